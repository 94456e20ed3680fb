# SPDX-License-Identifier: Apache-2.0
"""`optq.kernel_choices`: which kernel runs which linear of a checkpoint on this machine, and why not the others."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from optq.config.gptq import GPTQConfig
from optq.device.placement import execution_device
from optq.errors import CheckpointError
from optq.files.source import model_config_of, place_of
from optq.kernels import explain
from optq.layers import QuantLinear
from optq.readers import kind_of


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The kernel that runs the linears of one kind, and why others do not.

    Args:
        count: how many linears of this shape and kind there are.
        kernel: the one chosen.
        refused: by name of other kernels of the table, why they cannot run these linears.
    """

    kind: str
    out_features: int
    in_features: int
    bits: int
    count: int
    kernel: str
    refused: dict[str, str]


def kernel_choices(
    model_id_or_dir: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> list[KernelChoice]:
    """Load a GPTQ checkpoint and say which kernel runs which of its linears.

    Args:
        device: where; by default the accelerator, if there is one.
        backend: a kernel by name, as of `GPTQConfig`.
        kwargs: for `from_pretrained`.
    Raises:
        KernelError: the kernel asked for cannot run a linear.
        CheckpointError: nothing in it is quantized.
    """
    source = place_of(model_id_or_dir)
    if not getattr(model_config_of(source, kwargs), "quantization_config", None):
        raise CheckpointError(f"{source} is not quantized, so it has no linears that a kernel of optq multiplies.")
    options = {"dtype": "auto", "device_map": execution_device(device), **kwargs}
    if backend != "auto":
        options["quantization_config"] = GPTQConfig(bits=4, backend=backend)  # the rest is as stored
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    kinds: dict[tuple[str, int, int, int], list[QuantLinear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            kinds.setdefault((kind_of(name), layer.out_features, layer.in_features, layer.bits), []).append(layer)
    found = []
    for (kind, out_features, in_features, bits), layers in kinds.items():
        kernel = layers[0].kernel_name
        assert kernel is not None  # it is loaded
        reasons = explain(layers[0].packed(), model.dtype)
        found.append(
            KernelChoice(
                kind=kind,
                out_features=out_features,
                in_features=in_features,
                bits=bits,
                count=len(layers),
                kernel=kernel,
                refused={name: reason for name, reason in reasons.items() if reason is not None},
            )
        )
    return found
