# SPDX-License-Identifier: Apache-2.0
"""The kinds of block, and how each is quantized: stage by stage, on what the already quantized ones really compute."""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from optq.device.memory import free_bytes, release_free_memory
from optq.distributed import Ranks
from optq.errors import ModelError, counted
from optq.model import Stage, hidden_states, independent_groups

from .block_reconstruction import Example, reconstruct
from .coroutines import BlockCall, Finished
from .paused import PausedForwards
from .plan import Plan
from .report import Solved
from .run import Run
from .runner import BlockRunner
from .stage_solver import solve_stages
from .statistics import CalibrationCalls, collect
from .streams import Streams

logger = logging.getLogger(__name__)

PAUSED_SHARE = 0.5  # of the free memory, for what forwards hold while they wait inside a block


class OrdinaryBlock:
    """A block that each forward calls once, and how it is quantized.

    Attributes:
        reconstructs: it is of use to reconstruct it.
    """

    reconstructs = True

    def solve(
        self, runner: BlockRunner, stages: list[Stage], streams: Streams, run: Run, *, last: bool
    ) -> tuple[list[Solved], dict[int, Any]]:
        """Quantize the block that `streams` wait for.

        Args:
            stages: the block's stages.
            last: none follows it.
        Returns:
            What was solved, and the block's outputs as far as they came about, by the number of the call.
        Raises:
            ModelError: processes see different stages.
            SolveError: the Hessian of a linear cannot be inverted.
        """
        data, reconstructs = streams.calibration(), self.reconstructs and run.reconstruction_passes > 0
        originals: dict[int, Any] | None = {} if reconstructs or not last else None
        own: dict[int, Any] | None = {} if not reconstructs and not last else None  # reconstruction would change them
        solved = _solve(runner, stages, data, run, originals, own)
        outputs = {**(originals or {}), **(own or {})}
        if reconstructs and solved:
            targets = {number: outputs[reference.batch] for number, reference in data.references.items()}
            held_out = []
            for _, call, reference in streams.held_out():
                held_out.append(call)
                targets[call.batch] = runner.run_original(reference)
            solved = _reconstructed(runner, solved, data, held_out or data.calls[-1:], targets, run)
        return solved, outputs


class OutputHead(OrdinaryBlock):
    """The linear after the last block, which makes the logits: there is nothing in it to reconstruct."""

    reconstructs = False


class RepeatedBlock(OrdinaryBlock):
    """A block that each forward calls several times in a row, as ALBERT does.

    It is solved once, on all these calls as the original model makes them: the quantized one's depend on the solution.
    """

    def solve(
        self, runner: BlockRunner, stages: list[Stage], streams: Streams, run: Run, *, last: bool
    ) -> tuple[list[Solved], dict[int, Any]]:
        data = CalibrationCalls(calls=[], references={}, masks=[])
        references = streams.calibration().references
        gone = {reference.batch for reference in references.values()}
        streams.waiting = [call for call in streams.waiting if call.batch not in gone]
        with streams.forwards.ending() if last else nullcontext():
            for number, reference in references.items():
                posted: BlockCall | Finished = reference
                while isinstance(posted, BlockCall) and posted.block == reference.block:
                    data.calls.append(replace(posted, batch=len(data.calls)))
                    data.masks.append(streams.masks[number])
                    output = runner.with_room(partial(runner.run, data.calls[-1]))
                    posted = streams.forwards.resume(posted, output)
                if isinstance(posted, BlockCall):
                    streams.passed.append(posted)
        solved = _solve(runner, stages, data, run)
        if run.reconstruction_passes and solved:
            targets = {call.batch: runner.run_original(call) for call in data.calls}
            solved = _reconstructed(runner, solved, data, data.calls[-1:], targets, run)
        return solved, {}


def kind_of(name: str, plan: Plan, *, repeats: bool = False) -> OrdinaryBlock:
    """The kind of the block `name`; `repeats`: the model calls its blocks several times in a row."""
    if name == plan.head:
        return OutputHead()
    return RepeatedBlock() if repeats else OrdinaryBlock()


