# SPDX-License-Identifier: Apache-2.0
"""How long a run will take: what it has to do is known from its plan, and how fast this machine is gets measured.

One block of each kind is filled with arbitrary numbers and run on some tokens, which also shows its stages. With
`Hessian.add` and `solve` on small matrices that takes some seconds; the rest is multiplication.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from optq.calibration import Calibration, MicroBatch
from optq.checkpoint import pack
from optq.device.memory import reuse_of_free_memory
from optq.evaluation import Comparer
from optq.gptq import Drift, Hessian, SolvingWork, round_to_nearest, seconds_of, work_of
from optq.gptq import measured as measured_solving
from optq.model import LinearView, Stage, hidden_states, independent_groups
from optq.scheme import LayerScheme

from .bit_allocation import JUDGED_TOKENS, MEASURED_TOKENS
from .block import kind_of
from .block_reconstruction import Example, reconstruct
from .coroutines import BlockCall, SuspendedForwards
from .plan import Plan
from .report import Solved
from .run import Run
from .runner import BlockRunner, at_block
from .statistics import weight_of_drift

LONGEST_FORWARD = 0.5  # seconds, about, of the one that is timed: of as many tokens as that allows
FEWEST_TOKENS = 16
WIDTH, TOKENS = 1024, 2048  # of the inputs that Hessians are timed with
DISK_BYTES = 1 << 24
PATTERN = 1 << 20  # numbers that a block is filled with, again and again

SEARCHING, READING, FORWARDS, HESSIANS, SOLVING, RECONSTRUCTING = (
    "search of the best bits",
    "reading and writing",
    "forwards",
    "Hessians",
    "solving",
    "block reconstruction, at most",
)


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Estimated seconds by part of a run, and the parts that are not estimated."""

    seconds: dict[str, float]
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """Seconds that one unit of each kind of work takes on this machine.

    Args:
        hessian, drift: a multiplication of the whole product.
        packing: a weight.
        disk: a byte.
        device: where solving is measured.
    """

    solving: SolvingWork
    hessian: float
    drift: float
    packing: float
    disk: float
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a block of some kind shows.

    Args:
        scheme_of: of its linears, by name.
        tokens: that it was run on.
        forward: seconds of that.
        step, beginning: seconds of a step of reconstruction, and of what comes before the first; None: not timed.
        output: for the blocks of that kind that are not run.
        calls: by one forward of the model, in a row.
    """

    stages: list[Stage]
    scheme_of: dict[str, LayerScheme]
    tokens: int
    forward: float
    step: float | None
    beginning: float
    output: Any
    calls: int = 1


def estimate(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    run: Run,
    candidates: Callable[[LinearView], Sequence[LayerScheme]] | None = None,
) -> Duration:
    """Estimate the seconds of `quantize_model` in one process on this machine, if it does nothing else.

    Args:
        model: on the meta device; what lies outside of its blocks gets memory and zeros.
        candidates: schemes for a linear, if the best bits are searched for first.
    Cost: some seconds; memory for what lies outside of the blocks and for one block.
    """
    passes = run.reconstruction_passes
    with reuse_of_free_memory():
        ((commonest, _),) = Counter(target.scheme for target in plan.all_targets).most_common(1)
        speed = _speed(commonest, run.device, torch.get_num_threads())
        blocks, comparing = _look(model, plan, calibration.batches[0], run, speed)
    tokens, probed = (sum(b.input_ids.numel() for b in some) for some in (calibration.batches, calibration.held_out))
    repeats = any(seen.calls > 1 for seen in blocks.values())
    follows = plan.propagates or passes > 0 or repeats
    seconds = dict.fromkeys((READING, FORWARDS, HESSIANS, SOLVING), 0.0)
    for name, seen in blocks.items():
        targets, last = plan.targets[name], name == next(reversed(blocks))
        own = seen.calls * tokens  # of this block
        runs = own * _runs(seen, run, follows, last) + seen.calls * probed * 2
        seconds[FORWARDS] += seen.forward / seen.tokens * runs
        for stage in seen.stages:
            drift = follows and not repeats and stage.family is None
            weight = weight_of_drift(stage)
            drifts = drift * (1 if weight is None else 2 * weight.shape[0] / weight.shape[1])
            seconds[HESSIANS] += _products(stage, seen, own) * (speed.hessian + drifts * speed.drift)
            seconds[SOLVING] += _solving(stage, seen.scheme_of, speed, drift=drift)
        stored = sum(target.scheme.stored_bits(*target.view.shape) for target in targets) / 8
        seconds[READING] += sum(target.view.weight.numel() for target in targets) * speed.packing
        seconds[READING] += (_bytes_of(plan.blocks[name]) + stored) * speed.disk
    seconds[FORWARDS] += probed * comparing
    if candidates is not None:
        seconds = {SEARCHING: _searching(plan, blocks, speed, candidates), **seconds}
    reconstructed = [seen for name, seen in blocks.items() if plan.targets[name] and kind_of(name, plan).reconstructs]
    if not passes:
        return Duration(seconds=seconds)
    if any(seen.step is None for seen in reconstructed):
        reason = "block reconstruction, as one step of it takes longer than an estimate may"
        return Duration(seconds=seconds, uncounted=(reason,))
    steps = len(calibration.batches)
    seconds[RECONSTRUCTING] = sum(
        seen.beginning + passes * (steps * seen.calls * (seen.step or 0) + probed * seen.forward / seen.tokens)
        for seen in reconstructed
    )
    return Duration(seconds=seconds)


def _runs(seen: _Seen, run: Run, follows: bool, last: bool) -> float:
    """How often the calibration data runs through a block, in both streams together."""
    groups = len(independent_groups(seen.stages))
    if seen.calls > 1:
        return 3.0  # to find the calls, to solve, and on to the next block
    if not groups:
        return 1.0 + follows
    if run.sequential and groups > 1 and all(stage.orderly for stage in seen.stages):
        again = run.reconstruction_passes > 0 and not last  # reconstruction changes what came out
        return 1.0 + follows + again  # they wait inside
    before = (groups - 1) / 2 if run.sequential else 1.0  # anew for every stage, up to there
    return before + follows * before + (0 if last else 1 + follows * run.sequential)


def _products(stage: Stage, seen: _Seen, tokens: int) -> float:
    """Multiplications of the whole products that a stage's Hessian is the sum of."""
    return stage.rows / seen.tokens * tokens * stage.in_features**2


