# SPDX-License-Identifier: Apache-2.0
"""`optq.convert`: the same weights in another format, tensor by tensor, without loading the model."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from optq.checkpoint import (
    CHECKPOINT_FORMATS,
    TENSOR_NAMES,
    PackedWeight,
    QuantizedTensors,
    find_quantized_linears,
    read_headers,
    repack_zeros,
)
from optq.errors import CheckpointError, ConfigError, OutputError
from optq.scheme import trivial_groups

from .config import GPTQConfig
from .source import companions_folder, copy_companions, model_config_of, stated_quantization, weight_files

DENSE = "dense"
TARGETS = (*CHECKPOINT_FORMATS, DENSE)


def convert(
    model_id_or_dir: str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str],
    to: str,
    **kwargs: Any,
) -> Path:
    """Write a GPTQ checkpoint in another format.

    Every conversion is exact: the dequantized weights are the same numbers, those of "dense" rounded to the model's
    dtype. One file is in memory at a time.

    Args:
        model_id_or_dir: a GPTQ checkpoint of any tool.
        output_dir: is created; must be empty. It appears only when all of it is written.
        to: "gptq" (v1), "gptq_v2" or "dense": an ordinary model with the dequantized weights.
        kwargs: revision, token, trust_remote_code, cache_dir, … as for `from_pretrained`.
    Returns:
        The folder.
    Raises:
        ConfigError: `to` is unknown.
        CheckpointError: the source is not quantized, or holds zeros that the other format cannot.
        OutputError: the folder is not empty.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} was asked for; allowed are {', '.join(TARGETS)}.")
    source = os.fspath(model_id_or_dir)
    described = model_config_of(source, kwargs)
    files = weight_files(source, described, kwargs)
    linears = find_quantized_linears(read_headers([os.fspath(file) for file in files]))
    config = stated_quantization(described) if linears else None
    if config is None:
        raise CheckpointError(f"{source} is no GPTQ checkpoint, so there is nothing to convert.")
    dtype = described.dtype or torch.float16
    with _filled(Path(output_dir)) as partial, _opened(files) as tensors:
        copy_companions(companions_folder(source, kwargs), partial)
        sizes = {}
        for file, names in tqdm(tensors.by_file.items(), desc="Converting", unit="file", disable=None):
            converted: dict[str, Tensor] = {}
            for name in names:
                linear, _, last = name.rpartition(".")
                if linear not in linears or last not in TENSOR_NAMES:
                    converted[name] = tensors[name]
                elif to != DENSE:
                    converted[name] = _relabelled(tensors[name], linears[linear], last, config.format, to)
                elif last == "qweight":
                    converted[f"{linear}.weight"] = _dense(tensors, linears[linear], config).to(dtype)
            save_file(converted, partial / file, metadata={"format": "pt"})
            sizes[file] = {name: tensor.numel() * tensor.element_size() for name, tensor in converted.items()}
        if len(files) > 1:
            _write_index(partial, sizes)
        if to == DENSE:
            del described.quantization_config
        else:
            config.format = to
            described.quantization_config = config.to_dict()
        described.save_pretrained(partial)
    return Path(output_dir)


def _relabelled(tensor: Tensor, linear: QuantizedTensors, last: str, found: str, to: str) -> Tensor:
    """Only the zeros differ between the formats of packed words."""
    if last != "qzeros" or found == to:
        return tensor
    try:
        return repack_zeros(tensor, linear.bits, CHECKPOINT_FORMATS[found] - CHECKPOINT_FORMATS[to])
    except CheckpointError as error:
        raise CheckpointError(
            f"{linear.name}: {error} So this checkpoint cannot become {to!r}; it stays readable as it is."
        ) from error


def _dense(tensors: "_Tensors", linear: QuantizedTensors, config: GPTQConfig) -> Tensor:
    """(out, in), float32."""
    parts = {part: tensors[f"{linear.name}.{part}"] for part in TENSOR_NAMES if part in linear.headers}
    if "g_idx" not in parts:
        scheme = config.scheme_for(linear.name)
        if scheme is None:
            raise CheckpointError(f"{linear.name} is packed, but config.json excludes it, and it has no g_idx.")
        parts["g_idx"] = trivial_groups(linear.in_features, scheme.group_width(linear.in_features), "cpu")
    packed = PackedWeight(**parts, bits=linear.bits, checkpoint_format=config.format)
    return packed.columns(0, packed.out_features).T.contiguous()


class _Tensors:
    """The tensors of several open files, read when they are asked for: a linear's may lie in two of them."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.by_file = {file: list(opened.keys()) for file, opened in files.items()}
        self._home = {name: files[file] for file, names in self.by_file.items() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor


@contextmanager
def _opened(files: Sequence[Path]) -> Iterator[_Tensors]:
    with ExitStack() as stack:
        yield _Tensors({file.name: stack.enter_context(safe_open(file, framework="pt")) for file in files})


@contextmanager
def _filled(output: Path) -> Iterator[Path]:
    """A folder inside `output` to write to, whose files get their places when all are written, or none does."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(
            f"output_dir={str(output)!r} is not empty. Name one that does not exist or is empty; nothing was changed."
        )
    partial = output / ".optq-partial"
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        rmtree(partial)
        raise
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # without it, it is no model
        os.replace(file, output / file.name)
    partial.rmdir()


def _write_index(folder: Path, sizes: Mapping[str, Mapping[str, int]]) -> None:
    index = {
        "metadata": {"total_size": sum(sum(names.values()) for names in sizes.values())},
        "weight_map": {name: file for file, names in sizes.items() for name in names},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
