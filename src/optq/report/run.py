# SPDX-License-Identifier: Apache-2.0
"""What a run left in its folder: the events of its log, and what its config.json says of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from optq.device.memory import GIB
from optq.errors import ReportError, counted
from optq.evaluation import Verdict, verdict_of
from optq.events import (
    LOG_NAME,
    Allocated,
    BlockQuantized,
    BlockRestored,
    Dequantized,
    Event,
    LinearQuantized,
    Quality,
    Started,
    StarvedExperts,
    Unreached,
    read_events,
)
from optq.reading import text_of

E = TypeVar("E", bound=Event)
NAMED = 4  # of those that a note is about


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, which may have been interrupted and continued, as its folder shows it.

    Args:
        events: of the last session, and of earlier ones those of the blocks that it did not have to do again.
        seconds: time of all sessions together.
        info: `quantization_config` of the finished checkpoint; empty without one.
        size_gib: size of all weight files; None while there is no finished checkpoint.
    """

    folder: Path
    events: tuple[Event, ...] = field(repr=False)  # thousands
    seconds: float
    info: dict[str, Any] = field(repr=False)
    size_gib: float | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """The model's id on the Hub, or the name of its folder."""
        name = self.started.model
        return Path(name).name if Path(name).is_absolute() else name

    def events_of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def last(self, kind: type[E]) -> E | None:
        return next(reversed(self.events_of(kind)), None)

    @property
    def started(self) -> Started:
        (event,) = self.events_of(Started)
        return event

    @cached_property
    def linears(self) -> tuple[LinearQuantized, ...]:
        """The quantized linears, in the order in which they were solved."""
        return tuple(self.events_of(LinearQuantized))

    @cached_property
    def median_loss(self) -> dict[str, float]:
        """The relative loss of each kind of linear that lost anything: the median over blocks, experts averaged."""
        losses: dict[str, dict[str, list[float]]] = {}
        for linear in self.linears:
            if linear.relative_loss:
                losses.setdefault(linear.kind, {}).setdefault(linear.block, []).append(linear.relative_loss)
        return {kind: median(fmean(found) for found in of_block.values()) for kind, of_block in losses.items()}

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks with quantized linears, in order."""
        return list(dict.fromkeys(linear.block for linear in self.linears))

    @property
    def finished_blocks(self) -> set[str]:
        return {event.block for event in self.events if isinstance(event, (BlockQuantized, BlockRestored))}

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight of all linears solved so far, scales and zeros included."""
        return bits_per_weight(self.linears) if self.linears else None

    @property
    def standing(self) -> tuple[float, float] | None:
        """Bits per weight, and the divergence from the original in nats per token; None if it was not measured."""
        quality = self.last(Quality)
        if quality is None or quality.divergence is None or not self.bits_per_weight:
            return None
        return self.bits_per_weight, quality.divergence

    @property
    def verdict(self) -> Verdict | None:
        """How good the result is, on the rows that the run looked at; None if that is not known."""
        quality = self.last(Quality)
        if quality is None:
            return None
        return verdict_of(quality.perplexity_ratio, sound=quality.finite and quality.overflows is None)

    @property
    def peak_gib(self) -> float | None:
        found = [getattr(event, "peak_gib", None) for event in self.events]
        return max((peak for peak in found if peak is not None), default=None)


def bits_per_weight(linears: Iterable[LinearQuantized]) -> float:
    linears = list(linears)
    return sum(linear.stored_bits for linear in linears) / sum(linear.weights for linear in linears)


def percent(fraction: float) -> str:
    """Format a fraction as a percentage with two significant digits, or more before the point."""
    return f"{100 * fraction:#.2g} %" if fraction < 0.0995 else f"{100 * fraction:.0f} %"


def notes_on(run: Run) -> list[str]:
    """Sentences on what a run did otherwise than asked, or could do better."""
    notes = [f"Weak calibration data: {weakness}." for weakness in run.started.weaknesses]
    if base := run.last(Dequantized):
        notes.append(f"The original is stored in {base.quant_method}; it was dequantized as it was read.")
    if damped := [linear.linear for linear in run.linears if linear.is_damped]:
        notes.append(f"Damping was raised, because the Hessian was singular: {_named(damped)}.")
    if starved := list(dict.fromkeys(event.block for event in run.events_of(StarvedExperts))):
        notes.append(
            "Some experts saw fewer tokens than they have inputs; their layer's mean over all experts made up for the "
            f"rest: {_named(starved, 'blocks')}."
        )
    if unreached := [event.linear for event in run.events_of(Unreached)]:
        notes.append(f"In full precision, because the calibration data never reaches it: {_named(unreached)}.")
    reasons: dict[str, list[str]] = {}
    for name, reason in run.started.skipped.items():
        reasons.setdefault(reason, []).append(name)
    notes += [f"In full precision ({reason}): {_named(names)}." for reason, names in reasons.items()]
    if dead := [linear.linear for linear in run.linears if linear.dead_columns]:
        notes.append(f"Some inputs were always zero, and their weights rounded to nearest: {_named(dead)}.")
    if restored := run.events_of(BlockRestored):
        notes.append(
            f"The run was interrupted and went on; {counted(len(restored), 'block was', 'blocks were')} done by then."
        )
    return notes


def _named(names: list[str], plural: str = "linears") -> str:
    """How many there are, and some of them."""
    shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    return shown if len(names) == 1 else f"{len(names)} {plural} ({shown})"


def read_run(folder: Path) -> Run:
    """Read the log and config.json that `optq.quantize(..., output_dir=folder)` has written so far.

    Raises:
        ReportError: there is no log, or it cannot be read.
    """
    log, config = folder / LOG_NAME, folder / "config.json"
    if not log.is_file():
        raise ReportError(
            f"{str(folder)!r} holds no {LOG_NAME}, so there is nothing to report. Name the output_dir of a call of "
            "optq.quantize, or the folder into which log_file has written a file of this name."
        )
    events = read_events(log)
    sessions = _sessions(events)
    merged: list[Event] = []
    for session in sessions:
        restored = {event.block for event in session if isinstance(event, BlockRestored)}
        merged = [event for event in merged if getattr(event, "block", None) in restored] + session
    if not any(isinstance(event, Started) for event in merged):
        raise ReportError(f"{log}: the run ended before it started on the model's blocks; there is nothing to draw.")
    finished = config.is_file()
    try:
        stated = json.loads(text_of(config)) if finished else {}
        info = dict(stated.get("quantization_config") or {})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ReportError(f"{config} is not that of a checkpoint: {error}.") from error
    return Run(
        folder=folder,
        events=tuple(merged),
        seconds=sum(session[-1].at_seconds for session in sessions),
        info=info,
        size_gib=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB if finished else None,
    )


def _sessions(events: list[Event]) -> list[list[Event]]:
    """Every call that went on with the run appended to its log."""
    sessions: list[list[Event]] = []
    before: Event | None = None
    for event in events:
        # A budget is spent before anything is quantized.
        begins = isinstance(event, Allocated) or (isinstance(event, Started) and not isinstance(before, Allocated))
        if before is None or begins:
            sessions.append([])
        sessions[-1].append(event)
        before = event
    return sessions
