# SPDX-License-Identifier: Apache-2.0
"""Grids: which values the codes of one group of weights stand for.

A grid is fitted on the original weights before any error is fed back, and its scales are rounded to the stored dtype
at once, so that what is solved for is what is stored.

A grid that spans a group from its smallest to its largest weight spends codes on outliers. Clipping them a little
costs less than the coarser steps cost everyone else; how much is searched per row and group, with each column's
squared error weighted by how much it matters to the outputs.

A symmetric grid has one more step on one side of its zero: codes - zero run from -4 to 3 with 3 bits. Which side of
the group gets it is the sign of the scale, so both signs are tried.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.errors import ModelError
from optq.scheme import LayerScheme, per_column

SCALE_DTYPE = torch.float16
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; a scale of 0 would lose the group's sign and divide by zero

FEW_BITS = 3
ELEMENTS_AT_ONCE = 1 << 18  # of the weight while grids are searched on a CPU: what its caches hold
LARGEST_FACTOR, SMALLEST_FACTOR = 1.1, 0.3  # of a group's span
SMALLEST_OF_2_BITS = 0.6  # docs/accuracy.md says why
COARSE = 0.06  # between the factors that are tried first
FINE = (-0.04, -0.02, 0.02, 0.04)  # tried around the best of them


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scales and zeros of a weight, both (out, groups) float32; value = (code - zero) * scale, codes 0 … max_code."""

    scales: Tensor
    zeros: Tensor
    max_code: int

    def encode(self, weight: Tensor, group_of_column: Tensor) -> Tensor:
        """The nearest codes of `weight` (out, in), as float32 (out, in)."""
        codes = (weight / per_column(self.scales, group_of_column)).round_()
        return codes.add_(per_column(self.zeros, group_of_column)).clamp_(0, self.max_code)


