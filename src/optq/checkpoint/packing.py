# SPDX-License-Identifier: Apache-2.0
"""Codes to int32 words and back: one little-endian bitstream for 2, 3, 4 and 8 bits.

Code 0 fills the lowest bits of word 0, code 1 the next ones, and so on; a code may straddle two words:

    bits = 4:  word 0 = c7 c6 c5 c4 c3 c2 c1 c0
    bits = 3:  word 0 = c10[1:0] c9 … c1 c0     word 1 = c21[0] c20 … c11 c10[2]     word 2 = c31 … c22 c21[2:1]

The smallest whole number of words is a unit: 16, 8 or 4 codes in one word for 2, 4 and 8 bits, 32 codes in three words
for 3 bits.
"""

import math

import torch
from torch import Tensor

from optq.errors import CheckpointError
from optq.scheme import PACKED_WORD_BITS


def _unit(bits: int) -> tuple[int, int]:
    """Codes and words per unit."""
    codes = PACKED_WORD_BITS // math.gcd(PACKED_WORD_BITS, bits)
    return codes, codes * bits // PACKED_WORD_BITS


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first dimension.

    Args:
        codes: (count, columns), integers 0 … 2 ** bits - 1; count a multiple of 32 / gcd(32, bits).
    Returns:
        (count · bits / 32, columns) int32.
    """
    unit_codes, unit_words = _unit(bits)
    count, columns = codes.shape
    if count % unit_codes:
        raise CheckpointError(
            f"{count} codes of {bits} bits do not fill whole int32 words; use a multiple of {unit_codes}."
        )
    units = codes.reshape(count // unit_codes, unit_codes, columns)
    # int64, because int32 << 30 overflows; the cost is bounded by packing one layer at a time.
    words = torch.zeros(units.shape[0], unit_words, columns, dtype=torch.int64, device=codes.device)
    for position in range(unit_codes):
        word, shift = divmod(position * bits, PACKED_WORD_BITS)
        code = units[:, position].long()
        words[:, word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > PACKED_WORD_BITS:
            words[:, word + 1] |= code >> (PACKED_WORD_BITS - shift)
    words -= (words >> 31) << 32  # to the signed number with the same 32 bits
    return words.reshape(-1, columns).to(torch.int32)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Unpack (count · bits / 32, columns) int32 to (count, columns) uint8: the inverse of `pack_codes`."""
    unit_codes, unit_words = _unit(bits)
    rows, columns = words.shape
    if rows % unit_words:
        raise CheckpointError(
            f"{rows} words do not hold whole units of {bits}-bit codes; expected a multiple of {unit_words}."
        )
    units = words.reshape(rows // unit_words, unit_words, columns)
    mask = 2**bits - 1
    codes = torch.empty(units.shape[0], unit_codes, columns, dtype=torch.uint8, device=words.device)
    for position in range(unit_codes):
        word, shift = divmod(position * bits, PACKED_WORD_BITS)
        code = units[:, word] >> shift  # arithmetic: the copies of the sign bit are masked or replaced below
        if shift + bits > PACKED_WORD_BITS:
            low_bits = PACKED_WORD_BITS - shift
            code = (code & (2**low_bits - 1)) | (units[:, word + 1] << low_bits)
        codes[:, position] = code & mask
    return codes.reshape(-1, columns)
