# SPDX-License-Identifier: Apache-2.0
"""The solver against an independent, slow and obvious OBQ in float64."""

import itertools
import logging
from typing import get_args

import pytest
import torch
from torch import Tensor

from optq.errors import SolveError
from optq.gptq import Grid, fit_grid, output_energy, round_to_nearest, solve, solver
from optq.scheme import ActOrder, LayerScheme

OUT, IN, GROUP = 6, 48, 16
ORDERS = get_args(ActOrder)


def brute_force_codes(weight: Tensor, hessian: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """Optimal Brain Quantization with a given order: one column at a time, a fresh explicit inverse for each.

    After fixing column c, the optimal change of the open columns is -error / [H⁻¹]_cc · [H⁻¹]_c, with H restricted to
    the open columns (Frantar & Alistarh, "Optimal Brain Compression", arXiv:2208.11580, eq. 3).
    """
    original, hessian = weight.double(), hessian.double()
    weight = original.clone()
    in_features = weight.shape[1]
    damped = hessian + scheme.damping * hessian.diagonal().mean() * torch.eye(in_features, dtype=torch.float64)
    width = scheme.group_width(in_features)
    order = list(range(in_features))
    energy = hessian.diagonal().tolist()
    if scheme.act_order != "none":
        order.sort(key=lambda column: -energy[column])
    if scheme.act_order == "group_aware":
        members = [energy[start : start + width] for start in range(0, in_features, width)]
        order.sort(key=lambda column: -sum(members[column // width]) / len(members[column // width]))
    positions = {column: position for position, column in enumerate(order)}
    group_of_column = torch.tensor(
        [(positions[column] if scheme.act_order == "desc_act" else column) // width for column in range(in_features)]
    )
    importance = hessian.diagonal().float() if scheme.grid == "weighted" else None
    grid = fit_grid(weight.float(), group_of_column, scheme, importance)
    codes = torch.zeros(weight.shape, dtype=torch.float64)
    for step, column in enumerate(order):
        still_open = order[step:]
        inverse = torch.linalg.inv(damped[still_open][:, still_open])
        scale = grid.scales[:, group_of_column[column]].double()
        zero = grid.zeros[:, group_of_column[column]].double()
        codes[:, column] = torch.clamp(torch.round(weight[:, column] / scale) + zero, 0, grid.max_code)
        error = weight[:, column] - (codes[:, column] - zero) * scale
        weight[:, still_open] -= torch.outer(error / inverse[0, 0], inverse[0])
    # Rows on which this greedy procedure loses to rounding to nearest are rounded to nearest.
    nearest = grid.encode(original.float(), group_of_column).double()
    scales, zeros = (values.double()[:, group_of_column] for values in (grid.scales, grid.zeros))
    loss, rtn_loss = (output_energy(original - (found - zeros) * scales, damped) for found in (codes, nearest))
    codes = torch.where((rtn_loss < loss)[:, None], nearest, codes)
    return codes.to(torch.uint8), group_of_column


@pytest.mark.parametrize(
    ("bits", "symmetric", "act_order", "grid"),
    list(itertools.product((2, 3, 4, 8), (True, False), ORDERS, ("minmax", "weighted"))),
)
def test_codes_are_those_of_brute_force_obq(correlated_problem, bits, symmetric, act_order, grid):
    weight, hessian = correlated_problem(OUT, IN)
    scheme = LayerScheme(
        bits=bits, group_size=GROUP, symmetric=symmetric, act_order=act_order, grid=grid, damping=0.01
    )
    expected, groups = brute_force_codes(weight, hessian, scheme)
    found = solve(weight, hessian, scheme).quantized
    assert torch.equal(found.group_of_column.long(), groups)
    # float32 against float64: a weight may sit on the edge between two codes, but hardly ever.
    assert (found.codes != expected).float().mean() <= 0.005


def test_brute_force_differs_from_rounding_to_nearest(correlated_problem):
    """Negative control: the comparison above can fail."""
    weight, hessian = correlated_problem(OUT, IN)
    scheme = LayerScheme(bits=4, group_size=GROUP, act_order="none", grid="minmax", damping=0.01)
    expected, _ = brute_force_codes(weight, hessian, scheme)
    assert (round_to_nearest(weight, scheme).codes != expected).float().mean() > 0.1


@pytest.mark.parametrize("column_block", [1, 7, 16, 48, 1000])
def test_column_blocks_change_nothing_but_speed(correlated_problem, column_block):
    weight, hessian = correlated_problem(OUT, IN)
    scheme = LayerScheme(bits=4, group_size=GROUP)
    expected = solve(weight, hessian, scheme).quantized
    assert torch.equal(solve(weight, hessian, scheme, column_block=column_block).quantized.codes, expected.codes)


@pytest.mark.parametrize("group_size", [16, 32, 48, -1])
@pytest.mark.parametrize("act_order", ORDERS)
def test_output_error_is_below_rounding_to_nearest(correlated_problem, group_size, act_order):
    weight, hessian = correlated_problem(32, 80)  # 32 and 48 leave a narrower last group
    scheme = LayerScheme(bits=3, group_size=group_size, act_order=act_order, damping=0.01)
    solution = solve(weight, hessian, scheme)
    nearest = round_to_nearest(weight, scheme)
    assert solution.loss.sum() < 0.7 * output_energy(weight - nearest.decode(), hessian).sum()
    assert solution.quantized.scales.shape == (32, scheme.group_count(80))
    torch.testing.assert_close(solution.loss, output_energy(weight - solution.quantized.decode(), hessian))


def test_stacked_matrices_get_the_codes_of_separate_solves(correlated_problem):
    weight, hessian = correlated_problem(24, 64)
    scheme = LayerScheme(bits=4, group_size=32)
    parts = solve(weight, hessian, scheme).quantized.split_rows([8, 16])
    for part, rows in zip(parts, weight.split([8, 16]), strict=True):
        assert torch.equal(part.codes, solve(rows, hessian, scheme).quantized.codes)


def test_static_order_keeps_the_group_layout_and_desc_act_does_not(correlated_problem):
    weight, hessian = correlated_problem(OUT, IN)
    trivial = torch.arange(IN, dtype=torch.int32) // GROUP
    for act_order, is_trivial in (("none", True), ("static", True), ("desc_act", False)):
        quantized = solve(weight, hessian, LayerScheme(group_size=GROUP, act_order=act_order)).quantized
        assert torch.equal(quantized.group_of_column, trivial) is is_trivial


def test_dead_columns_are_counted_and_rounded_to_nearest(correlated_problem):
    weight, hessian = correlated_problem(OUT, IN)
    dead = [3, 40]
    hessian[dead] = hessian[:, dead] = 0
    scheme = LayerScheme(bits=4, group_size=GROUP)
    solution = solve(weight, hessian, scheme)
    assert solution.dead_columns == 2
    found = solution.quantized
    grid = Grid(scales=found.scales, zeros=found.zeros.float(), max_code=15)
    assert torch.equal(found.codes[:, dead].float(), grid.encode(weight, found.group_of_column)[:, dead])


def test_a_singular_hessian_is_damped_more_and_said(correlated_problem, caplog):
    weight, _ = correlated_problem(OUT, IN)
    direction = torch.ones(IN, 1)
    singular = direction @ direction.T * 1e6
    singular -= 5e3 * torch.eye(IN)  # indefinite: needs damping above 0.005
    with caplog.at_level(logging.WARNING):
        solution = solve(weight, singular, LayerScheme(group_size=GROUP, damping=0.001), name="layer.q_proj")
    assert solution.damping == pytest.approx(0.01)
    assert "layer.q_proj" in caplog.text


def test_a_hopeless_hessian_is_refused_by_name(correlated_problem):
    weight, hessian = correlated_problem(OUT, IN)
    hessian[0, 1] = hessian[1, 0] = 1e6 * hessian.diagonal().max()
    with pytest.raises(SolveError, match=r"layer\.q_proj.*48 inputs.*0\.1"):
        solve(weight, hessian, LayerScheme(group_size=GROUP), name="layer.q_proj")


def test_the_weight_and_the_hessian_are_not_modified(correlated_problem):
    weight, hessian = correlated_problem(OUT, IN)
    copies = weight.clone(), hessian.clone()
    solve(weight, hessian, LayerScheme(group_size=GROUP))
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_half_precision_weights_are_solved_in_float32(correlated_problem):
    weight, hessian = correlated_problem(OUT, IN)
    scheme = LayerScheme(group_size=GROUP)
    rounded = weight.bfloat16()
    assert torch.equal(
        solve(rounded, hessian, scheme).quantized.codes, solve(rounded.float(), hessian, scheme).quantized.codes
    )


def test_on_a_gpu_as_many_rows_are_solved_together_as_memory_allows(monkeypatch):
    gpu, shape = torch.device("cuda"), (4096, 14336)
    monkeypatch.setattr(solver, "free_bytes", lambda device: 80 * 2**30)
    assert solver.rows_at_once(*shape, gpu) == 4096
    assert solver.rows_at_once(*shape, torch.device("cpu")) == 2**24 // 14336
    monkeypatch.setattr(solver, "free_bytes", lambda device: 2 * 2**30)
    most = solver.rows_at_once(*shape, gpu)
    assert 4096 > most * 40 * 14336 / 2**30 > 0.5  # of the GiB that may be used
    assert -(-4096 // most) * most - 4096 < -(-4096 // most)  # pieces of equal size
    monkeypatch.setattr(solver, "free_bytes", lambda device: 0)
    assert solver.rows_at_once(*shape, gpu) == 1


def test_rows_that_are_solved_apart_are_those_that_are_solved_together(correlated_problem, monkeypatch):
    weight, hessian = correlated_problem(24, 64)
    scheme = LayerScheme(group_size=32)
    together = solve(weight, hessian, scheme)
    monkeypatch.setattr(solver, "rows_at_once", lambda rows, columns, device: 7)
    apart = solve(weight, hessian, scheme)
    assert torch.equal(apart.quantized.codes, together.quantized.codes)
    torch.testing.assert_close(apart.loss, together.loss)
