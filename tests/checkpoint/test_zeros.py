# SPDX-License-Identifier: Apache-2.0
"""Zeros of v1 are read by the rule of the tool that wrote them, also where a zero of 0 had no room."""

import numpy as np
import pytest
import torch

from optq.checkpoint import PackedWeight, decode_zeros, pack, relabel, rules_differ, unpack
from optq.checkpoint.zeros import encode_zeros
from optq.errors import CheckpointError
from optq.scheme import BITS, QuantizedWeight

OUT, GROUPS = 64, 32


def random_zeros(bits, least=0):
    """(groups, out); every value occurs."""
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(least, 2**bits, (GROUPS, OUT), generator=generator, dtype=torch.int16)


def stream(zeros, bits):
    """v2: the words as one long number per row of zeros, least significant field first."""
    words = np.zeros((zeros.shape[0], OUT * bits // 32), dtype=np.int64)
    for row, fields in enumerate(zeros.tolist()):
        number = sum(field << (bits * place) for place, field in enumerate(fields))
        words[row] = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(words.shape[1])]
    return words


def as_int32(words):
    return torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32).copy())


def by_gptqmodel(zeros, bits):
    """Subtract from whole words; of 3 bits from each field, which wraps."""
    if bits == 3:
        return as_int32(stream((zeros - 1) % 8, bits))
    return as_int32(stream(zeros, bits) - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])


def by_old_gptqmodel(zeros, bits):
    if bits != 3:
        return by_gptqmodel(zeros, bits)
    return as_int32(stream(zeros, bits) - np.tile([0x24924924, 0x92492492, 0x49249249], OUT // 32))


def by_auto_round(zeros, bits):
    """Sum what is left of each zero, shifted to its place."""
    assert bits != 3
    fields = (zeros.long() - 1).reshape(zeros.shape[0], -1, 32 // bits).numpy()
    return as_int32((fields << (bits * np.arange(32 // bits))).sum(-1))


def by_autogptq(zeros, bits):
    """Only zeros that have room."""
    return as_int32(stream(zeros - 1, bits))


WRITERS = {
    "gptq:gptqmodel": (by_gptqmodel, BITS, 0),
    "gptq:gptqmodel-6": (by_old_gptqmodel, BITS, 0),
    "gptq:auto-round": (by_auto_round, (2, 4, 8), 0),
    "gptq": (by_autogptq, BITS, 1),
    "gptq_v2": (lambda zeros, bits: as_int32(stream(zeros, bits)), BITS, 0),
}
CASES = [(name, bits) for name, (_, every, _) in WRITERS.items() for bits in every]


@pytest.mark.parametrize(("writer", "bits"), CASES)
def test_what_a_writer_stored_is_read_and_written_back(writer, bits):
    write, _, least = WRITERS[writer]
    zeros = random_zeros(bits, least)
    words = write(zeros, bits)
    assert torch.equal(decode_zeros(words, bits, writer), zeros)
    assert torch.equal(encode_zeros(zeros, bits, writer), words)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_a_writer_such_zeros_are_read_wrong_and_that_is_noticed(bits):
    zeros = random_zeros(bits)
    words = by_gptqmodel(zeros, bits)
    assert not torch.equal(decode_zeros(words, bits, "gptq"), zeros)
    assert rules_differ(words, bits)


@pytest.mark.parametrize("bits", BITS)
def test_where_every_zero_has_room_the_writers_agree(bits):
    zeros = random_zeros(bits, least=1)
    for writer in ("gptq:gptqmodel", "gptq:auto-round", "gptq"):
        assert torch.equal(encode_zeros(zeros, bits, writer), by_autogptq(zeros, bits))
    assert not rules_differ(by_autogptq(zeros, bits), bits)


def test_three_bits_of_auto_round_borrow_within_ten_fields():
    zeros = torch.full((1, 32), 3, dtype=torch.int16)
    zeros[0, [0, 4, 13, 25]] = 0
    words = []
    left = (zeros.long() - 1)[0].tolist()
    for word, (first, shift) in enumerate(((0, 0), (11, 1), (22, 2))):
        words.append(sum(left[first + place] << (3 * place + shift) for place in range(10)))
        words[word] |= {0: left[10] << 30, 1: left[21] << 31 | left[10] >> 2 & 1, 2: left[21] >> 1 & 3}[word]
    assert torch.equal(decode_zeros(as_int32(np.array([words])), 3, "gptq:auto-round"), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_such_a_weight_becomes_v2_and_stays_the_same(bits):
    zeros = random_zeros(bits)
    packed = PackedWeight(
        qweight=torch.zeros(32 * bits // 32, OUT, dtype=torch.int32),
        qzeros=by_gptqmodel(zeros, bits),
        scales=torch.ones(GROUPS, OUT, dtype=torch.float16),
        g_idx=torch.arange(32, dtype=torch.int32),
        bits=bits,
        checkpoint_format="gptq:gptqmodel",
    )
    assert relabel(packed, "gptq") is packed  # its bytes are v1's
    newer = relabel(packed, "gptq_v2")
    assert torch.equal(newer.zeros(), packed.zeros())
    assert torch.equal(newer.columns(0, OUT), packed.columns(0, OUT))
    with pytest.raises(CheckpointError, match="stored as -1"):
        relabel(newer, "gptq")


def test_solved_codes_are_packed_by_the_rule_and_unpacked_again():
    zeros = random_zeros(4).T.contiguous()
    solved = QuantizedWeight(
        codes=torch.zeros(OUT, GROUPS, dtype=torch.uint8),
        scales=torch.ones(OUT, GROUPS),
        zeros=zeros,
        group_of_column=torch.arange(GROUPS, dtype=torch.int32),
        bits=4,
    )
    packed = pack(solved, "gptq:gptqmodel")
    assert torch.equal(packed.qzeros, by_gptqmodel(zeros.T, 4))
    assert torch.equal(unpack(packed).zeros, zeros)
    with pytest.raises(CheckpointError, match="cannot be stored"):
        pack(solved, "gptq")
