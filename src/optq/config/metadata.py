# SPDX-License-Identifier: Apache-2.0
"""Where a model or the bytes of a checkpoint are not what a config says: readers that believe it compute nonsense."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from optq.checkpoint import (
    CHECKPOINT_FORMATS,
    QuantizedTensors,
    label_of,
    reader_of,
    rules_differ,
    unpack_codes,
    value_errors,
)
from optq.checkpoint.headers import TensorHeader
from optq.checkpoint.zeros import encode_zeros
from optq.errors import CheckpointError, counted
from optq.readers import kind_of
from optq.scheme import PACKED_WORD_BITS, LayerScheme, trivial_groups

from .dynamic import matches, names_in, pattern_in
from .gptq import GPTQConfig

HEAD_NAMES = ("lm_head", "embed_out", "output")
"""What output heads are called, as the last part of their names."""


def zeros_contradict(name: str, scheme: LayerScheme, zero_format: str, qzeros: Tensor) -> Iterator[str]:
    """Yield one sentence if the zeros of the linear `name` contradict config.json's checkpoint_format or sym.

    Args:
        zero_format: a key of `CHECKPOINT_FORMATS` or `BORROWING`.
        qzeros: (groups, out · bits / 32) int32.
    """
    checkpoint_format, middle = label_of(zero_format), 2 ** (scheme.bits - 1)
    if not scheme.symmetric:
        return
    outputs = qzeros.shape[1] * PACKED_WORD_BITS // scheme.bits
    row = encode_zeros(torch.full((1, outputs), middle, dtype=torch.int16), scheme.bits, zero_format)
    if torch.equal(qzeros, row.to(qzeros.device).expand_as(qzeros)):
        return
    stored = set(unpack_codes(qzeros.T.contiguous(), scheme.bits).unique().tolist())
    offset = CHECKPOINT_FORMATS[checkpoint_format]
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


def zeros_are_ambiguous(bits: int, zero_format: str, qzeros: Tensor) -> bool:
    """Whether v1 zeros, (groups, out · bits / 32) int32, mean different things from GPTQModel and from AutoGPTQ."""
    return zero_format == "gptq" and rules_differ(qzeros, bits)


def ambiguity(names: list[str]) -> str:
    """The warning about v1 zeros whose meaning depends on an unknown writer; `names` are the linears' names."""
    more = f" and {len(names) - 1} more linears" if len(names) > 1 else ""
    return (
        f"{names[0]}.qzeros{more}: zeros of 0 in checkpoint_format 'gptq' mean what their writer made of them, and "
        "config.json does not say that it was GPTQModel or AutoRound. They are read as AutoGPTQ reads its own files, "
        "where such zeros, and others in the same words, are lost. If one of these wrote the file, add its name to "
        'quantization_config: "meta": {"quantizer": ["gptqmodel:7.0"]}.'
    )


def groups_contradict(name: str, scheme: LayerScheme, g_idx: Tensor) -> Iterator[str]:
    """Yield one sentence if g_idx, (in,) int32, of the linear `name` contradicts desc_act=false."""
    trivial = trivial_groups(g_idx.numel(), scheme.group_width(g_idx.numel()), g_idx.device)
    if scheme.act_order != "desc_act" and not bool((g_idx == trivial).all()):
        yield (
            f"{name}: config.json says desc_act=false, but its groups are not runs of neighbouring columns. "
            "Readers that believe the label, among them vLLM, compute nonsense. Correct desc_act to true."
        )


COMPARABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that can be NaN, of what a model has vectors of."""

SMALL = ("scales", "g_idx", "bias")
"""The tensors of a packed linear that are read to be checked: a few hundredths of it."""


def unusable(
    quantized: Iterable[QuantizedTensors], vectors: Iterable[TensorHeader], config: GPTQConfig
) -> Iterator[str]:
    """Read the small tensors of a checkpoint, and yield one sentence for each that cannot be computed with.

    Args:
        quantized: the packed linears, as their headers say: qweight is (in · bits / 32, out).
        vectors: other tensors that have to be finite, such as the (features,) weights of norms.
        config: may state another group size for each linear.
    """
    linears, others = list(quantized), [header for header in vectors if header.dtype in COMPARABLE]
    with reader_of([*others, *(x.headers[part] for x in linears for part in SMALL if part in x.headers)]) as read:
        for linear in linears:
            scales, g_idx, bias = (read(linear.headers[part]) if part in linear.headers else None for part in SMALL)
            assert scales is not None  # no linear without
            scheme = config.scheme_for(linear.name)
            is_told = scheme is not None and linear.groups in _group_counts(scheme, linear.in_features)
            width = scheme.group_width(linear.in_features) if scheme is not None and is_told else None
            yield from value_errors(f"{linear.file}: {linear.name}", scales, g_idx, bias, width)
        for header in others:
            if not bool(read(header).float().isfinite().all()):
                yield f"{header}: it is not finite. The file is damaged; download it again."


def mislabelled(quantized: Iterable[QuantizedTensors], config: GPTQConfig) -> Iterator[str]:
    """Read zeros and groups of a checkpoint, and yield where they are not what config.json says: once per kind.

    Args:
        quantized: the packed linears, as their headers say: qweight is (in · bits / 32, out).
    """
    linears, zero_format = list(quantized), config.zero_format
    found: dict[tuple[str, str], str] = {}  # by the linear's kind, and by what is the matter
    unclear = []
    with reader_of(x.headers[part] for x in linears for part in ("qzeros", "g_idx") if part in x.headers) as read:
        for linear in linears:
            if (scheme := config.scheme_for(linear.name)) is None:
                continue
            zeros = read(linear.headers["qzeros"])
            for sentence in zeros_contradict(linear.name, scheme, zero_format, zeros):
                found.setdefault((kind_of(linear.name), "zeros"), sentence)
            if not scheme.symmetric and zeros_are_ambiguous(scheme.bits, zero_format, zeros):
                unclear.append(linear.name)
            if "g_idx" in linear.headers:
                for sentence in groups_contradict(linear.name, scheme, read(linear.headers["g_idx"])):
                    found.setdefault((kind_of(linear.name), "groups"), sentence)
    yield from found.values()
    if unclear:
        yield ambiguity(unclear)


def vectors_in(headers: Mapping[str, TensorHeader], quantized: Mapping[str, QuantizedTensors]) -> list[TensorHeader]:
    """The tensors of one dimension, (features,), that belong to no packed linear."""
    return [x for key, x in headers.items() if len(x.shape) == 1 and key.rpartition(".")[0] not in quantized]


def check_label(tensors: QuantizedTensors, scheme: LayerScheme | None) -> None:
    """Check bits, group size and desc_act against a linear's qweight (in · bits / 32, out) and scales (groups, out).

    Raises:
        CheckpointError: the tensors contradict `scheme`.
    """
    if scheme is None:
        return
    if scheme.bits != tensors.bits:
        raise CheckpointError(
            f"{tensors.name}: config.json says {scheme.bits} bits, but the tensors hold {tensors.bits}. "
            "Correct quantization_config.bits, or its dynamic entry for this layer."
        )
    groups = tensors.groups
    if groups not in _group_counts(scheme, tensors.in_features):
        raise CheckpointError(
            f"{tensors.name}: config.json says group_size {scheme.group_size}, which makes "
            f"{counted(scheme.group_count(tensors.in_features), 'group')} of {tensors.in_features} columns, but the "
            f"tensors hold {groups}. Correct quantization_config.group_size, or its dynamic entry for this layer."
        )
    if scheme.act_order == "desc_act" and groups > 1 and "g_idx" not in tensors.headers:
        raise CheckpointError(
            f"{tensors.name}: config.json says desc_act=true, so columns are in any group, but the checkpoint has no "
            f"{tensors.name}.g_idx that says in which. Correct desc_act to false if they are runs of neighbours; else "
            "download the checkpoint again."
        )


def _group_counts(scheme: LayerScheme, in_features: int) -> tuple[int, int]:
    """How many groups so many columns may have: writers disagree whether a narrower last one exists."""
    return scheme.group_count(in_features), in_features // scheme.group_width(in_features)


def scope_contradicts(
    config: GPTQConfig, quantized: Mapping[str, QuantizedTensors], dense: Iterable[str]
) -> Iterator[str]:
    """Yield where config.json and the tensors disagree about which linears are packed; one sentence of each kind.

    Args:
        quantized: the packed linears by name, as their headers say: qweight is (in · bits / 32, out).
        dense: the names of modules whose weight is a matrix that is not packed.
    """
    found: dict[tuple[str, str], str] = {}  # by kind and by what is the matter
    for name, tensors in quantized.items():
        if (scheme := config.scheme_for(name)) is None:
            found.setdefault(
                (kind_of(name), "excluded"),
                f"{name} is packed, but config.json excludes it. Readers that believe the label look for a dense "
                "weight. Correct dynamic or modules_in_block_to_quantize.",
            )
        try:
            check_label(tensors, scheme)
        except CheckpointError as error:
            found.setdefault((kind_of(name), "shapes"), str(error))
    packed_kinds = set(map(kind_of, quantized))
    for name in dense:
        if kind_of(name) in packed_kinds and config.scheme_for(name) is not None:
            found.setdefault(
                (kind_of(name), "dense"),
                f"{name} is not packed, but config.json does not exclude it, and others of its kind are packed. "
                f"Readers that believe the label look for packed words. Add '-:^{re.escape(name)}$' to dynamic.",
            )
    yield from found.values()
    heads = [name for name in quantized if name.rpartition(".")[2] in HEAD_NAMES and kind_of(name) == name]
    if config.lm_head and not any(kind_of(name) == name for name in quantized):
        yield (
            "config.json says lm_head=true, but the output head is not packed. Readers that believe the label look "
            "for packed words. Correct lm_head to false."
        )
    if heads and not config.lm_head:
        yield (
            f"{heads[0]} is packed, but config.json says lm_head=false. Readers that believe the label look for a "
            "dense weight. Correct lm_head to true."
        )


def without_effect(config: GPTQConfig, linears: list[str]) -> list[str]:
    """Settings of the config for layers that the model lacks, one sentence each; `linears` are the model's names."""
    found = [
        f"modules_in_block_to_quantize: {entry!r} is the name of no linear layer of a block."
        + (" The output head is asked for with lm_head=True." if entry in linears else _nearest(entry, linears))
        for entry in config.listed_modules
        if not any(name.endswith(f".{entry}") and kind_of(name) != name for name in linears)
    ]
    known = set(linears)
    for pattern in config.dynamic or {}:
        listed = names_in(pattern_in(pattern))
        matched = [
            name for name in (listed or linears) if name in known and (listed or matches(pattern_in(pattern), name))
        ]
        if matched and not config.lm_head and not pattern.startswith("-:") and all(kind_of(n) == n for n in matched):
            found.append(
                f"dynamic: {pattern!r} matches only the output head, which stays as it is, so it has no effect. The "
                "output head is asked for with lm_head=True."
            )
        if not matched:
            found.append(
                f"dynamic: {pattern!r} matches no linear layer, so it has no effect."
                + _nearest(re.sub(r"\\[dw.]|[^\w.]", "", pattern_in(pattern)).strip("."), linears)
            )
    return found


def _nearest(text: str, linears: Iterable[str]) -> str:
    """The names most like `text`, as a sentence."""
    kinds = dict.fromkeys(map(kind_of, linears))
    known = {ending: None for kind in kinds for ending in (kind, *_endings(kind))}
    near = (
        get_close_matches(text, known, n=3, cutoff=0.6)
        or list(dict.fromkeys(kind.split("*.")[-1] for kind in kinds))[:8]
    )
    return f" Near it: {', '.join(near)}." if near else ""


def _endings(kind: str) -> list[str]:
    """The last part of a name, and the last two."""
    parts = kind.split(".")
    return [".".join(parts[-count:]) for count in (1, 2)]
