# SPDX-License-Identifier: Apache-2.0
"""Writing a model's folder: every file is whole or not there, and so is the folder.

Files grow in the working folder `PARTIAL` inside of the output folder, those of one call in a scratch folder of its
own. Once all are written, that is renamed to `COMPLETE`: from then on nothing has to be done again, and whatever call
comes next moves the files to where they belong.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from optq.errors import OutputError

from .ownership import LOCK, OWNER, owned

logger = logging.getLogger(__name__)

PARTIAL = ".optq-partial"
"""The working folder: where files grow inside an output folder before they get their names."""

COMPLETE = "complete"
"""In there: the files of a finished result, once all of them are whole."""

SCRATCH = re.compile(r"work-[0-9a-f]{16}")
"""What the folders of single calls are called."""

OURS = (PARTIAL, LOCK, OWNER)


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A new folder inside `output`; at the end of the context its files are moved to `output`, or none is.

    Raises:
        OutputError: `output` is not empty, or another call writes to it, or something was put there meanwhile.
    """
    if not is_begun(output):  # what will be refused is not even touched
        refuse_strangers(output)
    with owned(output):
        partial = output / PARTIAL
        if (partial / COMPLETE).is_dir() and not partial.is_symlink() and not left_in(partial):
            reveal(output)
            tidy(partial)
        refuse_strangers(output)
        open_working_folder(output)
        if others := left_in(partial):
            raise OutputError(
                f"output_dir={str(output)!r} is not empty: it holds an unfinished run of optq.quantize, or what "
                f"else is in {partial}: {', '.join(others[:5])}. Name another folder; nothing was changed."
            )
        try:
            with scratch(partial) as folder:
                yield folder
                complete(folder)
            reveal(output)
        finally:
            tidy(partial)


def is_begun(output: Path) -> bool:
    """Whether a call works on a folder, or one that has ended has left something there."""
    return any(os.path.lexists(output / name) for name in OURS)


