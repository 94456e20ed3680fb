# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round one weight matrix so that its outputs, not its entries, stay close.

Columns are rounded one after the other; each column's error is pushed into the columns not yet rounded. Updates are
applied at once inside a block of columns and as one matrix product beyond it, which changes nothing but the speed.
Frantar et al., "OPTQ", ICLR 2023 (arXiv:2210.17323), Algorithm 1.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from optq.errors import SolveError
from optq.scheme import LayerScheme, QuantizedWeight, trivial_groups

from .grid import Grid, fit_grid

logger = logging.getLogger(__name__)

COLUMN_BLOCK = 32
DAMPING_STEPS = 3  # tenfold increases tried before giving up


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What `solve` found, and how.

    Args:
        quantized: the codes and grids.
        lost: per row, δᵀHδ with δ = weight - rounded and H undamped: the energy of the output error, (out,) float32.
        energy: per row, wᵀHw: the energy of the outputs, (out,) float32.
        damping: the fraction that was really used.
        dead_columns: inputs that were always zero during calibration; their weights are rounded to nearest.
    """

    quantized: QuantizedWeight
    lost: Tensor
    energy: Tensor
    damping: float
    dead_columns: int


def solve(
    weight: Tensor, hessian: Tensor, scheme: LayerScheme, *, column_block: int = COLUMN_BLOCK, name: str = "this layer"
) -> Solution:
    """Round `weight` to `scheme`'s grid, minimising the change of its outputs on the calibration data.

    Args:
        weight: (out, in), any float dtype, on the device where the work should happen. Not modified. Rows are
            independent, so matrices that share an input may be stacked.
        hessian: mean of x·xᵀ over calibration tokens, (in, in) float32. Not modified.
        column_block: columns whose updates are applied eagerly; speed only.
        name: for error messages.
    Raises:
        SolveError: the Hessian stays singular after three tenfold increases of damping.
    Cost: O(out · in²) time; (3 · in² + 3 · out · in) · 4 bytes beyond the inputs.
    """
    weight = weight.float()
    energy = hessian.diagonal()
    dead = energy == 0
    order, group_of_column = _order_and_groups(energy, scheme)
    # Weighted by the diagonal, although the solver's pivots are closer to what rounding a column costs after its error
    # is compensated: they gave lower losses of the layers and a worse perplexity (docs/accuracy.md).
    grid = fit_grid(weight, group_of_column, scheme, energy if scheme.grid == "weighted" else None)
    factor, damping = _inverse_factor(hessian, dead, order, scheme.damping, name)
    codes = _round_columns(weight, factor, grid, order, group_of_column, column_block)
    quantized = QuantizedWeight(
        codes=codes,
        scales=grid.scales,
        zeros=grid.zeros.to(torch.int16),
        group_of_column=group_of_column,
        bits=scheme.bits,
    )
    return Solution(
        quantized=quantized,
        lost=output_energy(weight - quantized.decode(), hessian),
        energy=output_energy(weight, hessian),
        damping=damping,
        dead_columns=int(dead.sum()),
    )


def round_to_nearest(weight: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    """The same grid without calibration: every weight goes to its nearest code. The yardstick, never a fallback."""
    weight = weight.float()
    group_of_column = trivial_groups(weight.shape[1], scheme.group_width(weight.shape[1]), weight.device)
    grid = fit_grid(weight, group_of_column, scheme)
    codes = grid.encode(weight, group_of_column).to(torch.uint8)
    return QuantizedWeight(
        codes=codes,
        scales=grid.scales,
        zeros=grid.zeros.to(torch.int16),
        group_of_column=group_of_column,
        bits=scheme.bits,
    )


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """Per row w of `weight` (out, in), wᵀHw: the mean square of its outputs on calibration data; (out,) float32."""
    return ((weight @ hessian) * weight).sum(1)


def _order_and_groups(energy: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """The order in which columns are solved (in,) int64, and the group of each column (in,) int32."""
    in_features = energy.shape[0]
    groups = trivial_groups(in_features, scheme.group_width(in_features), energy.device)
    if scheme.act_order == "none":
        return torch.arange(in_features, device=energy.device), groups
    order = torch.argsort(energy, descending=True, stable=True)
    if scheme.act_order == "desc_act":
        groups = torch.empty_like(groups).scatter_(0, order, groups)
    return order, groups


def _inverse_factor(hessian: Tensor, dead: Tensor, order: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped Hessian, columns in `order`, and the damping used."""
    mean_energy = hessian.diagonal().mean()
    hessian = hessian[order][:, order]  # a copy: modified below
    diagonal = hessian.diagonal()
    diagonal += torch.where(
        dead[order], mean_energy.clamp(min=torch.finfo(hessian.dtype).tiny), torch.zeros_like(mean_energy)
    )
    undamped = diagonal.clone()
    for step in range(DAMPING_STEPS + 1):
        tried = damping * 10**step
        diagonal.copy_(undamped + tried * mean_energy)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(factor.isfinite().all()):
                if step:
                    logger.warning("%s: the Hessian was singular at damping %g; solved with %g.", name, damping, tried)
                return factor, tried
    raise SolveError(
        f"{name}: the Hessian of {hessian.shape[0]} inputs stays singular with damping up to {tried:g} "
        f"(asked for: {damping:g}). Use more or more varied calibration data, or leave this layer in full precision "
        f"with dynamic={{'-:{name}': {{}}}}."
    )


def _round_columns(
    weight: Tensor, factor: Tensor, grid: Grid, order: Tensor, group_of_column: Tensor, column_block: int
) -> Tensor:
    """Algorithm 1 of the paper. Returns codes (out, in) uint8 in the layout of `weight`."""
    # Transposed, so that a column is contiguous: a third of the time of strided columns on CPU.
    pending = weight.T[order].contiguous()  # (in, out), in solving order
    codes = torch.empty_like(pending, dtype=torch.uint8)
    groups = group_of_column[order].long()
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()  # (groups, out)
    in_features = pending.shape[0]
    group_list = groups.tolist()
    for start in range(0, in_features, column_block):
        stop = min(start + column_block, in_features)
        block = pending[start:stop]
        block_factor = factor[start:stop, start:stop]
        pivots = block_factor.diagonal().tolist() if block.device.type == "cpu" else block_factor.diagonal()
        errors = torch.empty_like(block)
        for i in range(stop - start):
            group = group_list[start + i]
            scale, zero = scales[group], zeros[group]
            code = (block[i] / scale).round_().add_(zero).clamp_(0, grid.max_code)
            codes[start + i] = code
            error = torch.sub(block[i], code.sub_(zero).mul_(scale), out=errors[i]).div_(pivots[i])
            block[i + 1 :].addr_(block_factor[i, i + 1 :], error, alpha=-1)
        pending[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous()
