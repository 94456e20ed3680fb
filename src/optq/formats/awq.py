# SPDX-License-Identifier: Apache-2.0
"""AWQ's "gemm" layout of 4-bit weights, which GPTQ's can hold exactly.

Both matrices of integers are packed along out_features, eight to a word and not in their order: even ones first.

    word w = o7 o5 o3 o1 o6 o4 o2 o0        o_i = output 8w + i, the lowest four bits on the right
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from optq.checkpoint.layout import PackedWeight, as_float16
from optq.checkpoint.packing import pack_codes, unpack_codes
from optq.errors import CheckpointError, found_in
from optq.scheme import PACKED_WORD_BITS, LayerScheme, trivial_groups

from .source import Headers, Parts, Source, dense_matrices, entry_of, gptq_config, parts_in

AWQ_BITS = 4
AWQ_NAMES = ("qweight", "qzeros", "scales")
_NIBBLE_OF_OUTPUT = [0, 4, 1, 5, 2, 6, 3, 7]


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """Repack an AWQ weight for GPTQ, qweight (in · bits / 32, out), in "gptq_v2", which stores zeros as AWQ does.

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


def describe_awq(stated: dict[str, Any], headers: Headers) -> Source:
    version = (entry_of(stated, "version", str, "") or entry_of(stated, "format", str, "") or "gemm").lower()
    bits = stated.get("bits", AWQ_BITS)
    if version != "gemm" or bits != AWQ_BITS:
        raise CheckpointError(
            f"config.json: quantization_config: AWQ's version {version!r} with {bits} bits is not read; only 'gemm' "
            f"with {AWQ_BITS} is."
        )
    # Zeros are stored for every group, so the grid is asymmetric whatever `zero_point` says.
    with found_in("config.json: quantization_config"):
        scheme = LayerScheme(bits=AWQ_BITS, group_size=stated.get("group_size", 128), symmetric=False)
    schemes, as_gptq = {}, dict(headers)
    for name, own in parts_in(headers, AWQ_NAMES, AWQ_NAMES).items():
        shapes = {part: own[part].shape for part in AWQ_NAMES}
        in_features, words = (*shapes["qweight"], 0, 0)[:2]
        outputs = words * PACKED_WORD_BITS // AWQ_BITS
        groups = scheme.group_count(in_features) if in_features else 0
        expected = {"qweight": (in_features, words), "qzeros": (groups, words), "scales": (groups, outputs)}
        if shapes != expected or not words or not groups or in_features % groups:
            raise CheckpointError(
                f"{name} ({own['qweight'].file}): tensor shapes {shapes} are not those of AWQ's gemm layout with "
                f"group_size {scheme.group_size}: qweight (in, out/8), qzeros (groups, out/8), scales (groups, out)."
            )
        if reason := scheme.why_not_packed(in_features, outputs):
            raise CheckpointError(f"{name} ({own['qweight'].file}): {reason}.")
        shape = (in_features * AWQ_BITS // PACKED_WORD_BITS, outputs)
        as_gptq[f"{name}.qweight"] = replace(own["qweight"], shape=shape)
        schemes[name] = scheme

    def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
        return from_awq(**parts)

    dense = dense_matrices(headers)
    config = gptq_config(schemes, dense, "awq")
    return Source(config=config, schemes=schemes, dense=dense, parts=AWQ_NAMES, read=read, headers=as_gptq)
