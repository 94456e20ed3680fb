# SPDX-License-Identifier: Apache-2.0
"""The "pack-quantized" layout of compressed-tensors: GPTQ's words, transposed.

Its codes are signed, and 2 ** (bits - 1) is added to codes and zeros before they are packed into the same bitstream:
which makes them the unsigned ones that GPTQ packs. compressed-tensors 0.20 was read and run.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optq.checkpoint.headers import TensorHeader, reader_of
from optq.checkpoint.layout import PackedWeight, as_float16, relabel
from optq.checkpoint.packing import pack_codes
from optq.config.dynamic import Patterns
from optq.errors import CheckpointError, found_in
from optq.scheme import BITS, PACKED_WORD_BITS, ActOrder, LayerScheme, trivial_groups

from .source import Headers, Parts, Source, dense_matrices, entry_of, gptq_config, names_of, parts_in, patterns_of

COMPRESSED = "compressed-tensors"
COMPRESSED_NAMES = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")


def from_compressed(parts: Mapping[str, Tensor], scheme: LayerScheme) -> PackedWeight:
    """Convert a pack-quantized weight to GPTQ's packing, qweight (in · bits / 32, out), in "gptq_v2".

    Args:
        parts: by name: weight_packed (out, in · bits / 32) int32; weight_shape, holding out and in; weight_scale
            (out, groups), any float dtype; weight_zero_point (out · bits / 32, groups) int32, if asymmetric;
            weight_g_idx (in,) int32, of versions before 0.19, if groups are not runs of neighbouring columns.
            Their shapes are those that `describe_compressed` has checked.
    Raises:
        CheckpointError: float16 would change a scale.
    """
    out_features, in_features = parts["weight_shape"].tolist()
    groups = scheme.group_count(in_features)
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
    """Convert a packed weight to pack-quantized tensors, by name: the inverse of `from_compressed`.

    Returns:
        weight_packed (out, in · bits / 32) int32; weight_shape (2,) int64; weight_scale (out, groups); and, unless
        `symmetric`, weight_zero_point (out · bits / 32, groups) int32.
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


def describe_compressed(stated: dict[str, Any], headers: Headers) -> Source:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if stated.get(key):
            raise CheckpointError(f"config.json has a {key}, which a GPTQ checkpoint cannot tell its readers.")
    groups = entry_of(stated, "config_groups", dict, {})
    targets = {}
    for key in groups:
        group = entry_of(groups, key, dict, {})
        targets.update({str(target): (key, group) for target in entry_of(group, "targets", list, [])})
    schemes = {}
    act_order: ActOrder = "desc_act" if names_of(headers, "weight_g_idx") else "static"
    expressions = [target for target in targets if target.startswith("re:")]
    patterns = Patterns(tuple(target.removeprefix("re:") for target in expressions), "config.json: config_groups")
    packed = parts_in(headers, COMPRESSED_NAMES, ("weight_packed",))
    for name in packed:
        place = None if name in targets else patterns.first(name)
        declared = targets.get(name if place is None else expressions[place]) or targets.get("Linear")
        if declared is None:
            raise CheckpointError(f"{name} is packed, but is the target of none of config.json's config_groups.")
        schemes[name] = _compressed_scheme(*declared, stated.get("format"), act_order)

    def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
        return from_compressed(parts, scheme)

    dense = dense_matrices(headers)
    config = gptq_config(schemes, dense, COMPRESSED)
    as_gptq = {key: header for key, header in headers.items() if key.rpartition(".")[2] not in COMPRESSED_NAMES}
    shapes = _stated_shapes(packed)
    for name, own in packed.items():
        with found_in(name):
            _check_shapes(own, *shapes[name], schemes[name])
        as_gptq |= {f"{name}.{part}": header for part, header in _as_gptq(own, schemes[name]).items()}
    return Source(config=config, schemes=schemes, dense=dense, parts=COMPRESSED_NAMES, read=read, headers=as_gptq)


def _stated_shapes(packed: Mapping[str, Mapping[str, TensorHeader]]) -> dict[str, tuple[int, int]]:
    """What weight_shape says of each linear: outputs and inputs.

    Raises:
        CheckpointError: a linear has none, or it holds something else.
    """
    for name, own in packed.items():
        stated = own.get("weight_shape")
        if stated is None:
            raise CheckpointError(
                f"{name}: the checkpoint has weight_packed but not weight_shape ({own['weight_packed'].file})."
            )
        if stated.shape != (2,) or stated.dtype not in (torch.int32, torch.int64):
            raise CheckpointError(
                f"{stated} has shape {stated.shape} and is of {stated.dtype}; it holds two integers, outputs and "
                "inputs. The file is damaged; download it again."
            )
    with reader_of(own["weight_shape"] for own in packed.values()) as read:
        return {name: tuple(read(own["weight_shape"]).tolist()) for name, own in packed.items()}


