# SPDX-License-Identifier: Apache-2.0
"""How the Triton product is cut into programs: the tilings that are there from the start, and those that were tuned.

What `tune` found is kept in a file for later processes: below OPTQ_CACHE, by default `optq` in the user's cache.
"""

import json
import logging
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optq.errors import OutputError

from .prepared import Prepared

logger = logging.getLogger(__name__)

LEAST = {"stages": 2, "scale_sums": 0, "programs_per_processor": 0, "registers": 0, "split_fully": 0}  # else 1
POWERS_OF_TWO = ("rows", "outputs", "warps", "parts")
MOST_ROWS = 1024  # of activations; with more, the weight is dequantized into memory and multiplied by torch


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the fused product is divided into programs, for up to `most_rows` rows of activations.

    Args:
        rows, outputs: tile of the result that one program computes.
        warps, stages: Triton's own: of 32 threads, and loads in flight.
        scale_sums: scale sums instead of weights where groups are at least this wide; 0: never.
        programs_per_processor: at most, by splitting the sum; so many find room in shared memory.
        registers: at most, for each thread on NVIDIA's GPUs. 0: as many as its assembler likes; that may be too few,
            and then it spills some.
        split_fully: always into so many, and not only where an estimate says that it pays.
        parts: blocks of columns that a program sums at once. As many as warps: each warp has one of its own, and their
            sums are added at the end. 1: all warps share one.
    """

    most_rows: int
    rows: int
    outputs: int
    warps: int
    stages: int
    scale_sums: int
    programs_per_processor: int
    registers: int = 0
    split_fully: bool = False
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The properties of a product that decide which tilings are fast on one GPU."""

    bits: int
    group_width: int
    columns: int
    outputs: int
    dtype: torch.dtype

    @property
    def words(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.bits} bits, groups of {self.group_width}, {self.columns} x {self.outputs}, {dtype}"

    @classmethod
    def of(cls, words: str) -> "Problem":
        """Parse what `words` returns.

        Raises:
            ValueError: it has another form.
        """
        found = re.fullmatch(r"(\d+) bits, groups of (\d+), (\d+) x (\d+), (float16|bfloat16)", words)
        if found is None:
            raise ValueError(f"{words!r} does not name a problem")
        bits, group_width, columns, outputs = map(int, found.groups()[:4])
        dtype = getattr(torch, found[5])
        return cls(bits=bits, group_width=group_width, columns=columns, outputs=outputs, dtype=dtype)


def problem_of(prepared: Prepared, dtype: torch.dtype) -> Problem:
    return Problem(
        bits=prepared.bits,
        group_width=prepared.group_width,
        columns=prepared.in_features,
        outputs=prepared.out_features,
        dtype=dtype,
    )


TILINGS = (
    # Not tuned on any GPU yet: chosen by the instructions of the loop (with few rows they must not take longer than
    # the weights' way from memory; docs/kernels.md), registers and shared memory (at most 96 KiB, what small GPUs
    # have), all as compiled ahead of time for sm_80, sm_90 and sm_120.
    Tiling(
        most_rows=8,
        rows=8,
        outputs=32,
        warps=8,
        stages=3,
        scale_sums=32,
        programs_per_processor=2,
        registers=255,
        parts=8,
    ),
    Tiling(
        most_rows=16,
        rows=16,
        outputs=32,
        warps=4,
        stages=4,
        scale_sums=32,
        programs_per_processor=3,
        registers=255,
        parts=4,
    ),
    Tiling(
        most_rows=32, rows=32, outputs=128, warps=4, stages=4, scale_sums=128, programs_per_processor=3, registers=255
    ),
    Tiling(
        most_rows=64, rows=64, outputs=128, warps=4, stages=3, scale_sums=0, programs_per_processor=2, registers=255
    ),
    Tiling(
        most_rows=MOST_ROWS,
        rows=128,
        outputs=128,
        warps=8,
        stages=2,
        scale_sums=0,
        programs_per_processor=2,
        registers=255,
    ),
)


