# SPDX-License-Identifier: Apache-2.0
"""The errors of optq: one class per cause, all derived from `OptqError`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_MESSAGE = 2000
"""Characters of a message: it may quote data, or what another library says, of any length."""


class OptqError(Exception):
    """Base class of all errors of optq; the message says what was asked, found and allowed, and what to do."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shortened(arg) if isinstance(arg, str) else arg for arg in args))


def shortened(message: str, longest: int = LONGEST_MESSAGE) -> str:
    """Cut a message to `longest` characters, keeping its start, what is wrong, and its end, what to do."""
    if len(message) <= longest:
        return message
    start, end = longest * 5 // 8, longest * 5 // 16
    return f"{message[:start]} … [{len(message) - start - end} characters] … {message[-end:]}"


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and what it counts, by default with an s if it is not 1: "1 sample", "2 samples"."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


@contextmanager
def found_in(place: object) -> Iterator[None]:
    """Begin the message of every error of optq that is raised inside with a place, such as a file or a tensor."""
    try:
        yield
    except OptqError as error:
        raise type(error)(f"{place}: {error}") from error


class ConfigError(OptqError, ValueError):
    """The requested configuration cannot be carried out on this model."""


class CalibrationError(OptqError, ValueError):
    """The calibration data is empty, does not fit the model, or drives it to values that are not finite."""


class ModelError(OptqError, ValueError):
    """The model cannot be quantized: no decoder blocks found, or weights that are not finite."""


class SolveError(OptqError, RuntimeError):
    """The Hessian of a layer could not be factorised, whatever the damping."""


class QualityError(OptqError, RuntimeError):
    """The finished model is too far from the original to be used.

    Attributes:
        model: the complete quantized model, raised by `from_pretrained`; None where a folder keeps the work.
    """

    model: Any = None


class CheckpointError(OptqError, ValueError):
    """A checkpoint's bytes, names or labels contradict one another or are not supported."""


class OutputError(OptqError, OSError):
    """The output folder cannot be used."""


class HubError(OptqError):
    """The Hub refuses what was asked of it, or cannot be reached."""


class RankError(OptqError, RuntimeError):
    """The processes of one run do not find each other, differ, or have lost one of them."""


class AdapterError(OptqError, ValueError):
    """An adapter of PEFT asks a packed layer for something that takes its dense weight."""


class ReportError(OptqError, ValueError):
    """A run's log is missing or cannot be read, or what draws its pictures is not installed."""


class KernelError(OptqError, RuntimeError):
    """No kernel can run a layer, or the kernel asked for by name cannot."""
