# SPDX-License-Identifier: Apache-2.0
"""What happens in a run, an event each: what is logged, reported, shown on the card and counted by the progress bar.

A log is a file of JSON lines, an event each: its class's `event`, and the fields of the class.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, ClassVar, get_args, get_origin

from huggingface_hub.utils import tqdm

from .errors import OutputError, ReportError
from .reading import read_regular

LOG_NAME = "quantization_log.jsonl"
"""The file of a run's events in its output folder."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a run.

    Args:
        at_seconds: since the log was opened.
    """

    event: ClassVar[str]
    at_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Allocated(Event):
    """A budget of bits has been spent.

    Args:
        expected_loss: divergence of the predictions, in nats per token.
        units: of linears that have one scheme: their names, the scheme, and the losses of all schemes.
    """

    event = "allocated"
    bits_per_weight: float
    expected_loss: float
    units: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The work on the blocks begins.

    Args:
        utc: the time.
        model: its id or folder, or its class.
        from_folder: whether that is a folder.
        blocks, linears: how many.
        skipped: linears that stay as they are, and why.
        calibration: see `optq.calibration.Calibration.info`.
        weaknesses: of the calibration data.
        run: what tells this run from others; None where nothing is written.
    """

    event = "started"
    utc: str
    model: str
    from_folder: bool
    blocks: int
    linears: int
    skipped: dict[str, str]
    calibration: dict[str, Any]
    weaknesses: list[str]
    device: str
    run: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LinearQuantized(Event):
    """A linear has its codes.

    Args:
        family: of an expert's linear, what it and its counterparts are called, with * for the expert's number.
        shape: out_features, in_features.
        stored_bits: of codes, scales and zeros.
        relative_loss, rtn_relative_loss: the energy of the outputs' error over that of the outputs; of the result, and
            of rounding to nearest. The error is counted from the outputs that make up for earlier layers' errors, so
            where these are larger than what the linear adds, it exceeds 1 without harm.
        damping, damping_asked: fractions; more than was asked for if the Hessian was singular.
        dead_columns: inputs that were always zero.
        tokens: calibration tokens that reached it.
        seconds: of the solver.
        peak_gib: of memory so far.
    """

    event = "linear"
    block: str
    linear: str
    family: str | None
    shape: list[int]
    bits: int
    group_size: int
    stored_bits: int
    relative_loss: float
    rtn_relative_loss: float
    damping: float
    damping_asked: float
    dead_columns: int
    tokens: int
    seconds: float
    peak_gib: float | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_damped(self) -> bool:
        """Whether more damping was used than was asked for."""
        return self.damping > self.damping_asked

    @property
    def kind(self) -> str:
        """The linear's name within the block, with * for the expert's number."""
        return (self.family or self.linear).removeprefix(f"{self.block}.")

    @property
    def expert(self) -> int | None:
        if self.family is None:
            return None
        return int(self.linear[self.family.index("*") :].partition(".")[0])

    @property
    def experts(self) -> str | None:
        """Name of the module that holds the linear's expert and the others."""
        return None if self.family is None else self.family.partition(".*")[0]


@dataclass(frozen=True, kw_only=True)
class Unreached(Event):
    """A linear stays in full precision, as the calibration data never reaches it."""

    event = "unreached"
    block: str
    linear: str


