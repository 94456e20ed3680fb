# SPDX-License-Identifier: Apache-2.0
"""`optq.export_onnx`: a GPTQ checkpoint as an ONNX model whose quantized linears stay packed.

They become onnxruntime's operator `com.microsoft::MatMulNBits`; torch's own exporter makes the rest of the graph.
"""

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from optq.errors import CheckpointError, ConfigError, ModelError
from optq.files.output import filled
from optq.files.source import companions_folder, copy_companions, model_config_of, place_of, quantization_entry
from optq.formats.matmul_nbits import to_blocks
from optq.layers import QuantLinear
from optq.torch_state import default_torch_state

ONNX_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
EXAMPLE = (2, 8)  # a batch and a length to trace with; neither may be 1, which torch would take for a constant


@default_torch_state()
def export_onnx(model_id_or_dir: str | os.PathLike[str], *, output_dir: str | os.PathLike[str], **kwargs: Any) -> Path:
    """Write a GPTQ checkpoint as an ONNX model for onnxruntime.

    The model takes input_ids and attention_mask, both (batch, length) int64, and gives logits (batch, length,
    vocabulary) float32, without a cache. Quantized weights are the same numbers; all others are float32.

    Args:
        model_id_or_dir: a GPTQ checkpoint of any tool with a causal language model.
        output_dir: is created; must be empty. model.onnx, model.onnx.data, config.json and the tokenizer appear in it
            only when all is written.
        kwargs: revision, token, trust_remote_code, cache_dir, … as for `from_pretrained`.
    Returns:
        The folder.
    Raises:
        ConfigError: the packages onnx and onnxscript are not installed.
        CheckpointError: the source is not quantized, or a layer's bits or groups are none of MatMulNBits's.
        ModelError: torch cannot trace the model.
        OutputError: the folder is not empty.
    Cost: the model is in memory, in float32 but for its packed weights.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ConfigError(f"Exporting to ONNX needs the packages {' and '.join(missing)}: pip install 'optq[onnx]'.")
    source = place_of(model_id_or_dir)
    described = model_config_of(source, kwargs)
    stated = quantization_entry(described)
    if not stated or stated.get("quant_method", "gptq") != "gptq":
        raise CheckpointError(
            f"{source} is no GPTQ checkpoint. optq.convert makes one of AWQ, compressed-tensors and GGUF; for dense "
            "models there is torch.onnx.export."
        )
    with filled(Path(output_dir)) as partial:
        model = AutoModelForCausalLM.from_pretrained(source, **{**kwargs, "dtype": torch.float32})
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                model.set_submodule(name, _as_operator(name, layer))
        program = _traced(model)
        copy_companions(companions_folder(source, kwargs), partial)
        program.save(partial / ONNX_FILE, external_data=True)
        del described.quantization_config  # what it says of weights is not so of those in this folder
        described.save_pretrained(partial)
    return Path(output_dir)


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
