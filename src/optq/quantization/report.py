# SPDX-License-Identifier: Apache-2.0
"""What is said of a block while it is quantized: events for the log, and one line when it is done."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from optq.device.memory import peak_gib
from optq.errors import counted
from optq.events import (
    BlockQuantized,
    BlockReconstructed,
    BlockRestored,
    LinearQuantized,
    OutOfMemory,
    RunLog,
    StarvedExperts,
    Unreached,
    rounded,
)
from optq.gptq import Solution
from optq.model import LinearView
from optq.scheme import LayerScheme, QuantizedWeight

from .plan import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A solved linear.

    Args:
        relative_loss: the energy of the output's error, as a part of the output's.
    """

    view: LinearView
    quantized: QuantizedWeight
    relative_loss: float


@dataclass(kw_only=True)
class BlockReport:
    """Reports one block to the log.

    Attributes:
        observing_seconds: time that went into the statistics of its inputs.
    """

    block: str
    targets: tuple[Target, ...]
    log: RunLog
    device: torch.device
    observing_seconds: float = 0.0

    def unreached(self, linears: Iterable[str]) -> None:
        for name in linears:
            logger.warning("%s stays in full precision: the calibration data never reaches it.", name)
            self.log.emit(Unreached(block=self.block, linear=name))

    def starved_experts(self, family: Sequence[str], tokens: list[int], features: int) -> None:
        """Experts with fewer tokens than inputs; `tokens` are those of every expert of the layer."""
        logger.warning(
            "%s: %d of %d experts saw fewer calibration tokens than the %d inputs of %s, %d of them none. The "
            "layer's mean over all experts makes up for what they lack; more calibration data would be better.",
            self.block,
            sum(count < features for count in tokens),
            len(tokens),
            features,
            " and ".join(name.rpartition(".")[2] for name in family),
            tokens.count(0),
        )
        self.log.emit(StarvedExperts(block=self.block, family=list(family), tokens=tokens))

    def out_of_memory(self, remedy: str) -> None:
        logger.warning("%s: out of memory on %s; from now on %s.", self.block, self.device, remedy)
        self.log.emit(OutOfMemory(block=self.block, remedy=remedy))

    def linear(
        self, done: Solved, scheme: LayerScheme, solution: Solution, *, rtn_loss: float, tokens: int, seconds: float
    ) -> None:
        """Log a solved linear.

        Args:
            solution: the solution of all linears that were stacked with it.
            rtn_loss: relative loss of rounding to nearest.
            tokens: calibration tokens that its inputs were summed over.
        """
        self.log.emit(
            LinearQuantized(
                block=self.block,
                linear=done.view.name,
                family=done.view.family,
                shape=list(done.view.shape),
                bits=scheme.bits,
                group_size=scheme.group_size,
                stored_bits=scheme.stored_bits(*done.view.shape),
                relative_loss=done.relative_loss,
                rtn_relative_loss=rtn_loss,
                damping=solution.damping,
                damping_asked=scheme.damping,
                dead_columns=solution.dead_columns,
                tokens=tokens,
                seconds=round(seconds, 4),
                peak_gib=rounded(peak_gib(self.device)),
            )
        )

    def reconstructed(self, loss_before: float, loss: float, passes: int, seconds: float) -> None:
        self.log.emit(
            BlockReconstructed(
                block=self.block,
                held_out_loss_before=loss_before,
                held_out_loss=loss,
                passes=passes,
                seconds=round(seconds, 2),
            )
        )

    def restored(self, seconds: float) -> None:
        """Log that the block was finished in a former run."""
        self.log.emit(BlockRestored(block=self.block, seconds=round(seconds, 2)))

    def finished(self, solved: list[Solved], seconds: float) -> None:
        """Log one line about the block, unless nothing of it was solved."""
        if not solved:
            return
        scheme_of = {target.view: target.scheme for target in self.targets}
        shapes = {done.view: done.view.shape for done in solved}
        stored_bits = sum(scheme_of[view].stored_bits(*shape) for view, shape in shapes.items())
        event = BlockQuantized(
            block=self.block,
            relative_loss=sum(done.relative_loss for done in solved) / len(solved),
            bits_per_weight=round(stored_bits / sum(map(math.prod, shapes.values())), 4),
            seconds=round(seconds, 2),
            observing_seconds=round(self.observing_seconds, 2),
            peak_gib=rounded(peak_gib(self.device)),
        )
        self.log.emit(event)
        logger.info(
            "%s: relative loss %.2e, %.2f bits per weight, %.1f s, peak %.2f GiB; %s left, about %s",
            self.block,
            event.relative_loss,
            event.bits_per_weight,
            event.seconds,
            event.peak_gib or math.nan,
            counted(self.log.blocks_left, "block"),
            timedelta(seconds=round(self.log.seconds_left)),
        )
