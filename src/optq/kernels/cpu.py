# SPDX-License-Identifier: Apache-2.0
"""CPU kernels on torch's own int4 and int8 matrix products. Nothing is compiled.

torch's int4 product takes bfloat16 activations fast (others 10–100 times slower than dense float32) and computes
y = x @ ((q - 8) * scale + zero)ᵀ per group of 32, 64, 128 or 256 columns. With zero = (8 - z) * scale that is GPTQ's
(q - z) * scale. 2- and 3-bit codes are shifted into the middle of the 4-bit range first: otherwise (8 - z) * scale is
large, and its rounding to bfloat16 cancels badly. 8-bit codes are two 4-bit ones: q = 16 * high + low.

float16 activations, which CPUs multiply no faster than float32 ones, are rounded to bfloat16: the error is that of a
bfloat16 model. float32 activations ask for exact results and get the reference.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.checkpoint import PackedWeight, unpack_codes

from .prepared import (
    Prepared,
    columns_in_order,
    has_bfloat16_instructions,
    in_kernels_order,
    in_layers_order,
    matmul_dense,
    prepared_from,
)

INT4_GROUP_SIZES = (256, 128, 64, 32)
OUT_MULTIPLE = 16  # outputs are padded to this
AVX512_ORDER = True  # look for the order that needs no table
TILE = 64  # outputs that torch's int4 packing interleaves with one another, or a multiple of them
# Of activations: with more, dequantizing and multiplying densely is faster. It depends on whether the dense product of
# bfloat16 has instructions of its own; benchmarks/kernels.py measured both.
MOST_ROWS, MOST_ROWS_WITHOUT_BFLOAT16 = 88, 1024


def why_not_int4(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has no int4 product for CPUs"
    if _product_group_size(packed.g_idx) is None:
        return f"the groups are not made of runs of {', '.join(map(str, INT4_GROUP_SIZES))} columns"
    return None


def prepare_int4(packed: PackedWeight) -> Prepared:
    """codes: torch's int4 packing, (padded out, in / 2) uint8; extras: the grid, (groups, padded out, 2) bfloat16."""
    order = _column_order(packed.g_idx)
    recentre = _recentring(packed.bits)
    codes = unpack_codes(packed.qweight, packed.bits)[order].T + recentre  # (out, in)
    scales, zeros = _product_grid(packed, order)
    pairs = _pairs(scales, (8 - (zeros + recentre)) * scales)
    return prepared_from(packed, _pack_int4(codes), pairs)