def refuse_strangers(output: Path, ours: Collection[str] = ()) -> None:
    """Refuse a folder that holds anything but what optq works with there.

    Args:
        ours: what else than `OURS` may be there.
    Raises:
        OutputError: it does, or is a file. Nothing is changed.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"output_dir={str(output)!r} is a file; name a folder that does not exist or is empty.")
    found = sorted(output.iterdir()) if output.exists() else []
    for path in found:
        if path.is_symlink() and path.name in (*OURS, *ours):
            raise OutputError(
                f"{path} is a link, through which nothing is written. Remove it, or name another folder."
            )
    if strangers := [path.name for path in found if path.name not in (*OURS, *ours)]:
        raise OutputError(
            f"output_dir={str(output)!r} is not empty: it holds {', '.join(strangers[:5])}"
            f"{' …' * (len(strangers) > 5)}. Name a folder that does not exist or is empty; nothing was changed."
        )


def open_working_folder(output: Path) -> Path:
    """The working folder of an output folder that is held, without what dead calls left in their scratch folders."""
    partial = output / PARTIAL
    try:
        partial.mkdir(exist_ok=True)
        for path in partial.iterdir():
            if SCRATCH.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                rmtree(path)
    except OSError as error:
        raise OutputError(f"{partial} cannot be made or written to: {error}. Name another folder.") from error
    return partial


def left_in(partial: Path) -> list[str]:
    """Names of what is in a working folder besides what `output_folder` puts there."""
    names = sorted(path.name for path in partial.iterdir()) if partial.exists() else []
    return [name for name in names if name != COMPLETE and not SCRATCH.fullmatch(name)]


@contextmanager
def scratch(partial: Path) -> Iterator[Path]:
    """A new folder for what a call is writing; with what is still in it, it is gone at the end of the context.

    Raises:
        OutputError: in place of an error of the system, such as a full disk.
    """
    folder = partial / f"work-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # ours, or transformers', which tells what is missing
            raise
        raise OutputError(
            f"{partial.parent} could not be written: {error}. Nothing half-written is left; once it can be, repeat "
            "the call."
        ) from error
    finally:
        rmtree(folder, ignore_errors=True)  # what it leaves, the next call removes


def complete(folder: Path) -> None:
    """All files of the result are in this scratch folder, with their final names: flush them to the disk, say so."""
    for path in folder.rglob("*"):
        if path.is_file():
            own_mode(path, folder)
            _flush(path)
    _flush_folder(folder)
    os.replace(folder, folder.with_name(COMPLETE))
    _flush_folder(folder.parent)


def own_mode(path: Path, folder: Path) -> None:
    """Give a file the mode that the umask says, as `folder` has it: safetensors makes files for the user alone."""
    path.chmod(folder.stat().st_mode & 0o666)


def reveal(output: Path, shards: Mapping[Path, str] | None = None) -> None:
    """Move the files of a complete result to `output`; an earlier call may have begun with that.

    Args:
        shards: files besides those in `COMPLETE`, or of these that get another name; and their final names.
    Raises:
        OutputError: something else was put there meanwhile. Nothing is overwritten.
    """
    inside = output / PARTIAL / COMPLETE
    names = {path: path.name for path in sorted(inside.iterdir())} if inside.exists() else {}
    names = {**(shards or {}), **{path: (shards or {}).get(path, name) for path, name in names.items()}}
    waiting = sorted((path for path in names if path.exists()), key=lambda path: path.name == "config.json")
    if taken := [names[path] for path in waiting if os.path.lexists(output / names[path])]:
        raise OutputError(
            f"{output} got {', '.join(taken[:5])} from elsewhere while it was written, and nothing is overwritten. "
            "Move that elsewhere; then the same call goes on, and all work is kept."
        )
    try:
        for path in waiting:  # config.json last: a folder without it is no model
            os.replace(path, output / names[path])
        _flush_folder(output)
    except OSError as error:
        raise OutputError(
            f"The files of {output} are complete, but cannot be moved there: {error}. Once they can, the same call "
            "goes on from there."
        ) from error


def tidy(partial: Path, known: Iterable[Path] = ()) -> None:
    """Remove a working folder that has served its purpose, but nothing in it that is not `known` to be optq's own."""
    with suppress(OSError):  # a whole result is no worse for it
        for path in known:
            path.unlink(missing_ok=True)
        if (partial / COMPLETE).exists():
            (partial / COMPLETE).rmdir()
    with suppress(OSError):
        partial.rmdir()
    if partial.exists() and not (partial / COMPLETE).exists() and (names := left_in(partial)):
        logger.warning("%s stays, because of what else is in there: %s.", partial, ", ".join(names[:5]))


def write_index(folder: Path, tensors: Mapping[str, Iterable[str]], total_size: int) -> None:
    """Write the index of a checkpoint in several files.

    Args:
        tensors: the names of each file's tensors, by the file's.
        total_size: size of all tensors, in bytes.
    """
    homes = {name: file for file, names in tensors.items() for name in names}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(homes.items()))}
    write_whole(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole and flush it to the disk, or not at all.

    Raises:
        OutputError: the disk is full, or the like.
    """
    with written_whole(path, path.parent / temporary(path.name)) as target:
        target.write_text(text, encoding="utf-8")


def temporary(name: str) -> str:
    """What a file is called while `write_whole` writes it."""
    return f"{name}.partial"


@contextmanager
def written_whole(path: Path, target: Path) -> Iterator[Path]:
    """A context in which `target` is written; at its end that becomes `path`, flushed to the disk.

    Raises:
        OutputError: the disk is full, or the like.
    """
    try:
        yield target
        own_mode(target, path.parent)
        _flush(target)
        os.replace(target, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path} could not be written: {error}. What was finished before is whole; once there is space, the same "
            "command goes on from there."
        ) from error
    finally:
        with suppress(OSError):
            target.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
