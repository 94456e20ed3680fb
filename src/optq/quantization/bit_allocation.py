# SPDX-License-Identifier: Apache-2.0
"""Spend a budget of bits where they matter: a scheme for every linear, chosen by what each costs the model.

Before anything is quantized, the original model runs on a part of the calibration data. In every block, the linears
that share an input, which readers fuse and so must agree, are quantized alone at each candidate scheme, and the error
of the block's output is measured relative to that output. What such an error costs differs from block to block (the
last ones feed the logits directly), so each block is also quantized as a whole, and the divergence of the model's
predictions measured. Errors of different linears add up nearly independently, so the best schemes for a budget follow
from their lower convex hulls: always buy the bits that lower the divergence most.
"""

import heapq
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optq.calibration import Calibration, MicroBatch
from optq.distributed import ALONE
from optq.errors import ConfigError
from optq.evaluation import Comparer
from optq.events import Allocated, RunLog
from optq.gptq import solve
from optq.model import LinearView, Stage, hidden_states, independent_groups, observe_stages, relative_error
from optq.scheme import LayerScheme, QuantizedWeight

from .coroutines import BlockCall, Finished, SuspendedForwards
from .plan import Plan
from .run import Run
from .runner import BlockRunner, at_block
from .stage_solver import write_rows
from .statistics import CalibrationCalls, collect

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 8192  # for the Hessians: enough to rank linears
JUDGED_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Option:
    """One scheme for a unit: the bits that all of its linears then take, and the loss that it causes.

    Args:
        loss: the divergence of the model's predictions that it causes, in nats per token; for models without logits
            the relative error of the block's output.
    """

    scheme: LayerScheme
    bits: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears that must have the same scheme, by name, and their options."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


def allocate(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    candidates: Callable[[LinearView], Sequence[LayerScheme]],
    budget: float,
    run: Run,
) -> Plan:
    """`plan` with the schemes that fit the budget and cost the least.

    Args:
        model: its weights loaded, but for those of the blocks that `run.source` reads; as before afterwards.
        candidates: schemes for a linear; those of linears that share an input are intersected.
        budget: stored bits of all planned linears together, scales and zeros included.
        run: its log receives an event `allocated`, with the schemes and errors of every unit; of several processes,
            the first one measures.
    Raises:
        ConfigError: even the smallest schemes take more than the budget.
    """
    units = run.ranks.broadcast(lambda: measure(model, plan, calibration, candidates, run))
    chosen = choose([unit.options for unit in units], budget)
    weights = sum(target.view.weight.numel() for target in plan.all_targets)
    if chosen is None:
        least = sum(min(option.bits for option in unit.options) for unit in units)
        raise ConfigError(
            f"A budget of {budget / weights:.3f} bits per weight was asked for, but the smallest allowed schemes need "
            f"{least / weights:.3f}. Ask for more, or allow fewer bits or larger groups."
        )
    scheme_of = {name: option.scheme for unit, option in zip(units, chosen, strict=True) for name in unit.names}
    spent = sum(option.bits for option in chosen)
    logger.info("Allocated %.3f bits per weight of %.3f allowed.", spent / weights, budget / weights)
    run.log.emit(
        Allocated(
            bits_per_weight=round(spent / weights, 4),
            expected_loss=sum(option.loss for option in chosen),
            units=[
                {
                    "linears": unit.names,
                    "chosen": _label(option.scheme),
                    "losses": {_label(other.scheme): other.loss for other in unit.options},
                }
                for unit, option in zip(units, chosen, strict=True)
            ],
        )
    )
    targets = {
        block: tuple(replace(target, scheme=scheme_of.get(target.view.name, target.scheme)) for target in targets)
        for block, targets in plan.targets.items()
    }
    return replace(plan, targets=targets)


def _label(scheme: LayerScheme) -> str:
    return f"{scheme.bits}-bit g{scheme.group_size}"


