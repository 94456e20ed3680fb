# SPDX-License-Identifier: Apache-2.0
"""The tensors of `com.microsoft::MatMulNBits`, the operator of onnxruntime that multiplies with packed weights.

It wants groups of neighbouring columns, all of one width: a block. A block is the largest that fits into the groups of
the checkpoint, so a group may become several blocks with the same scale and zero. Codes are packed along the columns
as on disk, lowest bits first, so a row's bytes are those of its words. Nothing is rounded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.checkpoint.layout import PackedWeight
from optq.checkpoint.packing import pack_codes, unpack_codes
from optq.errors import CheckpointError
from optq.scheme import PACKED_WORD_BITS

MATMUL_NBITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What onnxruntime 1.31 computes on a CPU; larger blocks, which the operator's schema allows, it refuses."""


@dataclass(frozen=True, kw_only=True)
class BlockedWeight:
    """One linear's weight as the operator takes it.

    Args:
        codes: (out, blocks, block_size · bits / 8) uint8, packed.
        scales: (out, blocks) float32.
        zeros: (out, ceil(blocks · bits / 8)) uint8, packed; None if all are 2 ** (bits - 1), which the operator
            assumes.
        order: (in,) int64, which column of the layer each column of the codes is; None if they are in its order.
        bits: bits per weight.
        block_size: columns that share a scale and a zero.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bits: int
    block_size: int


def to_blocks(packed: PackedWeight) -> BlockedWeight:
    """The same weight for MatMulNBits.

    Raises:
        CheckpointError: the operator has no such bits or blocks, or a zero is 2 ** bits.
    """
    bits = packed.bits
    if bits not in MATMUL_NBITS:
        raise CheckpointError(
            f"has {bits} bits, and onnxruntime's MatMulNBits computes with {_listed(MATMUL_NBITS)}. Quantize it to "
            "one of these."
        )
    groups, qweight, order = packed.g_idx, packed.qweight, None
    if bool((groups[1:] < groups[:-1]).any()):
        order = torch.argsort(groups, stable=True)
        groups, qweight = groups[order], pack_codes(unpack_codes(qweight, bits)[order], bits)
    starts = torch.where(groups[1:] != groups[:-1])[0] + 1  # the columns at which a group begins
    block_size = math.gcd(BLOCK_SIZES[-1], packed.in_features, *starts.tolist())
    if block_size not in BLOCK_SIZES:
        raise CheckpointError(
            f"has {packed.in_features} columns in groups that share no block of more than {block_size}, and "
            f"onnxruntime's MatMulNBits computes with blocks of {_listed(BLOCK_SIZES)}. Quantize it with a group_size "
            f"that is a multiple of {BLOCK_SIZES[0]}."
        )
    of_block = groups[::block_size].long()
    zeros = packed.zeros()[of_block]
    if int(zeros.max()) == 2**bits:
        raise CheckpointError(f"has a zero of {2**bits}, which {bits} bits cannot hold in onnxruntime's MatMulNBits.")
    blocks, out_features = zeros.shape
    return BlockedWeight(
        codes=_bytes(qweight).view(out_features, blocks, block_size * bits // 8),
        scales=packed.scales[of_block].float().T.contiguous(),
        zeros=None if bool((zeros == 2 ** (bits - 1)).all()) else _packed_zeros(zeros, bits),
        order=order,
        bits=bits,
        block_size=block_size,
    )


def _packed_zeros(zeros: Tensor, bits: int) -> Tensor:
    """(blocks, out) to (out, ceil(blocks · bits / 8)) uint8."""
    blocks = zeros.shape[0]
    whole_words = pad(zeros, (0, 0, 0, -blocks % (PACKED_WORD_BITS // bits)))
    return _bytes(pack_codes(whole_words, bits))[:, : math.ceil(blocks * bits / 8)].contiguous()


def _bytes(words: Tensor) -> Tensor:
    """(words, out) int32 to (out, 4 · words) uint8, the lowest byte first."""
    return words.T.flatten().view(torch.uint8).view(words.shape[1], -1)


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
