# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens, by the protocols in use.

A protocol cuts the text into spans that the model reads one by one, and says from which token on each is predicted:
the fewer tokens stand before a predicted one, the higher the perplexity. So figures of two protocols, or of two window
lengths, must not be compared.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optq.errors import ConfigError, counted
from optq.positions import fitting
from optq.torch_state import default_torch_state

from .comparison import Comparer, Comparison, exponential

Protocol = Literal["consecutive", "sliding", "rolling"]
"""How a text is cut.

consecutive  windows without overlap, a shorter last one left out; all but the first token of each are predicted. That
             of the GPTQ paper (arXiv:2210.17323) and most tables since, with windows of 2048 tokens.
sliding      windows that overlap: each predicts as many tokens as it is ahead of the last one, so that these see at
             least `window - stride` tokens. That of the guide in transformers' documentation.
rolling      as lm-evaluation-harness does: every token is predicted once, the first from a token put before the text.
"""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The perplexity of a text, and the number of predicted tokens that it is a mean over."""

    perplexity: float
    tokens: int

    @property
    def loss(self) -> float:
        """Negative log-likelihood of all predicted tokens together, in nats."""
        return math.log(self.perplexity) * self.tokens


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a text: tokens [start, stop) are read at once, and those from `first` on are predicted."""

    start: int
    first: int
    stop: int


def spans(tokens: int, protocol: Protocol = "consecutive", window: int = 512, stride: int | None = None) -> list[Span]:
    """Cut a text of so many tokens into spans.

    Args:
        window: the most tokens that the model reads at once.
        stride: for "sliding", the distance between the starts of two windows; by default half a window.
    Raises:
        ValueError: the text is too short for the protocol, or the stride no positive number below `window`.
    """
    least = window if protocol == "consecutive" else 2
    if tokens < least:
        raise ValueError(f"The text has {counted(tokens, 'token')}; at least {least} are needed.")
    if protocol == "consecutive":
        return [Span(start=at, first=at + 1, stop=at + window) for at in range(0, tokens - window + 1, window)]
    if protocol == "sliding":
        stride = window // 2 if stride is None else stride
        if not 0 < stride < window:  # with a stride of a window, its first token would have none before it
            raise ValueError(f"stride={stride} was asked for; it is a number from 1 to below the window, {window}.")
        return list(_sliding(tokens, window, stride))
    return list(_rolling(tokens, window))


def _sliding(tokens: int, window: int, stride: int) -> Iterator[Span]:
    first = 1
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        yield Span(start=start, first=first, stop=stop)
        if stop == tokens:
            return
        first = stop


def _rolling(tokens: int, window: int) -> Iterator[Span]:
    # The last token of a span is predicted, not read, hence one more than the window.
    for first in range(1, tokens, window):
        stop = min(first + window, tokens)
        yield Span(start=max(0, stop - window - 1), first=first, stop=stop)


@default_torch_state()
def perplexity(
    model: Any,
    input_ids: Tensor,
    window: int = 512,
    windows: int | None = None,
    *,
    protocol: Protocol = "consecutive",
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of `model` on a text.

    Args:
        model: a causal language model; its device and dtype are used, losses are summed in float64.
        input_ids: (tokens,) or (1, tokens) int64. For "rolling" with the token before the text as its first.
        window: the most tokens read at once; cut to the positions that the model has.
        windows: number of windows to use at most, from the start; by default all.
        protocol, stride: see `Protocol` and `spans`.
    Raises:
        ConfigError: the model does not predict the next token; or an argument is not as above.
        ValueError: the text is too short for the protocol.
    """
    if not isinstance(input_ids, Tensor):
        raise ConfigError(
            f"input_ids is a {type(input_ids).__name__}; allowed is a tensor of token ids, such as "
            'tokenizer(text, return_tensors="pt").input_ids.'
        )
    if windows is not None and windows < 1:
        raise ConfigError(f"windows={windows!r} was asked for; allowed are 1 and more, or None for the whole text.")
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise ConfigError(no_perplexity(type(model).__name__, "does not predict the next token"))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(no_perplexity(type(model).__name__, "reads one text with its encoder to write another"))
    window = fitting(model, window, f"window={window}")
    return perplexity_on(model, input_ids, spans(input_ids.numel(), protocol, window, stride)[:windows])


def no_perplexity(what: str, reason: str) -> str:
    """The error message for a model that has no perplexity."""
    return (
        f"{what} {reason}, so a text has no perplexity under it. Perplexity is of causal language models; judge this "
        "one by its own task."
    )


@torch.no_grad()
def perplexity_on(model: Any, input_ids: Tensor, cut: Iterable[Span]) -> Perplexity:
    """Perplexity of `model` on a text that `spans` has cut.

    Args:
        input_ids: (tokens,) or (1, tokens) int64.
    Raises:
        ZeroDivisionError: `cut` is empty.
    """
    ids = input_ids.reshape(-1)
    loss, tokens = 0.0, 0
    for span in cut:
        logits = _logits(model, ids, span)
        predicted = ids[span.first : span.stop].to(logits.device)
        # Of a window of 2048 and a vocabulary of 150 000, float32 logits take 1.2 GB: a part at a time.
        for part, targets in zip(logits.split(512), predicted.split(512), strict=True):
            loss += torch.nn.functional.cross_entropy(part.float(), targets, reduction="sum").double().item()
        tokens += span.stop - span.first
    return Perplexity(perplexity=exponential(loss / tokens), tokens=tokens)


@torch.no_grad()
def compare_on(original: Any, model: Any, input_ids: Tensor, cut: Iterable[Span]) -> Comparison:
    """Compare the logits of `model` with those of `original` wherever a span of the text predicts a token.

    Args:
        input_ids: (tokens,) or (1, tokens) int64.
    Raises:
        ZeroDivisionError: `cut` is empty.
    """
    ids, comparer = input_ids.reshape(-1), Comparer()
    for span in cut:
        comparer.add(
            _logits(original, ids, span)[None], _logits(model, ids, span)[None], ids[None, span.first : span.stop]
        )
    return comparer.result()


def _logits(model: Any, ids: Tensor, span: Span) -> Tensor:
    """Logits of the tokens from `first` to `stop`, (stop - first, vocabulary)."""
    read = ids[None, span.start : span.stop - 1].to(model.device)
    logits: Tensor = model(input_ids=read, use_cache=False).logits[0, span.first - span.start - 1 :]
    return logits
