# SPDX-License-Identifier: Apache-2.0
"""How one layer is quantized (`LayerScheme`) and what comes out (`QuantizedWeight`): the types every package speaks.

They stand at the bottom of the import order, so that solver, packing and kernels can exchange them without knowing
one another.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import ConfigError

BITS = (2, 3, 4, 8)
SERVED_GROUP_SIZES = (128, 64, 32)  # what vLLM reads, besides -1
PACKED_WORD_BITS = 32

ActOrder = Literal["none", "static", "group_aware", "desc_act"]
"""In which order columns are solved, and what that does to the groups.

none         left to right.
static       by decreasing activation energy; groups keep their layout, so g_idx stays trivial. The default.
group_aware  whole groups by decreasing mean energy, and so inside each group; g_idx stays trivial. Known as GAR.
desc_act     as static, but groups are made of columns that are neighbours in that order: a non-trivial g_idx on disk.
"""


def divisors_of(in_features: int) -> list[int]:
    """The group sizes from 16 up that divide `in_features`, largest first: what an error message can offer."""
    return [size for size in range(in_features, 15, -1) if in_features % size == 0]


GridFit = Literal["minmax", "weighted"]
"""How a group's grid is fitted.

minmax    from the smallest to the largest weight.
weighted  clipped to the span with the least squared error, each column weighted by its activation energy. The default.
"""


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """The settings by which one linear layer is quantized.

    Args:
        bits: bits per weight: 2, 3, 4 or 8.
        group_size: columns that share a scale and a zero; -1 for one group per row.
        symmetric: zeros fixed at the middle of the grid.
        act_order: see `ActOrder`.
        grid: see `GridFit`.
        damping: fraction of the Hessian's mean diagonal that is added to it before it is inverted.
        propagation: fraction of the output error caused by earlier layers' errors that is compensated, 0 … 1.
        refinement: rounds of re-fitting scales and codes after the solve.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: ActOrder = "static"
    grid: GridFit = "weighted"
    damping: float = 0.1
    propagation: float = 0.5
    refinement: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS or not isinstance(self.bits, int):
            raise ConfigError(f"bits={self.bits!r} was asked for; allowed are {', '.join(map(str, BITS))}.")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise ConfigError(
                f"group_size={self.group_size!r} is not an integer; use a positive one, or -1 for whole rows."
            )
        if self.group_size != -1 and self.group_size <= 0:
            raise ConfigError(
                f"group_size={self.group_size} was asked for; allowed are positive integers, or -1 for whole rows."
            )
        if self.act_order not in get_args(ActOrder):
            raise ConfigError(
                f"act_order={self.act_order!r} was asked for; allowed are {', '.join(get_args(ActOrder))}."
            )
        if self.grid not in get_args(GridFit):
            raise ConfigError(f"grid={self.grid!r} was asked for; allowed are {', '.join(get_args(GridFit))}.")
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping < 1:
            raise ConfigError(
                f"damping={self.damping!r} was asked for; it is a fraction, 0 < damping < 1 (0.1 is usual)."
            )
        if not isinstance(self.propagation, (int, float)) or not 0 <= self.propagation <= 1:
            raise ConfigError(f"propagation={self.propagation!r} was asked for; it is a fraction from 0 (off) to 1.")
        if isinstance(self.refinement, bool) or not isinstance(self.refinement, int) or self.refinement < 0:
            raise ConfigError(f"refinement={self.refinement!r} was asked for; it is a number of rounds, 0 or more.")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def group_width(self, in_features: int) -> int:
        """Columns per group of a layer with `in_features` columns: `group_size`, or all of them for -1."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def group_count(self, in_features: int) -> int:
        """Groups per row; the last one is narrower when group_size does not divide in_features."""
        return -(-in_features // self.group_width(in_features))

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Bits that the codes, the float16 scales and the zeros of a layer of this shape take."""
        return out_features * (in_features * self.bits + self.group_count(in_features) * (16 + self.bits))

    def why_not_grouped(self, in_features: int) -> str | None:
        """Why rows of `in_features` columns cannot be cut into this scheme's groups, or None."""
        if self.group_size == -1 or in_features % self.group_size == 0 or self.group_size % PACKED_WORD_BITS == 0:
            return None
        return (
            f"in_features {in_features} is not a multiple of group_size {self.group_size}, and only group sizes that "
            f"are multiples of {PACKED_WORD_BITS} may leave a narrower last group; dividing sizes are "
            f"{', '.join(map(str, divisors_of(in_features))) or 'none'}, or -1 for whole rows"
        )

    def not_served(self, in_features: int | None = None) -> list[str]:
        """Everything for which vLLM does not read a layer of this scheme, with what to use instead."""
        found = []
        if self.bits not in (4, 8):
            found.append(f"{self.bits} bits; use 4 or 8")
        if not self.symmetric:
            found.append("asymmetric grids; use sym=True")
        if self.act_order == "desc_act" and self.group_size != -1:  # one group has one order only
            found.append("desc_act=True; leave it False: columns are still solved in activation order")
        if self.group_size not in (-1, *SERVED_GROUP_SIZES):
            found.append(f"group_size={self.group_size}; use {', '.join(map(str, SERVED_GROUP_SIZES))} or -1")
        elif in_features is not None and in_features % self.group_width(in_features):
            sizes = [size for size in SERVED_GROUP_SIZES if in_features % size == 0]
            found.append(
                f"group_size={self.group_size}, which does not divide {in_features}; use "
                f"{' or '.join(map(str, [*sizes, -1]))}"
            )
        return found

    def why_not_packed(self, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape has no place in the checkpoint format, or None.

        Codes are packed along in_features and zeros along out_features, both into whole int32 words.
        """
        codes_per_unit = PACKED_WORD_BITS // math.gcd(PACKED_WORD_BITS, self.bits)
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % codes_per_unit:
                return f"{what} {size} is not a multiple of {codes_per_unit}, which {self.bits}-bit int32 words need"
        return None


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One weight matrix on its grid: value[r, c] = (codes[r, c] - zeros[r, g]) * scales[r, g], g = group_of_column[c].

    Args:
        codes: (out, in) uint8.
        scales: (out, groups) float32, each exactly representable in the dtype it is stored in (float16).
        zeros: (out, groups) int16.
        group_of_column: (in,) int32.
        bits: bits per code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of_column: Tensor
    bits: int

    def decode(self) -> Tensor:
        """Dequantize: the (out, in) float32 values that every reader of the checkpoint must reproduce."""
        steps, zeros = self.codes.float(), self.zeros.float()
        if (width := _known_width(self.group_of_column, self.scales.shape[1])) is not None:
            by_group = steps.view(*self.scales.shape, width)
            return by_group.sub_(zeros[..., None]).mul_(self.scales[..., None]).view_as(steps)
        return (steps - per_column(zeros, self.group_of_column)) * per_column(self.scales, self.group_of_column)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """A copy with all tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "scales", "zeros", "group_of_column")}
        return replace(self, **moved)

    def split_rows(self, sizes: list[int]) -> list["QuantizedWeight"]:
        """Split (out, in) into weights of `sizes` rows each: undoes stacking for a common input."""
        parts = zip(self.codes.split(sizes), self.scales.split(sizes), self.zeros.split(sizes), strict=True)
        return [replace(self, codes=codes, scales=scales, zeros=zeros) for codes, scales, zeros in parts]


def per_column(values: Tensor, group_of_column: Tensor) -> Tensor:
    """Spread values per group, (out, groups), over the columns of each group: (out, in)."""
    width = _known_width(group_of_column, values.shape[1])
    if width is None:
        return values[:, group_of_column.long()]
    # The same, ten times as fast as gathering columns.
    return values[:, :, None].expand(-1, -1, width).reshape(values.shape[0], -1)


def _known_width(group_of_column: Tensor, groups: int) -> int | None:
    """As `run_width`, but None on accelerators, where asking waits for the device and gathering takes no time."""
    return run_width(group_of_column, groups) if group_of_column.device.type == "cpu" else None


def run_width(group_of_column: Tensor, groups: int) -> int | None:
    """The width of groups, given g_idx (in,) int32, if they are runs of equally many columns; else None."""
    columns = group_of_column.numel()
    width, rest = divmod(columns, groups)
    trivial = not rest and torch.equal(group_of_column, trivial_groups(columns, width, group_of_column.device))
    return width if trivial else None


def trivial_groups(in_features: int, group_width: int, device: torch.device | str | None = None) -> Tensor:
    """g_idx without activation order, (in,) int32: groups are runs of `group_width` neighbouring columns."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // group_width
