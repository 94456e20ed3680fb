# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round one weight matrix so that its outputs, not its entries, stay close.

Columns are rounded one after the other; each column's error is pushed into the columns not yet rounded. Updates are
applied at once inside a block of columns and as one matrix product beyond it, which changes nothing but the speed.
Frantar et al., "OPTQ", ICLR 2023 (arXiv:2210.17323), Algorithm 1.
"""

import logging
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.device.memory import all_finite, free_bytes
from optq.errors import SolveError
from optq.scheme import LayerScheme, QuantizedWeight, trivial_groups

from .columns import Columns, in_order, round_columns
from .grid import Grid, fit_grid
from .hessian import output_energy
from .refinement import Attempt, refine

logger = logging.getLogger(__name__)

ELEMENTS_AT_ONCE = 1 << 24  # of the weight, on a CPU
WORKING_BYTES = 40  # for each element of the rows that are solved together
MEMORY_SHARE = 0.5  # of what is free on an accelerator
DAMPING_STEPS = 3  # tenfold increases tried before giving up


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A quantized weight, its output error and how it was found.

    Args:
        quantized: the codes and grids.
        loss: per row, δᵀHδ with δ = target - rounded and H undamped: the energy of the output error, (out,) float32.
            The target is the weight, or the compensated weight where earlier errors are propagated.
        rtn_loss: the same of rounding to nearest on the grid that was solved on, (out,) float32. `loss` never exceeds
            it.
        energy: per row, wᵀHw: the energy of the outputs, (out,) float32.
        damping: the fraction of the Hessian's mean diagonal that was really used.
        dead_columns: number of inputs that were always zero during calibration; their weights are rounded to nearest.
    """

    quantized: QuantizedWeight
    loss: Tensor
    rtn_loss: Tensor
    energy: Tensor
    damping: float
    dead_columns: int

    def to(self, device: torch.device | str) -> "Solution":
        """A copy with all tensors on `device`."""
        return replace(
            self,
            quantized=self.quantized.to(device),
            loss=self.loss.to(device),
            rtn_loss=self.rtn_loss.to(device),
            energy=self.energy.to(device),
        )


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: LayerScheme,
    *,
    drift: Tensor | None = None,
    column_block: int | None = None,
    name: str = "this layer",
) -> Solution:
    """Round `weight` to `scheme`'s grid, minimising the change of its outputs on the calibration data.

    Args:
        weight: (out, in), any float dtype, on the device where the work should happen. Not modified. Rows are
            independent, so matrices that share an input may be stacked.
        hessian: mean of x·xᵀ over calibration tokens, (in, in) float32. Not modified.
        drift: mean of (outputs in the original model - outputs)·xᵀ, (out, in) float32, with all that the outputs are
            added to (`Drift`); with it, `scheme.propagation` of what earlier layers' errors change is compensated.
        column_block: columns whose updates are applied eagerly; speed only. None: what suits the device.
        name: for error messages.
    Raises:
        SolveError: the Hessian stays singular after three tenfold increases of damping, or the outputs' mean square is
            beyond float32's range.
        ModelError: a weight is so large that its scale overflows float16, or is not finite.
    Cost: O(out · in²) time; (4 · in² + 10 · rows · in) · 4 bytes beyond the inputs, for the rows of `rows_at_once`.
    """
    energy = hessian.diagonal()
    dead = energy == 0
    order, group_of_column = _order_and_groups(energy, scheme)
    inverted = _invert(hessian, dead, order, scheme.damping, name)
    columns = _Columns(hessian, inverted, order, group_of_column, scheme, column_block)
    parts = []
    at_once = rows_at_once(weight.shape[0], weight.shape[1], weight.device)
    drifts = repeat(None) if drift is None else drift.split(at_once)
    for rows, drifted in zip(weight.split(at_once), drifts, strict=False):
        original = target = rows.float()
        if drifted is not None and scheme.propagation:
            # What is missing in the outputs, by least squares; eq. 6 of arXiv:2504.09629.
            target = original + scheme.propagation * drifted @ inverted.inverse
        best, rounded = columns.solve(original, target)
        parts.append(
            Solution(
                quantized=best.quantized,
                loss=best.loss.clamp(min=0),  # sums that vanish may be rounded to either side of 0
                rtn_loss=rounded.loss.clamp(min=0),
                energy=output_energy(original, hessian).clamp(min=0),
                damping=inverted.damping,
                dead_columns=int(dead.sum()),
            )
        )
    solution = stacked(parts)
    _check_range(solution, name)
    return solution


