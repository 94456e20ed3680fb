# SPDX-License-Identifier: Apache-2.0
"""How much a model remembers of a text: asked of the model itself, on the meta device, where only shapes are computed.

So grouped heads, sliding windows, shared and compressed caches, states of recurrent layers and mixtures count as the
architecture has them, and not as some formula thinks.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optq.errors import ModelError

COMPUTED = torch.bfloat16  # the one dtype in which grouped products have shapes on the meta device
HOLDERS = ("past_key_values", "cache_params")
"""What outputs call the cache."""

FEW = (1, 64)
"""Tokens of two texts: a model that keeps as much of the one as of the other keeps no more of any."""


class _WithoutData(TorchDispatchMode):
    """Answers what a forward asks of numbers that there are none of: a maximum is 0, and no expert is hit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        return func(*args, **(kwargs or {}))


def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of what a model keeps of one text of `tokens` tokens while it writes on, in the model's dtype.

    Args:
        model: on any device; is left as it is, since forwards keep tables of positions.
    Raises:
        ModelError: it keeps nothing, or its forward cannot be computed without numbers.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} also keeps what its encoder has read, however long that is")
    try:
        with torch.device("meta"), torch.no_grad(), _WithoutData():
            alike = type(model)(copy.deepcopy(model.config)).to(COMPUTED)
            kept, more = (_kept(alike, few, model.dtype) for few in FEW)
            # What keeps states alone may go through a text token by token, which takes minutes.
            return kept if kept == more else _kept(alike, tokens, model.dtype)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{type(model).__name__} does not run without its weights: {error}") from error


def _kept(model: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the cache that a forward of so many tokens returns, if what is computed were of `dtype`."""
    output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True)
    held = [cache for name in HOLDERS if (cache := getattr(output, name, None)) is not None]
    layers = getattr(held[0], "layers", None) if held else None
    if not layers:
        raise ModelError(f"{type(model).__name__} returns no cache")
    kept = {id(tensor): tensor for layer in layers for tensor in _tensors_in(vars(layer).values())}
    return sum(
        tensor.numel() * (dtype if tensor.dtype == COMPUTED else tensor.dtype).itemsize for tensor in kept.values()
    )


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())
