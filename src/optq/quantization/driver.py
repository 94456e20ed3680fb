# SPDX-License-Identifier: Apache-2.0
"""Quantize a model, block by block.

The model runs on the calibration data and pauses at its first block. The block's linears fall into stages by the input
they share. Stage by stage, the inputs are summed into a Hessian, the weights are solved and written back, so that
later stages see what the quantized model will really compute. Then the block's outputs carry the model on to the next
block.

Beside it the original model runs on the same data, through the same blocks with their original weights: it says how
far the inputs of every stage have drifted, and at the end, on rows kept apart, how good the quantized model is.
"""

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from optq.calibration import Calibration
from optq.checkpoint import PackedWeight, pack
from optq.device.memory import all_finite, peak_gib, release_free_memory, reuse_of_free_memory
from optq.device.placement import working_dtype
from optq.distributed import Ranks
from optq.errors import CalibrationError, CheckpointError, ModelError, counted
from optq.evaluation import Comparer, Comparison, Overflow
from optq.events import Load, Quality, RunFinished, Started, rounded
from optq.layers import QuantLinear
from optq.model import Stage

from .block import kind_of
from .coroutines import Finished, SuspendedForwards
from .plan import Plan, Target
from .report import Solved
from .run import Run
from .runner import BlockRunner, at_block
from .streams import Streams, Watched

COMPARISON = 512  # multiplications in a block that take as long as comparing one logit; measured on a CPU


def quantize_model(model: nn.Module, plan: Plan, calibration: Calibration, run: Run) -> Comparison | None:
    """Quantize the planned linears of `model` in place: each becomes a `QuantLinear`.

    Args:
        model: on any device, its weights loaded, but for those of the blocks that `run.source` reads.
        run: settings of the run, and the device.
    Returns:
        How the quantized model compares with the original on `calibration.held_out`; None without these, or for
        models that return no logits.
    Raises:
        ModelError: weights are not finite; the layer is named.
        CalibrationError: activations are not finite; the block is named. Or there are more processes than
            micro-batches.
        SolveError: a layer's Hessian cannot be inverted.
    On any exception the model's hooks, flags and devices are as before; blocks finished by then stay quantized.
    """
    if run.source is None:
        _check_weights(plan.all_targets, "nothing was quantized")
    _say_started(model, plan, calibration, run)
    started = time.monotonic()
    calibration = _share_of(calibration, run.ranks)
    release_free_memory()  # encoding the calibration texts leaves a lot behind
    comparison = None
    overflow = Overflow(getattr(model, "dtype", None), working_dtype(run.device))
    with (
        reuse_of_free_memory() as bound_free_memory,
        SuspendedForwards(model, plan.blocks, run.device, run.store) as forwards,
    ):
        follow_all = plan.propagates or run.reconstruction_passes > 0
        streams = Streams(forwards, calibration, run.device, follow_all=follow_all)
        run.log.expect(_loads(model, plan, streams))
        for name in plan.blocks:
            comparison = _quantize_block(name, model, plan, streams, run, overflow)
            bound_free_memory()
    if comparison is not None:
        run.log.emit(Quality(held_out=calibration.truly_held_out, **comparison.facts()))
    run.log.emit(
        RunFinished(
            seconds=round(time.monotonic() - started, 3),
            peak_gib=rounded(peak_gib(run.device)),
            bits_per_weight=rounded(_bits_per_weight(model, plan)),
        )
    )
    return comparison


def _quantize_block(
    name: str, model: nn.Module, plan: Plan, streams: Streams, run: Run, overflow: Overflow
) -> Comparison | None:
    """Quantize the next block and carry the model on; behind the last one, what `quantize_model` returns."""
    started = time.monotonic()
    if run.source is not None:
        run.source.read(name)
        _check_weights(plan.targets[name], f"{name} was not quantized")
    recorded = None if run.sink is None else run.ranks.broadcast(partial(run.sink.recorded, name))
    first, last = (name == next(end(plan.blocks)) for end in (iter, reversed))
    solved: list[Solved] = []
    outputs: dict[int, Any] = {}
    with at_block(name, plan, streams.forwards, streams.waiting, run) as runner:
        runner.check_inputs(streams.waiting)
        stages: list[Stage] = []
        if first or (recorded is None and plan.targets[name]):
            stages, output = runner.look(streams.waiting[0])
            if first:
                with streams.forwards.ending() if last else nullcontext():
                    streams.find_repeats(output)
            del output
        if recorded is not None:
            packed = runner.write_recorded(recorded)
            run.log.advance(1, block=f"{name} was finished before")
        else:
            if plan.targets[name]:
                kind = kind_of(name, plan, repeats=streams.repeats)
                solved, outputs = kind.solve(runner, stages, streams, run, last=last)
            packed = {done.view: _packed(done, run.checkpoint_format) for done in solved}
        watched = partial(overflow.watching, name, plan.blocks[name])
        comparison = None
        if not last:
            streams.move_on(runner, outputs, watched)
        else:
            release_free_memory()  # logits are large
            with streams.forwards.ending():
                comparison = _compare(model, streams, runner, run.ranks, overflow, watched)
    for view, weight in packed.items():
        model.set_submodule(view.name, QuantLinear(weight, view.bias, run.backend).to(view.weight.device))
        view.module.to("meta")  # the plan still refers to it: without this, every dense weight would live to the end
    if recorded is not None:
        runner.report.restored(time.monotonic() - started)
    elif run.sink is not None and run.ranks.is_first:
        run.sink.write(name)
    if run.sink is not None and run.source is not None:
        run.source.drop(name)
    runner.report.finished(solved, time.monotonic() - started)
    return comparison


