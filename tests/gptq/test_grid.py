# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.errors import ModelError
from optq.gptq import fit_grid
from optq.gptq.grid import Grid, _spanning
from optq.scheme import BITS, LayerScheme, trivial_groups


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    shift=st.floats(-3, 3),
    spread=st.floats(1e-6, 1e3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_scales_are_float16_and_zeros_are_storable(bits, symmetric, shift, spread, seed):
    weight = (torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) + shift) * spread
    grid = fit_grid(weight, trivial_groups(32, 16), LayerScheme(bits=bits, group_size=16, symmetric=symmetric))
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert (grid.scales > 0).all()
    low, high = (2 ** (bits - 1), 2 ** (bits - 1)) if symmetric else (1, 2**bits - 1)
    assert ((grid.zeros >= low) & (grid.zeros <= high)).all()
    assert torch.equal(grid.zeros, grid.zeros.round())


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_sign_of_a_symmetric_scale_points_the_longer_side_of_the_grid(sign):
    """-4 … 3: four steps reach the outlier, three the other side."""
    weight = sign * torch.tensor([[-4.0, 3.0, 1.0, -2.0] * 4])
    groups = trivial_groups(16, 16)
    grid = fit_grid(weight, groups, LayerScheme(bits=3, group_size=16), torch.ones(16))
    assert grid.scales.sign().tolist() == [[sign]]
    decoded = (grid.encode(weight, groups) - grid.zeros[:, groups.long()]) * grid.scales[:, groups.long()]
    torch.testing.assert_close(decoded, weight, rtol=0.03, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_every_weight_is_within_a_step_of_its_value(bits, symmetric, sign):
    """Also groups of one sign only, whose zero would fall outside [1, max_code]."""
    weight = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) + 0.1 if sign else torch.randn(4, 32)
    weight = weight * (sign or 1)
    groups = trivial_groups(32, 16)
    grid = fit_grid(weight, groups, LayerScheme(bits=bits, group_size=16, symmetric=symmetric))
    decoded = (grid.encode(weight, groups) - grid.zeros[:, groups.long()]) * grid.scales[:, groups.long()]
    assert ((decoded - weight).abs() <= grid.scales[:, groups.long()] * 1.02).all()


def weighted_error(grid, weight, groups, importance):
    columns = groups.long()
    decoded = (grid.encode(weight, groups) - grid.zeros[:, columns]) * grid.scales[:, columns]
    return ((decoded - weight).square() * importance).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_the_searched_grid_has_the_lower_weighted_error(bits, symmetric, group_size):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(8, 80, generator=generator)  # 32 leaves a narrower last group
    weight[:, 7] *= 10  # an outlier in a column that hardly matters
    importance = torch.rand(80, generator=generator) + 0.1
    importance[7] = 1e-3
    scheme = LayerScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    groups = trivial_groups(80, scheme.group_width(80))
    span, searched = fit_grid(weight, groups, scheme), fit_grid(weight, groups, scheme, importance)
    assert weighted_error(searched, weight, groups, importance) < 0.75 * weighted_error(
        span, weight, groups, importance
    )
    assert torch.equal(searched.scales.half().float(), searched.scales)
    assert ((searched.zeros >= 1) & (searched.zeros <= 2**bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_comes_close_to_one_that_tries_all_spans(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 64, generator=generator) ** 3  # heavy tails, which want clipping
    importance = torch.rand(64, generator=generator) + 0.1
    scheme = LayerScheme(bits=bits, group_size=64, symmetric=symmetric)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    costs = []
    for factor in torch.arange(1.1, 0.59 if bits == 2 else 0.29, -0.02).tolist():
        scales, zeros = _spanning(low * factor, high * factor, scheme)
        for sign in (1, -1) if symmetric else (1,):
            for shift in (0,) if symmetric or bits == 4 else (-1, 0, 1):
                shifted = (zeros + shift).clamp(1, 2**bits - 1)
                tried = Grid(scales=scales * sign, zeros=shifted, max_code=2**bits - 1)
                error = weight - dequantized(tried, weight)
                costs.append((error.square() * importance).sum(1))
    exhaustive = torch.stack(costs).amin(0)
    groups = trivial_groups(64, 64)
    searched = fit_grid(weight, groups, scheme, importance)
    found = ((weight - dequantized(searched, weight)).square() * importance).sum(1)
    assert found.sum() <= 1.01 * exhaustive.sum()
    assert (found <= 1.25 * exhaustive).all()


def dequantized(fitted, weight):
    """`weight` (out, in), a group a row, rounded to its grid."""
    groups = trivial_groups(weight.shape[1], weight.shape[1])
    return (fitted.encode(weight, groups) - fitted.zeros) * fitted.scales


def test_groups_that_are_not_runs_of_neighbours_are_fitted_like_those_that_are():
    weight, importance = torch.randn(4, 32), torch.rand(32)
    scheme = LayerScheme(group_size=16)
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    groups = trivial_groups(32, 16)
    straight = fit_grid(weight, groups, scheme, importance)
    shuffled = fit_grid(weight[:, shuffle], groups[shuffle], scheme, importance[shuffle])
    torch.testing.assert_close(shuffled.scales, straight.scales)


def test_a_group_of_zeros_decodes_to_zeros():
    weight = torch.zeros(2, 32)
    for symmetric in (True, False):
        groups = trivial_groups(32, 16)
        grid = fit_grid(weight, groups, LayerScheme(group_size=16, symmetric=symmetric))
        assert torch.equal(grid.encode(weight, groups), grid.zeros[:, groups.long()])


def test_weights_beyond_float16_scales_are_refused():
    with pytest.raises(ModelError, match="float16"):
        fit_grid(torch.full((2, 32), 1e7), trivial_groups(32, 16), LayerScheme(group_size=16))
