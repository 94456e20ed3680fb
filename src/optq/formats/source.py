# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint in any format, in GPTQ's words: what every reader makes, and every writer takes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from optq.checkpoint import PackedWeight, with_trivial_groups
from optq.checkpoint.headers import TensorHeader
from optq.config.dynamic import dynamic_rules
from optq.config.gptq import GPTQConfig
from optq.errors import CheckpointError, found_in, shortened
from optq.readers import kind_of, pattern_of
from optq.scheme import LayerScheme
from optq.version import __version__

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
        headers: those that a GPTQ checkpoint of these weights has, each with the file and name of the tensor that it
            is of: so what is checked of one is checked of all. None of a GGUF file, which is checked otherwise.
    """

    config: GPTQConfig
    schemes: dict[str, LayerScheme]
    dense: list[str]
    parts: tuple[str, ...]
    read: Callable[[Parts, LayerScheme], PackedWeight]
    headers: Headers = field(default_factory=dict)

    def without_desc_act(self) -> "Source":
        """The same source with every linear's groups renumbered by the order of their columns.

        Reading a linear whose groups are not runs of neighbouring columns then raises CheckpointError.
        """

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
    """A checkpoint that is open for conversion, with everything that belongs to the model.

    Args:
        described: its transformers config.
        save_companions: writes the tokenizer and other small files to a folder.
    """

    described: Any
    source: Source
    tensors: Tensors
    save_companions: Callable[[Path], None]


def entry_of(stated: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """What a config.json of another tool says under a key; `default` if nothing or null.

    Raises:
        CheckpointError: it is of another type.
    """
    found = stated.get(key)
    if found is not None and not isinstance(found, kind):
        raise CheckpointError(
            f"config.json: quantization_config says {key}={shortened(repr(found), 100)}, and a {kind.__name__} was "
            "expected. Correct it, or download it again."
        )
    return default if found is None else found


def names_of(headers: Headers, part: str) -> list[str]:
    """The modules that have a tensor of this name."""
    return [name.removesuffix(f".{part}") for name in headers if name.endswith(f".{part}")]


def parts_in(headers: Headers, parts: Sequence[str], needed: Sequence[str]) -> dict[str, dict[str, TensorHeader]]:
    """The packed linears' tensors, by the linear's name and by the last part of theirs.

    Args:
        parts: which tensors a linear may have; the first one stands for it.
        needed: which it has to have.
    Raises:
        CheckpointError: one is missing.
    """
    linears: dict[str, dict[str, TensorHeader]] = {}
    for key, header in headers.items():
        name, _, part = key.rpartition(".")
        if part in parts:
            linears.setdefault(name, {})[part] = header
    for name, own in linears.items():
        if missing := [part for part in needed if part not in own]:
            part, found = next(iter(own.items()))
            raise CheckpointError(
                f"{name}: the checkpoint has {part} ({found}) but not {' and '.join(missing)}. A file of it may be "
                "missing, or of another checkpoint; download it again."
            )
    return linears


def gptq_config(schemes: Mapping[str, LayerScheme], dense: Iterable[str], origin: str) -> GPTQConfig:
    """The GPTQ config of linears that another tool quantized, and of those that it left dense."""
    if not schemes:
        raise CheckpointError(f"No linear is quantized in the way of {origin}, so there is nothing to convert.")
    base = Counter(schemes.values()).most_common(1)[0][0]
    excluded: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns_of(dense, schemes)}
    with found_in("config.json: quantization_config"):
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


def dense_matrices(headers: Headers) -> list[str]:
    return [name for name in names_of(headers, "weight") if len(headers[f"{name}.weight"].shape) == 2]


def patterns_of(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions for `names` and for none of `others`: one for all blocks where blocks do not differ."""
    other_kinds = set(map(kind_of, others))
    fused: dict[str, list[str]] = {}
    for kind in dict.fromkeys(name if kind_of(name) in other_kinds else kind_of(name) for name in names):
        parent, _, child = kind.rpartition(".")
        fused.setdefault(parent, []).append(child)
    return [pattern_of(parent, children).replace(r"\*", r"\d+") for parent, children in fused.items()]
