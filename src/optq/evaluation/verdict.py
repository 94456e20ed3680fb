# SPDX-License-Identifier: Apache-2.0
"""How good a quantized model is, in one word: the only table of limits, for the log, reports, cards and comparisons.

The limits are conventions; docs/evaluation.md says where they come from.
"""

import math
from typing import Literal

Verdict = Literal["as good as the original", "good", "usable", "poor"]

VERDICTS: dict[Verdict, float] = {"as good as the original": 1.01, "good": 1.05, "usable": 1.25}
"""Up to how many times the original's perplexity. Above: poor."""

SCORE_VERDICTS: dict[Verdict, float] = {"as good as the original": 0.99, "good": 0.98, "usable": 0.95}
"""From what mean part of the original's scores on. Below: poor."""


def verdict_of(perplexity_ratio: float | None, *, sound: bool = True) -> Verdict | None:
    """The verdict on a model with so many times the original's perplexity; None if that is not known.

    Args:
        sound: whether its outputs are finite, also in its own dtype.
    """
    if not sound:
        return "poor"
    if perplexity_ratio is None:
        return None
    return next((verdict for verdict, limit in VERDICTS.items() if perplexity_ratio <= limit), "poor")


def verdict_of_scores(kept: float) -> Verdict:
    """The verdict on a model that keeps this part of the original's scores, on average over tasks."""
    kept = -math.inf if math.isnan(kept) else kept
    return next((verdict for verdict, limit in SCORE_VERDICTS.items() if kept >= limit), "poor")
