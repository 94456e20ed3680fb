# SPDX-License-Identifier: Apache-2.0
"""Where a converted or exported model goes: a folder that is whole, or is not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from optq.errors import OutputError


@contextmanager
def filled(output: Path) -> Iterator[Path]:
    """A folder inside `output` to write to, whose files get their places when all are written, or none does."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(
            f"output_dir={str(output)!r} is not empty. Name one that does not exist or is empty; nothing was changed."
        )
    partial = output / ".optq-partial"
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        rmtree(partial)
        raise
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # without it, it is no model
        os.replace(file, output / file.name)
    partial.rmdir()