def unpack_int4(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Codes of output features start … stop: (in, stop - start) uint8, columns in the layer's order."""
    codes = _unpack_int4(prepared.codes, start, stop, prepared.in_features)
    if recentre := _recentring(prepared.bits):
        codes = codes - recentre
    return in_layers_order(codes, prepared.order)


def matmul_int4(x: Tensor, prepared: Prepared) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, by torch's int4 product in bfloat16; densely for many rows."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > _most_rows():
        return matmul_dense(x, prepared, unpack_int4)
    output = int4_product(_gathered(rows, prepared), prepared.codes, *prepared.extras)
    return output[:, : prepared.out_features].to(x.dtype).reshape(*x.shape[:-1], prepared.out_features)


def prepare_int4_twice(packed: PackedWeight) -> Prepared:
    """codes: the low and the high halves, (2, padded out, in / 2) uint8, each in torch's int4 packing.

    The high half takes its middle, 8 * 16, off every weight, and the low half the rest of the zero: so neither of the
    products' own zeros is large.
    """
    order = _column_order(packed.g_idx)
    codes = unpack_codes(packed.qweight, packed.bits)[order].T
    scales, zeros = _product_grid(packed, order)
    low, high = _pairs(scales, (8 + 128 - zeros) * scales), _pairs(16 * scales, torch.zeros_like(scales))
    halves = torch.stack([_pack_int4(codes & 15), _pack_int4(codes >> 4)])
    return prepared_from(packed, halves, low, high)


def unpack_int4_twice(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Codes of output features start … stop: (in, stop - start) uint8, columns in the layer's order."""
    low, high = (_unpack_int4(half, start, stop, prepared.in_features) for half in prepared.codes)
    return in_layers_order(low + 16 * high, prepared.order)


def matmul_int4_twice(x: Tensor, prepared: Prepared) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, as the sum of two int4 products in bfloat16; densely for many rows."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > _most_rows():
        return matmul_dense(x, prepared, unpack_int4_twice)
    low, high = prepared.extras
    rows = _gathered(rows, prepared)
    output = int4_product(rows, prepared.codes[0], low).float() + int4_product(rows, prepared.codes[1], high)
    return output[:, : prepared.out_features].to(x.dtype).reshape(*x.shape[:-1], prepared.out_features)


def _most_rows() -> int:
    return MOST_ROWS if has_bfloat16_instructions() else MOST_ROWS_WITHOUT_BFLOAT16


def int4_product(rows: Tensor, codes: Tensor, pairs: Tensor) -> Tensor:
    """torch's int4 product: (rows, in) bfloat16 -> (rows, padded out) bfloat16."""
    group_size = rows.shape[1] // pairs.shape[0]
    # A view of several weights' pairs is not contiguous: an eighth of the codes' bytes, and joined weights are rarely
    # multiplied one by one.
    output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group_size, pairs.contiguous())
    return output


def why_not_int8(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    if packed.scales.shape[0] != 1:
        return f"torch's int8 product takes one group per row (group_size=-1), not {packed.scales.shape[0]}"
    if not bool((packed.zeros() == 128).all()):
        return "torch's int8 product takes symmetric zeros only"
    return None


def prepare_int8(packed: PackedWeight) -> Prepared:
    """codes: the checkpoint's codes minus 128, (out, in) int8; extras: scales (out,) bfloat16."""
    codes = (unpack_codes(packed.qweight, packed.bits).T.short() - 128).to(torch.int8).contiguous()
    return prepared_from(packed, codes, packed.scales[0].to(torch.bfloat16))


def unpack_int8(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Codes of output features start … stop: (in, stop - start) uint8, columns in the layer's order."""
    return (prepared.codes[start:stop].T.short() + 128).to(torch.uint8)


def matmul_int8(x: Tensor, prepared: Prepared) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, by torch's int8 product in bfloat16; densely for many rows."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > _most_rows():
        return matmul_dense(x, prepared, unpack_int8)
    output: Tensor = torch.ops.aten._weight_int8pack_mm(_gathered(rows, prepared), prepared.codes, *prepared.extras)
    return output.to(x.dtype).reshape(*x.shape[:-1], prepared.out_features)


def _product_group_size(group_of_column: Tensor) -> int | None:
    """The widest group of the int4 product whose groups each lie inside one group of the layer, or None."""
    ordered = group_of_column.sort().values
    for size in INT4_GROUP_SIZES:
        if ordered.numel() % size == 0 and bool((ordered.view(-1, size) == ordered[::size, None]).all()):
            return size
    return None


def _column_order(group_of_column: Tensor) -> Tensor | slice:
    order = columns_in_order(group_of_column)
    return slice(None) if order is None else order


def _product_grid(packed: PackedWeight, order: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Scales and zeros of the product's own groups, which may be narrower than the layer's: (groups, out) float32."""
    size = _product_group_size(packed.g_idx)
    assert size is not None  # why_not was asked
    groups = packed.g_idx[order][::size].long()
    return packed.scales[groups].float(), packed.zeros()[groups].float()


def _pairs(scales: Tensor, zeros: Tensor) -> Tensor:
    """(groups, padded out, 2) bfloat16."""
    pairs = pad(torch.stack([scales, zeros], -1), (0, 0, 0, -scales.shape[1] % OUT_MULTIPLE))
    return pairs.to(torch.bfloat16).contiguous()


def _recentring(bits: int) -> int:
    """What moves codes of fewer bits into the middle of the 4-bit range."""
    return 8 - (1 << (bits - 1))


def _gathered(rows: Tensor, prepared: Prepared) -> Tensor:
    return in_kernels_order(rows.to(torch.bfloat16), prepared).contiguous()


def _pack_int4(codes: Tensor) -> Tensor:
    """(out, in) 0 … 15 -> torch's packing, (padded out, in / 2) uint8."""
    codes = pad(codes.int(), (0, 0, 0, -codes.shape[0] % OUT_MULTIPLE), value=8)
    # The second argument tiles the packing on GPUs; the CPU version ignores it.
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    return packed


def _unpack_int4(packed: Tensor, start: int, stop: int, columns: int) -> Tensor:
    """Codes start … stop (in, stop - start) uint8 from torch's packing of all of them."""
    first, last = start // TILE * TILE, min(-(-stop // TILE) * TILE, packed.shape[0])
    whole = (last - first) // TILE * TILE
    parts = []
    for rows, tile in ((packed[first : first + whole], TILE), (packed[first + whole : last], last - first - whole)):
        if rows.numel():
            data = rows.reshape(-1, tile * columns // 2)  # (tiles, bytes)
            order = _nibble_order(tile, columns)
            if order is None:
                data = data.view(-1, columns, tile // 2)
                codes = torch.stack([data & 15, data >> 4], 2).permute(1, 0, 2, 3)  # (in, tiles, 2, tile / 2)
            else:
                codes = torch.cat([data & 15, data >> 4], 1)[:, order].view(-1, columns).T
            parts.append(codes.reshape(columns, -1))
    codes = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return codes[:, start - first : stop - first]


@lru_cache(maxsize=64)
def _nibble_order(rows: int, columns: int) -> Tensor | None:
    """Which nibble of torch's packing of (rows, columns) codes holds each code, counting low nibbles first.

    It depends on the processor's instruction set and is nowhere promised, so it is read off: numbers are packed, one
    hexadecimal digit after the other. None stands for the order on processors with AVX-512, which needs no table: the
    low nibbles are the first half of the rows, the high ones the second, both column after column.
    """
    numbers = torch.arange(rows * columns, dtype=torch.int32, device="cpu").view(rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.int64, device="cpu")
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu((numbers >> shift & 15).contiguous(), 1).flatten()
        found |= torch.cat([data & 15, data >> 4]).long() << shift
    order = torch.argsort(found)
    avx512 = torch.arange(rows * columns, device="cpu").view(2, columns, rows // 2).transpose(1, 2).flatten()
    return None if AVX512_ORDER and torch.equal(order, avx512) else order
