# SPDX-License-Identifier: Apache-2.0
"""Refinement against slow and obvious float64 versions, and its promise: never worse."""

import pytest
import torch

from optq.gptq import Drift, output_energy, solve
from optq.gptq.refinement import Attempt, refine, refit_scales, sweep_codes
from optq.scheme import LayerScheme

OUT, IN = 12, 80
GROUP_SIZES = [16, 32, -1]  # 32 leaves a narrower last group


def damped(hessian, damping=0.01):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(hessian.shape[0])


@pytest.fixture
def problem(correlated_problem):
    weight, hessian = correlated_problem(OUT, IN)
    return weight, damped(hessian)


def start(problem, **scheme):
    weight, hessian = problem
    return solve(weight, hessian, LayerScheme(damping=0.01, **{"bits": 3, "group_size": 16, **scheme})).quantized


def loss(problem, quantized):
    weight, hessian = problem
    return output_energy(weight - quantized.decode(), hessian)


@pytest.mark.parametrize("act_order", ["static", "desc_act"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_refitted_scales_are_the_least_squares_solution(problem, group_size, act_order):
    quantized = start(problem, group_size=group_size, act_order=act_order)
    refitted = refit_scales(problem[1], Attempt.of(*problem, quantized), IN if group_size < 0 else group_size)
    weight, hessian = (tensor.double() for tensor in problem)
    root = torch.linalg.cholesky(hessian).T  # δᵀHδ = ‖root δ‖²
    columns = quantized.group_of_column.long()
    for row in range(OUT):
        steps = quantized.codes[row].double() - quantized.zeros[row].double()[columns]
        design = torch.zeros(IN, quantized.scales.shape[1], dtype=torch.float64)
        design[torch.arange(IN), columns] = steps
        expected = torch.linalg.lstsq(root @ design, (root @ weight[row])[:, None]).solution[:, 0]
        # float16, and the small pull towards the scales before
        torch.testing.assert_close(refitted.scales[row].double(), expected, rtol=5e-3, atol=0)


def test_a_sweep_is_coordinate_descent(problem):
    quantized = start(problem)
    swept = sweep_codes(problem[1], Attempt.of(*problem, quantized))
    weight, hessian = (tensor.double() for tensor in problem)
    columns = quantized.group_of_column.long()
    scales, zeros = quantized.scales.double()[:, columns], quantized.zeros.double()[:, columns]
    codes = quantized.codes.double()
    for column in torch.argsort(problem[1].diagonal(), descending=True).tolist():
        losses = []
        for code in range(8):
            tried = codes.clone()
            tried[:, column] = code
            losses.append(output_energy(weight - (tried - zeros) * scales, hessian))
        codes[:, column] = torch.stack(losses).argmin(0).double()
    assert (swept.codes != codes).float().mean() <= 0.005
    assert not torch.equal(swept.codes, quantized.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_no_row_ends_above_where_it_started(problem, bits, symmetric, group_size):
    quantized = start(problem, bits=bits, symmetric=symmetric, group_size=group_size)
    before = loss(problem, quantized)
    for rounds in (1, 3):
        refined = refine(*problem, Attempt.of(*problem, quantized), rounds)
        after = refined.loss
        torch.testing.assert_close(after, loss(problem, refined.quantized))
        torch.testing.assert_close(refined.pull, (problem[0] - refined.quantized.decode()) @ problem[1])
        assert (after <= before).all()
        assert after.sum() < before.sum()
        before = after
    assert refine(*problem, Attempt.of(*problem, quantized), 0).quantized is quantized


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_round_helps(correlated_problem, bits):
    weight, hessian = correlated_problem(64, IN)
    losses = []
    for refinement in (0, 1, 3):
        scheme = LayerScheme(bits=bits, group_size=16, damping=0.01, refinement=refinement)
        losses.append(float(solve(weight, hessian, scheme).loss.sum()))
    assert losses[0] > 1.05 * losses[1] > 1.05 * losses[2]


@pytest.mark.parametrize("refinement", [0, 2])
def test_no_row_ends_above_rounding_to_nearest(correlated_problem, refinement):
    weight, hessian = correlated_problem(64, IN)
    hessian = damped(hessian, 0.3)  # so that the solver's own damping below changes little
    solution = solve(weight, hessian, LayerScheme(bits=2, group_size=16, damping=1e-4, refinement=refinement))
    assert (solution.loss <= solution.rtn_loss * 1.001).all()
    assert solution.loss.sum() < 0.95 * solution.rtn_loss.sum()


def test_refined_scales_are_storable(problem):
    first = Attempt.of(*problem, start(problem, bits=2, symmetric=False))
    refined = refine(*problem, first, 2).quantized
    assert torch.equal(refined.scales.half().float(), refined.scales)
    assert (refined.scales > 0).all()
    assert ((refined.zeros >= 1) & (refined.zeros <= 3)).all()


def test_a_group_of_zeros_keeps_its_scale(problem):
    weight = problem[0].clone()
    weight[:, :16] = 0
    quantized = solve(weight, torch.eye(IN), LayerScheme(bits=4, group_size=16)).quantized
    refitted = refit_scales(torch.eye(IN), Attempt.of(weight, torch.eye(IN), quantized), 16)
    assert torch.equal(refitted.scales[:, 0], quantized.scales[:, 0])


def drifted():
    """Inputs in the original model, in ours, a weight, and what makes more random numbers."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5
    originals = torch.randn(4000, IN, generator=generator) @ mixing
    inputs = 0.9 * originals + 0.1 * torch.randn(4000, IN, generator=generator) @ mixing
    weight = torch.randn(OUT, IN, generator=generator)
    return originals, inputs, weight, generator


def test_propagation_moves_the_outputs_towards_the_originals():
    originals, inputs, weight, _ = drifted()
    drift = Drift(IN, "cpu")
    first = inputs[:1000].view(2, 500, IN)
    drift.add(originals[:1000].view(2, 500, IN), first)
    keep = torch.arange(3002) < 3000  # the last two rows are padding
    padded = torch.cat([inputs[1000:], torch.full((2, IN), 1e6)])
    drift.add(torch.cat([originals[1000:], torch.zeros(2, IN)]), padded, keep=keep)
    expected = weight @ (originals - inputs).T @ inputs / 4000
    torch.testing.assert_close(drift.of_outputs(weight), expected, rtol=1e-3, atol=1e-3)
    hessian = inputs.T @ inputs / 4000
    errors = []
    for propagation in (0.0, 0.5, 1.0):
        scheme = LayerScheme(bits=8, group_size=16, damping=1e-4, propagation=propagation)
        decoded = solve(weight, hessian, scheme, drift=drift.of_outputs(weight)).quantized.decode()
        errors.append(float((originals @ weight.T - inputs @ decoded.T).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    best = torch.linalg.lstsq(inputs, originals @ weight.T).solution
    assert errors[2] == pytest.approx(float((originals @ weight.T - inputs @ best).square().mean()), rel=0.1)


def test_the_error_of_the_residual_stream_is_compensated_as_well():
    originals, inputs, weight, generator = drifted()
    streams = originals @ torch.randn(OUT, IN, generator=generator).T
    ours = streams + 0.1 * inputs @ torch.randn(OUT, IN, generator=generator).T
    alone, with_stream = Drift(IN, "cpu", weight), Drift(IN, "cpu", weight)
    alone.add(originals, inputs)
    with_stream.add(originals, inputs, (streams, ours))
    wanted, hessian = streams + originals @ weight.T, inputs.T @ inputs / 4000
    expected = (wanted - ours - inputs @ weight.T).T @ inputs / 4000
    torch.testing.assert_close(with_stream.of_outputs(weight), expected, rtol=1e-3, atol=1e-3)
    errors = []
    for propagation, drift in ((1.0, alone), (0.5, with_stream), (1.0, with_stream)):
        scheme = LayerScheme(bits=8, group_size=16, damping=1e-4, propagation=propagation)
        solved = solve(weight, hessian, scheme, drift=drift.of_outputs(weight))
        errors.append(float((wanted - ours - inputs @ solved.quantized.decode().T).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    best = torch.linalg.lstsq(inputs, wanted - ours).solution
    assert errors[2] == pytest.approx(float((wanted - ours - inputs @ best).square().mean()), rel=0.15)
