# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.checkpoint import pack_codes, unpack_codes
from optq.errors import CheckpointError
from optq.scheme import BITS


def words(*values: int) -> list[int]:
    """Unsigned 32-bit numbers as the signed ones that int32 holds."""
    return [value - 2**32 if value >= 2**31 else value for value in values]


@given(bits=st.sampled_from(BITS), units=st.integers(1, 4), columns=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_unpacking_undoes_packing(bits, units, columns, seed):
    codes = torch.randint(0, 2**bits, (units * 32, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (units * bits, columns)
    assert torch.equal(unpack_codes(packed, bits).long(), codes)


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_words_are_a_little_endian_bitstream(bits, seed):
    """Against Python's own big integers."""
    codes = torch.randint(0, 2**bits, (32,), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = sum(code << (bits * position) for position, code in enumerate(codes))
    expected = words(*((stream >> (32 * word)) & 0xFFFFFFFF for word in range(bits)))
    assert pack_codes(torch.tensor(codes)[:, None], bits)[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(2, [0x55555555]), (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]), (4, [0x77777777]), (8, [0x7F7F7F7F])],
)
def test_symmetric_v1_zeros_are_the_known_words(bits, expected):
    stored = torch.full((32, 1), 2 ** (bits - 1) - 1)
    assert pack_codes(stored, bits)[: len(expected), 0].tolist() == words(*expected)


@pytest.mark.parametrize(("bits", "count"), [(2, 8), (3, 16), (4, 4), (8, 2)])
def test_codes_that_do_not_fill_words_are_refused(bits, count):
    with pytest.raises(CheckpointError, match="whole int32 words"):
        pack_codes(torch.zeros(count, 1, dtype=torch.int64), bits)


def test_words_that_hold_no_whole_unit_are_refused():
    with pytest.raises(CheckpointError, match="3-bit"):
        unpack_codes(torch.zeros(2, 1, dtype=torch.int32), 3)
