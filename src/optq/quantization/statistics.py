# SPDX-License-Identifier: Apache-2.0
"""Sum what the linears of a block are given on the calibration data: a Hessian per stage, and how far inputs drift."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from optq.distributed import Ranks
from optq.gptq import Drift, Hessian
from optq.model import Stage, feed_stages, fitting_mask

from .coroutines import BlockCall
from .runner import BlockRunner


@dataclass(frozen=True, kw_only=True)
class CalibrationCalls:
    """The calls of a block that its linears are calibrated on.

    Args:
        calls: the quantized model's calls.
        references: the same micro-batches as the original model computes them, by the number of the quantized model's
            call; empty if earlier layers' errors are not to be propagated.
        masks: (samples, tokens), 0 for padding, or None; by the number of the call.
    """

    calls: list[BlockCall]
    references: dict[int, BlockCall]
    masks: list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class StageStatistics:
    """A stage's Hessian and drift over the calibration data of all processes; drift is None if not compared."""

    stage: Stage
    hessian: Hessian
    drift: Drift | None


Inputs = tuple[Tensor, Tensor | None]  # of a stage, (..., in), and the residual stream, (..., out)


def collect(
    runner: BlockRunner,
    stages: list[Stage],
    data: CalibrationCalls,
    ranks: Ranks,
    outputs: dict[int, Any] | None = None,
) -> list[StageStatistics]:
    """The statistics of each stage's inputs, with the weights that the block has now.

    Micro-batches that wait inside the block go on from there; the others are run from its beginning.

    Args:
        outputs: receives what the original block returns for the reference calls, by their numbers; None: not wanted.
    """
    started = time.monotonic()
    hessians = {stage: Hessian(stage.in_features, runner.device) for stage in stages}
    # The original model may route a token to another expert, so that experts' inputs cannot be compared.
    compared = [stage for stage in stages if data.references and stage.family is None]
    drifts = {stage: Drift(stage.in_features, runner.device, weight_of_drift(stage)) for stage in compared}

    def needs(call: BlockCall) -> Any:
        """None where a forward waits inside the block, and has it."""
        both = (call, data.references.get(call.batch))
        return [(one.args, one.kwargs) for one in both if one and one.batch not in (runner.paused or ())]

    for call in runner.store.in_turn(data.calls, needs):
        reference = data.references[call.batch] if data.references and (compared or outputs is not None) else None
        of_stages, originals, output = runner.with_room(
            partial(_inputs_of, runner, stages, compared, call, reference, to_the_end=outputs is not None)
        )
        if reference is not None and outputs is not None:
            outputs[reference.batch] = runner.store.take(output)
        mask = data.masks[call.batch]
        for stage, inputs in of_stages.items():
            for number, (part, (x, residual)) in enumerate(inputs):
                keep = fitting_mask(None if mask is None else mask[part], x)
                hessians[stage].add(x, keep)
                if stage in drifts:
                    original, original_residual = originals[stage][number]
                    both = None if original_residual is None or residual is None else (original_residual, residual)
                    drifts[stage].add(original, x, both, keep)
    for statistics in (*hessians.values(), *drifts.values()):
        statistics.all_reduce(ranks)
    _support_starved(hessians, runner)
    runner.report.observing_seconds += time.monotonic() - started
    return [StageStatistics(stage=stage, hessian=hessians[stage], drift=drifts.get(stage)) for stage in stages]


def weight_of_drift(stage: Stage) -> Tensor | None:
    """The weight (out, in) with which the stage's drift is summed up; None where it is left out until the end.

    It is needed where there is a residual stream, and saves work where 2 · out · in multiplications for a token are
    fewer than in².
    """
    weight = stage.views[0].weight
    if len(stage.views) > 1 or (stage.residual is None and 2 * weight.shape[0] > weight.shape[1]):
        return None
    return weight


def _inputs_of(
    runner: BlockRunner,
    stages: list[Stage],
    compared: list[Stage],
    call: BlockCall,
    reference: BlockCall | None,
    *,
    to_the_end: bool,
) -> tuple[dict[Stage, list[tuple[slice, Inputs]]], dict[Stage, list[Inputs]], Any]:
    """The inputs of `stages` on one micro-batch, with the samples that they belong to; those of `compared` in the
    original model, in the same order; and what the original block returns, if it runs to the end.
    """
    originals: dict[Stage, list[Inputs]] = {stage: [] for stage in compared}
    inputs: dict[Stage, list[tuple[slice, Inputs]]] = {stage: [] for stage in stages}
    in_parts = runner.store.parts > 1  # then the stages are reached once per part

    def feed(one: BlockCall, wanted: list[Stage], keep: Callable[[Stage, Inputs], None], to_the_end: bool) -> Any:
        if runner.paused is None or one.batch not in runner.paused:
            return feed_stages(wanted, partial(runner.run, one), keep, to_the_end=to_the_end or in_parts)
        if wanted:
            for stage, found in runner.paused.inputs_of(one.batch, wanted).items():
                keep(stage, found)
        return runner.paused.output_of(one.batch) if to_the_end else None

    output = None
    if reference is not None:
        with runner.original_weights():
            output = feed(reference, compared, lambda stage, found: originals[stage].append(found), to_the_end)
    feed(call, stages, lambda stage, found: inputs[stage].append((runner.part, found)), False)
    return inputs, originals, output


def _support_starved(hessians: dict[Stage, Hessian], runner: BlockRunner) -> None:
    """Where an expert saw fewer tokens than it has inputs, all experts' mean makes up for the rest."""
    families: dict[tuple[str, ...], list[Hessian]] = {}
    for stage, hessian in hessians.items():
        if stage.family is not None:
            families.setdefault(stage.family, []).append(hessian)
    for family, members in families.items():
        full = [member for member in members if member.tokens]  # what follows changes only the others' sums
        starved = [member for member in members if member.tokens < member.features]
        if not starved or not full:
            continue
        mean = Hessian(members[0].features, runner.device)
        mean.support(full, 1)
        for member in starved:
            member.support([mean], member.features - member.tokens)
        runner.report.starved_experts(family, [member.tokens for member in members], mean.features)
