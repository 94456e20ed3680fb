# SPDX-License-Identifier: Apache-2.0
"""What a run left in its folder: the events of its log, and what its config.json says of it."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from optq.device.memory import GIB
from optq.errors import ReportError, counted
from optq.events import LOG_NAME

Event = dict[str, Any]
NAMED = 4  # of those that a note is about


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantized linear: the fields of its event.

    Args:
        family: of an expert's linear, what it and its counterparts are called, with * for the expert's number.
        shape: out_features, in_features.
        relative_loss, nearest_relative_loss: the energy of the outputs' error over that of the outputs; of the result,
            and of rounding to nearest.
        damping, damping_asked: fractions; more than was asked for if the Hessian was singular.
        tokens: calibration tokens that reached it.
    """

    block: str
    linear: str
    family: str | None
    shape: list[int]
    bits: int
    group_size: int
    stored_bits: int
    relative_loss: float
    nearest_relative_loss: float
    damping: float
    damping_asked: float
    dead_columns: int
    tokens: int
    seconds: float

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_damped(self) -> bool:
        """More than was asked for."""
        return self.damping > self.damping_asked

    @property
    def kind(self) -> str:
        """Its name within the block, the same for all experts."""
        return (self.family or self.linear).removeprefix(f"{self.block}.")

    @property
    def expert(self) -> int | None:
        if self.family is None:
            return None
        return int(self.linear[self.family.index("*") :].partition(".")[0])

    @property
    def experts(self) -> str | None:
        """The module that holds it and the other experts."""
        return None if self.family is None else self.family.partition(".*")[0]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, which may have been interrupted and continued.

    Args:
        events: of the last session, and of earlier ones those of the blocks that it did not have to do again.
        seconds: of all sessions.
        info: `quantization_config` of the finished checkpoint; empty without one.
        size_gib: of all weight files; None while there is no finished checkpoint.
    """

    folder: Path
    events: tuple[Event, ...]
    seconds: float
    info: dict[str, Any]
    size_gib: float | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """Its id on the Hub, or the name of its folder."""
        name = str(self.started["model"])
        return Path(name).name if Path(name).is_absolute() else name

    def events_of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    def last(self, kind: str) -> Event | None:
        return next(reversed(self.events_of(kind)), None)

    @property
    def started(self) -> Event:
        (event,) = self.events_of("started")
        return event

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """In the order in which they were solved."""
        names = [field.name for field in fields(Linear)]
        return tuple(Linear(**{name: event[name] for name in names}) for event in self.events_of("linear"))

    @property
    def blocks(self) -> list[str]:
        """Those with quantized linears, in order."""
        return list(dict.fromkeys(linear.block for linear in self.linears))

    @property
    def finished_blocks(self) -> set[str]:
        return {event["block"] for event in self.events if event["event"] in ("block", "restored")}

    @property
    def bits_per_weight(self) -> float | None:
        """Of all linears solved so far, scales and zeros included."""
        return bits_per_weight(self.linears) if self.linears else None

    @property
    def standing(self) -> tuple[float, float] | None:
        """Bits per weight, and the divergence from the original in nats per token; None if it was not measured."""
        divergence = (self.last("quality") or {}).get("divergence")
        return (self.bits_per_weight, divergence) if self.bits_per_weight and divergence else None

    @property
    def peak_gib(self) -> float | None:
        found = [event["peak_gib"] for event in self.events if event.get("peak_gib") is not None]
        return max(found, default=None)


def bits_per_weight(linears: Iterable[Linear]) -> float:
    linears = list(linears)
    return sum(linear.stored_bits for linear in linears) / sum(linear.weights for linear in linears)


def percent(fraction: float) -> str:
    """Two digits, or more if they stand before the point."""
    return f"{100 * fraction:#.2g} %" if fraction < 0.0995 else f"{100 * fraction:.0f} %"


def notes_on(run: Run) -> list[str]:
    """Whatever a run did otherwise than asked, or could do better."""
    notes = [f"Weak calibration data: {weakness}." for weakness in run.started["weaknesses"]]
    if base := run.last("dequantized"):
        notes.append(f"The original is stored in {base['quant_method']}; it was dequantized as it was read.")
    if damped := [linear.linear for linear in run.linears if linear.is_damped]:
        notes.append(f"Damping was raised, because the Hessian was singular: {_named(damped)}.")
    if starved := list(dict.fromkeys(event["block"] for event in run.events_of("starved_experts"))):
        notes.append(
            "Some experts saw fewer tokens than they have inputs; their layer's mean over all experts made up for the "
            f"rest: {_named(starved, 'blocks')}."
        )
    if unreached := [event["linear"] for event in run.events_of("unreached")]:
        notes.append(f"In full precision, because the calibration data never reaches it: {_named(unreached)}.")
    reasons: dict[str, list[str]] = {}
    for name, reason in run.started["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    notes += [f"In full precision ({reason}): {_named(names)}." for reason, names in reasons.items()]
    if dead := [linear.linear for linear in run.linears if linear.dead_columns]:
        notes.append(f"Some inputs were always zero, and their weights rounded to nearest: {_named(dead)}.")
    if restored := run.events_of("restored"):
        notes.append(
            f"The run was interrupted and went on; {counted(len(restored), 'block was', 'blocks were')} done by then."
        )
    return notes


def _named(names: list[str], plural: str = "linears") -> str:
    """How many there are, and some of them."""
    shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    return shown if len(names) == 1 else f"{len(names)} {plural} ({shown})"


def read_run(folder: Path) -> Run:
    """What `optq.quantize(..., output_dir=folder)` has written so far.

    Raises:
        ReportError: there is no log, or it cannot be read.
    """
    log, config = folder / LOG_NAME, folder / "config.json"
    if not log.is_file():
        raise ReportError(
            f"{str(folder)!r} holds no {LOG_NAME}, so there is nothing to report. Name the output_dir of a call of "
            "optq.quantize, or the folder into which log_file has written a file of this name."
        )
    events = _read_events(log)
    sessions = _sessions(events)
    merged: list[Event] = []
    for session in sessions:
        restored = {event["block"] for event in session if event["event"] == "restored"}
        merged = [event for event in merged if event.get("block") in restored] + session
    if not any(event["event"] == "started" for event in merged):
        raise ReportError(f"{log}: the run ended before it started on the model's blocks; there is nothing to draw.")
    finished = config.is_file()
    run = Run(
        folder=folder,
        events=tuple(merged),
        seconds=sum(session[-1]["at_seconds"] for session in sessions),
        info=json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {}) if finished else {},
        size_gib=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB if finished else None,
    )
    try:
        run.linears  # noqa: B018
    except KeyError as error:
        raise ReportError(
            f"{log}: an event of a linear has no {error}, so another version of optq wrote it. Quantize again, or "
            "report with that version."
        ) from error
    return run


def _read_events(log: Path) -> list[Event]:
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a crash cut it off
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.append({"event": event["event"], "at_seconds": event["at_seconds"], **event})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ReportError(f"{log}, line {number} is no event of a run ({error}): the file is damaged.") from error
    return events


def _sessions(events: list[Event]) -> list[list[Event]]:
    """Every call that went on with the run appended to its log."""
    sessions: list[list[Event]] = []
    before = None
    for event in events:
        kind = event["event"]
        # A budget is spent before anything is quantized.
        if before is None or kind == "allocated" or (kind == "started" and before != "allocated"):
            sessions.append([])
        sessions[-1].append(event)
        before = kind
    return sessions
