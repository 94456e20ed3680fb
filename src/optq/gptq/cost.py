# SPDX-License-Identifier: Apache-2.0
"""How long `solve` will take: what it has to do for a matrix is counted, and the kinds of work are timed.

Small calls of `solve` alone would not tell: what they do in the caches, large ones do in memory. Columns count as
single operations round them; on GPUs, where a block of them is one launch, the scaling to a whole solve makes up for
that.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial

import torch

from optq.scheme import LayerScheme, trivial_groups

from . import solver
from .columns import ROUND_BLOCK, SWEEP_BLOCK
from .grid import fit_grid

CPU = torch.device("cpu")
CPU_SIZE, ACCELERATOR_SIZE = 1024, 4096  # inputs of the matrices that kinds of work are timed with
SMALL, LARGE = (16, 256), (512, 1024)  # of the weights that are solved
REPEATS, ENOUGH = 5, 0.3  # seconds after which nothing is repeated
ROW_OPERATIONS = 8  # on the values of one column, to round it
STRIP_OPERATIONS = 1.5  # on each group's part of δᵀHδ while scales are re-fitted: half is made, multiplied, summed


@dataclass(frozen=True, kw_only=True)
class SolvingWork:
    """Numbers of operations of each kind that `solve` does; or the seconds that one operation of each kind takes.

    Args:
        products: multiplications in products with a whole Hessian.
        updates: entries of a matrix as large as the weight that a product with a few columns changes, where it is the
            memory that takes the time.
        elements: entries of a block of columns that are changed, in the caches.
        cubes: multiplications in factors and inverses of a Hessian.
        fits: weights for which a grid is searched.
        steps: columns that are rounded, whatever their length.
    """

    products: float
    updates: float
    elements: float
    cubes: float
    fits: float
    steps: float

    def times(self, seconds_of_each: "SolvingWork") -> float:
        """Total seconds: these counts times `seconds` per operation."""
        return math.fsum(count * each for count, each in zip(astuple(self), astuple(seconds_of_each), strict=True))


def work_of(rows: int, columns: int, scheme: LayerScheme, *, drift: bool, device: torch.device = CPU) -> SolvingWork:
    """Count the operations of `solve` for a (rows, columns) weight on `device`; `drift`: with making it."""
    weights, rounds, chunks = rows * columns, scheme.refinement, -(-rows // solver.rows_at_once(rows, columns, device))
    # An attempt each: the first solution, the nearest ones, both steps of every round. Three energies. In a round,
    # strips that are half a product together. Two for the target.
    products = (2 + (scheme.grid == "weighted") + 2 * rounds) + 3 + rounds / 2 + 2 * (drift and scheme.propagation > 0)
    # Half of the columns are still to come, on average.
    updates = columns / ROUND_BLOCK / 2 + rounds * columns / SWEEP_BLOCK / 2
    updates += rounds * STRIP_OPERATIONS * scheme.group_count(columns)
    elements = ROUND_BLOCK / 2 + ROW_OPERATIONS + rounds * (SWEEP_BLOCK / 2 + ROW_OPERATIONS)
    return SolvingWork(
        products=products * weights * columns,
        updates=updates * weights,
        elements=elements * weights,
        cubes=2 / 3 * columns**3,  # two Cholesky factors, a sixth each, and an inverse, a third
        fits=weights,
        steps=chunks * columns * (1 + rounds),
    )


def measured(scheme: LayerScheme, device: torch.device) -> SolvingWork:
    """Measure the seconds that one operation of each kind takes on this machine. Takes a second or two.

    The kinds are timed one by one; then all are scaled to what `solve` takes for a small layer.
    """
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    seconds = partial(seconds_of, device=device)
    size, few = CPU_SIZE if device.type == "cpu" else ACCELERATOR_SIZE, ROUND_BLOCK
    weight, large, narrow, flat = (
        normal(LARGE[0], size),
        normal(2 * size, size),
        normal(2 * size, few),
        normal(few, size),
    )
    hessian = large.T @ large / (2 * size)
    energy, groups = hessian.diagonal(), trivial_groups(size, scheme.group_width(size), device)
    invert = partial(solver._invert, hessian, energy == 0, energy.argsort(), scheme.damping, "")
    row, block = normal(size), normal(few // 2, size)
    kinds = SolvingWork(
        products=seconds(lambda: weight @ hessian) / (weight.numel() * size),
        updates=seconds(lambda: large.addmm_(narrow, flat, alpha=1e-3)) / large.numel(),
        elements=seconds(lambda: block.addr_(narrow[: few // 2, 0], row, alpha=1e-3)) / block.numel(),
        cubes=seconds(invert) / work_of(1, size, scheme, drift=False, device=device).cubes,
        fits=seconds(lambda: fit_grid(weight, groups, scheme, energy)) / weight.numel(),
        steps=0.0,
    )

    def solving(rows: int, columns: int) -> tuple[SolvingWork, float]:
        states = normal(2 * columns, columns)
        weight, drift, hessian = (
            normal(rows, columns),
            normal(columns, columns) / columns,
            states.T @ states / len(states),
        )

        def call() -> None:
            solver.solve(weight, hessian, scheme, drift=weight @ drift)

        return work_of(rows, columns, scheme, drift=True, device=device), seconds(call)

    work, took = solving(*SMALL)
    kinds = replace(kinds, steps=max(0.0, took - work.times(kinds)) / work.steps)
    work, took = solving(*LARGE)
    scale = took / work.times(kinds)
    return SolvingWork(**{kind: scale * each for kind, each in asdict(kinds).items()})


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one call to warm up."""
    once_seconds(call, device)
    found: list[float] = []
    while not found or (len(found) < REPEATS and sum(found) < ENOUGH):
        found.append(once_seconds(call, device))
    return min(found)


def once_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished its work."""
    _settle(device)
    started = time.perf_counter()
    call()
    _settle(device)
    return time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
