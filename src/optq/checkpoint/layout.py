# SPDX-License-Identifier: Apache-2.0
"""The tensors of one quantized linear on disk.

The format is specified in docs/checkpoint-format.md.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optq.errors import CheckpointError
from optq.scheme import PACKED_WORD_BITS, QuantizedWeight, trivial_groups

from .packing import pack_codes, unpack_codes
from .zeros import BORROWING, CHECKPOINT_FORMATS, decode_zeros, encode_zeros, label_of

TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One linear's quantized tensors exactly as on disk.

    Args:
        qweight: (in · bits / 32, out) int32.
        qzeros: (groups, out · bits / 32) int32.
        scales: (groups, out), the dtype on disk: float16 when optq writes.
        g_idx: (in,) int32.
        bits: bits per weight.
        checkpoint_format: a key of `CHECKPOINT_FORMATS`, or of `BORROWING`, which names the writer as well.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    checkpoint_format: str = "gptq"

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0] * PACKED_WORD_BITS // self.bits

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """qweight (in · bits / 32, out), qzeros (groups, out · bits / 32), scales (groups, out) and g_idx (in,)."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def zeros(self) -> Tensor:
        """Decoded zeros, (groups, out) int16: 8 bits are too few, since v1 files may mean a zero of 2 ** bits."""
        return decode_zeros(self.qzeros, self.bits, self.checkpoint_format)

    def columns(self, start: int, stop: int) -> Tensor:
        """Dequantize output features start … stop: (in, stop - start) float32."""
        codes = unpack_codes(self.qweight[:, start:stop].contiguous(), self.bits)
        groups = self.g_idx.long()
        zeros = self.zeros()[:, start:stop].float()[groups]
        return (codes.float() - zeros) * self.scales[:, start:stop].float()[groups]


