# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a source of `optq.convert`: its linears in GPTQ's words, everything else as float32.

Names and the order of rows are llama.cpp's: transformers' own reader of such files knows how to undo both.

The block types whose values lie on a grid of GPTQ's have 32 columns each, with a float16 scale d:

    Q4_0  d, 16 bytes       d · (q - 8)      byte i holds q_i in its low and q_(i + 16) in its high half
    Q4_1  d, m, 16 bytes    d · q + m        only where -m / d is a zero, that is one of 0 … 15
    Q8_0  d, 32 bytes       d · q            q is signed

What they say is from llama.cpp's own reader in Python, the package gguf 0.19.
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

from optq.checkpoint import PackedWeight, pack
from optq.errors import CheckpointError, OptqError, counted
from optq.files.config_checks import check_numbers
from optq.model import LINEAR_TYPES
from optq.readers import kind_of
from optq.scheme import LayerScheme, QuantizedWeight, trivial_groups

from .source import Opened, Parts, Source, gptq_config

GGML_COLUMNS = 32

GGML_SCHEMES = {
    "Q4_0": LayerScheme(bits=4, group_size=GGML_COLUMNS),
    "Q4_1": LayerScheme(bits=4, group_size=GGML_COLUMNS, symmetric=False),
    "Q8_0": LayerScheme(bits=8, group_size=GGML_COLUMNS),
}

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that were tried. Others store some tensors in other ways than transformers does."""


@contextmanager
def opened_gguf(file: Path) -> Iterator[Opened]:
    """Open the GGUF file of a model; yields its config, linears and tensors.

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

    class BoundedReader(GGUFReader):
        """Reads nothing beyond the end: an array may say that it has 2**60 entries, and each would be looked for."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > self.data.nbytes:
                raise ValueError(f"it says that it has {end} bytes or more, and has {self.data.nbytes}")
            return super()._get(offset, dtype, count, override_order)

    if not file.is_file():
        raise CheckpointError(f"There is no file {file}. Of one on the Hub, pass its repository and gguf_file=.")
    with _reading(file):
        reader = BoundedReader(file)
        architecture = _architecture(reader)
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        described = AutoConfig.from_pretrained(**where)
        described.dtype = torch.float32  # what is not quantized is not rounded either
        check_numbers(described.to_dict(), "its metadata")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
        described.architectures = [type(model).__name__]
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=described.to_dict())
        stored = _stored(reader.tensors, model, get_gguf_hf_weights_map(model, processor))
        schemes, dense = _sort_out(model, stored)
        _check_vectors(stored.values())
        config = gptq_config(schemes, dense, "gguf")

    def save_companions(folder: Path) -> None:
        with _reading(file):
            tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)

    source = Source(config=config, schemes=schemes, dense=dense, parts=("weight",), read=_read)
    tensors = _GgufTensors(file, stored, processor, packed={f"{name}.weight" for name in schemes})
    yield Opened(described=described, source=source, tensors=tensors, save_companions=save_companions)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Make errors name the file. Its readers, of the package gguf and of transformers, trust what it says."""
    try:
        yield
    except OptqError as error:
        raise type(error)(f"{file}: {error}") from error
    except Exception as error:  # an index, a key, a validator, a Rust panic: whatever a strange number leads to
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        raise CheckpointError(
            f"{file} is no GGUF file: {error}. It is damaged, cut short, or of a kind that "
            f"transformers {transformers.__version__} does not read ({type(error).__name__}); download it again."
        ) from error


def _architecture(reader: Any) -> str:
    """The architecture that it states, if it is read, and if its blocks are there: any number would be made."""
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"it holds a model of the architecture {architecture!r}; those read are {', '.join(ARCHITECTURES)}."
        )
    stated = reader.fields[f"{architecture}.block_count"].contents()
    blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    if stated != len(blocks):
        raise CheckpointError(
            f"it states {stated!r} blocks, and has tensors of {len(blocks)}. It is damaged, or a part of a model that "
            "was split into several files."
        )
    return str(architecture)


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


def _check_vectors(stored: Iterable[Any]) -> None:
    """Refuse norms and biases that are not finite, as of other formats."""
    from gguf import dequantize

    for tensor in stored:
        if len(tensor.shape) == 1 and not np.isfinite(dequantize(tensor.data, tensor.tensor_type)).all():
            raise CheckpointError(f"{tensor.name}: it is not finite. The file is damaged; download it again.")


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

    def __init__(self, file: Path, stored: Mapping[str, Any], processor: Any, packed: set[str]) -> None:
        self._file, self._stored, self._processor, self._packed = file, stored, processor, packed
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
        with _reading(self._file):
            values = tensor.data if name in self._packed else dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(np.array(self._processor.process(weights=values, name=tensor.name).weights))


def from_ggml(rows: Tensor, scheme: LayerScheme) -> PackedWeight:
    """Convert GGML blocks to GPTQ's packing, qweight (in · bits / 32, out), in checkpoint_format "gptq_v2".

    Args:
        rows: (out, bytes of a row) uint8.
        scheme: one of `GGML_SCHEMES`.
    Raises:
        CheckpointError: out_features do not fill words, or a block of Q4_1 is on no grid of GPTQ's.
    """
    numbers = 1 if scheme.symmetric else 2
    block_bytes = 2 * numbers + GGML_COLUMNS * scheme.bits // 8
    blocks = rows.unflatten(1, (-1, block_bytes))  # (out, groups, bytes)
    scales, *minimum = blocks[..., : 2 * numbers].contiguous().view(torch.float16).float().unbind(-1)
    codes = blocks[..., 2 * numbers :]
    codes = torch.cat([codes & 15, codes >> 4], dim=-1) if scheme.bits == 4 else codes ^ 128  # two's complement
    zeros = _zeros(scales, minimum[0]) if minimum else torch.full_like(scales, 2 ** (scheme.bits - 1))
    # A block of zeros has a scale of 0, which a GPTQ checkpoint may not: all its codes become its zero.
    is_zero = scales == 0
    codes = torch.where(is_zero[..., None], zeros[..., None].to(codes.dtype), codes)
    scales = torch.where(is_zero, 1.0, scales)
    out_features, in_features = codes.flatten(1).shape
    if reason := scheme.why_not_packed(in_features, out_features):
        raise CheckpointError(f"{reason}.")
    quantized = QuantizedWeight(
        codes=codes.flatten(1),
        scales=scales,
        zeros=zeros.to(torch.int16),
        group_of_column=trivial_groups(in_features, GGML_COLUMNS),
        bits=scheme.bits,
    )
    return pack(quantized, "gptq_v2")


def _zeros(scales: Tensor, minimum: Tensor) -> Tensor:
    zeros = torch.where(scales == 0, 0, -minimum / scales).round().clamp(0, 15)
    off_grid = int((zeros * scales != -minimum).sum())
    if off_grid:
        raise CheckpointError(
            f"{off_grid} of {zeros.numel()} blocks of Q4_1 have no zero among their values, so they are on no grid of "
            "GPTQ's. For a dense model, save what transformers' from_pretrained(..., gguf_file=...) loads."
        )
    return zeros
