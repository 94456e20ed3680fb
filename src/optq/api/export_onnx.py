# SPDX-License-Identifier: Apache-2.0
"""`optq.export_onnx`: a GPTQ checkpoint as an ONNX model whose quantized linears stay packed.

They become onnxruntime's operator `com.microsoft::MatMulNBits`; torch's own exporter makes the rest of the graph.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from optq.errors import CheckpointError, ConfigError
from optq.files.output import output_folder
from optq.files.source import companions_folder, copy_companions, model_config_of, place_of, quantization_entry
from optq.formats.onnx import traced
from optq.torch_state import default_torch_state
from optq.version import how_to_install

ONNX_FILE = "model.onnx"


@default_torch_state()
def export_onnx(model_id_or_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str], **kwargs: Any) -> Path:
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
        raise ConfigError(f"Exporting to ONNX needs the packages {' and '.join(missing)}: {how_to_install('onnx')}.")
    source = place_of(model_id_or_dir)
    described = model_config_of(source, kwargs)
    stated = quantization_entry(described)
    if not stated or stated.get("quant_method", "gptq") != "gptq":
        raise CheckpointError(
            f"{source} is no GPTQ checkpoint. optq.convert makes one of AWQ, compressed-tensors and GGUF; for dense "
            "models there is torch.onnx.export."
        )
    with output_folder(Path(output_dir), "optq.export_onnx") as partial:
        model = AutoModelForCausalLM.from_pretrained(source, **{**kwargs, "dtype": torch.float32})
        program = traced(model)
        copy_companions(companions_folder(source, kwargs), partial)
        program.save(partial / ONNX_FILE, external_data=True)
        del described.quantization_config  # what it says of weights is not so of those in this folder
        described.save_pretrained(partial)
    return Path(output_dir)