def _check_range(solution: Solution, name: str) -> None:
    if not all(all_finite(energies) for energies in (solution.loss, solution.rtn_loss, solution.energy)):
        raise SolveError(
            f"{name}: the mean square of its outputs on the calibration data is beyond float32's range, so its errors "
            "cannot be compared. Check weights and data for outliers, or leave this layer in full precision with "
            f"dynamic={{'-:{name}': {{}}}}."
        )


def rows_at_once(rows: int, columns: int, device: torch.device) -> int:
    """How many rows of a weight are solved together. They are independent; an output head has a hundred thousand.

    A CPU has no use for more than a few. On a GPU a launch for a block of columns is done when its slowest program is,
    so there are as few as memory allows, of equal size: one in the usual case.
    """
    if device.type == "cpu":
        return max(1, ELEMENTS_AT_ONCE // columns)
    most = max(1, int(MEMORY_SHARE * free_bytes(device)) // (WORKING_BYTES * columns))
    return -(-rows // -(-rows // most))


def stacked(parts: list[Solution]) -> Solution:
    """Concatenate solutions of consecutive rows, (rows, in) each, into one."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        quantized=replace(
            parts[0].quantized,
            codes=torch.cat([part.quantized.codes for part in parts]),
            scales=torch.cat([part.quantized.scales for part in parts]),
            zeros=torch.cat([part.quantized.zeros for part in parts]),
        ),
        loss=torch.cat([part.loss for part in parts]),
        rtn_loss=torch.cat([part.rtn_loss for part in parts]),
        energy=torch.cat([part.energy for part in parts]),
    )


def _on_grid(codes: Tensor, grid: Grid, group_of_column: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scales=grid.scales,
        zeros=grid.zeros.to(torch.int16),
        group_of_column=group_of_column,
        bits=scheme.bits,
    )


def round_to_nearest(weight: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    """Round-to-nearest (RTN) baseline: `weight` (out, in), any float dtype, to the nearest codes, (out, in) uint8.

    Raises:
        ModelError: a weight is so large that its scale overflows float16, or is not finite.
    """
    weight = weight.float()
    group_of_column = trivial_groups(weight.shape[1], scheme.group_width(weight.shape[1]), weight.device)
    grid = fit_grid(weight, group_of_column, scheme)
    return _on_grid(grid.encode(weight, group_of_column), grid, group_of_column, scheme)


def _order_and_groups(energy: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """The order in which columns are solved (in,) int64, and the group of each column (in,) int32."""
    in_features = energy.shape[0]
    groups = trivial_groups(in_features, scheme.group_width(in_features), energy.device)
    if scheme.act_order == "none":
        return torch.arange(in_features, device=energy.device), groups
    order = torch.argsort(energy, descending=True, stable=True)
    if scheme.act_order == "desc_act":
        groups = torch.empty_like(groups).scatter_(0, order, groups)
    elif scheme.act_order == "group_aware":
        # Groups by their mean energy, then columns inside each: both sorts are stable, so the second keeps the first.
        width, counts = scheme.group_width(in_features), torch.bincount(groups)
        filled = pad(energy, (0, counts.numel() * width - in_features))
        mean = filled.view(-1, width).sum(1) / counts
        order = order[torch.argsort(mean[groups[order].long()], descending=True, stable=True)]
    return order, groups


@dataclass(frozen=True, kw_only=True)
class _Inverted:
    """The damped Hessian, its inverse, the inverse's upper Cholesky factor with columns in solving order."""

    hessian: Tensor
    inverse: Tensor
    factor: Tensor
    damping: float


@dataclass(frozen=True)
class _Columns:
    """What the rows of a weight share while they are solved: the Hessian, and the order and groups of the columns."""

    hessian: Tensor
    inverted: _Inverted
    order: Tensor
    group_of_column: Tensor
    scheme: LayerScheme
    column_block: int | None

    def solve(self, original: Tensor, target: Tensor) -> tuple[Attempt, Attempt]:
        """The best codes that were found for rows (rows, in) float32, and those of rounding to nearest on their grid.

        Args:
            original: the weight's rows, to whose range grids are fitted.
            target: what the codes are to stand for.
        """
        scheme = self.scheme
        # Weighted by the diagonal, although the solver's pivots are closer to what rounding a column costs after its
        # error is compensated: they gave lower losses of the layers and a worse perplexity (docs/accuracy.md).
        importance = self.hessian.diagonal() if scheme.grid == "weighted" else None
        grid = fit_grid(original, self.group_of_column, scheme, importance)
        started = Attempt.of(target, self.inverted.hessian, self._rounded(grid, target))
        refined = refine(target, self.inverted.hessian, started, scheme.refinement)
        nearest = self._nearest(grid, original)
        solved = refined.or_better(Attempt.of(target, self.inverted.hessian, nearest)).quantized
        # Damping hides inputs that count, where one input has nearly all of the energy: so again, without it.
        rounded = Attempt.of(target, self.hessian, nearest)
        best = Attempt.of(target, self.hessian, solved).or_better(rounded)
        if importance is not None:  # where few directions count, another grid may fit them by chance
            plain = fit_grid(original, self.group_of_column, replace(scheme, grid="minmax"))
            best = best.or_better(Attempt.of(target, self.hessian, self._nearest(plain, original)))
        return best, rounded

    def _rounded(self, grid: Grid, target: Tensor) -> QuantizedWeight:
        """GPTQ itself: `target` (rows, in) float32 rounded to `grid` column by column, in `order`."""
        columns = Columns(
            matrix=self.inverted.factor,
            scales=grid.scales.T.contiguous(),
            zeros=grid.zeros.T.contiguous(),
            groups=self.group_of_column[self.order],
            max_code=grid.max_code,
        )
        codes = in_order(round_columns(target.T[self.order].contiguous(), columns, self.column_block), self.order)
        return _on_grid(codes, grid, self.group_of_column, self.scheme)

    def _nearest(self, grid: Grid, original: Tensor) -> QuantizedWeight:
        return _on_grid(grid.encode(original, self.group_of_column), grid, self.group_of_column, self.scheme)


def _invert(hessian: Tensor, dead: Tensor, order: Tensor, damping: float, name: str) -> _Inverted:
    mean_energy = hessian.diagonal().mean()
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += torch.where(dead, mean_energy.clamp(min=torch.finfo(damped.dtype).tiny), torch.zeros_like(mean_energy))
    undamped = diagonal.clone()
    for step in range(DAMPING_STEPS + 1):
        tried = damping * 10**step
        diagonal.copy_(undamped + tried * mean_energy)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse[order][:, order], upper=True)
            if not failed and all_finite(factor):
                if step:
                    logger.warning("%s: the Hessian was singular at damping %g; solved with %g.", name, damping, tried)
                return _Inverted(hessian=damped, inverse=inverse, factor=factor, damping=tried)
    raise SolveError(
        f"{name}: the Hessian of {hessian.shape[0]} inputs stays singular with damping up to {tried:g} "
        f"(asked for: {damping:g}). Use more or more varied calibration data, or leave this layer in full precision "
        f"with dynamic={{'-:{name}': {{}}}}."
    )
