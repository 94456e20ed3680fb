# SPDX-License-Identifier: Apache-2.0
"""AWQ's "gemm" layout of 4-bit weights, which GPTQ's can hold exactly.

Both matrices of integers are packed along out_features, eight to a word and not in their order: even ones first.

    word w = o7 o5 o3 o1 o6 o4 o2 o0        o_i = output 8w + i, the lowest four bits on the right
"""

from torch import Tensor

from optq.checkpoint.layout import PackedWeight, as_float16
from optq.checkpoint.packing import pack_codes, unpack_codes
from optq.scheme import trivial_groups

AWQ_BITS = 4
_NIBBLE_OF_OUTPUT = [0, 4, 1, 5, 2, 6, 3, 7]


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """The same weight as GPTQ packs it, in checkpoint_format "gptq_v2": AWQ stores zeros as they are.

    Args:
        qweight: (in, out / 8) int32.
        qzeros: (groups, out / 8) int32.
        scales: (groups, out), any float dtype. Groups are runs of neighbouring columns.
    Raises:
        CheckpointError: in_features or out_features do not fill words, or float16 would change a scale.
    """
    in_features, groups = qweight.shape[0], scales.shape[0]
    return PackedWeight(
        qweight=pack_codes(_in_order(qweight).T, AWQ_BITS),
        qzeros=pack_codes(_in_order(qzeros), AWQ_BITS).T.contiguous(),
        scales=as_float16(scales),
        g_idx=trivial_groups(in_features, in_features // groups),
        bits=AWQ_BITS,
        checkpoint_format="gptq_v2",
    )


def _in_order(words: Tensor) -> Tensor:
    """(columns, out / 8) words as (out, columns) codes."""
    shuffled = unpack_codes(words.T.contiguous(), AWQ_BITS)  # (out, columns), each eight outputs in AWQ's order
    return shuffled.reshape(-1, 8, words.shape[0])[:, _NIBBLE_OF_OUTPUT].flatten(0, 1)
