# SPDX-License-Identifier: Apache-2.0
"""`optq.convert`: the same weights in another format, tensor by tensor, without loading the model."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from optq.checkpoint import PackedWeight, read_headers, value_errors
from optq.config.metadata import ambiguity, groups_contradict, zeros_are_ambiguous, zeros_contradict
from optq.errors import CheckpointError, ConfigError, found_in
from optq.files.legacy import WHERE
from optq.files.output import output_folder, write_index
from optq.files.source import (
    companions_folder,
    copy_companions,
    model_config_of,
    place_of,
    quantization_entry,
    two_sets_of_weights,
    weight_files,
)
from optq.formats.gguf import opened_gguf
from optq.formats.source import Opened, Source, Tensors
from optq.formats.table import FORMATS, Write, describe
from optq.hf.loading import check_loadable
from optq.scheme import LayerScheme
from optq.torch_state import default_torch_state

logger = logging.getLogger(__name__)


@default_torch_state()
def convert(
    model_id_or_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    to: str,
    without_desc_act: bool = False,
    gguf_file: str | None = None,
    **kwargs: Any,
) -> Path:
    """Write a quantized checkpoint in another format.

    Every conversion is exact: the dequantized weights are the same numbers, those of "dense" rounded to the model's
    dtype. One file is in memory at a time. docs/checkpoint-format.md says what can be told in which format.

    Args:
        model_id_or_dir: a checkpoint of GPTQ, by any tool, of AWQ, or of compressed-tensors; or a GGUF file.
        output_dir: is created; must be empty. It appears only when all of it is written.
        to: "gptq" (v1), "gptq_v2", "compressed-tensors" (pack-quantized), or "dense": an ordinary model with the
            dequantized weights.
        without_desc_act: write desc_act=false, which more readers know, where every group is a run of neighbouring
            columns.
        gguf_file: the name of a GGUF file in the folder or repository, to be converted instead of its other weights.
        kwargs: revision, token, trust_remote_code, cache_dir, … as for `from_pretrained`.
    Returns:
        The folder.
    Raises:
        ConfigError: `to` is unknown.
        CheckpointError: the source is not quantized, or not on a grid of GPTQ's; its labels are not true; or it holds
            what cannot be written as asked.
        OutputError: the folder is not empty.
        OSError: there is no such folder, repository or GGUF file, or it cannot be reached.
    """
    target = FORMATS.get(to)
    if target is None or target.write is None:
        written = ", ".join(name for name, row in FORMATS.items() if row.write is not None)
        raise ConfigError(f"to={to!r} was asked for; allowed are {written}.")
    origin = place_of(model_id_or_dir)
    if gguf_file is not None:
        origin = cached_file(origin, gguf_file, **{key: kwargs[key] for key in WHERE if key in kwargs})
    with (
        opened_gguf(Path(origin)) if origin.endswith(".gguf") else _opened_checkpoint(origin, kwargs) as opened,
        output_folder(Path(output_dir), "optq.convert") as partial,
    ):
        described = opened.described
        source = opened.source.without_desc_act() if without_desc_act else opened.source
        if described.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CheckpointError(
                f"{origin}/config.json says dtype={described.dtype!r}; models are converted in float16, bfloat16, "
                "float32 and float64. Correct it, or remove it for float16."
            )
        opened.save_companions(partial)
        with found_in(origin):
            _write_weights(opened.tensors, source, target.write, described.dtype, partial)
        if target.entry is None:
            vars(described).pop("quantization_config", None)  # that of a GGUF file has none
        else:
            described.quantization_config = target.entry(source)
        described.save_pretrained(partial)
    return Path(output_dir)


def _write_weights(tensors: Tensors, source: Source, write: Write, dtype: torch.dtype | None, folder: Path) -> None:
    """Write every file's tensors, those of packed linears in the format asked for, and the index."""
    names_in, size = {}, 0
    for file, names in tqdm(tensors.by_file.items(), desc="Converting", unit="file", disable=None):
        converted: dict[str, Tensor] = {}
        for name in names:
            linear, _, part = name.rpartition(".")
            if linear not in source.schemes or part not in source.parts:
                converted[name] = tensors[name]
            elif part == source.parts[0]:  # all of a linear goes where its first tensor was
                written = _converted(tensors, source, linear, write, dtype)
                converted |= {f"{linear}.{new}": tensor for new, tensor in written.items()}
        if converted:
            save_file(converted, folder / file, metadata={"format": "pt"})
            names_in[file] = list(converted)
            size += sum(tensor.nbytes for tensor in converted.values())
    if len(tensors.by_file) > 1:
        write_index(folder, names_in, size)


def _converted(
    tensors: Tensors, source: Source, linear: str, write: Write, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of one linear in the format asked for, by the last part of their names."""
    scheme = source.schemes[linear]
    parts = {part: tensors[f"{linear}.{part}"] for part in source.parts if f"{linear}.{part}" in tensors}
    with found_in(linear):
        packed = source.read(parts, scheme)
    _check(packed, linear, scheme)
    with found_in(linear):
        return write(packed, scheme, dtype)


def _check(packed: PackedWeight, name: str, scheme: LayerScheme) -> None:
    """The bytes must be what the labels say: readers of the new ones would believe them, too."""
    width = scheme.group_width(packed.in_features)
    for contradiction in (
        *value_errors(name, packed.scales, packed.g_idx, None, width),
        *zeros_contradict(name, scheme, packed.checkpoint_format, packed.qzeros),
        *groups_contradict(name, scheme, packed.g_idx),
    ):
        raise CheckpointError(contradiction)
    if zeros_are_ambiguous(packed.bits, packed.checkpoint_format, packed.qzeros):
        logger.warning("%s", ambiguity([name]))


@contextmanager
def _opened_checkpoint(name: str, kwargs: dict[str, Any]) -> Iterator[Opened]:
    """A folder or repository of transformers' own layout."""
    described = model_config_of(name, kwargs)
    stated = quantization_entry(described)
    if not stated:
        raise CheckpointError(f"{name}: its config.json says nothing of quantization, so there is nothing to convert.")
    files = weight_files(name, described, kwargs)
    headers = read_headers([os.fspath(file) for file in files])
    with found_in(name):
        source = describe(stated, headers)
    for contradiction in (
        *two_sets_of_weights(name, kwargs),
        *check_loadable(described, source.headers, source.config),
    ):
        logger.warning("%s", contradiction)

    def save_companions(folder: Path) -> None:
        copy_companions(companions_folder(name, kwargs), folder)

    with ExitStack() as stack:
        # Older tools chose other names.
        names = [file.name for file in files] if len(files) > 1 else [SAFE_WEIGHTS_NAME]
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        tensors = _FileTensors(dict(zip(names, handles, strict=True)))
        yield Opened(described=described, source=source, tensors=tensors, save_companions=save_companions)


class _FileTensors:
    """The tensors of several open files; those of a linear may lie in two of them."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.by_file = {file: list(opened.keys()) for file, opened in files.items()}
        self._home = {name: files[file] for file, names in self.by_file.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor
