# SPDX-License-Identifier: Apache-2.0
"""Find the decoder blocks of a model: the repeated layers that are quantized one after the other."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from optq.errors import ModelError

from .linears import find_linears


def find_blocks(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The blocks by name, in order.

    Args:
        model: may be on the meta device.
        name: the `ModuleList` to take, such as "model.layers" (`block_name_to_quantize`). Without it, the list with
            the most linear parameters is taken among those whose members transformers itself treats as blocks: by
            their type `GradientCheckpointingLayer` or by the model's `_no_split_modules`.
    Raises:
        ModelError: there is no such list, or two candidates are of the same size.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(find_linears(child) for child in module)
    }
    if name is not None:
        if name not in lists:
            raise ModelError(
                f"block_name_to_quantize={name!r} names no list of blocks with linear layers in "
                f"{type(model).__name__}. Lists found: {_listed(lists)}."
            )
        return _members(name, lists[name])
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    candidates = {
        path: module
        for path, module in lists.items()
        if all(isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in unsplit for child in module)
    }
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks that optq recognises. "
            f"Name one with block_name_to_quantize; lists found: {_listed(lists)}."
        )
    sizes = {path: _linear_parameters(module) for path, module in candidates.items()}
    largest = max(sizes.values())
    winners = [path for path, size in sizes.items() if size == largest]
    if len(winners) > 1:
        raise ModelError(
            f"{type(model).__name__} has several lists of blocks of the same size: {', '.join(winners)}. "
            "Choose one with block_name_to_quantize."
        )
    return _members(winners[0], candidates[winners[0]])


def _members(path: str, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{path}.{index}": block for index, block in enumerate(blocks)}


def _linear_parameters(module: nn.Module) -> int:
    return sum(view.weight.numel() for view in find_linears(module).values())


def _listed(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{path} ({len(blocks)})" for path, blocks in lists.items()) or "none"
