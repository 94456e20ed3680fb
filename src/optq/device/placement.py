# SPDX-License-Identifier: Apache-2.0
"""Where tensors are while a model is worked on, and the state that it gets back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optq.errors import ConfigError


def working_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to compute in: float32 on CPUs, as 16-bit products are slow and less exact there; else None."""
    return torch.float32 if device.type == "cpu" else None


def devices_here() -> list[str]:
    """The devices of this machine, as torch writes them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def execution_device(asked: torch.device | str | None = None) -> torch.device:
    """The device asked for; by default the accelerator, if there is one, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if asked is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    here = devices_here()
    if str(asked) not in here:
        raise ConfigError(f"device={str(asked)!r} was asked for; this machine has {', '.join(here)}.")
    return torch.device(asked)


def tensors_outside(model: nn.Module, blocks: list[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, of any shape (...), outside of the blocks: embeddings, norms, heads."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [
        tensor
        for module in model.modules()
        if id(module) not in inside
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


def tensors_of(block: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a block, of any shape (...)."""
    return [*block.parameters(), *block.buffers()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and the like; restore every module's own flag."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        # By name: a quantized layer takes over its predecessor's flag. Some models exchange modules while they run.
        for name, module in model.named_modules():
            module.training = training.get(name, training[""])


@contextmanager
def placed(tensors: list[Tensor], device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Move parameters and buffers of any shape (...) to `device`, floating ones to `dtype` if given; back again after.

    Values written in between are kept: they come back cast to the tensor's own dtype.
    """
    device = torch.empty(0, device=device).device  # with its index: "cuda" is the present one
    homes: list[tuple[Tensor, torch.device, torch.dtype]] = []
    try:
        for tensor in tensors:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if tensor.device != device or tensor.dtype != wanted:
                homes.append((tensor, tensor.device, tensor.dtype))
                tensor.data = tensor.data.to(device, wanted)
        yield
    finally:
        for tensor, home, own_dtype in homes:
            tensor.data = tensor.data.to(home, own_dtype)
