# SPDX-License-Identifier: Apache-2.0
"""The "pack-quantized" layout of compressed-tensors: GPTQ's words, transposed.

Its codes are signed, and 2 ** (bits - 1) is added to codes and zeros before they are packed into the same bitstream:
which makes them the unsigned ones that GPTQ packs. compressed-tensors 0.20 was read and run.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from optq.checkpoint.layout import PackedWeight, as_float16, relabel
from optq.checkpoint.packing import pack_codes
from optq.errors import CheckpointError
from optq.scheme import PACKED_WORD_BITS, LayerScheme, trivial_groups

COMPRESSED_NAMES = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")


def from_compressed(parts: Mapping[str, Tensor], scheme: LayerScheme) -> PackedWeight:
    """The same weight as GPTQ packs it, in checkpoint_format "gptq_v2".

    Args:
        parts: by name: weight_packed (out, in · bits / 32) int32; weight_shape, holding out and in; weight_scale
            (out, groups), any float dtype; weight_zero_point (out · bits / 32, groups) int32, if asymmetric;
            weight_g_idx (in,) int32, of versions before 0.19, if groups are not runs of neighbouring columns.
    Raises:
        CheckpointError: shapes contradict the scheme, rows do not fill words, or float16 would change a scale.
    """
    if "weight_shape" not in parts:
        raise CheckpointError("the checkpoint has weight_packed but not weight_shape.")
    out_features, in_features = parts["weight_shape"].tolist()
    groups = scheme.group_count(in_features)
    if reason := scheme.why_not_packed(in_features, out_features):
        raise CheckpointError(f"{reason}.")
    expected = {
        "weight_packed": (out_features, in_features * scheme.bits // PACKED_WORD_BITS),
        "weight_scale": (out_features, groups),
        "weight_zero_point": None if scheme.symmetric else (out_features * scheme.bits // PACKED_WORD_BITS, groups),
        "weight_g_idx": (in_features,) if "weight_g_idx" in parts else None,
    }
    found = {name: tuple(parts[name].shape) if name in parts else None for name in expected}
    if found != expected:
        raise CheckpointError(
            f"the shapes are {found}, but config.json says {scheme.bits} bits and group_size {scheme.group_size}, "
            f"with which they would be {expected}. (Before compressed-tensors 0.18, words of 3 bits had gaps; such "
            "are not read.)"
        )
    if scheme.symmetric:
        zeros = pack_codes(torch.full((out_features, groups), 2 ** (scheme.bits - 1)), scheme.bits)
    else:
        zeros = parts["weight_zero_point"]
    return PackedWeight(
        qweight=parts["weight_packed"].T.contiguous(),
        qzeros=zeros.T.contiguous(),
        scales=as_float16(parts["weight_scale"].T.contiguous()),
        g_idx=parts.get("weight_g_idx", trivial_groups(in_features, scheme.group_width(in_features))),
        bits=scheme.bits,
        checkpoint_format="gptq_v2",
    )


def to_compressed(packed: PackedWeight, symmetric: bool) -> dict[str, Tensor]:
    """The inverse of `from_compressed`; zeros of a symmetric weight, all in the middle, are not stored.

    Raises:
        CheckpointError: the groups are not runs of equally many neighbouring columns.
    """
    width, rest = divmod(packed.in_features, packed.scales.shape[0])
    if rest or not torch.equal(packed.g_idx, trivial_groups(packed.in_features, width)):
        raise CheckpointError(
            "its groups are not runs of equally many neighbouring columns (desc_act, or a narrower last group), and "
            "compressed-tensors knows no others since 0.19, which gave up weight_g_idx."
        )
    parts = {
        "weight_packed": packed.qweight.T.contiguous(),
        "weight_shape": torch.tensor([packed.out_features, packed.in_features]),
        "weight_scale": packed.scales.T.contiguous(),
    }
    if not symmetric:
        parts["weight_zero_point"] = relabel(packed, "gptq_v2").qzeros.T.contiguous()
    return parts
