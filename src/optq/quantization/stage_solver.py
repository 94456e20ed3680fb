# SPDX-License-Identifier: Apache-2.0
"""Solve the stages of a block, each process some of them, and write what all of them found into the weights."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from optq.distributed import Ranks
from optq.errors import ModelError, found_in
from optq.gptq import Solution, solve, stacked
from optq.model import LinearView, Stage
from optq.scheme import LayerScheme, QuantizedWeight

from .report import Solved
from .runner import BlockRunner
from .statistics import StageStatistics

# Linears of a stage that have the same scheme, solved as one matrix, and the seconds that this took per row of it.
Stack = tuple[Solution, float]


def solve_stages(
    observed: list[StageStatistics], runner: BlockRunner, ranks: Ranks
) -> Iterator[tuple[Stage, list[Solved]]]:
    """Solve stages that do not depend on one another; every process ends with the rounded values in the weights.

    Each process solves some of the stages; where there are fewer than processes, some rows of every one.

    Raises:
        SolveError: a Hessian cannot be inverted.
        ModelError: a linear's weights are too large to have a grid; it is named.
    """
    rows_are_shared = len(observed) < ranks.size
    at_once = 1 if rows_are_shared else ranks.size
    for turn in (observed[start : start + at_once] for start in range(0, len(observed), at_once)):
        if rows_are_shared:
            own = runner.with_room(partial(_solve_stage, turn[0], runner, ranks, ranks.rank, ranks.size))
            found = [[_joined(parts) for parts in zip(*ranks.all_gather(own), strict=True)]]
        else:
            own = []
            if ranks.rank < len(turn):
                own = runner.with_room(partial(_solve_stage, turn[ranks.rank], runner, ranks))
            found = ranks.all_gather(own)
        for statistics, stacks in zip(turn, found, strict=False):
            yield statistics.stage, _write(statistics, stacks, runner)


def _solve_stage(
    statistics: StageStatistics, runner: BlockRunner, ranks: Ranks, part: int = 0, parts: int = 1
) -> list[Stack]:
    """The stage's linears, or only one of so many parts of their rows; on the CPU if they are to be sent."""
    with found_in(", ".join(view.name for view in statistics.stage.views)):
        hessian = statistics.hessian.mean()
    found = []
    for scheme, views in _by_scheme(statistics.stage, runner).items():
        started = time.monotonic()
        weight = torch.cat([view.weight for view in views])
        rows = weight.tensor_split(parts)[part]
        drift = None
        if statistics.drift is not None and scheme.propagation:
            drift = statistics.drift.of_outputs(weight, part, parts)
        try:
            solution = solve(rows, hessian, scheme, drift=drift, name=views[0].name)
        except ModelError as error:  # of weights that are too large
            largest = max(views, key=lambda view: float(view.weight.abs().max()))
            raise ModelError(f"{largest.name}: {error}") from error
        seconds_per_row = (time.monotonic() - started) / rows.shape[0]
        found.append((solution if ranks.size == 1 else solution.to("cpu"), seconds_per_row))
    return found


def _joined(parts: Sequence[Stack]) -> Stack:
    """What processes found for consecutive rows, at the slowest one's pace."""
    solutions, seconds_per_row = zip(*parts, strict=True)
    return stacked(list(solutions)), max(seconds_per_row) / len(parts)


def _by_scheme(stage: Stage, runner: BlockRunner) -> dict[LayerScheme, list[LinearView]]:
    scheme_of = {target.view: target.scheme for target in runner.targets}
    found: dict[LayerScheme, list[LinearView]] = {}
    for view in stage.views:
        found.setdefault(scheme_of[view], []).append(view)
    return found


def _write(statistics: StageStatistics, stacks: list[Stack], runner: BlockRunner) -> list[Solved]:
    """Give a stage's linears their rounded values, and tell the log."""
    solved = []
    by_scheme = _by_scheme(statistics.stage, runner).items()
    for (scheme, views), (solution, seconds_per_row) in zip(by_scheme, stacks, strict=True):
        solution = solution.to(runner.device)
        rows = [view.shape[0] for view in views]
        parts = zip(
            views,
            write_rows(views, solution.quantized),
            *(values.split(rows) for values in (solution.loss, solution.rtn_loss, solution.energy)),
            strict=True,
        )
        for view, quantized, *energies in parts:
            loss, rtn_loss, energy = (float(values.sum()) for values in energies)
            relative_loss, relative_rtn_loss = (one / energy if energy > 0 else 0.0 for one in (loss, rtn_loss))
            solved.append(Solved(view=view, quantized=quantized, relative_loss=relative_loss))
            runner.report.linear(
                solved[-1],
                scheme,
                solution,
                rtn_loss=relative_rtn_loss,
                tokens=statistics.hessian.tokens,
                seconds=seconds_per_row * view.shape[0],
            )
    return solved


def write_rows(views: Iterable[LinearView], stacked: QuantizedWeight) -> list[QuantizedWeight]:
    """Give linears that were solved as one matrix their rounded values; what each of them got."""
    views = list(views)
    parts = stacked.split_rows([view.shape[0] for view in views])
    for view, quantized in zip(views, parts, strict=True):
        view.write(quantized.decode())
    return parts
