# SPDX-License-Identifier: Apache-2.0
"""What a run ends with, in two lines: for whoever called `from_pretrained` and sees nothing else of it."""

import logging
import math
import os
from collections.abc import Sequence
from statistics import fmean

from optq.device.memory import GIB
from optq.errors import counted
from optq.evaluation import Comparison, verdict_of
from optq.events import BlockQuantized, BlockRestored, LinearQuantized, RunLog
from optq.readers import Linear

logger = logging.getLogger(__name__)


def say_summary(
    linears: Sequence[Linear], log: RunLog, quality: Comparison | None, log_file: str | os.PathLike[str] | None
) -> None:
    """Log how much was quantized, how small and how good it is, and where more is said.

    Args:
        linears: those that are packed now.
        quality: beside the original; None if that was not looked at.
        log_file: of the run's events.
    """
    blocks = sum(isinstance(event, (BlockQuantized, BlockRestored)) for event in log.events)
    stored = sum(linear.scheme.stored_bits(linear.out_features, linear.in_features) for linear in linears)
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    losses = [event.relative_loss for event in log.events if isinstance(event, LinearQuantized)]
    parts = [
        f"{counted(len(linears), 'linear')} of {counted(blocks, 'block')}",
        f"{stored / weights if weights else math.nan:.2f} bits per weight, {stored / 8 / GIB:.2f} GiB",
        *([f"mean relative loss {fmean(losses):.2e}"] if losses else []),
    ]
    if quality is None:
        parts.append("not compared with the original")
    elif (ratio := quality.perplexity_ratio) is not None:
        word = verdict_of(ratio, sound=quality.finite and quality.overflows is None)
        parts.append(f"{word} (perplexity {ratio:.3f} × the original's)")
    where = os.fspath(log_file) if log_file is not None else "model.hf_quantizer.log.events"
    logger.info("Quantized %s. Log: %s", "; ".join(parts), where)
