# SPDX-License-Identifier: Apache-2.0
"""One call at a time writes to a folder; whoever comes second is told who holds it."""

import json
import logging
import os
import platform
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from optq.errors import OutputError
from optq.reading import text_of

logger = logging.getLogger(__name__)

LOCK = ".optq-lock"
"""Locked by the system for as long as the process lives: what is left of one that was killed holds nobody up."""

OWNER = ".optq-owner.json"
"""Who holds the lock: another file, since on Windows a locked one cannot be read."""

TOKEN = re.compile(r"(?<=--token[= ])\S+|\bhf_\w+")
"""Of the Hub: never written to a file."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Create a folder if there is none, and hold it until the end of the context. Not reentrant.

    Raises:
        OutputError: another call holds it, which is named; or it cannot be made or written to, or has links or pipes.
    """
    for path in (folder / LOCK, folder / OWNER):
        refuse_irregular(path)
    lock, is_new = FileLock(folder / LOCK), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OutputError(
            f"output_dir={str(folder)!r} is being written by {holder_of(folder)}. Wait until it has ended, then "
            "repeat the call; or name another folder. Nothing was changed."
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        if (folder / OWNER).exists():
            logger.info("%s was left by %s, which has ended.", folder, holder_of(folder))
        try:
            (folder / OWNER).write_text(json.dumps(_this_process()), encoding="utf-8")
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield
    finally:
        try:
            for name in (OWNER, LOCK):
                with suppress(OSError):  # the next call removes it
                    (folder / name).unlink(missing_ok=True)
        finally:
            lock.release()
            if is_new:
                with suppress(OSError):  # there is something in it
                    folder.rmdir()


def refuse_irregular(path: Path, *, folder: bool = False) -> None:
    """Refuse a link, a pipe, a device, … in the place of a file, or folder, of optq's. There may be nothing.

    Raises:
        OutputError: there is something else. Nothing is changed.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be looked at: {error}. Once it can, repeat the call.") from error
    if stat.S_ISLNK(mode):
        raise OutputError(f"{path} is a link, through which nothing is written. Remove it, or name another folder.")
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(mode):
        raise OutputError(
            f"{path} is no {'folder' if folder else 'regular file'}, so it is not optq's. Remove it, or name another "
            "folder; nothing was changed."
        )


def holder_of(folder: Path) -> str:
    """The process that holds a folder, in words."""
    try:
        found = json.loads(text_of(folder / OWNER))
        return f"process {found['process']} on {found['host']} since {found['since']} ({found['command']})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # it has not said so yet, or not as a whole
        return "another process"


def _this_process() -> dict[str, object]:
    return {
        "process": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": TOKEN.sub("***", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""),
    }


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output_dir={str(folder)!r} cannot be made or written to: {error}. Name another folder; nothing was done."
    )