def _bits_per_weight(model: nn.Module, plan: Plan) -> float:
    """Of the linears that are packed; NaN without any."""
    packed = [x for x in plan.all_targets if isinstance(model.get_submodule(x.view.name), QuantLinear)]
    stored = sum(target.scheme.stored_bits(*target.view.shape) for target in packed)
    return stored / sum(math.prod(target.view.shape) for target in packed) if packed else math.nan


def _say_started(model: nn.Module, plan: Plan, calibration: Calibration, run: Run) -> None:
    named = str(getattr(model, "name_or_path", ""))
    run.log.emit(
        Started(
            utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=named or type(model).__name__,
            from_folder=Path(named).is_dir(),
            blocks=len(plan.blocks) - (plan.head is not None),
            linears=len(plan.all_targets),
            skipped=plan.skipped,
            calibration=calibration.info,
            weaknesses=list(calibration.weak_for(plan.widest)),
            device=str(run.device),
        )
    )


def _loads(model: nn.Module, plan: Plan, streams: Streams) -> dict[str, Load]:
    """What every block has to do, for the time that is left; of work that all blocks do alike, only the like of it."""
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    fitted_tokens, held_out_tokens = (streams.tokens(held_out=held_out) for held_out in (False, True))
    loads = {}
    for name, block in plan.blocks.items():
        shapes = [target.view.shape for target in plan.targets[name]]
        weights = sum(parameter.numel() for parameter in block.parameters())
        inputs = sum(columns**2 for columns in {columns for _, columns in shapes})  # of each stage a Hessian
        running = fitted_tokens * (inputs + (weights if name != plan.head else 0))
        running += held_out_tokens * weights
        if head is not None and name == next(reversed(plan.blocks)):  # the comparison follows
            of_logit = COMPARISON + (head.shape[1] if name != plan.head else 0)
            running += held_out_tokens * head.shape[0] * of_logit
        loads[name] = Load(solving=sum(rows * columns**2 for rows, columns in shapes), running=running)
    return loads


def _share_of(calibration: Calibration, ranks: Ranks) -> Calibration:
    """What this process runs; every one needs a micro-batch to find the stages of a block with."""
    if len(calibration.batches) < ranks.size:
        raise CalibrationError(
            f"{ranks.size} processes share the run, but the calibration data makes only "
            f"{counted(len(calibration.batches), 'micro-batch', 'micro-batches')}. Start fewer, or choose a smaller "
            "batch_size or more samples."
        )
    return replace(calibration, batches=ranks.shard(calibration.batches), held_out=ranks.shard(calibration.held_out))


def _compare(
    model: nn.Module, streams: Streams, runner: BlockRunner, ranks: Ranks, overflow: Overflow, watched: Watched
) -> Comparison | None:
    """Run the held-out batches to their end, through the last block, original and quantized; compare the logits."""
    comparer, generates = Comparer(), getattr(model, "can_generate", lambda: False)()
    for batch, call, reference in streams.held_out():
        ended = [streams.past(waits, runner, watched) for waits in (reference, call)]
        outputs = [end.output if isinstance(end, Finished) else None for end in ended]
        original, quantized = (getattr(output, "logits", None) for output in outputs)
        if original is not None and quantized is not None and original.shape[:-1] == batch.input_ids.shape:
            comparer.add(original, quantized, batch.next_ids if generates else None, batch.attention_mask)
            overflow.look_at("the output head", quantized)
    comparer.all_reduce(ranks)
    if not comparer.tokens:
        return None
    overflows = next(filter(None, ranks.all_gather(overflow.found)), None) if overflow.is_possible else None
    return replace(comparer.result(), overflows=overflows)


def _packed(done: Solved, checkpoint_format: str) -> PackedWeight:
    try:
        return pack(done.quantized, checkpoint_format)
    except CheckpointError as error:
        raise CheckpointError(f"{done.view.name}: {error}") from error


def _check_weights(targets: Iterable[Target], consequence: str) -> None:
    for target in targets:
        if not all_finite(target.view.weight):
            raise ModelError(
                f"{target.view.name} has weights that are not finite (NaN or infinity). The checkpoint is damaged, or "
                f"its values overflow the dtype it is loaded in; {consequence}."
            )
