# SPDX-License-Identifier: Apache-2.0
"""Perplexity over fixed windows of a text: exp of the mean negative log-likelihood of each window's tokens 2 … n."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """perplexity, and the number of predicted tokens that it is a mean over."""

    perplexity: float
    tokens: int


@torch.no_grad()
def perplexity(model: Any, input_ids: Tensor, window: int = 512, windows: int | None = None) -> Perplexity:
    """Perplexity of `model` on consecutive windows without overlap; a shorter last window is left out.

    Args:
        model: a causal language model; its device and dtype are used, losses are summed in float64.
        input_ids: (tokens,) or (1, tokens) int64.
        window: tokens per window.
        windows: how many to use at most, from the start; by default all.
    Raises:
        ValueError: fewer tokens than one window.
    """
    ids = input_ids.reshape(-1)
    count = ids.numel() // window
    if count == 0:
        raise ValueError(f"The text has {ids.numel()} tokens; at least one window of {window} is needed.")
    rows = ids[: count * window].view(count, window)[:windows]
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, :-1].float()
        total += cross_entropy(logits, row[1:].to(logits.device), reduction="sum").double().item()
    tokens = rows.shape[0] * (window - 1)
    return Perplexity(perplexity=math.exp(total / tokens), tokens=tokens)
