# SPDX-License-Identifier: Apache-2.0
"""The loops over the columns of a weight: GPTQ's, and coordinate descent's.

Each visits the columns in turn, chooses a code per row, and changes all later columns by what it chose. A block of
columns is done eagerly, and what it changes beyond itself is one matrix product. Tensors are transposed, so that a
column is contiguous: a third of the time of strided columns on a CPU.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optq.device.triton import DEVICES as FUSED_ON
from optq.device.triton import current, in_words, why_no_triton

logger = logging.getLogger(__name__)

ROUND_BLOCK, SWEEP_BLOCK = 32, 64  # columns, as single operations of torch
FUSED_BLOCK, FUSED_ROWS, FUSED_WARPS = 128, 8, 1  # not tuned on any GPU yet: registers by ahead-of-time compilation
MOST_DIFFERENT = 0.01  # of the codes, in the self-test on a GPU: products that are rounded once there, or twice


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a weight in the order in which they are visited, with their grids.

    Args:
        matrix: (in, in) float32; its diagonal has the pivots, and row i what column i changes the later ones by. GPTQ:
            the upper Cholesky factor of the inverse Hessian; coordinate descent: the Hessian.
        scales, zeros: (groups, out) float32.
        groups: (in,) int32, the group of each column.
        max_code: the largest code.
    """

    matrix: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    max_code: int


def round_columns(pending: Tensor, columns: Columns, at_once: int | None = None) -> Tensor:
    """Round the columns of a weight in turn and push each error into the later ones: Algorithm 1 of arXiv:2210.17323.

    Args:
        pending: (in, out) float32, the weights; overwritten.
        at_once: columns whose updates are applied eagerly; speed only.
    Returns:
        (in, out) uint8 codes.
    """
    codes = torch.empty_like(pending, dtype=torch.uint8)
    _run("round_block", _round_block, ROUND_BLOCK, pending, codes, columns, at_once)
    return codes


def sweep_columns(pull: Tensor, codes: Tensor, columns: Columns, at_once: int | None = None) -> None:
    """One sweep of coordinate descent: every column in turn gets the code that is best with all others as they are.

    Args:
        pull: (in, out) float32, `Attempt.pull` transposed; overwritten.
        codes: (in, out) uint8; replaced.
        at_once: columns whose updates are applied eagerly; speed only.
    """
    _run("sweep_block", _sweep_block, SWEEP_BLOCK, pull, codes, columns, at_once)


def in_order(visited: Tensor, order: Tensor) -> Tensor:
    """Columns in the order of their visit, (in, out), back to the weight's order and layout: (out, in)."""
    restored = torch.empty_like(visited)
    restored[order] = visited
    return restored.T.contiguous()


BlockLoop = Callable[[Tensor, Tensor, Columns, int, int], Tensor]
"""(state, codes, columns, start, stop) -> (stop - start, out): by how much, times the matrix, later columns change."""


def _run(
    program: str, loop: BlockLoop, block: int, state: Tensor, codes: Tensor, columns: Columns, at_once: int | None
) -> None:
    if why_not_fused(state.device) is None:
        columns = replace(columns, matrix=columns.matrix.contiguous())  # of Cholesky's factor, columns are
        _blockwise(_fused(program), state, codes, columns, min(at_once or FUSED_BLOCK, FUSED_BLOCK))
    else:
        _blockwise(loop, state, codes, columns, at_once or block)


def _blockwise(run_block: BlockLoop, state: Tensor, codes: Tensor, columns: Columns, at_once: int) -> None:
    in_features = state.shape[0]
    for start in range(0, in_features, at_once):
        stop = min(start + at_once, in_features)
        changes = run_block(state, codes, columns, start, stop)
        state[stop:].addmm_(columns.matrix[start:stop, stop:].T, changes, alpha=-1)


