# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.checkpoint import pack
from optq.errors import CheckpointError
from optq.formats.compressed_tensors import from_compressed, to_compressed
from optq.gptq import round_to_nearest
from optq.scheme import BITS, LayerScheme
from other_formats import compressed_parts, compressed_weight, random_grid

SHAPES = st.tuples(st.sampled_from([32, 64]), st.sampled_from([32, 96]))


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    shape=SHAPES,
    whole_rows=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_there_and_back_is_the_same_bytes(bits, symmetric, shape, whole_rows, seed):
    scheme = LayerScheme(bits=bits, symmetric=symmetric, group_size=-1 if whole_rows else 32)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = pack(round_to_nearest(weight, scheme), "gptq_v2")
    parts = to_compressed(packed, symmetric)
    assert torch.equal(
        compressed_weight({f"a.{part}": t for part, t in parts.items()}, "a", bits), packed.columns(0, shape[0]).T
    )
    for name, tensor in from_compressed(parts, scheme).tensors().items():
        assert torch.equal(tensor, getattr(packed, name)), name


@given(bits=st.sampled_from(BITS), symmetric=st.booleans(), shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_what_others_packed_has_the_same_weights(bits, symmetric, shape, seed):
    grid = random_grid(shape, bits=bits, symmetric=symmetric, lowest_zero=0, seed=seed)
    scheme = LayerScheme(bits=bits, symmetric=symmetric, group_size=32)
    packed = from_compressed(compressed_parts(grid, symmetric=symmetric), scheme)
    assert torch.equal(packed.columns(0, shape[0]).T, grid.weight())


def test_a_narrower_last_group_is_refused():
    packed = pack(round_to_nearest(torch.randn(32, 96), LayerScheme(group_size=64)))
    with pytest.raises(CheckpointError, match="a narrower last group"):
        to_compressed(packed, symmetric=True)
