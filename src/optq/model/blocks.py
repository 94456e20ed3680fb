# SPDX-License-Identifier: Apache-2.0
"""Find the decoder blocks of a model: the repeated layers that are quantized one after the other."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from optq.errors import ModelError

from .linears import find_linears


def find_blocks(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """Find a model's decoder blocks: by name, in order.

    Args:
        model: may be on the meta device.
        name: the `ModuleList` to take, such as "model.layers" (`block_name_to_quantize`). Without it, the list with
            the most linear parameters is taken: in the text decoder, if the model says which of its parts that is, and
            before it in the encoder, if there is one; among those whose members transformers itself treats as blocks,
            by their type `GradientCheckpointingLayer` or the model's `_no_split_modules`, if there are any.
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
        return {f"{name}.{index}": block for index, block in enumerate(lists[name])}
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    candidates = {
        path: module
        for path, module in lists.items()
        if all(isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in unsplit for child in module)
    }
    candidates = candidates or lists
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing that optq could "
            "quantize one after the other."
        )
    found: dict[str, nn.Module] = {}
    for prefix in _parts(model):
        inside = {path: blocks for path, blocks in candidates.items() if path.startswith(prefix)}
        found |= _largest(model, inside) if inside else {}
    return found or _largest(model, candidates)


def _largest(model: nn.Module, candidates: dict[str, nn.ModuleList]) -> dict[str, nn.Module]:
    """The members of the list with the most linear parameters."""
    sizes = {path: _linear_parameters(module) for path, module in candidates.items()}
    largest = [path for path, size in sizes.items() if size == max(sizes.values())]
    winners = [path for path in largest if not any(path.startswith(f"{other}.") for other in largest)]  # the outermost
    if len(winners) > 1:
        raise ModelError(
            f"{type(model).__name__} has several lists of blocks of the same size: {', '.join(winners)}. "
            "Choose one with block_name_to_quantize."
        )
    path = winners[0]
    return {f"{path}.{index}": block for index, block in enumerate(candidates[path])}


def _parts(model: nn.Module) -> list[str]:
    """The prefixes of the names inside the parts whose blocks are of interest, in the order in which they run.

    The encoder, of models that decode what an encoder has read, and what transformers calls the text decoder.
    """
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    prefixes = []
    for find in ("get_encoder", "get_decoder") if encodes else ("get_decoder",):
        try:
            part = getattr(model, find)()
        except (AttributeError, NotImplementedError):  # this architecture has no such part
            continue
        name = next((name for name, module in model.named_modules() if module is part), "")
        if name:
            prefixes.append(f"{name}.")
    return prefixes


def _linear_parameters(module: nn.Module) -> int:
    return sum(view.weight.numel() for view in find_linears(module).values())


def _listed(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{path} ({len(blocks)})" for path, blocks in lists.items()) or "none"
