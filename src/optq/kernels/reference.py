# SPDX-License-Identifier: Apache-2.0
"""The kernel that runs everything: dequantize a few outputs at a time and multiply.

Exact: weights are dequantized in float32 and cast to the activations' dtype, as a dense linear of that dtype would
have them; on CPUs without instructions for 16-bit products, those are made in float32.
"""

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight, unpack_codes

from .prepared import Prepared, matmul_dense, prepared_from


def why_not(packed: PackedWeight, dtype: torch.dtype) -> None:
    """Always None: this kernel runs every layer of the bits and dtypes that its row declares."""


def prepare(packed: PackedWeight) -> Prepared:
    """codes: the words on disk, (in · bits / 32, out) int32, which are read in place."""
    return prepared_from(packed, packed.qweight)


def unpack(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Codes of output features start … stop: (in, stop - start) uint8, columns in the layer's order."""
    return unpack_codes(prepared.codes[:, start:stop], prepared.bits)


def matmul(x: Tensor, prepared: Prepared) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype."""
    return matmul_dense(x, prepared, unpack)
