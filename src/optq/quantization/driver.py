# SPDX-License-Identifier: Apache-2.0
"""Quantize a model: the whole story.

The model runs on the calibration data and pauses at its first block. The block's linears fall into stages by the
input they share. Stage by stage, the inputs are summed into a Hessian, the weights are solved and written back, so
that later stages see what the quantized model will really compute. Then the block's outputs carry the model on to the
next block.

Beside it the original model runs on the same data, through the same blocks with their original weights: it says how
far the inputs of every stage have drifted, and at the end, on rows kept apart, how good the quantized model is.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optq.calibration import Calibration, MicroBatch
from optq.checkpoint import PackedWeight, pack
from optq.device.memory import all_finite, peak_gib, release_free_memory, reuse_of_free_memory
from optq.device.placement import execution_device, placed, tensors_outside, working_dtype
from optq.distributed import ALONE, Ranks
from optq.errors import CalibrationError, CheckpointError, ModelError, counted
from optq.evaluation import Comparer, Comparison, Overflow
from optq.events import BlockRestored, Load, Quality, RunFinished, RunLog, Started, rounded
from optq.layers import QuantLinear
from optq.model import LinearView

from .activations import ActivationStore
from .block import BlockWork, Solved
from .coroutines import BlockCall, Finished, SuspendedForwards
from .plan import Plan, Target
from .walk import BlockSink, BlockSource, at_work, in_memory, suspended

Watched = Callable[[], AbstractContextManager[None]]

COMPARISON = 512  # multiplications in a block that take as long as comparing one logit; measured on a CPU


def quantize_model(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    *,
    sequential: bool = True,
    reconstruction_passes: int = 0,
    checkpoint_format: str = "gptq",
    backend: str = "auto",
    device: torch.device | str | None = None,
    log: RunLog | None = None,
    source: BlockSource | None = None,
    sink: BlockSink | None = None,
    store: ActivationStore | None = None,
    ranks: Ranks = ALONE,
) -> Comparison | None:
    """Quantize the planned linears of `model` in place: each becomes a `QuantLinear`.

    Args:
        model: on any device, its weights loaded, but for those of the blocks that `source` reads.
        sequential: calibrate later stages of a block on the already quantized earlier ones (true_sequential).
        reconstruction_passes: over the calibration data, at most, to tune each finished block by gradient; 0: none.
        device: where blocks are run and solved, one at a time; by default the accelerator, if there is one.
        log: receives the events of the run.
        source: where the blocks' tensors come from when their turn comes; None: all are in memory.
        sink: where finished blocks go at once. Those that it has already are not solved again. With a source they are
            dropped from memory afterwards. Only that of the first process is asked and written to.
        store: keeps the hidden states between blocks; by default on `device`.
        ranks: the processes that share the run; each is called with the same arguments and ends with the same model.
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
    log = log if log is not None else RunLog()
    device = execution_device(device)
    if source is None:
        for targets in plan.targets.values():
            _check_weights(targets, "nothing was quantized")
    names, blocks = list(plan.blocks), list(plan.blocks.values())
    named = str(getattr(model, "name_or_path", ""))
    log.emit(
        Started(
            utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=named or type(model).__name__,
            from_folder=Path(named).is_dir(),
            blocks=len(blocks) - (plan.head is not None),
            linears=sum(map(len, plan.targets.values())),
            skipped=plan.skipped,
            calibration=calibration.info,
            weaknesses=list(calibration.weak_for(plan.widest)),
            device=str(device),
        )
    )
    started = time.monotonic()
    calibration = _share_of(calibration, ranks)
    release_free_memory()  # encoding the calibration texts leaves a lot behind
    repeats = _repeats(model, plan, calibration.batches[-1], device, source)
    streams = _Streams(
        calibration, follow_all=plan.propagates or reconstruction_passes > 0 or repeats, repeats=repeats
    )
    log.expect(_loads(model, plan, streams))
    comparison = None
    overflow = Overflow(getattr(model, "dtype", None), working_dtype(device))
    with (
        reuse_of_free_memory() as bound_free_memory,
        suspended(model, plan, streams.model_inputs(device), device, store) as (forwards, waiting),
    ):
        for name in names:
            block_started = time.monotonic()
            last = name == names[-1]
            if source is not None:
                source.read(name)
            with at_work(name, forwards, waiting, plan, streams.masks, device, log, ranks) as work:
                _check_weights(plan.targets[name], f"{name} was not quantized")
                work.check_finite(waiting)
                recorded = None if sink is None else ranks.broadcast(partial(sink.recorded, name))
                solved: list[Solved] = []
                outputs: dict[int, Any] = {}
                ahead: list[BlockCall] = []
                if recorded is not None:
                    packed = work.write_recorded(recorded)
                    log.advance(1, block=f"{name} was finished before")
                else:
                    passes = 0 if name == plan.head else reconstruction_passes
                    if repeats and name != plan.head:
                        with placed(tensors_outside(model, blocks) if last else [], device, working_dtype(device)):
                            solved, ahead = _solve_repeated(work, forwards, streams, waiting, sequential, passes)
                    else:
                        solved, outputs = _solve(work, streams, waiting, sequential, passes, last)
                    packed = {done.view: _packed(done, checkpoint_format) for done in solved}
                watched = partial(overflow.watching, name, plan.blocks[name])
                if last:
                    release_free_memory()  # logits are large
                    with placed(tensors_outside(model, blocks), device, working_dtype(device)):
                        comparison = _compare(forwards, streams, waiting, work, model, ranks, overflow, watched)
                else:
                    waiting = _continue(forwards, streams, waiting, work, outputs, watched) + ahead
            for view, weight in packed.items():
                _replace(model, view, QuantLinear(weight, view.bias, backend).to(view.weight.device))
            if recorded is not None:
                log.emit(BlockRestored(block=name, seconds=round(time.monotonic() - block_started, 2)))
            elif sink is not None and ranks.is_first:
                sink.write(name)
            if sink is not None and source is not None:
                source.drop(name)
            work.report(solved, time.monotonic() - block_started)
            del work, solved, outputs, ahead, packed, recorded
            bound_free_memory()
    if comparison is not None:
        log.emit(Quality(held_out=calibration.truly_held_out, **comparison.facts()))
    log.emit(RunFinished(seconds=round(time.monotonic() - started, 3), peak_gib=rounded(peak_gib(device))))
    return comparison


