# SPDX-License-Identifier: Apache-2.0
"""The formats of quantized checkpoints, a row each: what is read, what is written, and what config.json says of it.

A new format is a file of its own beside this one, and a row here. GGUF files are one too, but are opened by their
suffix, as they hold a whole model (`optq.formats.gguf`); ONNX models are made by torch's exporter
(`optq.formats.onnx`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight, relabel
from optq.errors import CheckpointError
from optq.scheme import LayerScheme

from .awq import describe_awq
from .compressed_tensors import COMPRESSED, compressed_entry, describe_compressed, to_compressed
from .gptq import describe_gptq, gptq_entry
from .source import Headers, Source, entry_of

Write = Callable[[PackedWeight, LayerScheme, torch.dtype | None], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Args:
        name: what `to=` calls it, and, of one that is read, the quant_method of its quantization_config.
        read: (quantization_config, headers) -> what the checkpoint holds; None if it is not read.
        write: (packed, scheme, dtype of the model) -> the tensors of a linear, by the last part of their names; None
            if it is not written.
        entry: the quantization_config of what is written; None: an ordinary model has none.
    """

    name: str
    read: Callable[[dict[str, Any], Headers], Source] | None = None
    write: Write | None = None
    entry: Callable[[Source], dict[str, Any]] | None = None


def _labelled(name: str, packed: PackedWeight, scheme: LayerScheme, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return relabel(packed, name).tensors()


def _compressed(packed: PackedWeight, scheme: LayerScheme, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return to_compressed(packed, scheme.symmetric)


def _dense(packed: PackedWeight, scheme: LayerScheme, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {"weight": packed.columns(0, packed.out_features).T.to(dtype or torch.float16).contiguous()}


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="gptq", read=describe_gptq, write=partial(_labelled, "gptq"), entry=partial(gptq_entry, name="gptq")
        ),
        Format(name="gptq_v2", write=partial(_labelled, "gptq_v2"), entry=partial(gptq_entry, name="gptq_v2")),
        Format(name="awq", read=describe_awq),
        Format(name=COMPRESSED, read=describe_compressed, write=_compressed, entry=compressed_entry),
        Format(name="dense", write=_dense),
    )
}


def describe(stated: dict[str, Any], headers: Headers) -> Source:
    """Make a `Source` from a checkpoint's quantization_config and the headers of its tensors.

    Raises:
        CheckpointError: the format is unknown, or not of integers on a uniform grid, or contradicts the headers.
    """
    method = entry_of(stated, "quant_method", str, "gptq")
    row = FORMATS.get(method)
    if row is None or row.read is None:
        read = ", ".join(name for name, row in FORMATS.items() if row.read is not None)
        raise CheckpointError(f"quant_method {method!r} is not converted; it may be {read}.")
    return row.read(stated, headers)
