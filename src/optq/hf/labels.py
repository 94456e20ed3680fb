# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a checkpoint are not what its config says: readers that believe the label compute nonsense."""

from collections.abc import Iterator

import torch
from torch import Tensor

from optq.checkpoint import CHECKPOINT_FORMATS, QuantizedTensors, unpack_codes
from optq.errors import CheckpointError, counted
from optq.scheme import LayerScheme, trivial_groups


def zeros_contradict(name: str, scheme: LayerScheme, checkpoint_format: str, qzeros: Tensor) -> Iterator[str]:
    """Of the linear of this name; qzeros: (groups, out · bits / 32) int32."""
    stored = set(unpack_codes(qzeros.T.contiguous(), scheme.bits).unique().tolist())
    offset = CHECKPOINT_FORMATS[checkpoint_format]
    middle = 2 ** (scheme.bits - 1)
    if not scheme.symmetric or stored == {middle - offset}:
        return
    for other, its_offset in CHECKPOINT_FORMATS.items():
        if stored == {middle - its_offset}:
            yield (
                f"{name}: config.json says checkpoint_format {checkpoint_format!r}, but every stored "
                f"zero is {middle - its_offset}: so {other!r} writes the middle of a {scheme.bits}-bit grid. Read as "
                f"labelled, every weight is off by one step. Correct checkpoint_format to {other!r}."
            )
            return
    shown = ", ".join(map(str, sorted(stored)[:6]))
    yield (
        f"{name}: config.json says sym=true, but the stored zeros are {shown}{' …' * (len(stored) > 6)}, not "
        f"{middle - offset} everywhere. Readers that believe the label compute nonsense. Correct sym to false."
    )


def groups_contradict(name: str, scheme: LayerScheme, g_idx: Tensor) -> Iterator[str]:
    """Of the linear of this name; g_idx: (in,) int32."""
    trivial = trivial_groups(g_idx.numel(), scheme.group_width(g_idx.numel()), g_idx.device)
    if scheme.act_order != "desc_act" and not torch.equal(g_idx, trivial):
        yield (
            f"{name}: config.json says desc_act=false, but its groups are not runs of neighbouring columns. "
            "Readers that believe the label, among them vLLM, compute nonsense. Correct desc_act to true."
        )


def check_label(tensors: QuantizedTensors, scheme: LayerScheme | None) -> None:
    """Refuse bits and a group size that the shapes of the tensors contradict."""
    if scheme is None:
        return
    if scheme.bits != tensors.bits:
        raise CheckpointError(
            f"{tensors.name}: config.json says {scheme.bits} bits, but the tensors hold {tensors.bits}. "
            "Correct quantization_config.bits, or its dynamic entry for this layer."
        )
    groups = tensors.headers["scales"].shape[0]
    # Writers disagree whether a narrower last group exists; both counts are read.
    width = scheme.group_width(tensors.in_features)
    if groups not in (scheme.group_count(tensors.in_features), tensors.in_features // width):
        raise CheckpointError(
            f"{tensors.name}: config.json says group_size {scheme.group_size}, which makes "
            f"{counted(scheme.group_count(tensors.in_features), 'group')} of {tensors.in_features} columns, but the "
            f"tensors hold {groups}. Correct quantization_config.group_size, or its dynamic entry for this layer."
        )
