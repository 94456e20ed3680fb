# SPDX-License-Identifier: Apache-2.0
"""Spend a budget of bits where they matter: a scheme for every linear, chosen by what each costs the model.

Before anything is quantized, the original model runs on a part of the calibration data. In every block, the linears
that share an input, which readers fuse and so must agree, are quantized alone at each candidate scheme, and the error
of the block's output is measured relative to that output. Errors of different linears add up nearly independently, so
the best schemes for a budget follow from their lower convex hulls: always buy the bits that lower the error most.
"""

import heapq
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .block import BlockWork, write_rows
from .calibration import Calibration, MicroBatch
from .errors import ConfigError
from .gptq import solve
from .model import BlockCall, LinearView, hidden_states, observe_stages, relative_error
from .placement import execution_device
from .plan import Plan
from .progress import RunLog
from .scheme import LayerScheme
from .walk import at_work, suspended

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 8192  # enough to rank linears


@dataclass(frozen=True, kw_only=True)
class Option:
    """One scheme for a unit: the bits that all of its linears then take, and the error it causes."""

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
    *,
    device: torch.device | str | None = None,
    log: RunLog | None = None,
) -> Plan:
    """`plan` with the schemes that fit the budget and cost the least.

    Args:
        model: its weights loaded; as before afterwards.
        candidates: of a linear; those of linears that share an input are intersected.
        budget: stored bits of all planned linears together, scales and zeros included.
        log: receives an event `allocated`, with the schemes and errors of every unit.
    Raises:
        ConfigError: even the smallest schemes take more than the budget.
    """
    units = measure(model, plan, calibration, candidates, torch.device(device or execution_device()))
    chosen = choose([unit.options for unit in units], budget)
    weights = sum(target.view.weight.numel() for targets in plan.targets.values() for target in targets)
    if chosen is None:
        least = sum(min(option.bits for option in unit.options) for unit in units)
        raise ConfigError(
            f"A budget of {budget / weights:.3f} bits per weight was asked for, but the smallest allowed schemes need "
            f"{least / weights:.3f}. Ask for more, or allow fewer bits or larger groups."
        )
    scheme_of = {name: option.scheme for unit, option in zip(units, chosen, strict=True) for name in unit.names}
    spent = sum(option.bits for option in chosen)
    logger.info("Allocated %.3f bits per weight of %.3f allowed.", spent / weights, budget / weights)
    if log is not None:
        log.emit(
            "allocated",
            bits_per_weight=round(spent / weights, 4),
            units=[
                {
                    "linears": unit.names,
                    "chosen": _label(option.scheme),
                    "losses": {_label(other.scheme): other.loss for other in unit.options},
                }
                for unit, option in zip(units, chosen, strict=True)
            ],
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
    device: torch.device,
) -> list[Unit]:
    """Every unit's options, measured on the original model."""
    batches = _first_tokens(calibration.batches)
    inputs, masks = [batch.as_model_inputs(device) for batch in batches], [batch.attention_mask for batch in batches]
    units: list[Unit] = []
    last = list(plan.blocks)[-1]
    with suspended(model, plan, inputs, device) as (forwards, calls):
        for name in plan.blocks:
            with at_work(name, forwards, calls, plan, masks, device, RunLog(bar=False)) as (work, calls):
                units += _measure_block(work, calls, candidates)
                if name != last:
                    following = (forwards.resume(call, work.run(call)) for call in calls)
                    calls = [posted for posted in following if isinstance(posted, BlockCall)]
    return units


def _first_tokens(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The first micro-batches, up to `MEASURED_TOKENS`."""
    chosen: list[MicroBatch] = []
    for batch in batches:
        if sum(other.input_ids.numel() for other in chosen) >= MEASURED_TOKENS:
            break
        chosen.append(batch)
    return chosen


def _measure_block(
    work: BlockWork, calls: list[BlockCall], candidates: Callable[[LinearView], Sequence[LayerScheme]]
) -> list[Unit]:
    if not work.targets:
        return []
    judged, mask = calls[0], work.masks[calls[0].batch]
    stages = observe_stages([target.view for target in work.targets], lambda: work.run(judged))
    expected = hidden_states(work.run(judged))
    units = []
    for stage, hessian, _ in work.observe(stages, calls, {}):
        mean = hessian.mean()
        allowed = [candidates(view) for view in stage.views]
        options = []
        for scheme in allowed[0]:
            if not all(scheme in others for others in allowed[1:]):
                continue
            # Quickly, without refinement or propagation: what counts is how options compare.
            quick = replace(scheme, refinement=0, propagation=0.0)
            stacked = torch.cat([view.weight for view in stage.views])
            write_rows(stage.views, solve(stacked, mean, quick, name=stage.views[0].name).quantized)
            loss = float(relative_error(hidden_states(work.run(judged)), expected, mask))
            work.restore(stage.views)
            bits = sum(scheme.stored_bits(*view.shape) for view in stage.views)
            options.append(Option(scheme=scheme, bits=bits, loss=loss))
        units.append(Unit(names=tuple(view.name for view in stage.views), options=tuple(options)))
    return units
