# SPDX-License-Identifier: Apache-2.0
"""GPTQ's own checkpoints, of any tool: both of its formats, v1 and v2."""

from collections.abc import Iterable
from typing import Any

import torch

from optq.checkpoint import TENSOR_NAMES, PackedWeight, find_quantized_linears
from optq.config.gptq import GPTQConfig
from optq.config.metadata import check_label
from optq.errors import CheckpointError, found_in
from optq.scheme import PACKED_WORD_BITS, LayerScheme, trivial_groups
from optq.version import __version__

from .source import Headers, Parts, Source, dense_matrices


def describe_gptq(stated: dict[str, Any], headers: Headers) -> Source:
    with found_in("config.json: quantization_config"):
        config = GPTQConfig.from_dict(stated)
    linears = find_quantized_linears(dict(headers))

    def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
        in_features = parts["qweight"].shape[0] * PACKED_WORD_BITS // scheme.bits
        trivial = trivial_groups(in_features, scheme.group_width(in_features))
        packed = {"g_idx": trivial, **parts}  # some tools leave it out where it says nothing
        packed["g_idx"] = packed["g_idx"].to(torch.int32)  # of some it is int64
        return PackedWeight(**packed, bits=scheme.bits, checkpoint_format=config.zero_format)

    for linear in linears.values():
        check_label(linear, config.scheme_for(linear.name))
    return Source(
        config=config,
        schemes=_schemes(config, linears),
        dense=dense_matrices(headers),
        parts=TENSOR_NAMES,
        read=read,
        headers=headers,
    )


def gptq_entry(source: Source, name: str) -> dict[str, Any]:
    """The quantization_config of the same weights in "gptq" (v1) or "gptq_v2"."""
    config = source.config
    if name == "gptq" and config.format != "gptq":  # v1's zeros are read as their writer stored them
        wrote = config.meta or {}
        config.meta = {
            **wrote,
            "quantizer": [f"optq:{__version__}"],
            "converted_from": wrote.get("converted_from") or config.format,
        }
    config.format = name
    stated: dict[str, Any] = config.to_dict()
    return stated


def _schemes(config: GPTQConfig, linears: Iterable[str]) -> dict[str, LayerScheme]:
    """How the config says that each of the linears is quantized."""
    schemes = {}
    for name in linears:
        if (scheme := config.scheme_for(name)) is None:
            raise CheckpointError(
                f"{name} is packed, but config.json excludes it. Correct its dynamic or modules_in_block_to_quantize."
            )
        schemes[name] = scheme
    return schemes