# Others than TILINGS, by the major number of a GPU's compute capability.
BY_CAPABILITY = {
    # Where four warps multiply as one, with the weight from their registers, scaling sums takes fewer instructions
    # than scaling weights; and two programs of four warps need not wait for one another as eight warps do.
    9: (*TILINGS[:3], replace(TILINGS[3], scale_sums=128), replace(TILINGS[4], warps=4)),
    # The wider tile spills 10 registers there.
    12: (*TILINGS[:3], replace(TILINGS[3], outputs=64, stages=4), TILINGS[4]),
}


ON_ROCM = TILINGS[1:]
"""AMD's matrix instructions take 16 rows. With 8, Triton 3.9 multiplies one by one on gfx942, and spills."""


def untuned(device: torch.device) -> tuple[Tiling, ...]:
    """The tilings that are there from the start, for few rows first."""
    if device.type != "cuda":
        return TILINGS
    if torch.version.hip is not None:
        return ON_ROCM
    return BY_CAPABILITY.get(torch.cuda.get_device_capability(device)[0], TILINGS)


@cache
def tuned(device: torch.device) -> dict[Problem, tuple[Tiling, ...]]:
    """The remembered tilings of a device, read once; call `tuned.cache_clear()` after `remember`."""
    return remembered(device) if device.type == "cuda" else {}


def remembered(device: torch.device) -> dict[Problem, tuple[Tiling, ...]]:
    """The tilings that were found for this type of GPU and this version of Triton."""
    found: dict[Problem, tuple[Tiling, ...]] = {}
    for words, tilings in _read().get(kind_of(device), {}).items():
        try:
            found[Problem.of(words)] = _checked([Tiling(**tiling) for tiling in tilings])
        except (TypeError, ValueError) as error:
            logger.warning("%s: %r is not understood and left out (%s).", _file(), words, error)
    return found


def _checked(tilings: list[Tiling]) -> tuple[Tiling, ...]:
    """Return what was read from a file that anybody may have written to.

    Raises:
        ValueError: there is nothing, or a number is none of those that programs are made with.
    """
    if not tilings:
        raise ValueError("it has no tilings")
    for tiling in tilings:
        for name, value in asdict(tiling).items():
            least = LEAST.get(name, 1)
            if not isinstance(value, int) or value < least or (name in POWERS_OF_TWO and value & (value - 1)):
                power = "a power of two, " if name in POWERS_OF_TWO else ""
                raise ValueError(f"{name} is {value!r}, and must be {power}an integer of at least {least}")
    return tuple(tilings)


def make_folder() -> None:
    """Make the folder of the file that `remember` writes.

    Raises:
        OutputError: there can be none, or nothing can be written to it.
    """
    folder = _file().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"What tuning finds is kept in {_file()}, which cannot be written ({error}). "
            "Let OPTQ_CACHE name a folder that can."
        ) from error


def remember(device: torch.device, problem: Problem, tilings: tuple[Tiling, ...]) -> None:
    content = _read()
    content.setdefault(kind_of(device), {})[problem.words] = [asdict(tiling) for tiling in tilings]
    file = _file()
    make_folder()
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
        json.dump(content, temporary, indent=1)
    os.replace(temporary.name, file)  # all of it or nothing, whoever else writes


def _read() -> dict[str, dict[str, Any]]:
    """By kind of device, what `Problem.words` says of a problem, and its tilings as JSON has them."""
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(known, dict) for known in content.values()):
            raise ValueError("it is not an object of objects")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read, so no tuned tilings are used (%s). Delete it.", _file(), error)
        return {}
    return content


def _file() -> Path:
    folder = os.environ.get("OPTQ_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "optq", "tilings.json")


def kind_of(device: torch.device) -> str:
    """What tilings depend on beside the problem: the type of GPU, and the version of Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {version('triton')}"
