# SPDX-License-Identifier: Apache-2.0
"""Writing a model's folder: every file is whole or not there, and so is the folder.

Files grow in the working folder `PARTIAL` inside of the output folder, those of one call in a scratch folder of its
own. Once all are written, that is renamed to `COMPLETE`: from then on nothing has to be done again, and whatever call
comes next moves the files to where they belong. A file in there, `RESULT`, says which call made them, and has their
checksums: only what it names gets its final name, and only if it is what was written.
"""

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from optq.config.field import short
from optq.errors import OutputError
from optq.reading import open_regular, text_of

from .ownership import LOCK, OWNER, owned, refuse_irregular

logger = logging.getLogger(__name__)

PARTIAL = ".optq-partial"
"""The working folder: where files grow inside an output folder before they get their names."""

COMPLETE = "complete"
"""In there: the files of a finished result, once all of them are whole."""

RESULT = ".optq-result.json"
"""In there: which call made them, and their checksums."""

SCRATCH = re.compile(r"work-[0-9a-f]{16}")
"""What the folders of single calls are called."""

OURS = (PARTIAL, LOCK, OWNER)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The files of a result of which all are whole.

    Args:
        call: what made them.
        run: what tells that call from others; None of calls that do not go on with what is there.
        files: checksums of all bytes, by final name, which has slashes for a file in a folder.
        places: where the files are until they are moved, in the working folder, by final name.
    """

    call: str
    run: dict[str, Any] | None = None
    files: dict[str, str]
    places: dict[str, str]

    @property
    def moves(self) -> dict[str, str]:
        """What has to be moved: the final name of each file, or of the folder that it is in; config.json last."""
        found: dict[str, str] = {}
        for name, place in self.places.items():
            top = name.partition("/")[0]
            found[place if top == name else f"{COMPLETE}/{top}"] = top
        return dict(sorted(found.items(), key=lambda move: move[1] == "config.json"))

    def others_than(self, asked: Mapping[str, str]) -> list[str]:
        """Names of files that do not have the checksums `asked`, or are not there."""
        return [name for name, digest in asked.items() if self.files.get(name) != digest]

    def damaged(self, output: Path) -> list[Path]:
        """The files that are not what was written, in the working folder or where they have been moved to.

        Raises:
            OutputError: one of them is a link or a pipe.
        """
        found = {name: output / PARTIAL / place for name, place in self.places.items()}
        for name, path in found.items():
            if not os.path.lexists(path) and os.path.lexists(output / name):
                found[name] = output / name
        for path in found.values():
            refuse_irregular(path)
        return [path for name, path in found.items() if not is_whole(path, self.files[name])]


def write_result(
    folder: Path,
    call: str,
    run: dict[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    others: Mapping[str, tuple[str, str]] | None = None,
) -> Result:
    """Write `RESULT` to a scratch folder that holds all other files of a result, with these exceptions.

    Args:
        call, run: see `Result`.
        names: final names of files in there that have others now.
        others: what belongs to it in the working folder: final names and checksums, by the name there.
    """
    inside = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    final = {name: (names or {}).get(name, name) for name in inside}
    files = {final[name]: digest_of_file(path) for name, path in inside.items()}
    places = {final[name]: f"{COMPLETE}/{name}" for name in inside}
    for place, (name, digest) in (others or {}).items():
        files[name], places[name] = digest, place
    result = Result(call=call, run=run, files=files, places=places)
    write_checked(folder / RESULT, asdict(result))
    return result


@contextmanager
def output_folder(output: Path, call: str) -> Iterator[Path]:
    """A new folder inside `output`; at the end of the context its files are moved to `output`, or none is.

    Args:
        call: what is going to write there.
    Raises:
        OutputError: `output` is not empty, or another call writes to it, or something was put there meanwhile.
    """
    output = place_for(output)
    if not is_begun(output):  # what will be refused is not even touched
        refuse_strangers(output)
    with owned(output):
        partial = output / PARTIAL
        if (earlier := settled(output)) is not None:
            reveal(output, earlier)
            tidy(partial)
        refuse_strangers(output)
        refuse_unfinished(output)
        open_working_folder(output)
        try:
            with scratch(partial) as folder:
                yield folder
                result = write_result(folder, call)
                complete(folder)
            reveal(output, result)
        finally:
            tidy(partial)


def refuse_unfinished(output: Path) -> None:
    """Refuse an output folder with a working folder that holds something, of which nothing can be gone on with.

    Raises:
        OutputError: names what is in there.
    """
    partial = output / PARTIAL
    if left := left_in(partial):
        raise OutputError(
            f"output_dir={str(output)!r} is not empty: it holds an unfinished run of optq.quantize of a model given "
            f"by its id or folder, or what else is in {partial}: {', '.join(left[:5])}. Repeat that call, or name "
            "another folder; nothing was changed."
        )


def place_for(output_dir: str | os.PathLike[str]) -> Path:
    """The absolute path of an output folder, wherever the process goes while it is written.

    Raises:
        OutputError: no folder can have that name, or no file in it the names that it would get.
    """
    if not os.fspath(output_dir):
        raise OutputError(f"output_dir={output_dir!r} names no folder. Name one that does not exist or is empty.")
    output = Path(output_dir).absolute()
    inside = output / PARTIAL / f"work-{'0' * 16}" / "model-00000-of-00000.safetensors"
    for path in (inside, *(Path(output.anchor, part) for part in output.parts[1:])):  # of which none may be there yet
        try:
            str(path).encode()  # safetensors takes no other names
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):  # there is nothing yet; or a file, which others refuse
            pass
        except (OSError, ValueError) as error:
            raise OutputError(
                f"output_dir={short(str(output_dir))} cannot be made or written to: "
                f"{getattr(error, 'strerror', None) or error}. Name another folder; nothing was done."
            ) from error
    return output


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
        if path.name in (*OURS, *ours):
            refuse_irregular(path, folder=path.name == PARTIAL)
    if strangers := [path.name for path in found if path.name not in (*OURS, *ours)]:
        raise OutputError(
            f"output_dir={str(output)!r} is not empty: it holds {', '.join(strangers[:5])}"
            f"{' …' * (len(strangers) > 5)}. Name a folder that does not exist or is empty; nothing was changed."
        )


def open_working_folder(output: Path) -> Path:
    """The working folder of an output folder that is held, without what dead calls left in their scratch folders."""
    partial = output / PARTIAL
    if has_result(partial):
        raise OutputError(
            f"{partial / COMPLETE} is there, but nothing tells which call has made it. Move it elsewhere, or name "
            "another folder; nothing was changed."
        )
    try:
        partial.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            (partial / COMPLETE).rmdir()  # empty
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
    """All files of the result, and `RESULT`, are in this scratch folder: flush them to the disk, say so."""
    for path in folder.rglob("*"):
        if path.is_file():
            own_mode(path, folder)
            flush(path)
    _flush_folder(folder)
    os.replace(folder, folder.with_name(COMPLETE))
    _flush_folder(folder.parent)


def has_result(partial: Path) -> bool:
    """Whether there is a complete result, of which some files may have been moved."""
    inside = partial / COMPLETE
    return os.path.lexists(inside) and (inside.is_symlink() or not inside.is_dir() or any(inside.iterdir()))


def read_result(partial: Path) -> Result | None:
    """The complete result in a working folder; None if what tells of it is missing or damaged, which is said.

    Raises:
        OutputError: that cannot be read, or is a link or a pipe.
    """
    refuse_irregular(partial, folder=True)
    refuse_irregular(partial / COMPLETE, folder=True)
    stated = read_checked(partial / COMPLETE / RESULT)
    if stated is None:
        return None
    result = Result(**stated)
    for place in (*result.files, *result.places.values()):
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise OutputError(f"{partial / COMPLETE / RESULT} names {place!r}, which is no file of optq's there.")
    return result


def settled(
    output: Path, ours: Collection[str] = (), *, is_own: bool = False, asked: Mapping[str, str] | None = None
) -> Result | None:
    """The complete result of an output folder, if all its files are what was written; a damaged one is removed.

    Args:
        ours: see `refuse_strangers`.
        asked: checksums that files of the result have to have now, by name: one with others is removed as well.
        is_own: the working folder is known to be of the same call; else one with more in it is left alone.
    Raises:
        OutputError: it is damaged, and some files have been moved already, or there are others among them.
    """
    partial = output / PARTIAL
    if not has_result(partial) or (left_in(partial) and not is_own):
        return None
    result = read_result(partial)
    if result is None:
        if not is_own and not (partial / COMPLETE / RESULT).exists():
            return None
        refuse_strangers(output, ours)  # some files may have been moved: these cannot be made again
        damaged = [partial / COMPLETE / RESULT]
    elif not (damaged := [*result.damaged(output), *(Path(name) for name in result.others_than(asked or {}))]):
        return result
    elif moved := [name for name in result.moves.values() if os.path.lexists(output / name)]:
        raise OutputError(
            f"{damaged[0]} is not what it has to be, and some files of {output} have their names already, "
            f"{moved[0]} for one, so it cannot be made again there. Delete {output}, or name another folder."
        )
    else:
        known = {RESULT, *(place.partition("/")[2].partition("/")[0] for place in result.places.values())}
        if others := sorted(path.name for path in (partial / COMPLETE).iterdir() if path.name not in known):
            raise OutputError(
                f"{damaged[0]} is not what it has to be. It can be made again once what else is beside it is moved "
                f"elsewhere: {', '.join(others[:5])}. Nothing was changed."
            )
    logger.warning("%s is damaged, or not what is asked for now. It is made again.", damaged[0])
    with scratch(partial) as folder:
        os.replace(partial / COMPLETE, folder / COMPLETE)
    return None


def own_mode(path: Path, folder: Path) -> None:
    """Give a file the mode that the umask says, as `folder` has it: safetensors makes files for the user alone."""
    path.chmod(folder.stat().st_mode & 0o666)


def reveal(output: Path, result: Result) -> None:
    """Move the files of a complete result to `output`; an earlier call may have begun with that.

    Raises:
        OutputError: something else was put there meanwhile. Nothing is overwritten.
    """
    moves = {output / PARTIAL / place: output / name for place, name in result.moves.items()}
    waiting = {path: target for path, target in moves.items() if path.exists()}
    if taken := [target.name for target in waiting.values() if os.path.lexists(target)]:
        raise OutputError(
            f"{output} got {', '.join(taken[:5])} from elsewhere while it was written, and nothing is overwritten. "
            "Move that elsewhere; then the same call goes on, and all work is kept."
        )
    try:
        for path, target in waiting.items():  # config.json last: a folder without it is no model
            os.replace(path, target)
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
            if path.is_file() and not path.is_symlink():  # else it is not what optq has put there
                path.unlink()
        inside = partial / COMPLETE
        if inside.exists():
            if [path.name for path in inside.iterdir()] == [RESULT]:
                (inside / RESULT).unlink()
            inside.rmdir()
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
        flush(target)
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


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file has these bytes."""
    try:
        return digest_of_file(path) == digest
    except OSError:  # of the disk: what cannot be read is done again
        return False


def digest_of_file(file: Path) -> str:
    """A digest of all bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(file) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def digest_of_json(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Write an object of JSON with a checksum of itself, as a whole.

    Raises:
        OutputError: the disk is full, or the like.
    """
    write_whole(path, json.dumps({**content, "checksum": digest_of_json(content)}))


def read_checked(path: Path) -> dict[str, Any] | None:
    """What `write_checked` has written; None if there is nothing, or if it is damaged, which is said.

    Raises:
        OutputError: it cannot be read, or is a link or a pipe.
    """
    refuse_irregular(path)
    try:
        found = json.loads(text_of(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error}. Once it can, the same call goes on from there.") from error
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and found.pop("checksum", None) == digest_of_json(found):
        return found
    logger.warning("%s is damaged, and goes unused.", path)
    return None


def flush(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
