# SPDX-License-Identifier: Apache-2.0
"""Grids: which values the codes of one group of weights stand for.

A grid is fitted on the original weights before any error is fed back, and its scales are rounded to the stored dtype
at once, so that what is solved for is what is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optq.errors import ModelError
from optq.scheme import LayerScheme

SCALE_DTYPE = torch.float16
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; a scale of 0 would lose the group's sign and divide by zero


@dataclass(frozen=True, kw_only=True)
class Grid:
    """scales and zeros, both (out, groups) float32; value = (code - zero) * scale for codes 0 … max_code."""

    scales: Tensor
    zeros: Tensor
    max_code: int

    def encode(self, weight: Tensor, group_of_column: Tensor) -> Tensor:
        """The nearest codes of `weight` (out, in), as float32 (out, in)."""
        columns = group_of_column.long()
        return (weight / self.scales[:, columns]).round_().add_(self.zeros[:, columns]).clamp_(0, self.max_code)


def fit_grid(weight: Tensor, group_of_column: Tensor, scheme: LayerScheme) -> Grid:
    """Fit one grid per row and group, spanning the group from its smallest to its largest weight.

    Args:
        weight: (out, in) float32.
        group_of_column: (in,) int32, values 0 … groups - 1.
    Returns:
        A `Grid` with float16-representable scales. Symmetric zeros are 2 ** (bits - 1); asymmetric ones lie in
        [1, max_code], because a zero of 0 cannot be stored safely in the v1 format (it is stored minus one).
    Raises:
        ModelError: a weight is so large that its scale overflows float16.
    """
    out_features = weight.shape[0]
    groups = int(group_of_column.max()) + 1
    index = group_of_column.long().expand(out_features, -1)
    # Zero is always inside the range (the initial value of the reduction), so that it is represented exactly.
    low = weight.new_zeros(out_features, groups).scatter_reduce_(1, index, weight, "amin")
    high = weight.new_zeros(out_features, groups).scatter_reduce_(1, index, weight, "amax")
    if scheme.symmetric:
        scales = _stored(2 * torch.maximum(-low, high) / scheme.max_code)
        return Grid(scales=scales, zeros=torch.full_like(scales, (scheme.max_code + 1) / 2), max_code=scheme.max_code)
    scales = _stored((high - low) / scheme.max_code)
    zeros = (-low / scales).round()
    # A group without negative weights wants zero = 0. It gets 1, and the remaining max_code - 1 steps span it.
    all_positive = zeros < 1
    scales = torch.where(all_positive, _stored(high / (scheme.max_code - 1)), scales)
    return Grid(scales=scales, zeros=zeros.clamp_(1, scheme.max_code), max_code=scheme.max_code)


def _stored(scales: Tensor) -> Tensor:
    """Round to the dtype of the checkpoint, keeping float32 for arithmetic."""
    largest = torch.finfo(SCALE_DTYPE).max
    if scales.max() > largest:
        raise ModelError(
            f"A group's scale is {scales.max():.3g}, above float16's largest value {largest:.5g}. "
            "Check the weights for outliers, or leave this layer in full precision with dynamic={'-:NAME': {}}."
        )
    return scales.to(SCALE_DTYPE).float().clamp_(min=SMALLEST_SCALE)
