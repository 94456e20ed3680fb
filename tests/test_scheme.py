# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from optq.errors import ConfigError
from optq.scheme import LayerScheme, QuantizedWeight, per_column, run_width, trivial_groups


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits=5.*2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": 12.5}, "not an integer"),
        ({"act_order": "random"}, "none, static, group_aware, desc_act"),
        ({"damping": 0}, "fraction"),
        ({"damping": 1.5}, "fraction"),
    ],
)
def test_impossible_schemes_say_what_is_allowed(changes, message):
    with pytest.raises(ConfigError, match=message):
        LayerScheme(**changes)


@pytest.mark.parametrize(("group_size", "groups"), [(64, 9), (128, 5), (-1, 1), (576, 1), (48, 12)])
def test_group_count_includes_a_narrower_last_group(group_size, groups):
    scheme = LayerScheme(group_size=group_size)
    assert scheme.why_not_grouped(576) is None
    assert scheme.group_count(576) == groups
    assert int(trivial_groups(576, scheme.group_width(576)).max()) + 1 == groups


def test_a_group_size_that_neither_divides_nor_packs_is_refused_with_the_divisors():
    reason = LayerScheme(group_size=100).why_not_grouped(576)
    assert "576" in reason
    assert "100" in reason
    assert "64" in reason


@pytest.mark.parametrize(
    ("bits", "shape", "fits"),
    [
        (4, (8, 8), True),
        (4, (12, 8), False),
        (3, (32, 32), True),
        (3, (48, 32), False),
        (8, (4, 4), True),
        (2, (16, 8), False),
    ],
)
def test_shapes_that_do_not_fill_words_are_refused(bits, shape, fits):
    assert (LayerScheme(bits=bits).why_not_packed(*shape) is None) is fits


def test_decode_and_split_rows():
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    weight = QuantizedWeight(
        codes=codes,
        scales=torch.tensor([[0.5, 1.0], [2.0, 1.0]]),
        zeros=torch.tensor([[1, 2], [1, 2]], dtype=torch.int16),
        group_of_column=torch.tensor([0, 1, 0, 1], dtype=torch.int32),
        bits=2,
    )
    expected = torch.tensor([[-0.5, -1.0, 0.5, 1.0], [4.0, 0.0, 0.0, -2.0]])
    assert torch.equal(weight.decode(), expected)
    assert torch.equal(torch.cat([part.decode() for part in weight.split_rows([1, 1])]), expected)


@pytest.mark.parametrize(
    ("groups", "width"),
    [([0, 0, 1, 1], 2), ([0, 0, 0, 0], 4), ([0, 1, 0, 1], None), ([1, 1, 0, 0], None), ([0, 0, 0, 1], None)],
)
def test_values_per_column_are_those_of_its_group(groups, width):
    group_of_column = torch.tensor(groups, dtype=torch.int32)
    values = torch.randn(3, max(groups) + 1)
    assert run_width(group_of_column, values.shape[1]) == width
    assert torch.equal(per_column(values, group_of_column), values[:, group_of_column.long()])
