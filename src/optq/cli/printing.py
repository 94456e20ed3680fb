# SPDX-License-Identifier: Apache-2.0
"""How results are printed: a table for people, or JSON for programs."""

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Sequence[str]


NARROW = 10  # characters of a column, or as many as its cells or the longest word of its name need


def print_table(title: str, columns: Row, rows: Sequence[Row], *, markdown: bool = False) -> None:
    """Print a table on the standard output; all columns but the first are aligned to the right.

    The columns' names are wrapped, and cells are not: where these are too wide for a terminal, each row is a list.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=None if markdown else title, title_justify="left", box=box.MARKDOWN if markdown else box.SIMPLE
    )
    for index, column in enumerate(columns):
        width = max([NARROW, *(cell_len(row[index]) for row in rows)])
        name = column if markdown else "\n".join(textwrap.wrap(column, width, break_long_words=False))
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    needed = Console(width=10_000).measure(table).maximum
    if not markdown and console.is_terminal and needed > console.width:
        _print_lists(title, columns, rows)
        return
    console.width = needed
    console.print(table)


def _print_lists(title: str, columns: Row, rows: Sequence[Row]) -> None:
    if title:
        print(title)
    for row in rows:
        print(row[0], *(f"  {column}: {cell}" for column, cell in list(zip(columns, row, strict=True))[1:]), sep="\n")


def print_either(arguments: argparse.Namespace, words: str, **facts: Any) -> None:
    """Print `words`, or `facts` as JSON where that is asked for."""
    if arguments.json:
        print_json(facts)
    else:
        print(words)


def print_json(facts: Any) -> None:
    print(json.dumps(as_json(facts), indent=2, ensure_ascii=False, allow_nan=False))


def as_json(facts: Any) -> Any:
    """Dataclasses as objects, NaN and infinity as null, since JSON has no such numbers."""
    if dataclasses.is_dataclass(facts) and not isinstance(facts, type):
        return {field.name: as_json(getattr(facts, field.name)) for field in dataclasses.fields(facts)}
    if isinstance(facts, Mapping):
        return {str(key): as_json(value) for key, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [as_json(value) for value in facts]
    if isinstance(facts, float) and not math.isfinite(facts):
        return None
    if facts is None or isinstance(facts, (str, int, float)):
        return facts
    return str(facts) if isinstance(facts, Path) else repr(facts)
