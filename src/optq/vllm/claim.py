# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints vLLM gets wrong by itself: it refuses them, or would answer something else than they hold."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from optq.api.inspect import linears_of
from optq.checkpoint import TENSOR_NAMES, find_quantized_linears, read_headers
from optq.config.gptq import GPTQConfig
from optq.config.metadata import groups_contradict
from optq.errors import CheckpointError, ConfigError, OptqError
from optq.files.source import model_config_of, quantization_entry, weight_files
from optq.readers import Linear, refusals, rules_of

logger = logging.getLogger(__name__)

ANY_WIDTH = 4096
"""Inputs and outputs of a linear of which only its scheme is known."""

LOCAL = {"local_files_only": True}


def why_not_by_itself(place: str | None, stated: Mapping[str, Any], reader: str, version: str) -> str | None:
    """Why vLLM does not serve a checkpoint right by itself, or None.

    Args:
        place: its folder, or its id on the Hub. Of one that is not on this machine yet, only `stated` is known.
        stated: quantization_config of its config.json.
        reader: "vllm" or "vllm-cpu".
        version: of vLLM; one that the table of readers does not know counts as the newest in it.
    """
    try:
        rules_of(reader, version)
    except ConfigError:
        version = rules_of(reader).versions[0]
    try:
        reasons = _reasons_of_bytes(place, stated, reader, version)
        if reasons is None:
            reasons = _reasons_of_config(stated, reader, version)
    except Exception as error:  # a stranger's file may be damaged in any way; to refuse it is vLLM's
        logger.warning("%s: optq leaves this checkpoint to vLLM, since it cannot read it: %r", place, error)
        return None
    if not reasons:
        return None
    return f"{reasons[0]}{f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''}"


def _reasons_of_bytes(
    place: str | None, stated: Mapping[str, Any], reader: str, version: str
) -> tuple[str, ...] | None:
    """From headers, and from g_idx, which vLLM does not read; None if the files are not on this machine."""
    if place is None:
        return None
    try:
        described = model_config_of(place, LOCAL, as_data=True)
        files = weight_files(place, described, LOCAL)
    except (OSError, OptqError):
        if os.path.isdir(place):
            raise
        return None  # of the Hub's cache, which may have the config and not the weights
    if not os.path.isdir(place) and quantization_entry(described) != dict(stated):
        return None  # it is another revision that vLLM was asked for
    headers = read_headers([os.fspath(file) for file in files])
    quantized = find_quantized_linears(headers)
    if not quantized:
        raise CheckpointError(f"{place} has no packed linear.")
    linears = list(linears_of(quantized, GPTQConfig.from_dict(dict(stated)), described).values())
    hidden = _hidden_orders(files, linears)
    dense = {name.removesuffix(".weight") for name, header in headers.items() if len(header.shape) == 2}
    dense -= {f"{name}.{part}" for name in quantized for part in TENSOR_NAMES}
    return (*refusals(reader, linears, dense=dense, version=version), *hidden)


def _hidden_orders(files: Iterable[Path], linears: Iterable[Linear]) -> Iterator[str]:
    """Where g_idx is not what the config says, of any linear."""
    left = {f"{linear.name}.g_idx": linear for linear in linears}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in left.keys() & set(tensors.keys()):
                yield from groups_contradict(left[name].name, left[name].scheme, tensors.get_tensor(name))


def _reasons_of_config(stated: Mapping[str, Any], reader: str, version: str) -> tuple[str, ...]:
    linears = [
        Linear(name="a linear", out_features=ANY_WIDTH, in_features=ANY_WIDTH, scheme=scheme)
        for scheme in GPTQConfig.from_dict(dict(stated)).all_schemes()
    ]
    return tuple(reason for linear in linears for reason in refusals(reader, [linear], version=version))