def _loads(model: nn.Module, plan: Plan, streams: "_Streams") -> dict[str, Load]:
    """What every block has to do, for the time that is left; of work that all blocks do alike, only the like of it."""
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    loads = {}
    for name, block in plan.blocks.items():
        shapes = [target.view.shape for target in plan.targets[name]]
        weights = sum(parameter.numel() for parameter in block.parameters())
        inputs = sum(columns**2 for columns in {columns for _, columns in shapes})  # of each stage a Hessian
        running = streams.fitted_tokens * (inputs + (weights if name != plan.head else 0))
        running += streams.held_out_tokens * weights
        if head is not None and name == next(reversed(plan.blocks)):  # the comparison follows
            of_logit = COMPARISON + (head.shape[1] if name != plan.head else 0)
            running += streams.held_out_tokens * head.shape[0] * of_logit
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


class _Streams:
    """Which suspended forward is which: the quantized model's run over the data, and beside it the original model's.

    Args:
        follow_all: the original model runs all micro-batches, not only the held-out ones.
        repeats: the model calls each block several times in a row.
    """

    def __init__(self, calibration: Calibration, follow_all: bool, repeats: bool) -> None:
        self.repeats = repeats
        self.batches = (*calibration.batches, *calibration.held_out)
        self.masks = [batch.attention_mask for batch in self.batches]
        self._fitted = len(calibration.batches)
        followed = range(0 if follow_all else self._fitted, len(self.batches))
        # The forwards beyond those of the quantized model, with the micro-batch that each of them runs.
        self._number_of = {len(self.batches) + position: number for position, number in enumerate(followed)}

    def model_inputs(self, device: torch.device) -> list[dict[str, Tensor]]:
        """One entry per forward."""
        inputs = [batch.as_model_inputs(device) for batch in self.batches]
        return inputs + [inputs[number] for number in self._number_of.values()]

    @property
    def fitted_tokens(self) -> int:
        """That run through every block, in all forwards."""
        followed = [number for number in self._number_of.values() if number < self._fitted]
        return sum(self.batches[number].input_ids.numel() for number in (*range(self._fitted), *followed))

    @property
    def held_out_tokens(self) -> int:
        """The same of the held-out ones."""
        return 2 * sum(batch.input_ids.numel() for batch in self.batches[self._fitted :])

    def is_original(self, call: BlockCall) -> bool:
        return call.batch in self._number_of

    def is_held_out(self, call: BlockCall) -> bool:
        """Whether a call is the quantized model's, on a held-out one."""
        return self._fitted <= call.batch < len(self.batches)

    def number_of(self, call: BlockCall) -> int:
        """Of the micro-batch that a forward of the original model runs."""
        return self._number_of[call.batch]

    def fitted(self, waiting: list[BlockCall]) -> tuple[list[BlockCall], dict[int, BlockCall]]:
        """The quantized model's calls to calibrate on, and the original model's by the number of the micro-batch."""
        return [call for call in waiting if call.batch < self._fitted], {
            self.number_of(call): call
            for call in waiting
            if self.is_original(call) and self.number_of(call) < self._fitted
        }

    def held_out(self, waiting: list[BlockCall]) -> list[tuple[MicroBatch, BlockCall, BlockCall]]:
        """Every held-out micro-batch with the quantized model's call and the original model's."""
        originals = {self.number_of(call): call for call in waiting if self.is_original(call)}
        return [(self.batches[call.batch], call, originals[call.batch]) for call in waiting if self.is_held_out(call)]


