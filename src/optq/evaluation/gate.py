# SPDX-License-Identifier: Apache-2.0
"""The gate at the end of a run: is this model good enough to use?"""

import logging

from optq.errors import QualityError, counted

from .comparison import Comparison
from .verdict import verdict_of

logger = logging.getLogger(__name__)


def is_good(comparison: Comparison, limit: float) -> bool:
    """Whether the gate is green: outputs are finite, and the perplexity ratio, where there is one, within `limit`."""
    ratio = comparison.perplexity_ratio
    return comparison.finite and comparison.overflows is None and (ratio is None or ratio <= limit)


def judge(comparison: Comparison, limit: float, *, held_out: bool, strict: bool) -> None:
    """The gate at the end: say how good the model is; warn, or raise, if it is not good enough to use.

    Args:
        limit: perplexity ratio above which the gate is red.
        held_out: whether the rows compared on were kept out of the calibration.
        strict: raise when red. Outputs that are not finite always raise.
    Raises:
        QualityError: see `strict`.
    """
    where = "held-out calibration rows" if held_out else "calibration rows (too few to hold some out)"
    ratio = comparison.perplexity_ratio
    perplexity = "" if ratio is None else f"perplexity {ratio:.3f} × the original's, "
    word = verdict_of(ratio)
    told = "" if word is None else f": {word}"
    verdict = (
        f"On {counted(comparison.tokens, 'token')} of {where}: {perplexity}KL divergence "
        f"{comparison.divergence:.4f} nats per token, same top token {comparison.agreement:.1%}{told}."
    )
    if not comparison.finite:
        raise QualityError(
            "The quantized model's outputs are not finite (NaN or infinity), so it is of no use. Quantize with "
            "dtype=torch.float32 or torch.bfloat16, and look at the losses of the layers in the log."
        )
    if is_good(comparison, limit):
        logger.info("%s", verdict)
        return
    advice = (
        f"{verdict} That is above the limit of {limit:g}. More bits, smaller groups, effort='max' or more calibration "
        "text that resembles what the model will read lower it; max_perplexity_ratio moves the limit."
    )
    if comparison.overflows is not None:
        advice = (
            f"{verdict} But that was in float32, and {comparison.overflows} hands over values that the model's own "
            "dtype cannot hold: used in that, its outputs may not be finite. Quantize with dtype=torch.bfloat16."
        )
    if strict:
        raise QualityError(advice)
    logger.warning("%s", advice)
