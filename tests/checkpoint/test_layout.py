# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from optq.checkpoint import pack, unpack
from optq.errors import CheckpointError
from optq.gptq import round_to_nearest
from optq.scheme import LayerScheme, QuantizedWeight

CASES = list(itertools.product((2, 3, 4, 8), (True, False), (32, -1, 64), ("gptq", "gptq_v2")))


def quantized(bits: int, symmetric: bool, group_size: int) -> QuantizedWeight:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(bits)) / 10
    return round_to_nearest(weight, LayerScheme(bits=bits, symmetric=symmetric, group_size=group_size))


@pytest.mark.parametrize(("bits", "symmetric", "group_size", "checkpoint_format"), CASES)
def test_packing_loses_nothing(bits, symmetric, group_size, checkpoint_format):
    original = quantized(bits, symmetric, group_size)
    packed = pack(original, checkpoint_format)
    groups = original.scales.shape[1]
    assert packed.qweight.shape == (96 * bits // 32, 32)
    assert packed.qzeros.shape == (groups, 32 * bits // 32)
    assert packed.scales.shape == (groups, 32)
    assert (packed.in_features, packed.out_features) == (96, 32)
    restored = unpack(packed)
    for field in ("codes", "scales", "zeros", "group_of_column"):
        assert torch.equal(getattr(restored, field), getattr(original, field)), field
    assert torch.equal(packed.columns(0, 32).T, original.decode())
    assert torch.equal(packed.columns(8, 20).T, original.decode()[8:20])


def test_v1_and_v2_differ_by_one_in_every_zero():
    original = quantized(4, False, 32)
    v1, v2 = pack(original, "gptq"), pack(original, "gptq_v2")
    assert torch.equal(v1.qweight, v2.qweight)
    assert not torch.equal(v1.qzeros, v2.qzeros)
    assert torch.equal(v1.zeros(), v2.zeros())


def test_a_zero_of_zero_fits_v2_only():
    original = quantized(4, False, 32)
    original.zeros[0, 0] = 0
    assert pack(original, "gptq_v2").zeros()[0, 0] == 0
    with pytest.raises(CheckpointError, match="gptq_v2"):
        pack(original, "gptq")


def test_scales_that_float16_would_round_are_refused():
    original = quantized(4, True, 32)
    original.scales[0, 0] = 0.1
    with pytest.raises(CheckpointError, match="float16"):
        pack(original)
