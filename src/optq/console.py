# SPDX-License-Identifier: Apache-2.0
"""Where log lines go: around the progress bars, and somewhere at all where nobody has said where.

A run takes hours, and a library's log lines are lost unless somebody configures logging; few who try it do.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class AroundBars(logging.Handler):
    """Writes log lines to the standard error, above the progress bars; warnings and errors say that they are some."""

    def emit(self, record: logging.LogRecord) -> None:
        from huggingface_hub.utils import tqdm  # whose instances are to be gone around

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with suppress(OSError):  # of a full disk, or a terminal that is gone: the work goes on
            tqdm.write(prefix + self.format(record), file=sys.stderr)


@contextmanager
def shown(level: int) -> Iterator[None]:
    """While this is open, show what optq logs from `level` on, if nobody has configured its logging or Python's."""
    logger = logging.getLogger("optq")
    if logger.hasHandlers() or logger.level != logging.NOTSET:
        yield
        return
    handler = AroundBars()
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
