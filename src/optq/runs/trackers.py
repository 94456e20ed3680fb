# SPDX-License-Identifier: Apache-2.0
"""A run's figures in an experiment tracker: TensorBoard, trackio, W&B, and whatever else accelerate knows."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from optq.errors import ConfigError
from optq.evaluation import verdict_of
from optq.events import BlockQuantized, BlockRestored, Event, LinearQuantized, Quality, RunFinished

logger = logging.getLogger(__name__)

PROJECT = "optq"  # as trackers call what runs belong to
FOLDER = (
    "runs"  # of trackers that write files, where TENSORBOARD_LOGGING_DIR names no other; TensorBoard's own default
)


def trackers_of(asked: str | list[str] | None) -> list[str]:
    """The names of the trackers that `report_to` asks for.

    Raises:
        ConfigError: there is no such tracker, or it is not installed.
    """
    names = [name.strip() for name in (asked.split(",") if isinstance(asked, str) else asked or [])]
    here = {str(name) for name in get_available_trackers()}
    installed = [name for name in LOGGER_TYPE_TO_CLASS if name in here or name not in LoggerType.list()]
    found = dict.fromkeys(each for name in names for each in (installed if name == "all" else [name]))
    for name in found:
        if name not in (*LOGGER_TYPE_TO_CLASS, "none"):
            allowed = ", ".join([*LOGGER_TYPE_TO_CLASS, "all", "none"])
            raise ConfigError(f"report_to={asked!r} was asked for; {name!r} is no tracker: allowed are {allowed}.")
        if name not in (*installed, "none"):
            raise ConfigError(
                f"report_to={asked!r} was asked for, but {name} is not installed here; installed are "
                f"{', '.join(installed) or 'none'}. Install it (pip install {name}), or leave it out: the run's log "
                "has the same figures."
            )
    return [name for name in found if name != "none"]


@contextmanager
def tracking(names: list[str], settings: dict[str, Any]) -> Iterator[Callable[[Event], None]]:
    """Open trackers, and close them in the end; what is yielded takes every event of the run.

    Args:
        names: as `trackers_of` returns them.
        settings: of the run, of which a tracker keeps numbers and text.
    Raises:
        ConfigError: one cannot be opened.
    """
    figures = _Figures()
    kept = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
    try:
        for name in names:
            try:
                figures.trackers.append(_opened(name, kept))
            except Exception as error:  # a package that only its users have may raise anything
                raise ConfigError(
                    f"report_to: {name} could not be opened: {type(error).__name__}: {error}. Nothing was quantized. "
                    "Mend that, or leave it out: the run's log has the same figures."
                ) from error
        yield figures.follow
    finally:
        figures.give(lambda tracker: tracker.finish())


def _opened(name: str, settings: dict[str, Any]) -> GeneralTracker:
    PartialState()  # accelerate's log lines ask it which process this is
    kind = LOGGER_TYPE_TO_CLASS[name]
    where = os.environ.get("TENSORBOARD_LOGGING_DIR", FOLDER)
    folder = os.path.join(where, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}")
    tracker = kind(PROJECT, folder) if kind.requires_logging_directory else kind(PROJECT)
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


class _Figures:
    """What a tracker shows of a run: a step is a block."""

    def __init__(self) -> None:
        self.trackers: list[GeneralTracker] = []
        self._losses: list[float] = []  # of the block's linears so far
        self._step = 0

    def follow(self, event: Event) -> None:
        if isinstance(event, LinearQuantized):
            self._losses.append(event.relative_loss)
        elif isinstance(event, BlockRestored):
            self._step += 1
        elif isinstance(event, BlockQuantized):
            self._step += 1
            self._log(
                "block",
                loss_mean=event.relative_loss,
                loss_max=max(self._losses),
                seconds=event.seconds,
                peak_gib=event.peak_gib,
                bits_per_weight=event.bits_per_weight,
            )
            self._losses = []
        elif isinstance(event, Quality):
            self._log("quality", kl_divergence=event.divergence, perplexity_ratio=event.perplexity_ratio)
            verdict = verdict_of(event.perplexity_ratio, sound=event.finite and event.overflows is None)
            self._log("quality", verdict=verdict)  # by itself: some take numbers only
        elif isinstance(event, RunFinished):
            self._log("run", seconds=event.seconds, peak_gib=event.peak_gib, bits_per_weight=event.bits_per_weight)

    def _log(self, section: str, **values: float | str | None) -> None:
        found = {f"{section}/{name}": value for name, value in values.items() if value is not None}
        self.give(lambda tracker: tracker.log(found, step=self._step))

    def give(self, call: Callable[[GeneralTracker], None]) -> None:
        """Call every tracker; one that fails is not worth the run, so it is told nothing more."""
        for tracker in tuple(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # as above
                self.trackers.remove(tracker)
                logger.warning(
                    "report_to: %s failed, and is told nothing more of this run: %s: %s.",
                    tracker.name,
                    type(error).__name__,
                    error,
                )
