# SPDX-License-Identifier: Apache-2.0
"""Zeros to int32 words and back, as each writer of the format did it.

v2 stores a zero as it is. v1 stores it minus one, and a zero of 0 has no room for that: what the words hold then
depends on who wrote them. With fields f of a word for zeros z:

    gptq              f = z - 1, for z >= 1 only. optq writes no others; AutoGPTQ spoils the rest of the word.
    gptq:gptqmodel    the word of all z minus 1 in every field at once: each field borrows from the one above it. Of 3
                      bits f = (z - 1) mod 8, each alone.
    gptq:gptqmodel-6  GPTQModel before 6.1: the same, but of 3 bits other constants are subtracted from three words.
    gptq:auto-round   the sum of (z - 1) << position: the same words as GPTQModel's. Of 3 bits the sum is that of ten
                      fields at a time, and those between, which straddle two words, are alone.

GPTQModel: utils/model.py, convert_gptq_v2_to_v1_format_module; AutoRound: qlinear_torch_zp.py, pack_248_bits and
pack_3bits; AutoGPTQ: qlinear_cuda.py, pack.
"""

from itertools import accumulate

import torch
from torch import Tensor

from .packing import pack_codes, unpack_codes

CHECKPOINT_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""checkpoint_format in config.json -> what is subtracted from a zero before it is packed."""

WHOLE_WORDS: dict[int, tuple[int, ...]] = {2: (16,), 4: (8,), 8: (4,)}

BORROWING: dict[str, dict[int, tuple[int, ...]]] = {
    "gptq:gptqmodel": {**WHOLE_WORDS, 3: (1,) * 32},
    "gptq:gptqmodel-6": WHOLE_WORDS,
    "gptq:auto-round": {**WHOLE_WORDS, 3: (10, 1, 10, 1, 10)},
}
"""Format of zeros -> bits -> how many neighbouring fields borrow from one another, over one unit of whole words."""

CONSTANTS = {("gptq:gptqmodel-6", 3): (0x24924924, 0x92492492, 0x49249249)}
"""Format and bits -> what is subtracted from every word of a unit, where that is not 1 in every field."""


def label_of(zero_format: str) -> str:
    """The checkpoint_format that config.json states for a format of zeros: the part before the writer's name."""
    return zero_format.partition(":")[0]


def decode_zeros(qzeros: Tensor, bits: int, zero_format: str) -> Tensor:
    """Decode stored zeros to (groups, out) int16; without a writer's rule, v1 may mean a zero of 2 ** bits.

    Args:
        qzeros: (groups, out · bits / 32) int32.
        zero_format: a key of `CHECKPOINT_FORMATS` or `BORROWING`.
    """
    words = qzeros.T.contiguous()
    if (constants := CONSTANTS.get((zero_format, bits))) is not None:
        return unpack_codes(_added(words, constants, 1), bits).to(torch.int16).T.contiguous()
    fields = unpack_codes(words, bits).to(torch.int16)  # (out, groups)
    if (runs := BORROWING.get(zero_format, {}).get(bits)) is not None:
        return _carried(fields, bits, runs, 1).T.contiguous()
    return (fields + CHECKPOINT_FORMATS[label_of(zero_format)]).T.contiguous()


def encode_zeros(zeros: Tensor, bits: int, zero_format: str) -> Tensor:
    """Encode integer zeros (groups, out) to (groups, out · bits / 32) int32: the inverse of `decode_zeros`.

    In the format "gptq" without a writer's rule, zeros must be at least 1.
    """
    if (constants := CONSTANTS.get((zero_format, bits))) is not None:
        return _added(pack_codes(zeros.T, bits), constants, -1).T.contiguous()
    if (runs := BORROWING.get(zero_format, {}).get(bits)) is not None:
        return pack_codes(_carried(zeros.T.to(torch.int16), bits, runs, -1), bits).T.contiguous()
    return pack_codes(zeros.T - CHECKPOINT_FORMATS[label_of(zero_format)], bits).T.contiguous()


def rules_differ(qzeros: Tensor, bits: int) -> bool:
    """Whether the meaning of v1 zeros, (groups, out · bits / 32) int32, depends on the tool that wrote them.

    It does if a field is all ones, which stands for a zero of 0 or of 2 ** bits.
    """
    return bool((unpack_codes(qzeros.T.contiguous(), bits) == 2**bits - 1).any())


def _carried(fields: Tensor, bits: int, runs: tuple[int, ...], step: int) -> Tensor:
    """Add `step` to every field of (count, columns); what a field cannot hold goes to the next one of its run."""
    units = fields.reshape(-1, sum(runs), fields.shape[1])
    found, carry = torch.empty_like(units), torch.zeros_like(units[:, 0])
    starts = {0, *accumulate(runs)}
    for position in range(units.shape[1]):
        total = units[:, position] + step + (carry if position not in starts else 0)
        found[:, position], carry = total & (2**bits - 1), total >> bits
    return found.reshape(fields.shape)


def _added(words: Tensor, constants: tuple[int, ...], sign: int) -> Tensor:
    """Add a constant to each word of every unit of (words, columns), as int32 does."""
    added = torch.tensor(constants, device=words.device).repeat(words.shape[0] // len(constants))[:, None]
    total = (words.long() + sign * added) & 0xFFFFFFFF
    return (total - ((total >> 31) << 32)).to(torch.int32)
