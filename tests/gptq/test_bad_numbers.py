# SPDX-License-Identifier: Apache-2.0
"""Numbers that a solver may stumble over: whatever comes, it is finite, storable, and not worse than rounding."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optq.checkpoint import pack, value_errors
from optq.config.schemes import EFFORTS
from optq.errors import ModelError, OptqError, SolveError
from optq.gptq import Solution, fit_grid, output_energy, round_to_nearest, solve
from optq.scheme import BITS, LayerScheme, trivial_groups

TOKENS, GROUP = 128, 32
PIECES = sorted({(effort.propagation, effort.refinement) for effort in EFFORTS.values()})


def _every_second_is_zero(x: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[1]) % 2)


def _one_is_larger(x: Tensor, times: float) -> Tensor:
    return torch.cat([times * x[:, :1], x[:, 1:]], 1)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "of rank 5": lambda x: x[:5],
    "one token": lambda x: x[:1],
    "columns twice": lambda x: x[:, torch.arange(x.shape[1]) // 2],
    "all columns equal": lambda x: x[:, :1].expand_as(x),
    "all zero": lambda x: 0 * x,
    "half of them zero": _every_second_is_zero,
    "one column only": lambda x: x * (torch.arange(x.shape[1]) == 0),
    "1e-8": lambda x: 1e-8 * x,
    "1e8": lambda x: 1e8 * x,
    "1e-8 to 1e8": lambda x: x * torch.logspace(-8, 8, x.shape[1]),
    "one of 1e8": lambda x: _one_is_larger(x, 1e8),
    "one of 1e-8": lambda x: _one_is_larger(x, 1e-8),
    "a large mean": lambda x: x + 1000,
}


def _with_one(w: Tensor, value: float) -> Tensor:
    w = 0.02 * w
    w[0, 0] = value
    return w


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda w: 0.02 * w,
    "65504": lambda w: torch.full_like(w, 65504),
    "±65504": lambda w: 65504 * w.sign(),
    "one of 65504": lambda w: _with_one(w, 65504),
    "one of -65504": lambda w: _with_one(w, -65504),
    "all zero": lambda w: 0 * w,
    "rows of zeros": lambda w: w * (torch.arange(w.shape[0]) % 2)[:, None],
    "constant": lambda w: torch.full_like(w, 0.3),
    "a negative constant": lambda w: torch.full_like(w, -0.3),
    "rows that are constant": lambda w: w[:, :1].expand_as(w),
    "positive": lambda w: w.abs(),
    "1e-9": lambda w: 1e-9 * w,
    "denormals": lambda w: 1e-40 * w,
    "one denormal": lambda w: _with_one(0 * w, 1e-45),
    "1e-8 to 1e4": lambda w: w * torch.logspace(-8, 4, w.shape[1]),
}


def made(inputs: str, weights: str, out: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (out, features), and the Hessian of inputs (features, features), both float32."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator) / math.sqrt(features)
    x = INPUTS[inputs](torch.randn(TOKENS, features, generator=generator) @ mixed)
    return WEIGHTS[weights](torch.randn(out, features, generator=generator)), x.T @ x / len(x)


def assert_sound(solution: Solution, weight: Tensor, hessian: Tensor, scheme: LayerScheme) -> None:
    """Storable, finite, and per row not worse than rounding to nearest, in float64 but for float32's rounding."""
    found = solution.quantized
    width = scheme.group_width(weight.shape[1])
    stated = None if scheme.act_order == "desc_act" else width
    packed_scales = found.scales.half()
    assert not list(value_errors("layer", packed_scales.T.contiguous(), found.group_of_column, None, stated))
    assert torch.equal(packed_scales.float(), found.scales)
    assert int(found.zeros.min()) >= 1
    assert int(found.zeros.max()) <= scheme.max_code
    assert found.decode().isfinite().all()
    for energies in (solution.loss, solution.rtn_loss, solution.energy):
        assert energies.isfinite().all()
        assert (energies >= 0).all()
    importance = hessian.diagonal() if scheme.grid == "weighted" else None
    grid = fit_grid(weight, found.group_of_column, scheme, importance)
    columns = found.group_of_column.long()
    plain = fit_grid(weight, found.group_of_column, replace(scheme, grid="minmax"))
    for rounded_on in (grid, plain):
        codes = rounded_on.encode(weight, found.group_of_column)
        nearest = (codes - rounded_on.zeros[:, columns]) * rounded_on.scales[:, columns]
        errors = [(weight - rounded).double() for rounded in (found.decode(), nearest)]
        loss, rtn_loss = (output_energy(error, hessian.double()) for error in errors)
        noise = sum(output_energy(error.abs(), hessian.double().abs()) for error in errors)
        assert (loss <= rtn_loss * (1 + 1e-4) + 1e-6 * noise).all()


