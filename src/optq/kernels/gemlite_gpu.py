# SPDX-License-Identifier: Apache-2.0
"""The kernel of the package gemlite, Triton programs that tune themselves; it runs only when asked for by name.

It packs codes along the columns just as GPTQ does, so the words on disk are read in place. Its tuning takes some
seconds when a shape or a number of rows is first met, which is one reason why it is never chosen unasked.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight, pack_codes, unpack_codes
from optq.device.triton import why_no_triton

from .prepared import Prepared, columns_in_order, group_width, in_kernels_order, in_layers_order, prepared_from
from .selftest import why_wrong

MULTIPLE = 32  # of columns per group, and of outputs


def why_not(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    if find_spec("gemlite") is None:
        return "needs the package gemlite; install it with `pip install gemlite`"
    device = packed.scales.device
    return why_no_triton(device) or why_not_shaped(packed) or _why_wrong(device, packed.bits, dtype)


def why_not_shaped(packed: PackedWeight) -> str | None:
    """Why gemlite cannot run a layer of this shape and these groups, or None."""
    width = group_width(packed.g_idx)
    if not width or width % MULTIPLE or packed.in_features % width:
        return f"gemlite takes groups of a multiple of {MULTIPLE} columns, all of the same width"
    if packed.out_features % MULTIPLE:
        return f"gemlite takes a multiple of {MULTIPLE} outputs, not {packed.out_features}"
    return None


@cache
def _why_wrong(device: torch.device, bits: int, dtype: torch.dtype) -> str | None:
    return why_wrong("gemlite", prepare, [(1, matmul), (8, matmul), (70, matmul)], device, bits, dtype)


def prepare(packed: PackedWeight) -> Prepared:
    """codes: the words on disk, (in · bits / 32, out) int32; with desc_act, repacked in order of groups."""
    order = columns_in_order(packed.g_idx)
    if order is None:
        return prepared_from(packed, packed.qweight)
    return prepared_from(packed, pack_codes(unpack_codes(packed.qweight, packed.bits)[order], packed.bits))


def unpack(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Codes of output features start … stop: (in, stop - start) uint8, columns in the layer's order."""
    return in_layers_order(unpack_codes(prepared.codes[:, start:stop], prepared.bits), prepared.order)


def matmul(x: Tensor, prepared: Prepared) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, by gemlite; float16 or bfloat16."""
    layer = prepared.memo.get(x.dtype)
    if layer is None:
        layer = prepared.memo[x.dtype] = _layer(prepared, x.dtype)
    output: Tensor = layer(in_kernels_order(x, prepared))
    return output


def _layer(prepared: Prepared, dtype: torch.dtype) -> Any:
    """gemlite's own module."""
    from gemlite import DType, GemLiteLinearTriton

    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]
    layer = GemLiteLinearTriton(
        prepared.bits, prepared.group_width, prepared.in_features, prepared.out_features, kind, kind
    )
    codes = unpack_codes(prepared.codes, prepared.bits).T.contiguous()
    scales, zeros = (grid.T.to(dtype).contiguous() for grid in (prepared.scales, prepared.zeros))
    # Not fma_mode: it would round zero * scale.
    layer.pack(codes, scales, zeros, None, fma_mode=False)
    if not torch.equal(layer.W_q, prepared.codes):
        raise RuntimeError("this version of gemlite does not pack codes as GPTQ does")
    layer.W_q = torch.nn.Parameter(prepared.codes, requires_grad=False)  # one memory for both
    return layer
