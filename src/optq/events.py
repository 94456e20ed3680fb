# SPDX-License-Identifier: Apache-2.0
"""The events of a run: a bar on the screen, JSON lines in a file, and a list in memory for whoever reports."""

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

LOG_NAME = "quantization_log.jsonl"
"""The file of a run's events in its output folder."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a block has to do, in multiplications: the two kinds of it take times of their own each."""

    solving: float
    running: float


class RunLog:
    """Collects the events of one run. A context manager.

    Args:
        file: JSON lines are appended here as they happen, or None.
        bar: show a progress bar (it disables itself where there is no terminal).
        run: what tells this run from others; it stands in the event "started".
    """

    def __init__(self, file: Path | None = None, *, bar: bool = True, run: dict[str, Any] | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._file = file
        self._show_bar = bar
        self._run = run
        self._bar: tqdm[Any] | None = None
        self._loads: dict[str, Load] = {}  # by block, in order
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
        if kind == "started" and self._run is not None:
            event["run"] = self._run
        self.events.append(event)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event) + "\n")

    def expect(self, loads: dict[str, Load]) -> None:
        """Start the bar over blocks, by name, in their order."""
        self._loads = loads
        self._bar = tqdm(
            total=len(loads),
            desc="Quantizing",
            unit="block",
            disable=None if self._show_bar else True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| block {n:.1f}/{total} [{elapsed}<{remaining}]{postfix}",
        )

    @property
    def _left(self) -> list[Load]:
        """Of the blocks to come. One without linears has no event of its own."""
        done = {event["block"] for event in self.events if event["event"] in ("block", "restored")}
        latest = max((number for number, name in enumerate(self._loads, 1) if name in done), default=0)
        return list(self._loads.values())[latest:]

    @property
    def blocks_left(self) -> int:
        return len(self._left)

    @property
    def seconds_left(self) -> float:
        """If either kind of work goes on at its median speed so far: the first block may be slower than others.

        Raises StatisticsError before the first.
        """
        solving, running = [], []
        for event in self.events:
            if event["event"] != "block":
                continue
            linears = (
                other for other in self.events if other["event"] == "linear" and other["block"] == event["block"]
            )
            solved = min(sum(linear["seconds"] for linear in linears), event["seconds"])  # processes may solve at once
            load = self._loads[event["block"]]
            solving.append(solved / load.solving)
            running.append((event["seconds"] - solved) / load.running)
        per_solving, per_running = statistics.median(solving), statistics.median(running)
        return math.fsum(per_solving * load.solving + per_running * load.running for load in self._left)

    def advance(self, blocks: float, **shown: str) -> None:
        """Move the bar by a fraction of a block and show what was just done."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(blocks)


def rounded(value: float | None) -> float | None:
    """For the log: three decimals; None where there is nothing to say."""
    return None if value is None or math.isnan(value) else round(value, 3)
