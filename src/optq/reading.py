# SPDX-License-Identifier: Apache-2.0
"""Reading of files that somebody else may have put there: none waits, and none is read without end."""

import errno
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a file, or a link to one, to be read as bytes.

    Raises:
        OSError: it is a pipe, on which opening waits for somebody who writes; a device, which may never end; a folder;
            or it cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "It is no regular file", str(path))
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """All bytes of a file; see `open_regular`."""
    with open_regular(path) as stream:
        return stream.read()


def text_of(path: Path) -> str:
    """The text of a file in UTF-8; see `open_regular`."""
    return read_regular(path).decode("utf-8")
