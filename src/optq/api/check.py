# SPDX-License-Identifier: Apache-2.0
"""`optq.check`: whether a server will read a checkpoint, or what a config would make of a model, and why not."""

import copy
import os
from typing import Any

import transformers

from optq.config.gptq import GPTQConfig
from optq.errors import ConfigError
from optq.files.source import place_of
from optq.readers import refusals, rules_of
from optq.runs.preparation import plan_for
from optq.runs.readers import as_linears, served_group_size
from optq.torch_state import default_torch_state

from .inspect import inspect
from .quantize import model_without_weights


@default_torch_state()
def servable_group_size(
    model_id_or_dir: str | os.PathLike[str], config: GPTQConfig, server: str, **kwargs: Any
) -> int | None:
    """The largest group size, or -1, with which a server reads a model quantized like this; None if there is none."""
    model = model_without_weights(place_of(model_id_or_dir), kwargs)
    config = copy.copy(config)
    config.serving, config.group_size = None, -1  # with which every linear can be planned
    plan, _, _ = plan_for(model, config)
    return served_group_size(as_linears(model, plan.all_targets, config.format), plan.skipped, server)


@default_torch_state()
def check(
    model_id_or_dir: str | os.PathLike[str],
    config: transformers.GPTQConfig | dict[str, Any] | None = None,
    *,
    server: str = "vllm",
    version: str | None = None,
    tensor_parallel: int = 1,
    **kwargs: Any,
) -> tuple[str, ...]:
    """Say what a server refuses: all reasons, each with its kinds of linears; empty if it reads all. Reads no weights.

    Args:
        model_id_or_dir: a GPTQ checkpoint; or, with a config, the model that is going to be quantized.
        server: "vllm", "vllm-cpu", "vllm+optq" (with the plugin), "sglang", "gptqmodel" or "transformers" (with optq).
        version: the server's, such as "0.32"; by default the newest that the table knows, see docs/interop.md.
        tensor_parallel: over how many GPUs it will split the model.
        kwargs: revision, token, trust_remote_code, cache_dir, … as for `from_pretrained`.
    Raises:
        ConfigError: there is no such server in the table, or nothing is known about that version of it.
        CheckpointError: without a config, the model is not quantized.
    """
    rules_of(server, version)  # before what takes longer
    if config is None:
        versions = None if version is None else {server: version}
        inspection = inspect(model_id_or_dir, tensor_parallel=tensor_parallel, versions=versions, **kwargs)
        if inspection.config is None:
            raise ConfigError(
                f"{place_of(model_id_or_dir)} is not quantized. Pass config= as well, to know what it would become."
            )
        return (*inspection.contradictions, *inspection.refused[server])
    model = model_without_weights(place_of(model_id_or_dir), kwargs)
    config = GPTQConfig.from_stock(config)
    plan, _, _ = plan_for(model, config)
    linears = as_linears(model, plan.all_targets, config.format)
    return refusals(server, linears, tensor_parallel, plan.skipped, version)
