# SPDX-License-Identifier: Apache-2.0
"""CPU kernels on torch's own int4 and int8 matrix products. Nothing is compiled.

torch's int4 product takes bfloat16 activations fast (others 10–100 times slower than dense float32) and computes
y = x @ ((q - 8) * scale + zero)ᵀ per group of 32, 64, 128 or 256 columns. With zero = (8 - z) * scale that is GPTQ's
(q - z) * scale. 2- and 3-bit codes are shifted into the middle of the 4-bit range first: otherwise (8 - z) * scale is
large, and its rounding to bfloat16 cancels badly. Its time grows with the rows from the first one on, so for very many
of them dequantizing and multiplying densely catches up (benchmarks/results/kernels-cpu.json).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight, unpack

from . import reference

INT4_GROUP_SIZES = (256, 128, 64, 32)
OUT_MULTIPLE = 16  # outputs are padded to this
MOST_ROWS = 1024  # above, dequantizing with `reference` and multiplying densely is about as fast, and more exact


@dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """What torch's int4 product wants.

    Args:
        packed: the words on disk, for many rows.
        weight: torch's own int4 packing of (padded out, in) codes.
        scales_and_zeros: (in / group_size, padded out, 2) bfloat16.
        group_size: of the product: divides the layer's own.
        columns: (in,) order in which inputs are gathered, or None when groups are runs of neighbours.
    """

    packed: PackedWeight
    weight: Tensor
    scales_and_zeros: Tensor
    group_size: int
    columns: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """What torch's int8 product wants: weight (out, in) int8, scales (out,) bfloat16."""

    packed: PackedWeight
    weight: Tensor
    scales: Tensor


def why_not_int4(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    if reason := _why_not_cpu(packed, dtype):
        return reason
    if packed.bits == 8:
        return "8-bit codes do not fit torch's int4 product"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has no int4 product for CPUs"
    if _int4_group_size(packed.g_idx) is None:
        return f"the groups are not made of runs of {', '.join(map(str, INT4_GROUP_SIZES))} columns"
    return None


def prepare_int4(packed: PackedWeight) -> Int4Weight:
    quantized = unpack(packed)
    group_size = _int4_group_size(packed.g_idx)
    assert group_size is not None  # why_not_int4 was asked
    order = torch.argsort(packed.g_idx, stable=True)
    recentre = 8 - 2 ** (packed.bits - 1)
    codes = quantized.codes[:, order].int() + recentre
    groups = packed.g_idx[order][::group_size].long()  # the layer's group of each of the product's groups
    scales = quantized.scales[:, groups]
    zeros = (8 - (quantized.zeros[:, groups].float() + recentre)) * scales
    padding = -codes.shape[0] % OUT_MULTIPLE
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding), value=8)
    pairs = torch.stack([scales.T, zeros.T], dim=-1)  # (groups, out, 2)
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, padding))
    return Int4Weight(
        packed=packed,
        # The second argument tiles the packing on GPUs; the CPU version ignores it.
        weight=torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1),
        scales_and_zeros=pairs.to(torch.bfloat16).contiguous(),
        group_size=group_size,
        columns=None if torch.equal(order, torch.arange(order.numel())) else order,
    )


def matmul_int4(x: Tensor, prepared: Int4Weight) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > MOST_ROWS:
        return reference.matmul(x, prepared.packed)
    return int4_product(rows, prepared).reshape(*x.shape[:-1], prepared.packed.out_features)


def int4_product(rows: Tensor, prepared: Int4Weight) -> Tensor:
    """(rows, in) bfloat16 -> (rows, out), however many rows."""
    if prepared.columns is not None:
        rows = rows.index_select(1, prepared.columns)
    output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows.contiguous(), prepared.weight, prepared.group_size, prepared.scales_and_zeros
    )
    return output[:, : prepared.packed.out_features]


def why_not_int8(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    if reason := _why_not_cpu(packed, dtype):
        return reason
    if packed.bits != 8:
        return f"torch's int8 product takes 8-bit codes, not {packed.bits}-bit ones"
    if packed.scales.shape[0] != 1:
        return f"torch's int8 product takes one group per row (group_size=-1), not {packed.scales.shape[0]}"
    if not bool((packed.zeros() == 128).all()):
        return "torch's int8 product takes symmetric zeros only"
    return None


def prepare_int8(packed: PackedWeight) -> Int8Weight:
    quantized = unpack(packed)
    return Int8Weight(
        packed=packed,
        weight=(quantized.codes.short() - 128).to(torch.int8),
        scales=quantized.scales[:, 0].to(torch.bfloat16),
    )


def matmul_int8(x: Tensor, prepared: Int8Weight) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > MOST_ROWS:
        return reference.matmul(x, prepared.packed)
    output: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), prepared.weight, prepared.scales)
    return output.reshape(*x.shape[:-1], prepared.packed.out_features)


def _why_not_cpu(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    if packed.qweight.device.type != "cpu":
        return f"runs on CPUs only, the layer is on {packed.qweight.device}"
    if dtype != torch.bfloat16:
        return f"torch's integer products are fast for bfloat16 activations only, these are {dtype}"
    return None


def _int4_group_size(group_of_column: Tensor) -> int | None:
    """The widest group of the int4 product whose groups each lie inside one group of the layer, or None."""
    ordered = group_of_column.sort().values
    for size in INT4_GROUP_SIZES:
        if ordered.numel() % size == 0 and bool((ordered.view(-1, size) == ordered[::size, None]).all()):
            return size
    return None