@dataclass(frozen=True, kw_only=True)
class StarvedExperts(Event):
    """Some experts saw fewer tokens than they have inputs.

    Args:
        family: names of the linears, with * for the expert's number.
        tokens: by expert.
    """

    event = "starved_experts"
    block: str
    family: list[str]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(Event):
    """Memory ran out, and `remedy` made some."""

    event = "out_of_memory"
    block: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class BlockReconstructed(Event):
    """A block's scales and codes have been tuned by gradient.

    Args:
        held_out_loss_before, held_out_loss: relative errors of the block's output on held-out batches.
        passes: over the calibration data.
    """

    event = "block_reconstructed"
    block: str
    held_out_loss_before: float
    held_out_loss: float
    passes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BlockQuantized(Event):
    """A block is done.

    Args:
        relative_loss: mean of its linears'.
        observing_seconds: of running the data and summing Hessians, part of `seconds`.
        peak_gib: of memory so far.
    """

    event = "block"
    block: str
    relative_loss: float
    bits_per_weight: float
    seconds: float
    observing_seconds: float
    peak_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class BlockRestored(Event):
    """A block was done by an earlier session of the run."""

    event = "restored"
    block: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Quality(Event):
    """The finished model beside the original; see `optq.evaluation.Comparison`.

    Args:
        held_out: whether the rows were not calibrated on.
    """

    event = "quality"
    held_out: bool
    tokens: int
    finite: bool
    divergence: float | None
    agreement: float | None
    original_perplexity: float | None
    perplexity: float | None
    perplexity_ratio: float | None
    overflows: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """All blocks are done.

    Args:
        bits_per_weight: of all linears that are packed now, those of earlier sessions as well.
    """

    event = "finished"
    seconds: float
    peak_gib: float | None = None
    bits_per_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Dequantized(Event):
    """The original was stored quantized, and was dequantized as it was read."""

    event = "dequantized"
    quant_method: str


@dataclass(frozen=True, kw_only=True)
class Gate(Event):
    """Whether the model is good enough."""

    event = "gate"
    green: bool
    max_perplexity_ratio: float


@dataclass(frozen=True, kw_only=True)
class FilesWritten(Event):
    """All files of the checkpoint are written; this log and the model card are none of them.

    Args:
        files: checksums of all bytes, by name.
    """

    event = "written"
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run ended with an error."""

    event = "failed"
    error: str


EVENTS: dict[str, type[Event]] = {kind.event: kind for kind in Event.__subclasses__()}

OLD_EVENTS = {"polished": "block_reconstructed"}
OLD_FIELDS = {"nearest_relative_loss": "rtn_relative_loss"}
"""What earlier versions wrote, and what it is called now."""


OF_CALIBRATION: dict[str, Any] = {
    **{"source": str, "sha256": str, "samples": int, "tokens": int, "seed": int},
    "sources": list[dict[str, Any]] | None,
}
"""What reports and cards want to know of the calibration."""


def to_dict(event: Event) -> dict[str, Any]:
    """The event as a line of a log, before it is written as JSON."""
    stated = {key: value for key, value in asdict(event).items() if key != "run" or value is not None}
    return {"event": event.event, **stated}


def read_events(log: Path) -> list[Event]:
    """The events of a log, without those that this version does not know, and a last line that a crash cut off.

    Raises:
        ReportError: a line is no event, or one of another version; file and line are named. Or it cannot be read.
    """
    try:
        lines = read_regular(log).splitlines(keepends=True)
    except OSError as error:
        raise ReportError(f"{log} cannot be read: {error}.") from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            stated = json.loads(line)
            kind = EVENTS.get(OLD_EVENTS.get(stated["event"], stated["event"]))
            stated = {OLD_FIELDS.get(key, key): value for key, value in stated.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ReportError(f"{log}, line {number} is no event of a run ({error}): the file is damaged.") from error
        if kind is None:
            continue
        known = {field.name: field.default is MISSING for field in fields(kind)}
        if missing := [name for name, required in known.items() if required and name not in stated]:
            raise ReportError(
                f"{log}, line {number}: an event {kind.event!r} has no {', '.join(map(repr, missing))}, so another "
                "version of optq wrote it. Quantize again, or report with that version."
            )
        types = {field.name: field.type for field in fields(kind)}
        wrong = [name for name, type_ in types.items() if name in stated and not _fits(stated[name], type_)]
        if kind is Started and not wrong:
            told = stated["calibration"]
            wrong = [f"calibration: {key}" for key, type_ in OF_CALIBRATION.items() if not _fits(told.get(key), type_)]
        if wrong:
            raise ReportError(f"{log}, line {number} is no event of a run ({wrong[0]}): the file is damaged.")
        events.append(kind(**{key: value for key, value in stated.items() if key in known}))
    return events


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is what a field of an event holds."""
    inside = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in inside)
    if issubclass(get_origin(kind) or kind, (list, dict)):
        of_values = value.values() if isinstance(value, dict) else value
        return isinstance(value, get_origin(kind) or kind) and all(_fits(each, inside[-1]) for each in of_values)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _append(file: Path, line: str) -> None:
    """Add a line to a log; half a line, which is what a crash or a full disk has left of one, goes."""
    try:
        with file.open("ab+") as stream:
            end = whole = stream.seek(0, os.SEEK_END)
            while whole:
                start = max(whole - 4096, 0)
                stream.seek(start)
                newline = stream.read(whole - start).rfind(b"\n")
                whole = start + newline + 1
                if newline >= 0:
                    break
            if whole < end:
                stream.truncate(whole)
            stream.write(line.encode() + b"\n")
    except OSError as error:
        raise OutputError(
            f"{file} could not be written: {error}. Finished blocks are whole; once there is space, the same call "
            "goes on from there."
        ) from error


