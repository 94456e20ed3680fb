# SPDX-License-Identifier: Apache-2.0
"""The block types of GGUF files whose values lie on a grid of GPTQ's: 32 columns each with a float16 scale d.

    Q4_0  d, 16 bytes       d · (q - 8)      byte i holds q_i in its low and q_(i + 16) in its high half
    Q4_1  d, m, 16 bytes    d · q + m        only where -m / d is a zero, that is one of 0 … 15
    Q8_0  d, 32 bytes       d · q            q is signed

What they say is from llama.cpp's own reader in Python, the package gguf 0.19.
"""

import torch
from torch import Tensor

from optq.checkpoint.layout import PackedWeight, pack
from optq.errors import CheckpointError
from optq.scheme import LayerScheme, QuantizedWeight, trivial_groups

GGML_COLUMNS = 32

GGML_SCHEMES = {
    "Q4_0": LayerScheme(bits=4, group_size=GGML_COLUMNS),
    "Q4_1": LayerScheme(bits=4, group_size=GGML_COLUMNS, symmetric=False),
    "Q8_0": LayerScheme(bits=8, group_size=GGML_COLUMNS),
}


def from_ggml(rows: Tensor, scheme: LayerScheme) -> PackedWeight:
    """The same weight as GPTQ packs it, in checkpoint_format "gptq_v2".

    Args:
        rows: (out, bytes of a row) uint8.
        scheme: one of `GGML_SCHEMES`.
    Raises:
        CheckpointError: out_features do not fill words, or a block of Q4_1 is on no grid of GPTQ's.
    """
    numbers = 1 if scheme.symmetric else 2
    block_bytes = 2 * numbers + GGML_COLUMNS * scheme.bits // 8
    blocks = rows.unflatten(1, (-1, block_bytes))  # (out, groups, bytes)
    scales, *minimum = blocks[..., : 2 * numbers].contiguous().view(torch.float16).float().unbind(-1)
    codes = blocks[..., 2 * numbers :]
    codes = torch.cat([codes & 15, codes >> 4], dim=-1) if scheme.bits == 4 else codes ^ 128  # two's complement
    zeros = _zeros(scales, minimum[0]) if minimum else torch.full_like(scales, 2 ** (scheme.bits - 1))
    out_features, in_features = codes.flatten(1).shape
    if reason := scheme.why_not_packed(in_features, out_features):
        raise CheckpointError(f"{reason}.")
    quantized = QuantizedWeight(
        codes=codes.flatten(1),
        scales=scales,
        zeros=zeros.to(torch.int16),
        group_of_column=trivial_groups(in_features, GGML_COLUMNS),
        bits=scheme.bits,
    )
    return pack(quantized, "gptq_v2")


def _zeros(scales: Tensor, minimum: Tensor) -> Tensor:
    zeros = torch.where(scales == 0, 0, -minimum / scales).round().clamp(0, 15)
    off_grid = int((zeros * scales != -minimum).sum())
    if off_grid:
        raise CheckpointError(
            f"{off_grid} of {zeros.numel()} blocks of Q4_1 have no zero among their values, so they are on no grid of "
            "GPTQ's. For a dense model, save what transformers' from_pretrained(..., gguf_file=...) loads."
        )
    return zeros