def _solve(
    work: BlockWork,
    streams: _Streams,
    waiting: list[BlockCall],
    sequential: bool,
    reconstruction_passes: int,
    last: bool,
) -> tuple[list[Solved], dict[int, Any]]:
    """What was solved, and the outputs of the block that came about meanwhile, by the number of the call."""
    calls, references = streams.fitted(waiting)
    reconstructs = reconstruction_passes > 0
    solved, outputs = work.solve(
        calls,
        references,
        sequential,
        original_outputs=reconstructs or not last,
        own_outputs=not reconstructs and not last,  # reconstruction would change them
    )
    if reconstructs and solved:
        solved = _polish(work, solved, streams, waiting, outputs, reconstruction_passes)
    return solved, outputs


def _repeats(
    model: nn.Module, plan: Plan, batch: MicroBatch, device: torch.device, source: BlockSource | None
) -> bool:
    """Whether the model calls its first block several times in a row, as ALBERT does."""
    name, *others = plan.blocks
    outside = [] if others else tensors_outside(model, list(plan.blocks.values()))  # which will run, if it does not
    with (
        in_memory(name, source),
        suspended(model, plan, [batch.as_model_inputs(device)], device) as (forwards, (call,)),
        at_work(name, forwards, [call], plan, [batch.attention_mask], device, RunLog(bar=False)) as work,
        placed(outside, device, working_dtype(device)),
    ):
        posted = forwards.resume(call, work.with_room(partial(work.run, call)))
        return isinstance(posted, BlockCall) and posted.block == call.block


