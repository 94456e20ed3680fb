# SPDX-License-Identifier: Apache-2.0
"""Improve a finished solution: re-fit the scales to the codes, then the codes to the scales.

GPTQ never returns to a column, and its grids are fitted before it starts. Once all codes are known, the best scales
for them are a least-squares problem per row; GPTQ can be run again on the grids with these scales; and the best code
of one column, all others given, is known in closed form. A row takes the result of a step only where that lowers its
δᵀHδ.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from optq.scheme import QuantizedWeight, per_column

from .grid import LARGEST_SCALE, SMALLEST_SCALE, stored_scales

COLUMN_BLOCK = 64
ELEMENTS_AT_ONCE = 1 << 24  # of the largest intermediate of `refit_scales`: 64 MiB
RIDGE = 1e-4  # pulls the scale of a group whose codes hardly matter towards the one it has


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A solution, and what is known about its error δ = target - weights.

    Args:
        pull: δH, (out, in) float32: half the negative gradient of the loss, from which every step starts.
        lost: δᵀHδ per row, (out,) float32.
    """

    quantized: QuantizedWeight
    pull: Tensor
    lost: Tensor

    @classmethod
    def of(cls, target: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> "Attempt":
        error = target - quantized.decode()
        pull = error @ hessian
        return cls(quantized=quantized, pull=pull, lost=(pull * error).sum(1))

    def or_better(self, other: "Attempt") -> "Attempt":
        """Row by row, the one that loses less."""
        better = other.lost < self.lost
        rows = better[:, None]
        chosen = replace(
            self.quantized,
            codes=torch.where(rows, other.quantized.codes, self.quantized.codes),
            scales=torch.where(rows, other.quantized.scales, self.quantized.scales),
            zeros=torch.where(rows, other.quantized.zeros, self.quantized.zeros),
        )
        return Attempt(
            quantized=chosen,
            pull=torch.where(rows, other.pull, self.pull),
            lost=torch.where(better, other.lost, self.lost),
        )


def refine(
    target: Tensor, hessian: Tensor, present: Attempt, rounds: int, solve_again: Callable[[Attempt], QuantizedWeight]
) -> Attempt:
    """Alternate `refit_scales`, `solve_again` and `sweep_codes`; rows that a step does not improve keep what they had.

    Args:
        target: (out, in) float32, what the rounded weights should compute.
        hessian: (in, in) float32, damped.
        rounds: of all three steps; 0 returns `present` itself.
        solve_again: GPTQ on the grids of what it is given.
    """
    for _ in range(rounds):
        for step in (partial(refit_scales, hessian), solve_again, partial(sweep_codes, hessian)):
            present = present.or_better(Attempt.of(target, hessian, step(present)))
    return present


def refit_scales(hessian: Tensor, present: Attempt) -> QuantizedWeight:
    """The scales that minimise δᵀHδ with the codes as they are.

    With q_g the codes minus zeros of group g, the best change c of a row's scales solves A c = b,
    A_gg' = q_gᵀ H_gg' q_g' and b_g = q_gᵀ (Hδ)_g. Scales that would vanish or change their sign keep their value.
    """
    quantized = present.quantized
    order = torch.argsort(quantized.group_of_column, stable=True)
    hessian = hessian[order][:, order]
    widths = torch.bincount(quantized.group_of_column).tolist()
    steps = quantized.codes.float() - per_column(quantized.zeros.float(), quantized.group_of_column)
    steps, pull = steps[:, order], present.pull[:, order]
    rows_at_once = max(1, ELEMENTS_AT_ONCE // (steps.shape[1] * len(widths)))
    refitted = []
    for chunk, chunk_pull, scales in zip(
        steps.split(rows_at_once),
        pull.split(rows_at_once),
        quantized.scales.split(rows_at_once),
        strict=True,
    ):
        right = _sums_by_group(chunk * chunk_pull, widths)  # (rows, groups)
        strips = zip(chunk.split(widths, 1), hessian.split(widths), strict=True)
        left = torch.stack([_sums_by_group((part @ strip) * chunk, widths) for part, strip in strips], 1)
        diagonal = left.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(left.dtype).tiny
        change, failed = torch.linalg.solve_ex(left, right)
        solved = scales + change
        size = solved * scales.sign()
        usable = (size > SMALLEST_SCALE) & (size < LARGEST_SCALE) & (failed == 0)[:, None]  # False for NaN
        refitted.append(torch.where(usable, solved, scales))
    return replace(quantized, scales=stored_scales(torch.cat(refitted)))


def _sums_by_group(values: Tensor, widths: list[int]) -> Tensor:
    """(rows, in) -> (rows, groups)."""
    return torch.stack([part.sum(1) for part in values.split(widths, 1)], 1)


def sweep_codes(hessian: Tensor, present: Attempt) -> QuantizedWeight:
    """One sweep of coordinate descent: every column in turn gets the code that is best with all others as they are.

    For a column j that is w_j + ((w - q) H)_j / H_jj with the others' errors in w - q; columns are visited by
    decreasing H_jj. As in the solver, a block of columns is updated at once and the rest by one matrix product.
    """
    quantized = present.quantized
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    groups = quantized.group_of_column[order].tolist()
    hessian = hessian[order][:, order]
    scales, zeros = quantized.scales.T.contiguous(), quantized.zeros.float().T.contiguous()  # (groups, out)
    pull = present.pull.T[order].contiguous()  # (in, out)
    codes = quantized.codes.T[order].contiguous()
    max_code = (1 << quantized.bits) - 1
    pivots = hessian.diagonal().tolist()
    in_features = len(groups)
    for start in range(0, in_features, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, in_features)
        moves = torch.zeros(stop - start, codes.shape[1], device=codes.device)
        for i in range(start, stop):
            scale, zero = scales[groups[i]], zeros[groups[i]]
            steps = codes[i].float() - zero
            best = torch.div(pull[i], scale * pivots[i]).add_(steps).round_().add_(zero).clamp_(0, max_code)
            codes[i] = best
            torch.sub(best - zero, steps, out=moves[i - start]).mul_(scale)
            pull[i + 1 : stop].addr_(hessian[i, i + 1 : stop], moves[i - start], alpha=-1)
        pull[stop:].addmm_(hessian[start:stop, stop:].T, moves, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return replace(quantized, codes=restored.T.contiguous())
