# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a source of `optq.convert`: its linears in GPTQ's words, everything else as float32.

Names and the order of rows are llama.cpp's: transformers' own reader of such files knows how to undo both.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from optq.checkpoint import PackedWeight
from optq.errors import CheckpointError, counted
from optq.model import LINEAR_TYPES
from optq.readers import kind_of
from optq.scheme import LayerScheme

from .ggml import GGML_SCHEMES, from_ggml
from .table import Opened, Parts, Source, gptq_config

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that were tried. Others store some tensors in other ways than transformers does."""


@contextmanager
def opened_gguf(file: Path) -> Iterator[Opened]:
    """Everything about the model in `file`.

    Raises:
        CheckpointError: the package gguf is not installed, the architecture is not read, a linear is on no grid of
            GPTQ's, or tensors are missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{file} is read with the package gguf, which is not installed: pip install gguf"
        ) from error
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}. Of one on the Hub, pass its repository and gguf_file=.")
    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is no GGUF file: {error}.") from error
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file} holds a model of the architecture {architecture!r}; those read are {', '.join(ARCHITECTURES)}."
        )
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    described = AutoConfig.from_pretrained(**where)
    described.dtype = torch.float32  # what is not quantized is not rounded either
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described)
    described.architectures = [type(model).__name__]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=described.to_dict())
    stored = _stored(reader.tensors, model, get_gguf_hf_weights_map(model, processor))
    schemes, dense = _sort_out(model, stored)
    source = Source(
        config=gptq_config(schemes, dense, "gguf"), schemes=schemes, dense=dense, parts=("weight",), read=_read
    )

    def save_companions(folder: Path) -> None:
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        model.generation_config.save_pretrained(folder)

    tensors = _GgufTensors(stored, processor, packed={f"{name}.weight" for name in schemes})
    yield Opened(described=described, source=source, tensors=tensors, save_companions=save_companions)


def _stored(tensors: Iterable[Any], model: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The file's tensors by transformers' names, if they are all of the model and nothing else."""
    stored = {tensor.name: tensor for tensor in tensors}
    if strangers := [name for name in stored if name not in names]:
        raise CheckpointError(
            f"{counted(len(strangers), 'tensor')} of the file, such as {strangers[0]}, "
            f"{'has' if len(strangers) == 1 else 'have'} no place in {type(model).__name__}. "
            "Without them it would be another model."
        )
    named = {names[name]: tensor for name, tensor in stored.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    for name, tensor in named.items():
        if (found := tuple(map(int, reversed(tensor.shape)))) != shapes[name]:
            raise CheckpointError(
                f"{tensor.name} has shape {found}, but transformers {transformers.__version__} takes the config "
                f"for one of a model in which {name} has {shapes[name]}."
            )
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    if missing := [name for name in shapes if name not in named and name not in tied]:
        raise CheckpointError(f"The file has no tensor for {', '.join(missing[:3])} of {type(model).__name__}.")
    return named


def _sort_out(model: Any, stored: Mapping[str, Any]) -> tuple[dict[str, LayerScheme], list[str]]:
    """How the linears of the blocks are quantized; and the modules with a matrix that will be dense."""
    schemes, dense = {}, []
    for name, module in model.named_modules():
        tensor = stored.get(f"{name}.weight")
        if tensor is None or not isinstance(module, (*LINEAR_TYPES, torch.nn.Embedding)):
            continue
        kind = tensor.tensor_type.name
        if kind in ("F32", "F16", "BF16") or kind_of(name) == name:  # not in a block
            dense.append(name)
        elif kind in GGML_SCHEMES:
            schemes[name] = GGML_SCHEMES[kind]
        else:
            raise CheckpointError(
                f"{name} ({tensor.name}) is of type {kind}, whose values are on no grid of GPTQ's; those of "
                f"{', '.join(GGML_SCHEMES)} are. For a dense model, save what transformers' "
                "from_pretrained(..., gguf_file=...) loads."
            )
    return schemes, dense


def _read(parts: Parts, scheme: LayerScheme) -> PackedWeight:
    return from_ggml(parts["weight"], scheme)


class _GgufTensors:
    """The tensors of a GGUF file in transformers' order of rows, to be written into one file for each block.

    Those of `packed` are rows of bytes, the others are dequantized.
    """

    def __init__(self, stored: Mapping[str, Any], processor: Any, packed: set[str]) -> None:
        self._stored, self._processor, self._packed = stored, processor, packed
        blocks: dict[str, list[str]] = {}
        for name in stored:
            blocks.setdefault(next((part for part in name.split(".") if part.isdigit()), ""), []).append(name)
        self.by_file = {
            f"model-{index:05}-of-{len(blocks):05}.safetensors": names
            for index, names in enumerate(blocks.values(), start=1)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        from gguf import dequantize

        tensor = self._stored[name]
        values = tensor.data if name in self._packed else dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(self._processor.process(weights=values, name=tensor.name).weights))
