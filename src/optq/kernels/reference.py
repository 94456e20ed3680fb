# SPDX-License-Identifier: Apache-2.0
"""The kernel that runs everything: dequantize a few output columns at a time and multiply.

Exact: weights are dequantized in float32. On CPU the product is float32 as well; on accelerators the weights are cast
to the activations' dtype, as a dense linear of that dtype would have them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight

PIECE_BYTES = 2**24  # of float32 weights alive at once: large enough for the GEMM, small enough to stay bounded
ALIGNMENT = 32  # output columns, so that a piece of qzeros is whole words


def why_not(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    """None: every bits, shape and device works, for floating-point activations."""
    return None if dtype.is_floating_point else f"activations are {dtype}, not floating point"


def prepare(packed: PackedWeight) -> PackedWeight:
    """Nothing to prepare: the words on disk are read in place."""
    return packed


def matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype."""
    inputs, dtype = _arithmetic(x)
    output = torch.empty(*x.shape[:-1], packed.out_features, dtype=x.dtype, device=x.device)
    for start, stop in _pieces(packed):
        output[..., start:stop] = inputs @ packed.columns(start, stop).to(dtype)
    return output


def matmul_transposed(gradient: Tensor, packed: PackedWeight) -> Tensor:
    """gradient (..., out) -> (..., in), the gradient of `matmul` towards its input."""
    outputs, dtype = _arithmetic(gradient)
    total = torch.zeros(*gradient.shape[:-1], packed.in_features, dtype=torch.float32, device=gradient.device)
    for start, stop in _pieces(packed):
        total += outputs[..., start:stop] @ packed.columns(start, stop).to(dtype).T
    return total.to(gradient.dtype)


def _arithmetic(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """The activations and the dtype in which the product is made."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return x.to(dtype), dtype


def _pieces(packed: PackedWeight) -> Iterator[tuple[int, int]]:
    """Ranges of output columns, each of at most `PIECE_BYTES` dense bytes."""
    width = max(ALIGNMENT, PIECE_BYTES // (4 * packed.in_features) // ALIGNMENT * ALIGNMENT)
    for start in range(0, packed.out_features, width):
        yield start, min(start + width, packed.out_features)
