# SPDX-License-Identifier: Apache-2.0
"""`Prepared`: what a kernel makes of a packed weight once and reads at every call; and dense columns of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight
from optq.scheme import trivial_groups

PIECE_BYTES = 2**24  # of float32 weights alive at once: large enough for the GEMM, small enough to stay bounded
ALIGNMENT = 64  # outputs: whole tiles of every packing


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A packed weight as one kernel wants it: tensors and integers only, so that an operator of torch can take it.

    Args:
        codes: all codes, in the form that the kernel reads fastest; takes the place of the words on disk.
        extras: further tensors that the kernel wants.
        scales: (groups, out), the dtype on disk.
        zeros: (groups, out) int16.
        group_of_column: (in,) int32.
        bits: bits per weight.
        group_width: columns per group where groups are runs of neighbours, all equally wide; else 0.
    """

    codes: Tensor
    extras: tuple[Tensor, ...]
    scales: Tensor
    zeros: Tensor
    group_of_column: Tensor
    bits: int
    group_width: int

    @property
    def in_features(self) -> int:
        return self.group_of_column.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]


def prepared_from(packed: PackedWeight, codes: Tensor, *extras: Tensor) -> Prepared:
    """`codes` and `extras` together with what every kernel keeps."""
    groups, in_features = packed.scales.shape[0], packed.in_features
    width = in_features // groups
    regular = width * groups == in_features and torch.equal(
        packed.g_idx, trivial_groups(in_features, width, packed.g_idx.device)
    )
    return Prepared(
        codes=codes,
        extras=extras,
        scales=packed.scales,
        zeros=packed.zeros(),
        group_of_column=packed.g_idx,
        bits=packed.bits,
        group_width=width if regular else 0,
    )


Unpack = Callable[[Prepared, int, int], Tensor]
"""(prepared, start, stop) -> the codes of outputs start … stop, (in, stop - start) uint8."""


def pieces(prepared: Prepared, unpack: Unpack) -> Iterator[tuple[slice, Tensor]]:
    """The dense float32 weight (in, out), a few outputs at a time: which ones, and (in, their number)."""
    width = max(ALIGNMENT, PIECE_BYTES // (4 * prepared.in_features) // ALIGNMENT * ALIGNMENT)
    for start in range(0, prepared.out_features, width):
        stop = min(start + width, prepared.out_features)
        steps = unpack(prepared, start, stop).float()
        zeros, scales = prepared.zeros[:, start:stop].float(), prepared.scales[:, start:stop].float()
        if prepared.group_width:
            groups = steps.view(-1, prepared.group_width, stop - start)
            groups.sub_(zeros[:, None]).mul_(scales[:, None])
        else:
            columns = prepared.group_of_column.long()
            steps.sub_(zeros[columns]).mul_(scales[columns])
        yield slice(start, stop), steps


def matmul_dense(x: Tensor, prepared: Prepared, unpack: Unpack) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, by dequantizing a few outputs at a time."""
    dtype = _arithmetic(x)
    inputs = x.to(dtype)
    output = torch.empty(*x.shape[:-1], prepared.out_features, dtype=x.dtype, device=x.device)
    for outputs, weight in pieces(prepared, unpack):
        output[..., outputs] = inputs @ weight.to(dtype)
    return output


def matmul_transposed(gradient: Tensor, prepared: Prepared, unpack: Unpack) -> Tensor:
    """gradient (..., out) -> (..., in), the gradient of a product towards its input."""
    dtype = _arithmetic(gradient)
    total = torch.zeros(*gradient.shape[:-1], prepared.in_features, dtype=torch.float32, device=gradient.device)
    for outputs, weight in pieces(prepared, unpack):
        total += gradient[..., outputs].to(dtype) @ weight.to(dtype).T
    return total.to(gradient.dtype)


def _arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of the product: that of a dense layer, but at least float32 on CPUs without instructions for it."""
    if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and has_bfloat16_instructions()):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


@cache
def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported() for supported in asked if supported is not None)
