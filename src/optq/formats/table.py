# SPDX-License-Identifier: Apache-2.0
"""Formats that `optq.convert` reads, each in GPTQ's words, and what config.json says in the ones that it writes."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from optq.checkpoint import TENSOR_NAMES, PackedWeight, find_quantized_linears, with_trivial_groups
from optq.checkpoint.layout import TensorHeader
from optq.config.dynamic import dynamic_rules, pattern_of
from optq.config.gptq import GPTQConfig
from optq.config.metadata import check_label
from optq.errors import CheckpointError
from optq.readers import kind_of
from optq.scheme import BITS, PACKED_WORD_BITS, ActOrder, LayerScheme, trivial_groups
from optq.version import __version__

from .awq import AWQ_BITS, from_awq
from .compressed_tensors import COMPRESSED_NAMES, from_compressed

Headers = Mapping[str, TensorHeader]
Parts = Mapping[str, Tensor]
"""The tensors of one linear, by the last part of their names."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint in any format, in GPTQ's words.

    Args:
        config: what config.json says of these weights in a GPTQ checkpoint.
        schemes: how each quantized linear is, by name.
        dense: the modules whose weight is a matrix that is not quantized: linears and embeddings.
        parts: which tensors a linear has; the first one stands for it.
        read: makes of one linear's tensors what GPTQ stores, bit for bit the same weight.
    """

    config: GPTQConfig
    schemes: dict[str, LayerScheme]
    dense: list[str]
    parts: tuple[str, ...]
    read: Callable[[Parts, LayerScheme], PackedWeight]

    def without_desc_act(self) -> "Source":
        """The same with groups in the order of their columns; reading a linear where they cannot be is refused."""

        def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
            packed = self.read(parts, scheme)
            return with_trivial_groups(packed, scheme.group_width(packed.in_features))

        return replace(self, config=self.config.without_desc_act(), read=read)


class Tensors(Protocol):
    """A checkpoint's tensors by name, each read when it is asked for."""

    by_file: dict[str, list[str]]
    """The names of those that belong into one file."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """All of a model that is converted.

    Args:
        described: its transformers config.
        save_companions: writes the tokenizer and other small files to a folder.
    """

    described: Any
    source: Source
    tensors: Tensors
    save_companions: Callable[[Path], None]


def describe(stated: dict[str, Any], headers: Headers) -> Source:
    """What a checkpoint holds, from its quantization_config and the headers of its tensors.

    Raises:
        CheckpointError: the format is unknown, or not of integers on a uniform grid, or contradicts the headers.
    """
    method = stated.get("quant_method", "gptq")
    if method not in SOURCES:
        raise CheckpointError(f"quant_method {method!r} is not converted; it may be {', '.join(SOURCES)}.")
    return SOURCES[method](stated, headers)


def _gptq(stated: dict[str, Any], headers: Headers) -> Source:
    config = GPTQConfig.from_dict(stated)
    linears = find_quantized_linears(dict(headers))

    def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
        in_features = parts["qweight"].shape[0] * PACKED_WORD_BITS // scheme.bits
        trivial = trivial_groups(in_features, scheme.group_width(in_features))
        packed = {"g_idx": trivial, **parts}  # some tools leave it out where it says nothing
        return PackedWeight(**packed, bits=scheme.bits, checkpoint_format=config.zero_format)

    for linear in linears.values():
        check_label(linear, config.scheme_for(linear.name))
    return Source(
        config=config,
        schemes=_schemes(config, linears),
        dense=_dense_matrices(headers),
        parts=TENSOR_NAMES,
        read=read,
    )


def _awq(stated: dict[str, Any], headers: Headers) -> Source:
    version = (stated.get("version") or stated.get("format") or "gemm").lower()
    bits = stated.get("bits", AWQ_BITS)
    if version != "gemm" or bits != AWQ_BITS:
        raise CheckpointError(
            f"AWQ's version {version!r} with {bits} bits is not read; only 'gemm' with {AWQ_BITS} is."
        )
    # Zeros are stored for every group, so the grid is asymmetric whatever `zero_point` says.
    scheme = LayerScheme(bits=AWQ_BITS, group_size=stated.get("group_size", 128), symmetric=False)
    schemes = {}
    for name in _names_of(headers, "qweight"):
        shapes = {part: headers[f"{name}.{part}"].shape for part in _AWQ_PARTS if f"{name}.{part}" in headers}
        in_features, words = shapes["qweight"]
        groups = scheme.group_count(in_features)
        expected = {
            "qweight": (in_features, words),
            "qzeros": (groups, words),
            "scales": (groups, words * PACKED_WORD_BITS // AWQ_BITS),
        }
        if shapes != expected or in_features % groups:
            raise CheckpointError(
                f"{name}: tensor shapes {shapes} are not those of AWQ's gemm layout with group_size "
                f"{scheme.group_size}, which are {expected}."
            )
        schemes[name] = scheme

    def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
        return from_awq(**parts)

    dense = _dense_matrices(headers)
    config = gptq_config(schemes, dense, "awq")
    return Source(config=config, schemes=schemes, dense=dense, parts=_AWQ_PARTS, read=read)


_AWQ_PARTS = ("qweight", "qzeros", "scales")


def _compressed(stated: dict[str, Any], headers: Headers) -> Source:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if stated.get(key):
            raise CheckpointError(f"config.json has a {key}, which a GPTQ checkpoint cannot tell its readers.")
    groups = stated.get("config_groups") or {}
    targets = {target: (key, group) for key, group in groups.items() for target in group["targets"]}
    schemes = {}
    act_order: ActOrder = "desc_act" if _names_of(headers, "weight_g_idx") else "static"
    for name in _names_of(headers, "weight_packed"):
        patterns = (found for target, found in targets.items() if _is_pattern_of(target, name))
        declared = targets.get(name) or next(patterns, None) or targets.get("Linear")
        if declared is None:
            raise CheckpointError(f"{name} is packed, but is the target of none of config.json's config_groups.")
        schemes[name] = _compressed_scheme(*declared, stated.get("format"), act_order)

    def read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
        return from_compressed(parts, scheme)

    dense = _dense_matrices(headers)
    config = gptq_config(schemes, dense, COMPRESSED)
    return Source(config=config, schemes=schemes, dense=dense, parts=COMPRESSED_NAMES, read=read)


def _is_pattern_of(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None


def _compressed_scheme(key: str, group: dict[str, Any], form: str | None, act_order: ActOrder) -> LayerScheme:
    """What one of config_groups says about the weights of its targets."""
    weights = group.get("weights") or {}
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
                f"config_groups: {key!r} has {field} {found!r}; what GPTQ can hold has {', '.join(map(str, allowed))}."
            )
    return LayerScheme(
        bits=weights["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else -1,
        symmetric=weights.get("symmetric", True),
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


COMPRESSED = "compressed-tensors"

SOURCES: dict[str, Callable[[dict[str, Any], Headers], Source]] = {"gptq": _gptq, "awq": _awq, COMPRESSED: _compressed}
"""By the quant_method of a quantization_config."""


def _names_of(headers: Headers, part: str) -> list[str]:
    """The modules that have a tensor of this name."""
    return [name.removesuffix(f".{part}") for name in headers if name.endswith(f".{part}")]


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


def gptq_config(schemes: Mapping[str, LayerScheme], dense: Iterable[str], origin: str) -> GPTQConfig:
    """What config.json says of linears that another tool quantized, and of those that it left alone."""
    if not schemes:
        raise CheckpointError(f"No linear is quantized in the way of {origin}, so there is nothing to convert.")
    base = Counter(schemes.values()).most_common(1)[0][0]
    excluded: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns_of(dense, schemes)}
    return GPTQConfig(
        bits=base.bits,
        group_size=base.group_size,
        sym=base.symmetric,
        desc_act=base.act_order == "desc_act",
        dynamic={**excluded, **dynamic_rules(dict(schemes), base)} or None,
        lm_head="lm_head" in schemes,
        damp_percent=None,
        meta={"quantizer": [f"optq:{__version__}"], "converted_from": origin},
    )


def _dense_matrices(headers: Headers) -> list[str]:
    return [name for name in _names_of(headers, "weight") if len(headers[f"{name}.weight"].shape) == 2]


def patterns_of(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions for `names` and for none of `others`: one for all blocks where blocks do not differ."""
    other_kinds = set(map(kind_of, others))
    fused: dict[str, list[str]] = {}
    for kind in dict.fromkeys(name if kind_of(name) in other_kinds else kind_of(name) for name in names):
        parent, _, child = kind.rpartition(".")
        fused.setdefault(parent, []).append(child)
    return [pattern_of(parent, children).replace(r"\*", r"\d+") for parent, children in fused.items()]
