# SPDX-License-Identifier: Apache-2.0
"""Writing a model's folder: every file is whole or not there, and so is the folder."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from optq.errors import OutputError

PARTIAL = ".optq-partial"
"""Where files grow inside an output folder before they get their names."""


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A temporary folder inside `output`; at the end of the context its files are moved to `output`, or none is.

    Raises:
        OutputError: `output` is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(
            f"output_dir={str(output)!r} is not empty. Name one that does not exist or is empty; nothing was changed."
        )
    partial = output / PARTIAL
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        rmtree(partial)
        raise
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # without it, it is no model
        os.replace(file, output / file.name)
    partial.rmdir()


def write_index(folder: Path, tensors: Mapping[str, Iterable[str]], total_size: int) -> None:
    """Write the index of a checkpoint in several files.

    Args:
        tensors: the names of each file's tensors, by the file's.
        total_size: size of all tensors, in bytes.
    """
    homes = {name: file for file, names in tensors.items() for name in names}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(homes.items()))}
    write_whole(
        folder / SAFE_WEIGHTS_INDEX_NAME,
        lambda target: target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8"),
    )


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file as a whole and flush it to the disk, or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{path} could not be written: {error}. What was finished before is whole; once there is space, the same "
            "command goes on from there."
        ) from error