schemes = st.builds(
    lambda pieces, **settings: LayerScheme(**settings, propagation=pieces[0], refinement=pieces[1]),
    pieces=st.sampled_from(PIECES),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    group_size=st.sampled_from([GROUP, -1]),
    act_order=st.sampled_from(["none", "static", "group_aware", "desc_act"]),
    grid=st.sampled_from(["minmax", "weighted"]),
)
DEFAULT = LayerScheme(group_size=GROUP)


@example(inputs="one of 1e8", weights="one of 65504", scheme=DEFAULT, out=32, features=96, seed=0)
@example(inputs="one column only", weights="ordinary", scheme=DEFAULT, out=32, features=96, seed=0)
@example(inputs="one token", weights="1e-8 to 1e4", scheme=DEFAULT, out=8, features=96, seed=3)
@example(inputs="one token", weights="one of 65504", scheme=DEFAULT, out=32, features=96, seed=0)
@given(
    inputs=st.sampled_from(sorted(INPUTS)),
    weights=st.sampled_from(sorted(WEIGHTS)),
    scheme=schemes,
    out=st.sampled_from([1, 8]),
    features=st.sampled_from([1, 32, 80, 96]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bad_numbers_are_solved_no_worse_than_rounded(inputs, weights, scheme, out, features, seed):
    weight, hessian = made(inputs, weights, out, features, seed)
    assert_sound(solve(weight, hessian, scheme), weight, hessian, scheme)


@pytest.mark.parametrize("weights", sorted(WEIGHTS))
@pytest.mark.parametrize("inputs", sorted(INPUTS))
def test_every_kind_with_every_other(inputs, weights):
    weight, hessian = made(inputs, weights, 4, 32, seed=0)
    scheme = LayerScheme(bits=3, symmetric=False, group_size=16, refinement=1)
    assert_sound(solve(weight, hessian, scheme), weight, hessian, scheme)


def test_a_solution_that_is_worse_is_seen(correlated_problem):
    """Negative control: of the assertion above."""
    weight, hessian = correlated_problem(8, 64)
    solution = solve(weight, hessian, DEFAULT)
    assert_sound(solution, weight, hessian, DEFAULT)
    solution.quantized.codes[0] = 0
    with pytest.raises(AssertionError):
        assert_sound(solution, weight, hessian, DEFAULT)


@pytest.mark.parametrize("effort", sorted(EFFORTS))
def test_drift_of_other_sizes_than_the_inputs_is_finite(effort):
    weight, hessian = made("ordinary", "ordinary", 8, 64, seed=0)
    scheme = LayerScheme(
        group_size=GROUP, propagation=EFFORTS[effort].propagation, refinement=EFFORTS[effort].refinement
    )
    for inputs in ("one token", "all zero", "1e-8", "1e8"):
        _, hessian = made(inputs, "ordinary", 8, 64, seed=0)
        for times in (0, 1e-8, 1, 1e8):
            solution = solve(weight, hessian, scheme, drift=times * weight @ hessian)
            assert solution.quantized.decode().isfinite().all()
            assert (solution.loss <= solution.rtn_loss * (1 + 1e-4)).all()
            pack(solution.quantized)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_have_no_grid_are_refused(value, symmetric):
    weight = torch.ones(8, 64)
    weight[3, 5] = value
    with pytest.raises(ModelError, match="float16's largest value 65504 or not finite"):
        solve(weight, torch.eye(64), LayerScheme(group_size=GROUP, symmetric=symmetric))


def test_outputs_beyond_float32_are_refused_by_name():
    weight, hessian = made("ordinary", "±65504", 8, 64, seed=0)
    with pytest.raises(SolveError, match=r"block\.q_proj: the mean square of its outputs .* beyond float32's range"):
        solve(weight, 1e35 * hessian, DEFAULT, name="block.q_proj")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused_by_name(value):
    weight, hessian = made("ordinary", "ordinary", 8, 64, seed=0)
    hessian[3, 3] = value
    with pytest.raises(OptqError, match=r"block\.q_proj"):
        solve(weight, hessian, DEFAULT, name="block.q_proj")


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [128, -1])
def test_rows_of_65536_columns(group_size):
    """Rounded and packed; a Hessian of so many inputs takes 16 GiB."""
    columns = 65536
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(0))
    for bits in BITS:
        scheme = LayerScheme(bits=bits, group_size=group_size)
        nearest = round_to_nearest(weight, scheme)
        packed = pack(nearest)
        assert torch.equal(packed.g_idx, trivial_groups(columns, scheme.group_width(columns)))
        assert torch.equal(packed.columns(0, 32).T, nearest.decode())
        step = nearest.scales.abs()[:, nearest.group_of_column.long()]
        assert ((nearest.decode() - weight).abs() <= 1.02 * step).all()