def choose(options: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option per unit within the budget, with the least loss that the convex hulls allow; None if none fits."""
    hulls = [_lower_hull(unit) for unit in options]
    positions = [0] * len(hulls)
    spent = sum(hull[0].bits for hull in hulls)
    if spent > budget:
        return None
    upgrades: list[tuple[float, int]] = []

    def offer(unit: int) -> None:
        if positions[unit] + 1 < len(hulls[unit]):
            present, following = hulls[unit][positions[unit] : positions[unit] + 2]
            heapq.heappush(upgrades, ((following.loss - present.loss) / (following.bits - present.bits), unit))

    for unit in range(len(hulls)):
        offer(unit)
    while upgrades:
        _, unit = heapq.heappop(upgrades)
        present, following = hulls[unit][positions[unit] : positions[unit] + 2]
        if spent + following.bits - present.bits > budget:
            continue  # too large for what is left; a smaller one may still fit
        spent += following.bits - present.bits
        positions[unit] += 1
        offer(unit)
    return [hull[position] for hull, position in zip(hulls, positions, strict=True)]


def _lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options, by bits, that no mixture of two others beats."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    return (second.loss - first.loss) / max(second.bits - first.bits, 1)


def measure(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    candidates: Callable[[LinearView], Sequence[LayerScheme]],
    run: Run,
) -> list[Unit]:
    """Measure the options of every unit on the original model.

    Raises:
        ConfigError: linears that share an input have no candidate in common.
    """
    judged = _excerpt(calibration.batches[0])
    batches = [judged, *_first_tokens(calibration.batches)]
    names, first_damaged, source = list(plan.blocks), len(batches), run.source
    masks = [batch.attention_mask for batch in batches]
    alone = replace(run, log=RunLog(bar=False), ranks=ALONE)
    measured: list[_MeasuredBlock] = []
    with SuspendedForwards(model, plan.blocks, run.device) as forwards:
        # After the batches, a forward per block: with that block quantized and no other, it runs on to the end.
        calls = forwards.start(batch.as_model_inputs(run.device) for batch in (*batches, *[judged] * len(names)))
        for index, name in enumerate(names):
            if source is not None:
                source.read(name)
            with at_block(name, plan, forwards, calls, alone) as runner:
                data = CalibrationCalls(calls=calls[1:first_damaged], references={}, masks=masks)
                measured.append(_measure_block(runner, calls[0], data, candidates))
                outputs = {first_damaged + index: measured[-1].damaged_output}
                if name != names[-1]:
                    ends = _resumed(forwards, calls, runner, outputs)
                    calls = [end for end in ends if isinstance(end, BlockCall)]
                else:
                    with forwards.ending():
                        ends = _resumed(forwards, [calls[0], *calls[first_damaged:]], runner, outputs)
                        divergences = _divergences(ends, judged.attention_mask)
            if source is not None:
                source.drop(name)
    return [
        replace(unit, options=tuple(replace(option, loss=option.loss * weight) for option in unit.options))
        for block, weight in zip(measured, _sensitivities(measured, divergences), strict=True)
        for unit in block.units
    ]


def _first_tokens(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The first micro-batches, up to `MEASURED_TOKENS`."""
    chosen: list[MicroBatch] = []
    for batch in batches:
        if sum(other.input_ids.numel() for other in chosen) >= MEASURED_TOKENS:
            break
        chosen.append(batch)
    return chosen


def _excerpt(batch: MicroBatch) -> MicroBatch:
    """The first tokens of the first sample, or all of one that is more: one per block is under way at once."""
    if batch.inputs is not None:
        return batch
    mask = batch.attention_mask
    return MicroBatch(
        input_ids=batch.input_ids[:1, :JUDGED_TOKENS],
        attention_mask=None if mask is None else mask[:1, :JUDGED_TOKENS],
    )


@dataclass(frozen=True, kw_only=True)
class _MeasuredBlock:
    """A block's units, with losses relative to its own output; and what comes of quantizing all of them.

    Args:
        damaged_output: with every unit at a middle one of its options.
        error: of that output, relative to the original one.
    """

    units: list[Unit]
    damaged_output: Any
    error: float


def _measure_block(
    runner: BlockRunner,
    judged: BlockCall,
    data: CalibrationCalls,
    candidates: Callable[[LinearView], Sequence[LayerScheme]],
) -> _MeasuredBlock:
    """Calibrated on `data`, and judged by the call `judged`."""
    mask = data.masks[judged.batch]
    original = runner.run(judged)
    if not runner.targets:
        return _MeasuredBlock(units=[], damaged_output=original, error=0.0)

    def error_of(output: Any) -> float:
        return float(relative_error(hidden_states(output), hidden_states(original), mask))

    stages = observe_stages([target.view for target in runner.targets], lambda: runner.run(judged))
    hessians = {found.stage: found.hessian for found in collect(runner, stages, data, ALONE)}
    units, middle_ones = [], []
    for group in independent_groups(stages):
        views = [view for stage in group for view in stage.views]
        means = {stage: hessians[stage].mean() for stage in group}
        schemes, options = _common(views, candidates), []
        for scheme in schemes:
            for stage in group:
                quantized = _solve_quickly(stage, means[stage], scheme)
                if scheme is schemes[len(schemes) // 2]:
                    middle_ones.append((stage, quantized))
                write_rows(stage.views, quantized)
            bits = sum(scheme.stored_bits(*view.shape) for view in views)
            options.append(Option(scheme=scheme, bits=bits, loss=error_of(runner.run(judged))))
            runner.restore(views)
        units.append(Unit(names=tuple(view.name for view in views), options=tuple(options)))
    for stage, quantized in middle_ones:
        write_rows(stage.views, quantized)
    damaged = runner.run(judged)
    runner.restore(view for stage in stages for view in stage.views)
    return _MeasuredBlock(units=units, damaged_output=damaged, error=error_of(damaged))


def _common(views: list[LinearView], candidates: Callable[[LinearView], Sequence[LayerScheme]]) -> list[LayerScheme]:
    """The schemes that all of these linears may have."""
    first, *others = (candidates(view) for view in views)
    common = [scheme for scheme in first if all(scheme in allowed for allowed in others)]
    if not common:
        raise ConfigError(
            f"{', '.join(view.name for view in views[:4])}{' …' if len(views) > 4 else ''} must have one scheme, "
            "because readers fuse them, but `dynamic` leaves them none in common. Give them the same entry."
        )
    return common


def _solve_quickly(stage: Stage, hessian: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    """The stage's linears, stacked, without refinement or propagation: what counts is how options compare."""
    quick = replace(scheme, refinement=0, propagation=0.0)
    stacked = torch.cat([view.weight for view in stage.views])
    return solve(stacked, hessian, quick, name=stage.views[0].name).quantized


def _resumed(
    forwards: SuspendedForwards, calls: list[BlockCall], runner: BlockRunner, outputs: dict[int, Any]
) -> Iterator[BlockCall | Finished]:
    """Carry the model on, one forward after the other: with its entry of `outputs`, or what the block computes."""
    for call in calls:
        yield forwards.resume(call, outputs[call.batch] if call.batch in outputs else runner.run(call))


def _divergences(ends: Iterator[BlockCall | Finished], mask: Tensor | None) -> list[float] | None:
    """How far the logits of each forward but the first are from those of the first; None for models without logits."""
    found: list[float] = []
    original = None
    for end in ends:
        logits = getattr(end.output, "logits", None) if isinstance(end, Finished) else None
        if logits is None:
            return None
        if original is None:
            original = logits
            continue
        comparer = Comparer()
        comparer.add(original, logits, None, mask)
        found.append(max(comparer.result().divergence, 0.0))
    return found


def _sensitivities(blocks: Sequence[_MeasuredBlock], divergences: list[float] | None) -> list[float]:
    """Per block, what a relative error of its output costs at the end of the model."""
    if divergences is None:
        logger.warning("The model returns no logits: bits go where the blocks' outputs gain most, wherever they are.")
        return [1.0] * len(blocks)
    return [
        divergence / block.error if block.error > 0 else 1.0
        for block, divergence in zip(blocks, divergences, strict=True)
    ]
