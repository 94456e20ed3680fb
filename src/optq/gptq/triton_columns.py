# SPDX-License-Identifier: Apache-2.0
"""The programs behind `columns` on GPUs: one launch for a block of columns, where single operations take six a column.

A program owns some rows of the weight for all columns of a block, in registers: rows are independent of one another,
and what a column changes stays where it is needed next.
"""

import triton
import triton.language as tl


@triton.jit
def to_even(x):
    """The nearest integer, and of two the even one, as torch rounds: from 2 ** 23 on float32 has no fractions."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23, so that the sum stays there with a negative x as well


@triton.jit
def grid_of(scales, zeros, groups, start, i, rows, out):
    """The scales and zeros of some rows in the group of column start + i."""
    group = tl.load(groups + start + i).to(tl.int64) * out
    scale = tl.load(scales + group + rows, rows < out, other=1.0)
    return scale, tl.load(zeros + group + rows, rows < out, other=0.0)


@triton.jit
def round_block(
    pending,  # (in, out) float32; the block's columns become their errors, divided by their pivots
    codes,  # (in, out) uint8
    factor,  # (in, in) float32, upper
    scales,  # (groups, out) float32
    zeros,  # (groups, out) float32
    groups,  # (in,) int32
    start,
    columns,
    out,
    in_features,
    max_code,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """GPTQ on columns start … start + columns - 1."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    places = (start + at).to(tl.int64)[:, None] * out + rows[None, :]  # of more than 2 ** 31
    inside = (at < columns)[:, None] & (rows < out)[None, :]
    block = tl.load(pending + places, inside, other=0.0)
    for i in range(columns):
        scale, zero = grid_of(scales, zeros, groups, start, i, rows, out)
        row_of_factor = factor + (start + i).to(tl.int64) * in_features + start
        pivot = tl.load(row_of_factor + i)
        pushes = tl.load(row_of_factor + at, (at > i) & (at < columns), other=0.0)
        column = tl.sum(tl.where((at == i)[:, None], block, 0.0), 0)
        code = to_even(tl.div_rn(column, scale)) + zero
        code = tl.minimum(tl.maximum(code, 0.0), max_code)
        tl.store(codes + (start + i).to(tl.int64) * out + rows, code.to(tl.uint8), rows < out)
        error = tl.div_rn(column - (code - zero) * scale, pivot)
        block = tl.where((at == i)[:, None], error[None, :], block - pushes[:, None] * error[None, :])
    tl.store(pending + places, block, inside)


@triton.jit
def sweep_block(
    pull,  # (in, out) float32; the block's columns become their moves
    codes,  # (in, out) uint8, replaced
    hessian,  # (in, in) float32
    scales,  # (groups, out) float32
    zeros,  # (groups, out) float32
    groups,  # (in,) int32
    start,
    columns,
    out,
    in_features,
    max_code,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Coordinate descent over columns start … start + columns - 1."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    places = (start + at).to(tl.int64)[:, None] * out + rows[None, :]  # of more than 2 ** 31
    inside = (at < columns)[:, None] & (rows < out)[None, :]
    block = tl.load(pull + places, inside, other=0.0)
    for i in range(columns):
        scale, zero = grid_of(scales, zeros, groups, start, i, rows, out)
        row_of_hessian = hessian + (start + i).to(tl.int64) * in_features + start
        pivot = tl.load(row_of_hessian + i)
        pushes = tl.load(row_of_hessian + at, (at > i) & (at < columns), other=0.0)
        place = codes + (start + i).to(tl.int64) * out + rows
        steps = tl.load(place, rows < out, other=0).to(tl.float32) - zero
        column = tl.sum(tl.where((at == i)[:, None], block, 0.0), 0)
        best = to_even(tl.div_rn(column, scale * pivot) + steps) + zero
        best = tl.minimum(tl.maximum(best, 0.0), max_code)
        tl.store(place, best.to(tl.uint8), rows < out)
        move = (best - zero - steps) * scale
        block = tl.where((at == i)[:, None], move[None, :], block - pushes[:, None] * move[None, :])
    tl.store(pull + places, block, inside)