def fit_grid(weight: Tensor, group_of_column: Tensor, scheme: LayerScheme, importance: Tensor | None = None) -> Grid:
    """Fit one grid per row and group.

    Args:
        weight: (out, in) float32.
        group_of_column: (in,) int32, values 0 … groups - 1.
        importance: (in,) float32, what a squared error of each column costs; the grid that minimises the weighted sum
            is searched among spans of 1.1 to 0.3 times the group's, first in steps of 0.06, then of 0.02. None: the
            whole span.
    Returns:
        A `Grid` with float16-representable scales, never zero, and negative ones among the symmetric. Symmetric zeros
        are 2 ** (bits - 1); asymmetric ones lie in [1, max_code], because a zero of 0 cannot be stored safely in v1
        (it is stored minus one).
    Raises:
        ModelError: a weight is so large that its scale overflows float16, or is not finite.
    """
    grouped, costs = _grouped(weight, group_of_column, importance)
    at_once = ELEMENTS_AT_ONCE if weight.device.type == "cpu" else weight.numel()
    fitted = [
        _fit(rows, costs if importance is not None else None, scheme)
        for rows in grouped.split(max(1, at_once // weight.shape[1]))
    ]
    scales, zeros = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    if not (largest := scales.abs().max()) <= LARGEST_SCALE:  # a NaN is neither
        raise ModelError(
            f"A group's scale is {largest:.3g}, above float16's largest value {LARGEST_SCALE:.5g} or not finite. "
            "Check the weights for outliers, or leave this layer in full precision with dynamic={'-:its name': {}}."
        )
    return Grid(scales=scales, zeros=zeros, max_code=scheme.max_code)


def _fit(grouped: Tensor, costs: Tensor | None, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """Scales and zeros, both (rows, groups), of rows cut into groups, (rows, groups, width)."""
    # Zero is always inside the span, so that it is represented exactly.
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    scales, zeros = _spanning(low, high, scheme)
    if costs is None:
        return scales, zeros
    # The best so far: its cost, scales and zeros, and how it was tried: a factor of the span, a sign, a shift of zero.
    one, none = torch.ones_like(low), torch.zeros_like(low)
    best: tuple[Tensor, ...] = (_cost(grouped, costs, scales, zeros, scheme), scales, zeros, one, one, none)
    least = SMALLEST_OF_2_BITS if scheme.bits == 2 else SMALLEST_FACTOR

    def or_better(factor: Tensor | float, sign: Tensor | float, shift: Tensor | float) -> tuple[Tensor, ...]:
        scales, zeros = _spanning(low * factor, high * factor, scheme)
        scales, zeros = scales * sign, (zeros + shift).clamp_(1, scheme.max_code)
        cost = _cost(grouped, costs, scales, zeros, scheme)
        better = cost < best[0]  # False for the NaN of a scale that overflows
        found = (cost, scales, zeros, factor, sign, shift)
        return tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))

    for step in range(1 + int((LARGEST_FACTOR - least) / COARSE)):
        for sign, shift in _variants(scheme):
            best = or_better(LARGEST_FACTOR - COARSE * step, sign, shift)
    coarse = best[3:]
    for change in FINE:
        best = or_better((coarse[0] + change).clamp_(least, LARGEST_FACTOR), *coarse[1:])
    return best[1], best[2]


def _variants(scheme: LayerScheme) -> tuple[tuple[float, float], ...]:
    """What is tried with each span: the scale's sign, and how far zero is from where the span's ends have it."""
    if scheme.symmetric:
        return (1, 0), (-1, 0)
    # With few levels zero may be better one step to either side.
    return ((1, 0), (1, -1), (1, 1)) if scheme.bits <= FEW_BITS else ((1, 0),)


def _grouped(weight: Tensor, group_of_column: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The columns of each group side by side, (out, groups, width), and their costs, (groups, width).

    Narrower groups are filled up with zeros that cost nothing.
    """
    counts = torch.bincount(group_of_column)
    groups, width = counts.numel(), int(counts.max())
    costs = torch.ones_like(weight[0]) if importance is None else importance
    order = torch.argsort(group_of_column, stable=True)
    weight, costs = weight[:, order], costs[order]
    if groups * width != weight.shape[1]:  # only ever the last group
        filling = groups * width - weight.shape[1]
        weight, costs = pad(weight, (0, filling)), pad(costs, (0, filling))
    return weight.reshape(-1, groups, width), costs.reshape(groups, width)


def _cost(grouped: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor, scheme: LayerScheme) -> Tensor:
    """The weighted squared error of rounding to a grid, (out, groups)."""
    steps = grouped * scales.reciprocal()[..., None]
    if scheme.symmetric:  # one zero for all, and clamping to numbers is faster than to tensors
        middle = (scheme.max_code + 1) / 2
        steps.round_().clamp_(-middle, scheme.max_code - middle)
    else:
        steps.round_().add_(zeros[..., None]).clamp_(0, scheme.max_code).sub_(zeros[..., None])
    return steps.mul_(scales[..., None]).sub_(grouped).square_().mul_(costs).sum(2)


def _spanning(low: Tensor, high: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """Scales and zeros of grids from `low` to `high`."""
    if scheme.symmetric:
        scales = stored_scales(2 * torch.maximum(-low, high) / scheme.max_code)
        return scales, torch.full_like(scales, (scheme.max_code + 1) / 2)
    scales = stored_scales((high - low) / scheme.max_code)
    zeros = (-low / scales).round()
    # A group without negative weights wants zero = 0. It gets 1, and the remaining max_code - 1 steps span it.
    scales = torch.where(zeros < 1, stored_scales(high / (scheme.max_code - 1)), scales)
    return scales, zeros.clamp_(1, scheme.max_code)


def stored_scales(scales: Tensor) -> Tensor:
    """Round scales of any shape (...) to float16, the dtype of the checkpoint, and return them as float32.

    Scales whose magnitude would be below float16's smallest get that value instead, so none is zero.
    """
    rounded = scales.to(SCALE_DTYPE).float()
    return torch.where(rounded.abs() < SMALLEST_SCALE, torch.full_like(rounded, SMALLEST_SCALE), rounded)
