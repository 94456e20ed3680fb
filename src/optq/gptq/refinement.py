# SPDX-License-Identifier: Apache-2.0
"""Improve a finished solution: re-fit the scales to the codes, then the codes to the scales.

GPTQ never returns to a column, and its grids are fitted before it starts. Once all codes are known, the best scales
for them are a least-squares problem per row, and the best code of one column, all others given, is known in closed
form. A row takes the result of a step only where that lowers its δᵀHδ.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from optq.scheme import QuantizedWeight, per_column

from .columns import Columns, in_order, sweep_columns
from .grid import LARGEST_SCALE, SMALLEST_SCALE, stored_scales

ELEMENTS_AT_ONCE = 1 << 20  # of an intermediate of `refit_scales` on a CPU: what its caches hold
ELEMENTS_AT_ONCE_ON_GPUS = 1 << 26
RIDGE = 1e-4  # pulls the scale of a group whose codes hardly matter towards the one it has


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A quantized weight and its error δ = target - weights.

    Args:
        pull: δH, (out, in) float32: half the negative gradient of the loss, from which every step starts.
        loss: δᵀHδ per row, (out,) float32.
    """

    quantized: QuantizedWeight
    pull: Tensor
    loss: Tensor

    @classmethod
    def of(cls, target: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> "Attempt":
        """Evaluate a quantized weight against `target` (out, in) float32 under `hessian` (in, in) float32."""
        error = target - quantized.decode()
        pull = error @ hessian
        return cls(quantized=quantized, pull=pull, loss=(pull * error).sum(1))

    def or_better(self, other: "Attempt") -> "Attempt":
        """Choose, row by row, the attempt with the lower loss."""
        better = other.loss < self.loss
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
            loss=torch.where(better, other.loss, self.loss),
        )


def refine(target: Tensor, hessian: Tensor, present: Attempt, rounds: int) -> Attempt:
    """Alternate `refit_scales` and `sweep_codes`; rows that a step does not improve keep what they had.

    Args:
        target: (out, in) float32, what the rounded weights should compute.
        hessian: (in, in) float32, damped.
        rounds: of both steps; 0 returns `present` itself.
    """
    if not rounds:
        return present
    width = int(torch.bincount(present.quantized.group_of_column).max())  # once: a GPU has to be waited for
    for _ in range(rounds):
        present = present.or_better(Attempt.of(target, hessian, refit_scales(hessian, present, width)))
        present = present.or_better(Attempt.of(target, hessian, sweep_codes(hessian, present)))
    return present


def refit_scales(hessian: Tensor, present: Attempt, width: int) -> QuantizedWeight:
    """Fit the scales (out, groups) that minimise δᵀHδ for given codes; `hessian` is (in, in) float32, damped.

    `width` is the number of columns of the widest group.

    With q_g the codes minus zeros of group g, the best change c of a row's scales solves A c = b, A_gg' = q_gᵀ H_gg'
    q_g' and b_g = q_gᵀ (Hδ)_g. Scales that would vanish or change their sign keep their value.
    """
    quantized = present.quantized
    order = torch.argsort(quantized.group_of_column, stable=True)
    groups = quantized.scales.shape[1]
    missing = groups * width - order.numel()  # of the last group, which may be narrower
    hessian = pad(hessian[order][:, order], (0, missing, 0, missing))
    steps = quantized.codes.float() - per_column(quantized.zeros.float(), quantized.group_of_column)
    steps, pull = (pad(values[:, order], (0, missing)) for values in (steps, present.pull))
    limit = ELEMENTS_AT_ONCE if hessian.device.type == "cpu" else ELEMENTS_AT_ONCE_ON_GPUS
    at_once = max(1, limit // max(groups * width, groups**2))
    refitted = []
    for chunk, chunk_pull, scales in zip(
        steps.split(at_once), pull.split(at_once), quantized.scales.split(at_once), strict=True
    ):
        right = (chunk * chunk_pull).view(-1, groups, width).sum(2)
        left = torch.zeros(chunk.shape[0], groups, groups, device=chunk.device)
        for group in range(groups):
            start = group * width
            products = chunk[:, start : start + width] @ hessian[start : start + width, start:]
            left[:, group, group:] = products.mul_(chunk[:, start:]).view(-1, groups - group, width).sum(2)
        left += left.triu(1).mT
        diagonal = left.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(left.dtype).tiny
        change, failed = torch.linalg.solve_ex(left, right)
        solved = scales + change
        size = solved * scales.sign()
        usable = (size > SMALLEST_SCALE) & (size < LARGEST_SCALE) & (failed == 0)[:, None]  # False for NaN
        refitted.append(torch.where(usable, solved, scales))
    return replace(quantized, scales=stored_scales(torch.cat(refitted)))


def sweep_codes(hessian: Tensor, present: Attempt) -> QuantizedWeight:
    """One sweep of coordinate descent over the codes (out, in); `hessian` is (in, in) float32, damped.

    Every column j in turn gets the code that is best with all others as they are: the code nearest to w_j + ((w - q)
    H)_j / H_jj, where w - q holds the errors of the other columns. Columns are visited by decreasing H_jj. As in the
    solver, a block of columns is updated at once and the rest by one matrix product.
    """
    quantized = present.quantized
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    columns = Columns(
        matrix=hessian[order][:, order],
        scales=quantized.scales.T.contiguous(),
        zeros=quantized.zeros.float().T.contiguous(),
        groups=quantized.group_of_column[order],
        max_code=(1 << quantized.bits) - 1,
    )
    codes = quantized.codes.T[order].contiguous()
    sweep_columns(present.pull.T[order].contiguous(), codes, columns)
    return replace(quantized, codes=in_order(codes, order))
