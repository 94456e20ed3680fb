# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs whose packed linears are `com.microsoft::MatMulNBits`, onnxruntime's operator for packed weights.

It wants groups of neighbouring columns, all of one width: a block. A block is the largest that fits into the groups of
the checkpoint, so a group may become several blocks with the same scale and zero. Codes are packed along the columns
as on disk, lowest bits first, so a row's bytes are those of its words. Nothing is rounded.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from optq.checkpoint.layout import PackedWeight
from optq.checkpoint.packing import pack_codes, unpack_codes
from optq.errors import CheckpointError, ModelError
from optq.layers import QuantLinear
from optq.scheme import PACKED_WORD_BITS

INPUTS = ("input_ids", "attention_mask")
EXAMPLE = (2, 8)  # a batch and a length to trace with; neither may be 1, which torch would take for a constant

MATMUL_NBITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What onnxruntime 1.31 computes on a CPU; larger blocks, which the operator's schema allows, it refuses."""


@dataclass(frozen=True, kw_only=True)
class BlockedWeight:
    """One linear's weight in the layout of `com.microsoft::MatMulNBits`.

    Args:
        codes: (out, blocks, block_size · bits / 8) uint8, packed.
        scales: (out, blocks) float32.
        zeros: (out, ceil(blocks · bits / 8)) uint8, packed; None if all are 2 ** (bits - 1), which the operator
            assumes.
        order: (in,) int64, which column of the layer each column of the codes is; None if they are in its order.
        bits: bits per weight.
        block_size: columns that share a scale and a zero.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bits: int
    block_size: int


def to_blocks(packed: PackedWeight) -> BlockedWeight:
    """Convert a packed weight, qweight (in · bits / 32, out), to the layout of MatMulNBits; nothing is rounded.

    Raises:
        CheckpointError: the operator has no such bits or blocks, or a zero is 2 ** bits.
    """
    bits = packed.bits
    if bits not in MATMUL_NBITS:
        raise CheckpointError(
            f"has {bits} bits, and onnxruntime's MatMulNBits computes with {_listed(MATMUL_NBITS)}. Quantize it to "
            "one of these."
        )
    groups, qweight, order = packed.g_idx, packed.qweight, None
    if bool((groups[1:] < groups[:-1]).any()):
        order = torch.argsort(groups, stable=True)
        groups, qweight = groups[order], pack_codes(unpack_codes(qweight, bits)[order], bits)
    starts = torch.where(groups[1:] != groups[:-1])[0] + 1  # the columns at which a group begins
    block_size = math.gcd(BLOCK_SIZES[-1], packed.in_features, *starts.tolist())
    if block_size not in BLOCK_SIZES:
        raise CheckpointError(
            f"has {packed.in_features} columns in groups that share no block of more than {block_size}, and "
            f"onnxruntime's MatMulNBits computes with blocks of {_listed(BLOCK_SIZES)}. Quantize it with a group_size "
            f"that is a multiple of {BLOCK_SIZES[0]}."
        )
    of_block = groups[::block_size].long()
    zeros = packed.zeros()[of_block]
    if int(zeros.max()) == 2**bits:
        raise CheckpointError(f"has a zero of {2**bits}, which {bits} bits cannot hold in onnxruntime's MatMulNBits.")
    blocks, out_features = zeros.shape
    return BlockedWeight(
        codes=_bytes(qweight).view(out_features, blocks, block_size * bits // 8),
        scales=packed.scales[of_block].float().T.contiguous(),
        zeros=None if bool((zeros == 2 ** (bits - 1)).all()) else _packed_zeros(zeros, bits),
        order=order,
        bits=bits,
        block_size=block_size,
    )


def _packed_zeros(zeros: Tensor, bits: int) -> Tensor:
    """(blocks, out) to (out, ceil(blocks · bits / 8)) uint8."""
    blocks = zeros.shape[0]
    whole_words = pad(zeros, (0, 0, 0, -blocks % (PACKED_WORD_BITS // bits)))
    return _bytes(pack_codes(whole_words, bits))[:, : math.ceil(blocks * bits / 8)].contiguous()


def _bytes(words: Tensor) -> Tensor:
    """(words, out) int32 to (out, 4 · words) uint8, the lowest byte first."""
    return words.T.flatten().view(torch.uint8).view(words.shape[1], -1)


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def traced(model: Any) -> Any:
    """torch's ONNXProgram of a model, whose `QuantLinear`s are replaced in place by the operator.

    Raises:
        CheckpointError: a layer's bits or groups are none of the operator's.
        ModelError: torch cannot trace the model.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, _as_operator(name, layer))
    return _traced(model)


def _as_operator(name: str, layer: QuantLinear) -> "_MatMulNBits":
    try:
        return _MatMulNBits(layer)
    except CheckpointError as error:
        raise CheckpointError(f"{name} {error}") from error


def _traced(model: Any) -> Any:
    """torch's ONNXProgram, without the lines of Python and the paths that torch notes at every node."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name")  # both inputs have the same two axes, as they should
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch
            program = torch.onnx.export(
                _Logits(model).eval(),
                # Not one tensor for both: torch would take them for one input.
                kwargs={name: torch.ones(EXAMPLE, dtype=torch.int64) for name in INPUTS},
                input_names=INPUTS,
                output_names=["logits"],
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in INPUTS},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"torch {torch.__version__} cannot trace {type(model).__name__}: "
            f"{str(error.__cause__ or error).splitlines()[0]}. Models whose path depends on their data, such as "
            "mixtures of experts, cannot be exported."
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    return program


class _Logits(nn.Module):
    """The inputs and the output of the ONNX model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


class _MatMulNBits(nn.Module):
    """A linear that is the operator in a traced graph, and computes nothing elsewhere.

    Columns of uneven order (desc_act) are put in order in the activations: the operator's own input for that, g_idx,
    is deprecated, and slow where it works.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        weight = to_blocks(layer.packed())
        self.out_features = layer.out_features
        self.attributes: dict[str, Any] = {
            "K": layer.in_features,
            "N": layer.out_features,
            "bits": weight.bits,
            "block_size": weight.block_size,
        }
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("order", weight.order)
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = [tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None]
        output = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x if self.order is None else x.index_select(-1, self.order), *weight],
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return output if self.bias is None else output + self.bias
