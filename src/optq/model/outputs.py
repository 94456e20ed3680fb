# SPDX-License-Identifier: Apache-2.0
"""What a block returns, and how far it is from what it should."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

TINY = 1e-12


def hidden_states(output: Any) -> Tensor:
    """A block's first output tensor, usually (samples, tokens, features)."""
    states: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return states


def relative_error(states: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of the squared error relative to the token's own energy; a scalar, differentiable.

    Relative, because a few tokens, such as the first, are a thousand times larger than the others.

    Args:
        states, target: (..., features), any float dtype.
        mask: 0 for tokens that do not count, such as padding; None, or one that does not fit the tokens, is left out.
    """
    target = target.to(states.device, torch.float32)
    error = (states.float() - target).square().mean(-1) / target.square().mean(-1).clamp(min=TINY)
    keep = fitting_mask(mask, target)
    return error.mean() if keep is None else error[keep.view(error.shape)].mean()


def fitting_mask(mask: Tensor | None, states: Tensor) -> Tensor | None:
    """`mask` as booleans where `states` (..., features) are, if it has one entry per token of theirs, else None.

    Some inputs and outputs have fewer or more rows than the model has tokens: after a pooling, or routed to an expert.
    """
    if mask is None or mask.numel() * states.shape[-1] != states.numel():
        return None
    return mask.to(states.device, torch.bool)