def _solve(
    runner: BlockRunner,
    stages: list[Stage],
    data: CalibrationCalls,
    run: Run,
    originals: dict[int, Any] | None = None,
    own: dict[int, Any] | None = None,
) -> list[Solved]:
    """Quantize the block's linears, stage by stage, writing the rounded values into them.

    Args:
        originals, own: receive the outputs of the original block for the reference calls, and those of the quantized
            one for the calls, by number, as far as they come about; None: not wanted.
    """
    reached = {view.name for stage in stages for view in stage.views}
    runner.report.unreached(name for name in {target.view.name for target in runner.targets} - reached)
    groups = independent_groups(stages)
    stages = [stage for group in groups for stage in group]
    if len({*run.ranks.all_gather(tuple(stage.name for stage in stages))}) > 1:
        # Processes that differ here would wait for one another forever.
        raise ModelError(
            f"{runner.report.block}: which linears run, or in which order, depends on the data, so that several "
            "processes cannot share it. Quantize this model with one process."
        )
    if not run.sequential:
        groups = [stages]
    solved: list[Solved] = []
    with PausedForwards(groups) as paused:
        runner.paused = paused
        if len(groups) > 1:
            _pause(runner, stages, data, run.ranks)
        for group in groups:
            # Nothing of the original block changes in between, so its last run is also the one that goes on.
            kept = originals if group is groups[-1] else None
            for stage, done in solve_stages(collect(runner, group, data, run.ranks, kept), runner, run.ranks):
                solved += done
                run.log.advance(1 / len(stages), stage=stage.name, loss=f"{solved[-1].relative_loss:.2e}")
        for call in data.calls if own is not None else ():
            output = runner.with_room(partial(paused.output_of, call.batch)) if call.batch in paused else None
            if own is not None and output is not None:
                own[call.batch] = runner.store.take(output)
        runner.paused = None
    return solved


def _pause(runner: BlockRunner, stages: list[Stage], data: CalibrationCalls, ranks: Ranks) -> None:
    """Start as many forwards as find room, and let them wait; the others are run anew for every stage."""
    assert runner.paused is not None
    if not runner.store.pausing or not all(stage.orderly for stage in stages):
        return  # what was called before its turn would have gone on with other weights
    states = [hidden_states((*call.args, *call.kwargs.values())) for call in data.calls]
    inputs = sum(stage.rows * stage.in_features for stage in stages) * states[0].element_size()
    bytes_per_value = 2 * inputs / states[0].numel() * (1 + bool(data.references))  # and about as much in between
    room = _room(runner, ranks)
    if room < bytes_per_value * sum(map(torch.numel, states)):
        release_free_memory()  # so that what earlier blocks left behind counts as free
        room = _room(runner, ranks)
    for position, call in enumerate(data.calls):
        room -= bytes_per_value * states[position].numel()
        if room < 0:
            found = counted(len(data.calls), "micro-batch", "micro-batches")
            logger.info("%s: memory for %d of %s at once.", runner.report.block, position, found)
            return
        try:
            for one in (call, data.references.get(call.batch)):
                if one is not None:
                    runner.paused.start(one.batch, partial(runner.run, one))
        except torch.OutOfMemoryError:
            runner.store.pausing = False
            runner.paused.abandon()
            return


def _room(runner: BlockRunner, ranks: Ranks) -> float:
    """Bytes that paused forwards may take; processes on CPUs share what is free."""
    sharing = ranks.size if runner.device.type == "cpu" else 1
    return min(PAUSED_SHARE * free_bytes(runner.device) / sharing, runner.store.on_device)


def _reconstructed(
    runner: BlockRunner,
    solved: list[Solved],
    data: CalibrationCalls,
    held_out: list[BlockCall],
    targets: dict[int, Any],
    run: Run,
) -> list[Solved]:
    """Tune the solved linears towards the output of the original block.

    Args:
        held_out: the calls to judge by, as the quantized model makes them.
        targets: the original block's outputs, by the number of the quantized model's call.
    """
    started = time.monotonic()
    examples, judged = (
        [Example(call=call, target=hidden_states(targets[call.batch]), mask=data.masks[call.batch]) for call in calls]
        for calls in (data.calls, held_out)
    )
    found = reconstruct(runner, solved, examples, judged, run.reconstruction_passes, run.ranks)
    runner.report.reconstructed(found.loss_before, found.loss, found.passes, time.monotonic() - started)
    return found.solved