def _solving(stage: Stage, scheme_of: dict[str, LayerScheme], speed: _Speed, *, drift: bool) -> float:
    """Seconds; a stage's linears of the same scheme are one matrix."""
    rows: Counter[LayerScheme] = Counter()
    for view in stage.views:
        rows[scheme_of[view.name]] += view.shape[0]
    works = (
        work_of(count, stage.in_features, scheme, drift=drift, device=speed.device) for scheme, count in rows.items()
    )
    return sum(work.times(speed.solving) for work in works)


def _searching(
    plan: Plan, blocks: dict[str, _Seen], speed: _Speed, candidates: Callable[[LinearView], Sequence[LayerScheme]]
) -> float:
    """Seconds of `bit_allocation.measure`."""
    seconds = 0.0
    for number, (name, seen) in enumerate(blocks.items()):
        # To measure and on to the next block; the judged tokens, with each of the blocks before damaged in its turn.
        tokens = 2 * MEASURED_TOKENS + (number + 4) * JUDGED_TOKENS
        for group in independent_groups(seen.stages):
            options = candidates(group[0].views[0])
            tokens += len(options) * JUDGED_TOKENS
            for stage in group:
                seconds += _products(stage, seen, MEASURED_TOKENS) * speed.hessian
                for scheme in options:
                    quick = replace(scheme, refinement=0, propagation=0.0)
                    seconds += _solving(stage, {view.name: quick for view in stage.views}, speed, drift=False)
        seconds += tokens * seen.forward / seen.tokens + _bytes_of(plan.blocks[name]) * speed.disk
    return seconds


