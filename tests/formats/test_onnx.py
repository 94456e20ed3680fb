# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from dataclasses import replace

import pytest
import torch

from optq.checkpoint import PackedWeight, pack, pack_codes
from optq.errors import CheckpointError
from optq.formats.onnx import to_blocks
from optq.gptq import round_to_nearest
from optq.scheme import LayerScheme

CASES = list(itertools.product((2, 4, 8), (True, False), ((32, 32), (64, 64), (48, 16), (-1, 64), (128, 64))))


def packed_weight(bits=4, symmetric=True, group_size=32, columns=192) -> PackedWeight:
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(bits)) / 10
    return pack(round_to_nearest(weight, LayerScheme(bits=bits, symmetric=symmetric, group_size=group_size)))


def bits_of(packed_bytes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes along the last dimension, as the operator's documentation says: a byte's lowest bits are the first."""
    return torch.stack([packed_bytes >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=-1).flatten(-2)


def dense(blocked, columns: int) -> torch.Tensor:
    """(out, in), by the operator's definition, in the layer's order of columns."""
    codes = bits_of(blocked.codes, blocked.bits).float()  # (out, blocks, block_size)
    out_features, blocks, _ = codes.shape
    zeros = torch.full((out_features, blocks), 2 ** (blocked.bits - 1))
    if blocked.zeros is not None:
        assert blocked.zeros.shape == (out_features, math.ceil(blocks * blocked.bits / 8))
        zeros = bits_of(blocked.zeros, blocked.bits)[:, :blocks]
    values = ((codes - zeros[..., None]) * blocked.scales[..., None]).view(out_features, columns)
    order = torch.arange(columns) if blocked.order is None else blocked.order
    return torch.empty_like(values).index_copy_(1, order, values)


@pytest.mark.parametrize(("bits", "symmetric", "sizes"), CASES, ids=str)
def test_blocks_hold_the_same_weights(bits, symmetric, sizes):
    """A block is the largest power of two that fits: rows of 192 columns are three of 64."""
    group_size, block_size = sizes
    packed = packed_weight(bits, symmetric, group_size)
    blocked = to_blocks(packed)
    assert blocked.block_size == block_size
    assert (blocked.zeros is None) is symmetric
    assert blocked.order is None
    assert torch.equal(dense(blocked, 192), packed.columns(0, 32).T)
    # Negative control: the weights are not those of other scales.
    assert not torch.equal(dense(replace(blocked, scales=blocked.scales * 2), 192), packed.columns(0, 32).T)


def test_zeros_of_a_block_count_that_fills_no_byte_are_packed_row_by_row():
    packed = packed_weight(symmetric=False, group_size=64)
    blocked = to_blocks(packed)
    assert blocked.zeros.shape == (32, 2)
    assert bool((blocked.zeros[:, 1] >> 4 == 0).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_distant_columns_become_blocks_in_another_order(bits):
    packed = packed_weight(bits, symmetric=False)
    shuffled = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    packed = replace(packed, g_idx=packed.g_idx[shuffled])
    blocked = to_blocks(packed)
    assert blocked.block_size == 32
    assert blocked.order is not None
    assert torch.equal(dense(blocked, 192), packed.columns(0, 32).T)


def test_blocks_are_not_larger_than_onnxruntime_computes_with():
    assert to_blocks(packed_weight(group_size=-1, columns=1024)).block_size == 256


def test_what_the_operator_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match=r"has 3 bits.* computes with 2, 4 or 8"):
        to_blocks(packed_weight(bits=3))
    with pytest.raises(CheckpointError, match=r"no block of more than 8.* 16, 32, 64, 128 or 256.* multiple of 16"):
        to_blocks(packed_weight(group_size=24))
    packed = packed_weight(symmetric=False)
    largest = pack_codes(torch.full((32, 6), 15), 4).T.contiguous()  # v1 means 16 by it
    with pytest.raises(CheckpointError, match=r"has a zero of 16, which 4 bits cannot hold"):
        to_blocks(replace(packed, qzeros=largest))
    assert to_blocks(replace(packed, qzeros=largest, checkpoint_format="gptq_v2")).zeros is not None
