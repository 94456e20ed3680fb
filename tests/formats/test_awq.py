# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.checkpoint import pack_codes
from optq.errors import CheckpointError
from optq.formats.awq import from_awq

EVEN_ONES_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """(columns, out) codes as AWQ packs them: GPTQ's packing of shuffled outputs."""
    shuffled = codes.reshape(codes.shape[0], -1, 8)[:, :, list(EVEN_ONES_FIRST)].flatten(1)
    return pack_codes(shuffled.T, 4).T.contiguous()


def test_one_word_as_the_drawing_shows_it():
    word = torch.tensor([[0x75316420]], dtype=torch.int32)  # o7 o5 o3 o1 o6 o4 o2 o0
    weight = from_awq(word.repeat(8, 1), word, torch.ones(1, 8, dtype=torch.float16))
    assert weight.zeros().tolist() == [list(range(8))]
    assert weight.columns(0, 8).abs().max() == 0  # every code is its zero


@given(
    groups=st.integers(1, 3), width=st.sampled_from([8, 32]), outputs=st.sampled_from([8, 40]), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_every_weight_is_the_same_number(groups, width, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (groups * width, outputs), generator=generator)
    zeros = torch.randint(0, 16, (groups, outputs), generator=generator)
    scales = torch.rand(groups, outputs, generator=generator).half()
    weight = from_awq(packed(codes), packed(zeros), scales)
    of_column = torch.arange(groups).repeat_interleave(width)
    assert torch.equal(weight.columns(0, outputs), (codes - zeros[of_column]).float() * scales.float()[of_column])


def test_a_scale_that_float16_cannot_hold_is_refused():
    word = torch.zeros(8, 1, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="not representable in float16"):
        from_awq(word, word[:1], torch.full((1, 8), 1e-7, dtype=torch.bfloat16))
