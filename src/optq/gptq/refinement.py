# SPDX-License-Identifier: Apache-2.0
"""Improve a finished solution: re-fit the scales to the codes, then the codes to the scales.

GPTQ never returns to a column, and its grids are fitted before it starts. Once all codes are known, the best scales
for them are a least-squares problem per row; GPTQ can be run again on the grids with these scales; and the best code
of one column, all others given, is known in closed form. A row takes the result of a step only where that lowers its
δᵀHδ.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from optq.scheme import QuantizedWeight, per_column

from .grid import LARGEST_SCALE, SMALLEST_SCALE, stored_scales
from .hessian import output_energy

COLUMN_BLOCK = 64
ELEMENTS_AT_ONCE = 1 << 24  # of the largest intermediate of `refit_scales`: 64 MiB
RIDGE = 1e-4  # pulls the scale of a group whose codes hardly matter towards the one it has


Step = Callable[[Tensor, Tensor, QuantizedWeight], QuantizedWeight]
"""(target, damped hessian, quantized) -> an attempt to do better."""


def refine(
    target: Tensor, hessian: Tensor, quantized: QuantizedWeight, rounds: int, solve_again: Step
) -> tuple[QuantizedWeight, Tensor]:
    """Alternate `refit_scales`, `solve_again` and `sweep_codes`; rows that a step does not improve keep what they had.

    Args:
        target: (out, in) float32, what the rounded weights should compute.
        hessian: (in, in) float32, damped.
        rounds: of all three steps; 0 returns `quantized` itself.
        solve_again: GPTQ on the grids of its last argument.
    Returns:
        The solution and its δᵀHδ per row, (out,) float32.
    """
    lost = output_energy(target - quantized.decode(), hessian)
    for _ in range(rounds):
        for step in (refit_scales, solve_again, sweep_codes):
            quantized, lost = better_rows(target, hessian, quantized, lost, step(target, hessian, quantized))
    return quantized, lost


def better_rows(
    target: Tensor, hessian: Tensor, present: QuantizedWeight, lost: Tensor, other: QuantizedWeight
) -> tuple[QuantizedWeight, Tensor]:
    """Row by row, the solution with the lower δᵀHδ, and that loss (out,); `lost` belongs to `present`."""
    other_lost = output_energy(target - other.decode(), hessian)
    better = other_lost < lost
    chosen = replace(
        present,
        codes=torch.where(better[:, None], other.codes, present.codes),
        scales=torch.where(better[:, None], other.scales, present.scales),
        zeros=torch.where(better[:, None], other.zeros, present.zeros),
    )
    return chosen, torch.where(better, other_lost, lost)


def refit_scales(target: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
    """The scales that minimise δᵀHδ with the codes as they are.

    With q_g the codes minus zeros of group g, a row's optimum s solves A s = b, A_gg' = q_gᵀ H_gg' q_g' and
    b_g = q_gᵀ (H w)_g. Scales that would vanish or change their sign keep their value.
    """
    order = torch.argsort(quantized.group_of_column, stable=True)
    hessian = hessian[order][:, order]
    widths = torch.bincount(quantized.group_of_column).tolist()
    steps = quantized.codes.float() - per_column(quantized.zeros.float(), quantized.group_of_column)
    steps, wanted = steps[:, order], target[:, order] @ hessian
    rows_at_once = max(1, ELEMENTS_AT_ONCE // (steps.shape[1] * len(widths)))
    refitted = []
    for chunk, chunk_wanted, scales in zip(
        steps.split(rows_at_once),
        wanted.split(rows_at_once),
        quantized.scales.split(rows_at_once),
        strict=True,
    ):
        right = _sums_by_group(chunk * chunk_wanted, widths)  # (rows, groups)
        strips = zip(chunk.split(widths, 1), hessian.split(widths), strict=True)
        left = torch.stack([_sums_by_group((part @ strip) * chunk, widths) for part, strip in strips], 1)
        diagonal = left.diagonal(dim1=1, dim2=2)
        ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(left.dtype).tiny
        diagonal += ridge
        solved, failed = torch.linalg.solve_ex(left, right + ridge * scales)
        size = solved * scales.sign()
        usable = (size > SMALLEST_SCALE) & (size < LARGEST_SCALE) & (failed == 0)[:, None]  # False for NaN
        refitted.append(torch.where(usable, solved, scales))
    return replace(quantized, scales=stored_scales(torch.cat(refitted)))


def _sums_by_group(values: Tensor, widths: list[int]) -> Tensor:
    """(rows, in) -> (rows, groups)."""
    return torch.stack([part.sum(1) for part in values.split(widths, 1)], 1)


def sweep_codes(target: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
    """One sweep of coordinate descent: every column in turn gets the code that is best with all others as they are.

    For a column j that is w_j + ((w - q) H)_j / H_jj with the others' errors in w - q; columns are visited by
    decreasing H_jj. As in the solver, a block of columns is updated at once and the rest by one matrix product.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    groups = quantized.group_of_column[order].tolist()
    hessian = hessian[order][:, order]
    scales, zeros = quantized.scales.T.contiguous(), quantized.zeros.float().T.contiguous()  # (groups, out)
    pull = ((target - quantized.decode())[:, order] @ hessian).T.contiguous()  # (in, out): half the negative gradient
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