def _round_block(state: Tensor, codes: Tensor, columns: Columns, start: int, stop: int) -> Tensor:
    block, factor = state[start:stop], columns.matrix[start:stop, start:stop]
    pivots: Any = factor.diagonal().tolist() if state.device.type == "cpu" else factor.diagonal()
    errors = torch.empty_like(block)
    for i, group in enumerate(columns.groups[start:stop].tolist()):
        scale, zero = columns.scales[group], columns.zeros[group]
        code = (block[i] / scale).round_().add_(zero).clamp_(0, columns.max_code)
        codes[start + i] = code
        error = torch.sub(block[i], code.sub_(zero).mul_(scale), out=errors[i]).div_(pivots[i])
        block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return errors


def _sweep_block(state: Tensor, codes: Tensor, columns: Columns, start: int, stop: int) -> Tensor:
    block, hessian = state[start:stop], columns.matrix[start:stop, start:stop]
    pivots: Any = hessian.diagonal().tolist() if state.device.type == "cpu" else hessian.diagonal()
    moves = torch.empty_like(block)
    for i, group in enumerate(columns.groups[start:stop].tolist()):
        scale, zero = columns.scales[group], columns.zeros[group]
        steps = codes[start + i].float() - zero
        best = torch.div(block[i], scale * pivots[i]).add_(steps).round_().add_(zero).clamp_(0, columns.max_code)
        codes[start + i] = best
        torch.sub(best - zero, steps, out=moves[i]).mul_(scale)
        block[i + 1 :].addr_(hessian[i, i + 1 :], moves[i], alpha=-1)
    return moves


def _fused(name: str) -> BlockLoop:
    """The loop as one Triton launch per block of columns."""
    program = getattr(_programs(), name)

    def run_block(state: Tensor, codes: Tensor, columns: Columns, start: int, stop: int) -> Tensor:
        in_features, out = state.shape
        with current(state.device):
            program[(-(-out // FUSED_ROWS),)](
                state,
                codes,
                columns.matrix,
                columns.scales,
                columns.zeros,
                columns.groups,
                start,
                stop - start,
                out,
                in_features,
                float(columns.max_code),
                COLUMNS=FUSED_BLOCK,
                ROWS=FUSED_ROWS,
                num_warps=FUSED_WARPS,
            )
        return state[start:stop]

    return run_block


def _programs() -> Any:
    """Imported late: Triton takes a second, and is not everywhere."""
    from . import triton_columns

    return triton_columns


@cache
def why_not_fused(device: torch.device) -> str | None:
    """Why the loops run as single operations on `device`, or None. Said once, where it costs a GPU's time."""
    if device.type not in FUSED_ON:
        return f"the fused loops are for GPUs, not for {device}"
    reason = why_no_triton(device) or _why_wrong(device)
    if reason is not None:
        logger.warning(
            "%s: solving takes several times as long as it could, as single operations: %s.", device, reason
        )
    return reason


def _why_wrong(device: torch.device) -> str | None:
    """What is wrong with the fused loops on a device, by running both on a small weight."""
    in_features, out, groups = FUSED_BLOCK + 40, 2 * FUSED_ROWS - 3, 4
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(in_features, out, generator=generator, device="cpu").to(device)
    mixed = torch.randn(in_features, in_features, generator=generator, device="cpu")
    hessian = mixed @ mixed.T / in_features + torch.eye(in_features, device="cpu")
    columns = Columns(
        matrix=hessian.to(device),
        scales=(0.2 + 0.2 * torch.rand(groups, out, generator=generator, device="cpu")).to(device),
        zeros=torch.full((groups, out), 8.0, device=device),
        groups=(torch.arange(in_features, dtype=torch.int32, device="cpu") % groups).to(device),
        max_code=15,
    )
    try:
        for name, block in (("round_block", _round_block), ("sweep_block", _sweep_block)):
            expected = torch.full((in_features, out), 8, dtype=torch.uint8, device=device)
            found = expected.clone()
            _blockwise(block, weight.clone(), expected, columns, ROUND_BLOCK)
            _blockwise(_fused(name), weight.clone(), found, columns, FUSED_BLOCK)
            different = float((found != expected).float().mean())
            if different > MOST_DIFFERENT:
                return f"the fused loop {name} chooses other codes than single operations for {different:.0%} of them"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and a driver that nobody has seen yet may raise anything
        return f"the fused loops do not run ({in_words(error)})"
    return None