def pack(quantized: QuantizedWeight, checkpoint_format: str = "gptq") -> PackedWeight:
    """Pack a quantized weight, codes (out, in), into the int32 words of a checkpoint, qweight (in · bits / 32, out).

    Nothing is rounded.

    Raises:
        CheckpointError: a zero of 0 in the v1 format, which cannot hold it, or a scale that float16 would change.
    """
    least = 0 if checkpoint_format in BORROWING else CHECKPOINT_FORMATS[checkpoint_format]
    if int(quantized.zeros.min()) < least:
        raise CheckpointError("A zero point of 0 cannot be stored in checkpoint_format 'gptq' (v1); write 'gptq_v2'.")
    return PackedWeight(
        qweight=pack_codes(quantized.codes.T, quantized.bits),
        qzeros=encode_zeros(quantized.zeros.T, quantized.bits, checkpoint_format),
        scales=as_float16(quantized.scales).T.contiguous(),  # (groups, out): the order on disk
        g_idx=quantized.group_of_column.clone(),  # a tensor shared by several layers would be refused by safetensors
        bits=quantized.bits,
        checkpoint_format=checkpoint_format,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Unpack int32 words into codes (out, in) uint8, scales and zeros (out, groups): the inverse of `pack`."""
    return QuantizedWeight(
        codes=unpack_codes(packed.qweight, packed.bits).T.contiguous(),
        scales=packed.scales.float().T.contiguous(),
        zeros=packed.zeros().T.contiguous(),
        group_of_column=packed.g_idx,
        bits=packed.bits,
    )


def part_of(packed: PackedWeight, outputs: slice, inputs: slice) -> PackedWeight:
    """Cut a range of output and input features out of a packed weight: the shard of one tensor-parallel process.

    Args:
        packed: qweight (in · bits / 32, out).
        outputs, inputs: ranges of features that begin and end at whole words; see `optq.readers.why_not_in_parts`.
    Raises:
        CheckpointError: a range begins or ends inside of a word.
    """
    rows = words_of(inputs, packed.bits, "inputs")
    columns = words_of(outputs, packed.bits, "outputs")
    groups, own = groups_of_columns(packed.g_idx, inputs.start, inputs.stop)
    return replace(
        packed,
        qweight=packed.qweight[rows, outputs],
        qzeros=packed.qzeros[groups][:, columns],
        scales=packed.scales[groups][:, outputs],
        g_idx=own,
    )


def words_of(codes: slice, bits: int, what: str) -> slice:
    """The range of int32 words that holds a range of codes; `what` names the codes in the error.

    Raises:
        CheckpointError: the range begins or ends inside of a word.
    """
    if codes.start * bits % PACKED_WORD_BITS or codes.stop * bits % PACKED_WORD_BITS:
        raise CheckpointError(
            f"{what} {codes.start} to {codes.stop} of {bits} bits begin or end inside of a word of {PACKED_WORD_BITS} "
            "bits, so they cannot be had without their neighbours. Split the model over fewer processes."
        )
    return slice(codes.start * bits // PACKED_WORD_BITS, codes.stop * bits // PACKED_WORD_BITS)


def groups_of_columns(group_of_column: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The groups that a shard with columns start … stop of a weight needs, and the shard's own g_idx.

    Where groups are runs of columns and `start` lies inside of one, the shard gets narrower groups, all of one width,
    as the fast kernels want them: with groups of 128, columns 192 … 384 get three groups of 64.

    Args:
        group_of_column: (in,) int32, of the whole weight.
    Returns:
        The whole weight's group of each of the shard's groups, (local groups,) int64, which may name a group twice;
        and the shard's group of each column, (stop - start,) int32.
    """
    own = group_of_column[start:stop]
    width = int((group_of_column == group_of_column[0]).sum())
    if torch.equal(group_of_column, trivial_groups(len(group_of_column), width, own.device)):
        width = math.gcd(start, width)
        return own[::width].long(), trivial_groups(stop - start, width, own.device)
    groups, own = own.unique(return_inverse=True)
    return groups.long(), own.int()


def as_float16(scales: Tensor) -> Tensor:
    """Cast scales of any shape (...) and float dtype to float16 without rounding.

    Raises:
        CheckpointError: float16 cannot represent one of them.
    """
    stored = scales.to(torch.float16)
    if not torch.equal(stored.float(), scales.float()):
        raise CheckpointError("The scales are not representable in float16; storing them would change the weights.")
    return stored


def relabel(packed: PackedWeight, checkpoint_format: str) -> PackedWeight:
    """Convert a weight to another checkpoint_format of config.json: only qzeros (groups, out · bits / 32) changes.

    Raises:
        CheckpointError: the other format cannot hold a zero.
    """
    if checkpoint_format == label_of(packed.checkpoint_format):
        return packed
    zeros = packed.zeros()
    for extreme in (int(zero) - CHECKPOINT_FORMATS[checkpoint_format] for zero in zeros.aminmax()):
        if not 0 <= extreme < 2**packed.bits:
            raise CheckpointError(
                f"a zero would have to be stored as {extreme}, which {packed.bits} bits cannot hold. So this weight "
                f"cannot become {checkpoint_format!r}; {packed.checkpoint_format!r} holds it."
            )
    qzeros = encode_zeros(zeros, packed.bits, checkpoint_format)
    return replace(packed, qzeros=qzeros, checkpoint_format=checkpoint_format)


def with_trivial_groups(packed: PackedWeight, group_width: int) -> PackedWeight:
    """Renumber groups by the order of their columns, so that g_idx (in,) is column // group_width; same weights.

    Raises:
        CheckpointError: the groups are not runs of neighbouring columns.
    """
    first = packed.g_idx[::group_width].long()  # the group of each run, if these are runs
    if not torch.equal(packed.g_idx, first.repeat_interleave(group_width)[: packed.in_features]):
        raise CheckpointError(
            f"its groups are not runs of {group_width} neighbouring columns. Sorting its columns would make them so, "
            "but then its inputs would have to come in that order, too, and other layers make and share them. So it "
            "has to stay desc_act=true; quantize the original again with desc_act=False for one that need not."
        )
    trivial = trivial_groups(packed.in_features, group_width, packed.g_idx.device)
    return replace(packed, qzeros=packed.qzeros[first], scales=packed.scales[first], g_idx=trivial)