def _look(model: nn.Module, plan: Plan, batch: MicroBatch, run: Run, speed: _Speed) -> tuple[dict[str, _Seen], float]:
    """Every block as the first of its kind shows it; and the seconds per probed token of comparing the outputs."""
    inside = {id(module) for block in plan.blocks.values() for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module.to_empty(device=run.device, recurse=False)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.detach().zero_()
    weights = max(sum(parameter.numel() for parameter in block.parameters()) for block in plan.blocks.values())
    excerpt = _excerpt(batch, int(LONGEST_FORWARD / (weights * speed.solving.products)))
    tokens = excerpt.input_ids.numel()
    reconstructed = run.reconstruction_passes > 0 and tokens == batch.input_ids.numel()
    kinds: dict[tuple[Any, ...], _Seen] = {}
    found: dict[str, _Seen] = {}
    with SuspendedForwards(model, plan.blocks, run.device) as forwards:
        (call,) = forwards.start([excerpt.as_model_inputs(run.device)])
        for name, block in plan.blocks.items():
            if (kind := _kind_of(name, plan)) not in kinds:
                _fill(block, run.device)
                with at_block(name, plan, forwards, [call], run) as runner:
                    kinds[kind] = _seen(runner, call, excerpt, reconstructed and kind_of(name, plan).reconstructs)
                block.to("meta")
            last = name == next(reversed(plan.blocks))
            with forwards.ending() if last else nullcontext():
                calls, started = 1, time.perf_counter()
                posted = forwards.resume(call, kinds[kind].output)
                while isinstance(posted, BlockCall) and posted.block == call.block:
                    calls, posted = calls + 1, forwards.resume(posted, kinds[kind].output)
                found[name] = replace(kinds[kind], calls=calls)
                if not isinstance(posted, BlockCall):
                    return found, _comparing(posted.output, time.perf_counter() - started) / tokens
            call = posted
    return found, 0.0


def _excerpt(batch: MicroBatch, most: int) -> MicroBatch:
    """About so many tokens of a micro-batch; all of one that is more than text."""
    if batch.inputs is not None or batch.input_ids.numel() <= most:
        return batch
    length = batch.input_ids.shape[1]
    rows, columns = max(1, most // length), min(length, max(most, FEWEST_TOKENS))
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids[:rows, :columns],
        attention_mask=None if mask is None else mask[:rows, :columns],
    )


def _seen(runner: BlockRunner, call: BlockCall, excerpt: MicroBatch, reconstructed: bool) -> _Seen:
    """Run a block, and with `reconstructed` reconstruct it a little."""
    hidden_states((call.args, call.kwargs)).normal_()  # embeddings of zeros would send all tokens to the same experts
    run = partial(runner.run, call)
    stages, output = runner.look(call)
    forward, step, beginning = seconds_of(run, runner.device), None, 0.0
    if reconstructed and runner.targets:
        solved = [
            Solved(view=target.view, quantized=round_to_nearest(target.view.weight, target.scheme), relative_loss=0.0)
            for target in runner.targets
        ]
        examples = [Example(call=call, target=hidden_states(output), mask=excerpt.attention_mask)]
        one, two = (
            seconds_of(partial(reconstruct, runner, solved, examples, examples, passes), runner.device)
            for passes in (1, 2)
        )
        step = max(two - one - forward, forward)  # the second pass: a step, and a forward to judge it by
        beginning = max(one - step - 2 * forward, 0.0)
    return _Seen(
        stages=stages,
        scheme_of={target.view.name: target.scheme for target in runner.targets},
        tokens=excerpt.input_ids.numel(),
        forward=forward,
        step=step,
        beginning=beginning,
        output=output,
    )


def _comparing(output: Any, seconds: float) -> float:
    """Seconds of two forwards' ends, each of which takes so many, and of their comparison."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return 0.0
    following = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return 2 * seconds + seconds_of(lambda: Comparer().add(logits, logits, following, None), logits.device)


def _kind_of(name: str, plan: Plan) -> tuple[Any, ...]:
    """Equal for blocks that take equally long."""
    block = plan.blocks[name]
    shapes = tuple((part, tuple(parameter.shape)) for part, parameter in block.named_parameters())
    return type(block), shapes, tuple((t.view.name.removeprefix(name), t.scheme) for t in plan.targets[name])


def _fill(block: nn.Module, device: torch.device) -> None:
    """Give a block on the meta device memory, and numbers that are as quick to compute with as any."""
    block.to_empty(device=device)
    pattern = 0.02 * torch.randn(PATTERN, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    for tensor in (*block.parameters(), *block.buffers()):
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        for part in tensor.detach().view(-1).split(PATTERN):
            part.copy_(pattern[: part.numel()])


def _bytes_of(block: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())


@cache
def _speed(scheme: LayerScheme, device: torch.device, threads: int) -> _Speed:
    """Measure the speed of this machine; `threads` are those that torch uses."""
    states = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    hessian, drift = Hessian(WIDTH, device), Drift(WIDTH, device)
    nearest = round_to_nearest(states, scheme)
    return _Speed(
        solving=measured_solving(scheme, device),
        hessian=seconds_of(lambda: hessian.add(states), device) / (TOKENS * WIDTH**2),
        drift=seconds_of(lambda: drift.add(states, states), device) / (TOKENS * WIDTH**2),
        packing=seconds_of(lambda: pack(nearest, "gptq"), device) / states.numel(),
        disk=seconds_of(_write, torch.device("cpu")) / DISK_BYTES,
        device=device,
    )


def _write() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(DISK_BYTES))
