# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from optq.checkpoint import value_errors

SCALES, GROUPS = torch.full((3, 8), 0.5), torch.arange(96, dtype=torch.int32) // 32


def errors(scales=SCALES, g_idx=GROUPS, bias=None, width=32):
    return list(value_errors("a.b", scales, g_idx, bias, width))


def with_one(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


def test_good_values_are_no_error():
    assert errors() == []
    assert errors(g_idx=None, bias=torch.zeros(8)) == []
    assert errors(g_idx=GROUPS[torch.randperm(96)]) == []  # desc_act
    assert errors(scales=-SCALES) == []
    assert errors(g_idx=torch.zeros(96, dtype=torch.int32), width=None) == []  # nothing is said of groups


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_a_scale_that_nothing_can_be_computed_with_is_named(value):
    (error,) = errors(scales=with_one(SCALES, (1, 5), value))
    assert error.startswith(f"a.b.scales: that of group 1 and output 5 is {value}")


@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("width", [32, None])
def test_a_group_that_is_not_there_is_named(value, width):
    (error,) = errors(g_idx=with_one(GROUPS, 40, value), width=width)
    assert error.startswith(f"a.b.g_idx: column 40 is of group {value}, and there are 3")


def test_groups_have_as_many_columns_as_the_config_says():
    (error,) = errors(g_idx=with_one(GROUPS, 32, 0))
    assert error.startswith("a.b.g_idx: group 0 has 33 columns, and the config says that groups have 32")


def test_the_last_group_may_have_another_width():
    assert errors(g_idx=torch.arange(100, dtype=torch.int32) // 32, scales=torch.ones(4, 8)) == []
    assert errors(g_idx=(torch.arange(100, dtype=torch.int32) // 32).clamp(max=2)) == []


def test_a_bias_that_is_not_finite_is_named():
    (error,) = errors(bias=torch.tensor([0.0, float("nan")]))
    assert error.startswith("a.b.bias: it is not finite")
