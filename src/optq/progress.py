# SPDX-License-Identifier: Apache-2.0
"""The events of a run: a bar on the screen, JSON lines in a file, and a list in memory for whoever reports."""

import json
import math
import statistics
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

LOG_NAME = "quantization_log.jsonl"
"""The file of a run's events in its output folder."""


class RunLog:
    """Collects the events of one run. A context manager.

    Args:
        file: JSON lines are appended here as they happen, or None.
        bar: show a progress bar (it disables itself where there is no terminal).
    """

    def __init__(self, file: Path | None = None, *, bar: bool = True) -> None:
        self.events: list[dict[str, Any]] = []
        self._file = file
        self._show_bar = bar
        self._bar: tqdm[Any] | None = None
        self._expected = 0  # blocks
        self._started = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.emit("failed", error=f"{type(error).__name__}: {error}")
        if self._bar is not None:
            self._bar.close()

    def emit(self, kind: str, **facts: Any) -> None:
        """Record one event; `facts` must be JSON-serialisable."""
        event = {"event": kind, "at_seconds": round(time.monotonic() - self._started, 3), **facts}
        self.events.append(event)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event) + "\n")

    def expect(self, blocks: int) -> None:
        """Start the bar over so many blocks."""
        self._expected = blocks
        self._bar = tqdm(
            total=blocks,
            desc="Quantizing",
            unit="block",
            disable=None if self._show_bar else True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| block {n:.1f}/{total} [{elapsed}<{remaining}]{postfix}",
        )

    @property
    def blocks_left(self) -> int:
        return self._expected - sum(event["event"] in ("block", "restored") for event in self.events)

    @property
    def seconds_left(self) -> float:
        """If every block to come takes the median of those that were done: the first may be slower than the others.

        Raises StatisticsError before the first.
        """
        seconds: list[float] = [event["seconds"] for event in self.events if event["event"] == "block"]
        return self.blocks_left * statistics.median(seconds)

    def advance(self, blocks: float, **shown: str) -> None:
        """Move the bar by a fraction of a block and show what was just done."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(blocks)


def rounded(value: float | None) -> float | None:
    """For the log: three decimals; None where there is nothing to say."""
    return None if value is None or math.isnan(value) else round(value, 3)
