# SPDX-License-Identifier: Apache-2.0
"""How results are printed: a table for people, or JSON for programs."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Sequence[str]


def print_table(title: str, columns: Row, rows: Sequence[Row], *, markdown: bool = False) -> None:
    """Print a table on the standard output; all columns but the first are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=None if markdown else title, title_justify="left", box=box.MARKDOWN if markdown else box.SIMPLE
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if markdown or not console.is_terminal:  # a file or a pipe is as wide as the table: only a terminal wraps lines
        console.width = Console(width=10_000).measure(table).maximum
    console.print(table)


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
