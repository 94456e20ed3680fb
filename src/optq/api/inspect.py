# SPDX-License-Identifier: Apache-2.0
"""`optq.inspect`: what a checkpoint holds and who reads it, from its config, headers and small tensors."""

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optq.checkpoint import QuantizedTensors, find_quantized_linears, read_headers
from optq.checkpoint.headers import TensorHeader
from optq.config.field import short
from optq.config.gptq import GPTQConfig
from optq.config.metadata import mislabelled, scope_contradicts, unusable, vectors_in
from optq.device.memory import GIB
from optq.errors import CheckpointError, OptqError
from optq.files.source import (
    head_width_of,
    model_config_of,
    parallel_plan_of,
    place_of,
    quantization_entry,
    stated_quantization,
    two_sets_of_weights,
    weight_files,
)
from optq.formats.table import FORMATS
from optq.readers import READERS, Linear, kind_of, refusals, split_of
from optq.scheme import LayerScheme
from optq.torch_state import default_torch_state


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Contents of a checkpoint.

    Args:
        config: the quantization_config of config.json; None for a dense model.
        linears: number of quantized linears by kind: (name with * for numbers, out_features, in_features, scheme).
        dense: number of the blocks' matrices of each kind that are not quantized, by name with * for numbers.
        bits_per_weight: bits per weight of the quantized linears, scales and zeros included, as `optq.plan` and the
            log count them; for a dense model, of its blocks' matrices.
        size_gib: size of all files with weights.
        contradictions: where the bytes are not what config.json says.
        refused: by reader, what it refuses and why; empty where it reads all.
    """

    model: str
    config: GPTQConfig | None
    linears: dict[tuple[str, int, int, LayerScheme], int]
    dense: dict[str, int]
    bits_per_weight: float
    size_gib: float
    contradictions: tuple[str, ...]
    refused: dict[str, tuple[str, ...]]


@default_torch_state()
def inspect(
    model_id_or_dir: str | os.PathLike[str],
    *,
    tensor_parallel: int = 1,
    versions: Mapping[str, str] | None = None,
    verify: bool = False,
    **kwargs: Any,
) -> Inspection:
    """Say what a checkpoint holds, GPTQ or dense. Loads no model, and runs none of its code.

    Args:
        tensor_parallel: over how many GPUs a server will split it.
        versions: versions of readers, such as {"vllm": "0.32"}; by default the newest that is known.
        verify: also compare the tensors with those of the model's class; and list all values that nothing can be
            computed with as contradictions, instead of raising the first.
        kwargs: revision, token, trust_remote_code, cache_dir, … as for `from_pretrained`.
    Raises:
        CheckpointError: no safetensors files, tensors that fit no GPTQ layout, or values that nothing can be
            computed with.
        ConfigError: there is no such reader, or nothing is known about that version of it.
    """
    readers: dict[str, str | None] = {**dict.fromkeys(READERS), **(versions or {})}
    source = place_of(model_id_or_dir)
    described = model_config_of(source, kwargs, as_data=True)
    files = weight_files(source, described, kwargs)
    headers = read_headers([os.fspath(file) for file in files])
    _refuse_other_formats(described, source, headers)
    quantized = find_quantized_linears(headers)
    config = stated_quantization(described) if quantized else None
    if quantized and config is None:
        raise CheckpointError(
            f"{source} has packed GPTQ tensors, but its config.json says nothing about quantization. "
            "Add its quantization_config: bits, group_size, desc_act, sym and checkpoint_format at least."
        )
    wrong = [] if config is None else unusable(quantized.values(), vectors_in(headers, quantized), config)
    if config is not None and verify:
        wrong = _verified(wrong, described, headers, config)
    elif (first := next(iter(wrong), None)) is not None:
        raise CheckpointError(first)
    linears = {} if config is None else linears_of(quantized, config, described)
    dense = _dense_weights(headers, quantized)
    return Inspection(
        model=source,
        config=config,
        linears=dict(Counter((x.kind, x.out_features, x.in_features, x.scheme) for x in linears.values())),
        dense=dict(Counter(map(kind_of, dense))),
        bits_per_weight=_bits_per_weight(quantized.values(), dense.values()),
        size_gib=sum(file.stat().st_size for file in files) / GIB,
        contradictions=(
            *wrong,
            *two_sets_of_weights(source, kwargs),
            *(scope_contradicts(config, quantized, _modules_of(dense)) if config is not None else ()),
            *(mislabelled(quantized.values(), config) if config is not None else ()),
        ),
        refused={
            reader: refusals(reader, linears.values(), tensor_parallel, _modules_of(dense), version)
            for reader, version in readers.items()
        },
    )


def _refuse_other_formats(described: Any, source: str, headers: Collection[str]) -> None:
    """Name the format of a checkpoint that is none of GPTQ's; its tensors alone would be called damaged or dense."""
    method = (quantization_entry(described) or {}).get("quant_method")
    if method in (None, "gptq") or any(name.endswith(".g_idx") for name in headers):
        return
    reads = ", ".join(sorted(name for name, row in FORMATS.items() if row.read is not None and name != "gptq"))
    raise CheckpointError(
        f"{source}/config.json says quant_method={short(method)}; GPTQ and dense checkpoints are inspected. "
        f"optq.convert(..., to='gptq') makes GPTQ of {reads}. If the tensors are GPTQ's, correct it to \"gptq\"."
    )


def _dense_weights(headers: Mapping[str, TensorHeader], quantized: Collection[str]) -> dict[str, TensorHeader]:
    """The blocks' matrices that are not quantized; what is in blocks has a number in its name."""
    return {
        name: header
        for name, header in headers.items()
        if len(header.shape) >= 2 and kind_of(name) != name and name.rpartition(".")[0] not in quantized
    }


def _bits_per_weight(quantized: Collection[QuantizedTensors], dense: Iterable[TensorHeader]) -> float:
    """Of the packed linears; if there are none, of the dense matrices."""
    counted = [x.headers[part] for x in quantized for part in ("qweight", "qzeros", "scales")] or list(dense)
    weights = sum(x.out_features * x.in_features for x in quantized)
    if not quantized:
        weights = sum(math.prod(header.shape) for header in counted)
    stored = sum(math.prod(header.shape) * header.dtype.itemsize for header in counted)
    return 8 * stored / weights if weights else math.nan


def _verified(
    wrong: Iterable[str], described: Any, headers: Mapping[str, TensorHeader], config: GPTQConfig
) -> list[str]:
    """All that is wrong with values, and what else keeps a checkpoint from being loaded, or makes readers differ."""
    from optq.hf.loading import check_loadable  # which takes as long to import as all else; a model is made only here

    errors = list(wrong)
    try:
        errors += check_loadable(described, headers, config)
    except OptqError as error:
        errors += [] if str(error) in errors else [str(error)]
    return errors


def linears_of(quantized: Mapping[str, QuantizedTensors], config: GPTQConfig, described: Any) -> dict[str, Linear]:
    """The packed linears as readers see them, by name."""
    plan = parallel_plan_of(described)
    return {
        name: Linear(
            name=name,
            out_features=tensors.out_features,
            in_features=tensors.in_features,
            scheme=config.scheme_for(name) or LayerScheme(bits=tensors.bits),
            split=split_of(name, plan),
            head_width=head_width_of(name, described),
            checkpoint_format=config.format,
            by_gptqmodel=config.by_gptqmodel,
        )
        for name, tensors in quantized.items()
    }


def _modules_of(weights: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in weights]