def _solve_repeated(
    work: BlockWork,
    forwards: SuspendedForwards,
    streams: _Streams,
    waiting: list[BlockCall],
    sequential: bool,
    reconstruction_passes: int,
) -> tuple[list[Solved], list[BlockCall]]:
    """Solve a block on all its calls; the original model makes them, as the quantized one's depend on the solution.

    Returns:
        What was solved, and where the original model's forwards wait now. They are gone from `waiting`.
    """
    calls: list[BlockCall] = []
    masks: list[Tensor | None] = []
    following: list[BlockCall] = []
    references = streams.fitted(waiting)[1]
    gone = {reference.batch for reference in references.values()}
    waiting[:] = [call for call in waiting if call.batch not in gone]
    for number, reference in references.items():
        posted: BlockCall | Finished = reference
        while isinstance(posted, BlockCall) and posted.block == reference.block:
            calls.append(replace(posted, batch=len(calls)))
            masks.append(work.masks[number])
            posted = forwards.resume(posted, work.with_room(partial(work.run, calls[-1])))
        if isinstance(posted, BlockCall):
            following.append(posted)
    collected = replace(work, masks=masks)
    solved, _ = collected.solve(calls, {}, sequential)
    if reconstruction_passes and solved:
        targets = {call.batch: collected.run_original(call) for call in calls}
        solved = collected.reconstruct(solved, calls, calls[-1:], targets, reconstruction_passes)
    return solved, following


def _polish(
    work: BlockWork,
    solved: list[Solved],
    streams: _Streams,
    waiting: list[BlockCall],
    outputs: dict[int, Any],
    passes: int,
) -> list[Solved]:
    """Tune a solved block; `outputs` are the original block's, by the number of the original model's call."""
    calls, references = streams.fitted(waiting)
    targets = {number: outputs[reference.batch] for number, reference in references.items()}
    held_out = []
    for _, call, reference in streams.held_out(waiting):
        held_out.append(call)
        targets[call.batch] = work.run_original(reference)
    return work.reconstruct(solved, calls, held_out or calls[-1:], targets, passes)


def _continue(
    forwards: SuspendedForwards,
    streams: _Streams,
    waiting: list[BlockCall],
    work: BlockWork,
    outputs: dict[int, Any],
    watched: Watched,
) -> list[BlockCall]:
    """Run a finished block on every micro-batch and carry the model on; empties `waiting`, so that inputs are freed.

    Args:
        outputs: of the original block, by the number of the call, where they are known already.
        watched: what the quantized block's runs on held-out batches are done in.
    """

    def needs(call: BlockCall) -> Any:
        return call.args, call.kwargs, outputs.get(call.batch)

    following = []
    for call in work.store.in_turn((waiting.pop(0) for _ in range(len(waiting))), needs):
        posted = _past(forwards, streams, call, work, watched, outputs.pop(call.batch, None))
        if isinstance(posted, BlockCall):
            following.append(posted)
    return following


def _past(
    forwards: SuspendedForwards,
    streams: _Streams,
    call: BlockCall,
    work: BlockWork,
    watched: Watched,
    output: Any = None,
) -> BlockCall | Finished:
    """Run a forward on, past all its calls of the block; `output` is that of the first, if it is known."""
    run = work.run_original if streams.is_original(call) else work.run
    with watched() if streams.is_held_out(call) else nullcontext():
        posted = forwards.resume(call, work.with_room(partial(run, call)) if output is None else output)
        while streams.repeats and isinstance(posted, BlockCall) and posted.block == call.block:
            posted = forwards.resume(posted, work.with_room(partial(run, posted)))
    return posted


def _compare(
    forwards: SuspendedForwards,
    streams: _Streams,
    waiting: list[BlockCall],
    work: BlockWork,
    model: nn.Module,
    ranks: Ranks,
    overflow: Overflow,
    watched: Watched,
) -> Comparison | None:
    """Run the held-out batches to their end, through the last block, original and quantized; compare the logits."""
    comparer, generates = Comparer(), getattr(model, "can_generate", lambda: False)()
    for batch, call, reference in streams.held_out(waiting):
        ended = [_past(forwards, streams, waits, work, watched) for waits in (reference, call)]
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


def _replace(model: nn.Module, view: LinearView, layer: QuantLinear) -> None:
    model.set_submodule(view.name, layer)
    view.module.to("meta")  # the plan still refers to it: without this, every dense weight would live to the end
