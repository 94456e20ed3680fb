# SPDX-License-Identifier: Apache-2.0
"""The forwards of a run: the quantized model's over all micro-batches, and beside them the original model's.

Both run through the same blocks; for its turn, the original model gets its weights back. It says how far the inputs of
every stage have drifted, what a block should return, and, on batches held out, how good the quantized model is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from optq.calibration import Calibration, MicroBatch

from .coroutines import BlockCall, Finished, SuspendedForwards
from .runner import BlockRunner
from .statistics import CalibrationCalls

Watched = Callable[[], AbstractContextManager[None]]


class Streams:
    """All forwards of a run, suspended at the same block.

    Args:
        forwards: has none yet.
        device: where the model runs.
        follow_all: the original model runs all micro-batches, not only those held out.
    Attributes:
        waiting: the calls of the present block.
        passed: those of the next one, of forwards that are through already.
        repeats: the model calls each block several times in a row, as ALBERT does.
    """

    def __init__(
        self, forwards: SuspendedForwards, calibration: Calibration, device: torch.device, *, follow_all: bool
    ) -> None:
        self.forwards = forwards
        self.batches = (*calibration.batches, *calibration.held_out)
        self.masks = [batch.attention_mask for batch in self.batches]
        self._fitted = len(calibration.batches)
        self._inputs = [batch.as_model_inputs(device) for batch in self.batches]
        self._number_of: dict[int, int] = {}  # a forward of the original model -> the micro-batch that it runs
        self.repeats = False
        self.passed: list[BlockCall] = []
        self.waiting = forwards.start(self._inputs)
        self._follow(range(0 if follow_all else self._fitted, len(self.batches)))

    def _follow(self, numbers: range) -> None:
        """Run the original model on these micro-batches as well."""
        self._number_of |= {len(self.forwards) + position: number for position, number in enumerate(numbers)}
        self.waiting += self.forwards.start(self._inputs[number] for number in numbers)

    def find_repeats(self, output: Any) -> None:
        """Find out whether the model calls its first block again once that has returned.

        Args:
            output: the block's output for the first call.
        """
        (call,) = self.forwards.start(self._inputs[:1])
        posted = self.forwards.resume(call, output)
        self.repeats = isinstance(posted, BlockCall) and posted.block == call.block
        self.forwards.abandon(call)
        if self.repeats and len(self._number_of) < len(self.batches):
            self._follow(range(self._fitted))  # a repeated block is calibrated on the original model's calls

    def is_original(self, call: BlockCall) -> bool:
        return call.batch in self._number_of

    def calibration(self) -> CalibrationCalls:
        """The calls that the present block is calibrated on."""
        numbers = {call.batch: self._number_of[call.batch] for call in self.waiting if self.is_original(call)}
        return CalibrationCalls(
            calls=[call for call in self.waiting if call.batch < self._fitted],
            references={
                numbers[call.batch]: call
                for call in self.waiting
                if call.batch in numbers and numbers[call.batch] < self._fitted
            },
            masks=self.masks,
        )

    def is_held_out(self, call: BlockCall) -> bool:
        """Whether a call is the quantized model's, on a micro-batch held out."""
        return self._fitted <= call.batch < len(self.batches)

    def held_out(self) -> list[tuple[MicroBatch, BlockCall, BlockCall]]:
        """The micro-batches held out, each with the quantized model's call and the original model's."""
        originals = {self._number_of[call.batch]: call for call in self.waiting if self.is_original(call)}
        return [
            (self.batches[call.batch], call, originals[call.batch]) for call in self.waiting if self.is_held_out(call)
        ]

    def move_on(self, runner: BlockRunner, outputs: dict[int, Any], watched: Watched) -> None:
        """Run a finished block on all that waits for it, and carry the model on to the next one.

        Args:
            outputs: the block's outputs that are known already, by the number of the call. Emptied.
            watched: what the quantized block's runs on batches held out are done in.
        """

        def needs(call: BlockCall) -> Any:
            return call.args, call.kwargs, outputs.get(call.batch)

        waiting, following = self.waiting, []
        for call in runner.store.in_turn((waiting.pop(0) for _ in range(len(waiting))), needs):  # frees inputs
            posted = self.past(call, runner, watched, outputs.pop(call.batch, None))
            if isinstance(posted, BlockCall):
                following.append(posted)
        self.waiting, self.passed = following + self.passed, []

    def past(
        self, call: BlockCall, runner: BlockRunner, watched: Watched = nullcontext, output: Any = None
    ) -> BlockCall | Finished:
        """Run a forward on, past all its calls of the block; `output` is that of the first, if it is known."""
        run = runner.run_original if self.is_original(call) else runner.run
        with watched() if self.is_held_out(call) else nullcontext():
            posted = self.forwards.resume(call, runner.with_room(partial(run, call)) if output is None else output)
            while self.repeats and isinstance(posted, BlockCall) and posted.block == call.block:
                posted = self.forwards.resume(posted, runner.with_room(partial(run, posted)))
        return posted

    def tokens(self, *, held_out: bool) -> int:
        """Number of tokens that run through every block in both models, of batches held out or of the others."""
        numbers = (*range(len(self.batches)), *self._number_of.values())
        return sum(self.batches[n].input_ids.numel() for n in numbers if (n >= self._fitted) is held_out)