@dataclass(frozen=True, kw_only=True)
class Load:
    """Work of a block, in multiplications; the two kinds of it take different times each."""

    solving: float
    running: float


class RunLog:
    """Collects the events of one run. A context manager.

    Args:
        file: JSON lines are appended here as they happen, or None.
        bar: show a progress bar (it disables itself where there is no terminal).
        run: what tells this run from others; it stands in the event "started".
        follow: is called with every event of the run.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        bar: bool = True,
        run: dict[str, Any] | None = None,
        follow: Callable[[Event], None] | None = None,
    ) -> None:
        self.events: list[Event] = []
        self._file = file
        self._follow = follow
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
        try:
            if error is not None:
                with suppress(OutputError):  # the error itself says more
                    self.emit(Failed(error=f"{type(error).__name__}: {error}"))
        finally:
            self._follow = None  # the model keeps its log, and may be copied with it
            if self._bar is not None:
                self._bar.close()

    def emit(self, event: Event) -> None:
        """Record an event, with the time."""
        event = replace(event, at_seconds=round(time.monotonic() - self._started, 3))
        if isinstance(event, Started) and self._run is not None:
            event = replace(event, run=self._run)
        self.events.append(event)
        if self._file is not None:
            _append(self._file, json.dumps(to_dict(event)))
        if self._follow is not None:
            self._follow(event)

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
        """The work of the blocks that are still to come. A block without linears has no event of its own."""
        done = {event.block for event in self.events if isinstance(event, (BlockQuantized, BlockRestored))}
        latest = max((number for number, name in enumerate(self._loads, 1) if name in done), default=0)
        return list(self._loads.values())[latest:]

    @property
    def blocks_left(self) -> int:
        return len(self._left)

    @property
    def seconds_left(self) -> float:
        """The seconds left, by the median speed of each kind of work: the first block may be slower.

        Raises:
            StatisticsError: no block is done yet.
        """
        solving, running = [], []
        linears = [event for event in self.events if isinstance(event, LinearQuantized)]
        for event in self.events:
            if not isinstance(event, BlockQuantized):
                continue
            seconds = sum(linear.seconds for linear in linears if linear.block == event.block)
            solved = min(seconds, event.seconds)  # processes may solve at once
            load = self._loads[event.block]
            solving.append(solved / load.solving)
            running.append((event.seconds - solved) / load.running)
        per_solving, per_running = statistics.median(solving), statistics.median(running)
        return math.fsum(per_solving * load.solving + per_running * load.running for load in self._left)

    def advance(self, blocks: float, **shown: str) -> None:
        """Move the bar by a fraction of a block and show what was just done."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(blocks)


def rounded(value: float | None) -> float | None:
    """Round a number of the log to three decimals; None stays None."""
    return None if value is None or math.isnan(value) else round(value, 3)