def _check_shapes(own: Mapping[str, TensorHeader], out_features: int, in_features: int, scheme: LayerScheme) -> None:
    """Compare a linear's tensors with what weight_shape and config.json say.

    Raises:
        CheckpointError: they contradict one another, or rows do not fill words.
    """
    if min(out_features, in_features) < 1:
        raise CheckpointError(f"{own['weight_shape']} says {out_features} outputs of {in_features} inputs.")
    if reason := scheme.why_not_packed(in_features, out_features):
        raise CheckpointError(f"{reason} ({own['weight_shape'].file}).")
    groups = scheme.group_count(in_features)
    expected = {
        "weight_packed": (out_features, in_features * scheme.bits // PACKED_WORD_BITS),
        "weight_scale": (out_features, groups),
        "weight_zero_point": None if scheme.symmetric else (out_features * scheme.bits // PACKED_WORD_BITS, groups),
        "weight_g_idx": (in_features,) if "weight_g_idx" in own else None,
    }
    found = {part: own[part].shape if part in own else None for part in expected}
    if found != expected:
        raise CheckpointError(
            f"the shapes are {found} ({own['weight_packed'].file}), but config.json says {scheme.bits} bits and "
            f"group_size {scheme.group_size}, with which they would be {expected}. (Before compressed-tensors 0.18, "
            "words of 3 bits had gaps; such are not read.)"
        )


def _as_gptq(own: Mapping[str, TensorHeader], scheme: LayerScheme) -> dict[str, TensorHeader]:
    """The headers of a linear's tensors, whose shapes are right, as GPTQ has them."""

    def turned(header: TensorHeader) -> TensorHeader:
        return replace(header, shape=header.shape[::-1], transposed=True)

    scales = turned(own["weight_scale"])
    groups, outputs = scales.shape
    zeros = TensorHeader(shape=(groups, outputs * scheme.bits // PACKED_WORD_BITS), dtype=torch.int32)
    found = {
        "qweight": turned(own["weight_packed"]),
        "qzeros": zeros if scheme.symmetric else turned(own["weight_zero_point"]),
        "scales": scales,
    }
    return found | ({"g_idx": own["weight_g_idx"]} if "weight_g_idx" in own else {})


def _compressed_scheme(key: str, group: dict[str, Any], form: str | None, act_order: ActOrder) -> LayerScheme:
    """What one of config_groups says about the weights of its targets."""
    weights = entry_of(group, "weights", dict, {})
    for field, found, allowed in (
        ("format", group.get("format") or form, ("pack-quantized",)),
        ("input_activations", group.get("input_activations"), (None,)),
        ("output_activations", group.get("output_activations"), (None,)),
        ("type", weights.get("type"), ("int",)),
        ("num_bits", weights.get("num_bits"), BITS),
        ("strategy", weights.get("strategy"), ("group", "channel")),
    ):
        if found not in allowed:
            raise CheckpointError(
                f"config.json: config_groups: {key!r} has {field} {found!r}; what GPTQ can hold has "
                f"{', '.join(map(str, allowed))}."
            )
    with found_in(f"config.json: config_groups: {key!r}"):
        return LayerScheme(
            bits=weights["num_bits"],
            group_size=weights.get("group_size") if weights["strategy"] == "group" else -1,
            symmetric=entry_of(weights, "symmetric", bool, True),
            act_order=act_order,
        )


def compressed_entry(source: Source) -> dict[str, Any]:
    """The quantization_config of the same weights in compressed-tensors' pack-quantized format."""
    members: dict[tuple[int, int, bool], list[str]] = {}
    for name, scheme in source.schemes.items():
        members.setdefault((scheme.bits, scheme.group_size, scheme.symmetric), []).append(name)
    groups = {}
    for index, (key, names) in enumerate(sorted(members.items(), key=lambda item: len(item[1]))):
        bits, group_size, symmetric = key
        strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        named = patterns_of(names, source.schemes.keys() - set(names))
        most = index == len(members) - 1  # servers look for their scheme under this name
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if most else [f"re:{pattern}" for pattern in named],
            "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy},
        }
    dense = [name for name in source.dense if name != "lm_head"]
    ignored = [f"re:{pattern}" for pattern in patterns_of(dense, source.schemes)]
    return {
        "quant_method": COMPRESSED,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        # A head that is tied to the embeddings is a linear, too, but has no tensor that could tell.
        "ignore": ignored if "lm_head" in source.schemes else ["lm_head", *ignored],
    }
