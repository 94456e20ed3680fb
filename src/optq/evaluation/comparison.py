# SPDX-License-Identifier: Apache-2.0
"""How close a quantized model's predictions are to the original's, on the same tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from optq.device.memory import all_finite
from optq.distributed import Ranks

TOKENS_AT_ONCE = 128  # of the log-probabilities, which are as wide as the vocabulary


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How close two models' predictions are: means over all compared tokens.

    Args:
        tokens: positions compared.
        finite: whether all of the quantized model's outputs were.
        divergence: Kullback–Leibler divergence from the original's distribution of the next token to the quantized
            model's, in nats per token.
        agreement: fraction of tokens for which both predict the same most likely token, 0 … 1.
        original_perplexity, perplexity: of the original and the quantized model; None without known next tokens.
        overflows: where the quantized model's own dtype cannot hold what it computes, or None; see `Overflow`.
    """

    tokens: int
    finite: bool
    divergence: float
    agreement: float
    original_perplexity: float | None
    perplexity: float | None
    overflows: str | None = None

    @property
    def perplexity_ratio(self) -> float | None:
        """The quantized model's perplexity over the original's; None without known next tokens."""
        if self.perplexity is None or self.original_perplexity is None:
            return None
        return self.perplexity / self.original_perplexity

    def facts(self) -> dict[str, Any]:
        """For the log: plain numbers, None where there is none or it is not finite."""
        ratio = self.perplexity_ratio
        values = {
            "divergence": self.divergence,
            "agreement": self.agreement,
            "original_perplexity": self.original_perplexity,
            "perplexity": self.perplexity,
            "perplexity_ratio": ratio,
        }
        rounded = {
            name: round(value, 5) if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        overflows = {} if self.overflows is None else {"overflows": self.overflows}
        return {"tokens": self.tokens, "finite": self.finite, **rounded, **overflows}


class Comparer:
    """Accumulates a `Comparison` over micro-batches, with sums in float64."""

    def __init__(self) -> None:
        self._tokens = self._predicted = self._agreed = 0
        self._divergence = self._original_loss = self._loss = 0.0
        self._finite = True

    def add(self, original: Tensor, quantized: Tensor, next_ids: Tensor | None, keep: Tensor | None = None) -> None:
        """Add the logits of both models for the same tokens.

        Args:
            original, quantized: (samples, length, vocabulary), any float dtype.
            next_ids: (samples, length) int64, the token that really follows each; -1 where none does. None if the
                model does not predict the next token.
            keep: (samples, length) bool, False for padding.
        """
        for sample in range(original.shape[0]):
            for start in range(0, original.shape[1], TOKENS_AT_ONCE):
                window = slice(start, start + TOKENS_AT_ONCE)
                rows = original[sample, window], quantized[sample, window].to(original.device)
                ids = None if next_ids is None else next_ids[sample, window].to(original.device)
                if keep is not None:
                    kept = keep[sample, window].bool().to(original.device)
                    rows = rows[0][kept], rows[1][kept]
                    ids = None if ids is None else ids[kept]
                self._add_rows(*rows, ids)

    def _add_rows(self, original: Tensor, quantized: Tensor, next_ids: Tensor | None) -> None:
        original, quantized = log_softmax(original.float(), -1), log_softmax(quantized.float(), -1)
        self._tokens += original.shape[0]
        self._finite &= all_finite(quantized)
        self._agreed += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        # Where the original's probability is 0, its logarithm is -inf and the term is 0, not NaN.
        terms = original.exp() * (original - quantized)
        self._divergence += float(torch.where(original.isinf(), 0.0, terms).double().sum())
        if next_ids is not None:
            known = torch.where(next_ids >= 0)[0]
            self._predicted += known.numel()
            self._original_loss -= float(original[known, next_ids[known]].double().sum())
            self._loss -= float(quantized[known, next_ids[known]].double().sum())

    def all_reduce(self, ranks: Ranks) -> None:
        """Add what the other processes have summed."""
        counts = ranks.all_reduce_numbers(self._tokens, self._predicted, self._agreed, not self._finite)
        self._tokens, self._predicted, self._agreed = map(int, counts[:3])
        self._finite = counts[3] == 0
        self._divergence, self._original_loss, self._loss = ranks.all_reduce_numbers(
            self._divergence, self._original_loss, self._loss
        )

    @property
    def tokens(self) -> int:
        """Number of tokens compared so far."""
        return self._tokens

    def result(self) -> Comparison:
        """The means over all tokens added.

        Raises:
            ZeroDivisionError: nothing was added.
        """
        predicted = self._predicted
        return Comparison(
            tokens=self._tokens,
            finite=self._finite,
            divergence=self._divergence / self._tokens,
            agreement=self._agreed / self._tokens,
            original_perplexity=exponential(self._original_loss / predicted) if predicted else None,
            perplexity=exponential(self._loss / predicted) if predicted else None,
        )


def exponential(loss: float) -> float:
    """exp(loss), or infinity where that overflows."""
    return math.inf if loss > 700 else math.exp(loss)  # a NaN stays one
