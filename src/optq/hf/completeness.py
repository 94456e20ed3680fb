# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint has all of a model in its shapes: transformers fills what is missing with random numbers."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from optq.checkpoint import QuantizedTensors, reader_of
from optq.checkpoint.headers import TensorHeader
from optq.errors import CheckpointError
from optq.model import LINEAR_TYPES
from optq.readers import kind_of

NUMBERED = re.compile(r"(.*?\.)?[^.]+\.\d+\.")
"""The name of something in a list of blocks, up to that list's owner."""


def check_complete(
    model: Any,
    headers: Mapping[str, TensorHeader],
    quantized: Mapping[str, QuantizedTensors],
    on_disk: Iterable[str],
    linears: Iterable[str] | None = None,
) -> None:
    """Compare a checkpoint with the model that it is to be read into.

    Args:
        model: on the meta device, with the dense linears that are to be replaced.
        headers: of all tensors, by their names in the model.
        quantized: of the packed linears; none of a dense checkpoint.
        on_disk: the names of all tensors as they are in the files.
        linears: names of the model's linears that count; by default the packed ones.
    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    present = {f"{name}.weight" for name in quantized} | headers.keys()
    inside = f"{model.base_model_prefix}."
    of_base = model.base_model is not model and not any(name.startswith(inside) for name in on_disk)
    for name in _missing(model, present, quantized if linears is None else linears, of_base):
        raise CheckpointError(
            f"{model.config.name_or_path} has no tensor {name!r}, which {type(model).__name__} needs; it would be "
            "filled with random numbers. A file of the checkpoint may be missing, or its config.json be of another "
            "model; download it again."
        )
    for name, tensors in quantized.items():
        wanted, found = _features(model.get_submodule(name)), (tensors.out_features, tensors.in_features)
        if wanted != found:
            raise CheckpointError(
                f"{tensors.file}: {name} is packed for {found[0]} outputs of {found[1]} inputs, and "
                f"{type(model).__name__} has {wanted[0]} of {wanted[1]} there, as its config.json says. The weights "
                "or the config are of another model; download both again."
            )
    for name, tensor in model.state_dict().items():
        header = headers.get(name)
        if header is None:
            continue
        # Others may be turned as they are read.
        is_plain = tensor.ndim <= 1 or isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding)
        fits = header.shape == tuple(tensor.shape) if is_plain else math.prod(header.shape) == tensor.numel()
        if not fits or header.dtype.is_floating_point is not tensor.is_floating_point():
            raise CheckpointError(
                f"{header} has shape {header.shape} and is of {header.dtype}; {type(model).__name__} has "
                f"{tuple(tensor.shape)} of {tensor.dtype} there, as its config.json says. The weights or the config "
                "are of another model; download both again."
            )


def _features(module: torch.nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear."""
    assert isinstance(module, LINEAR_TYPES)
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    inputs, outputs = module.weight.shape
    return outputs, inputs


def _missing(model: Any, present: set[str], linears: Iterable[str], of_base: bool) -> Iterator[str]:
    """Parameters that are surely meant to be in the checkpoint, and are not.

    Those are what other blocks have under the same name, what lies beside the blocks, such as the last norm, the
    embedding and the output head. Others, such as a pooler or the head of another task, may be left to be trained.

    Args:
        of_base: the checkpoint was saved as a base model, which has no output head.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied |= {source: target for target, source in tied.items()}
    ignored = model._keys_to_ignore_on_load_missing or ()
    kinds = set(map(kind_of, present))
    beside = {found[1] or "" for name in linears if (found := NUMBERED.match(name)) is not None}
    outer = [_weight_of(model.get_input_embeddings)]
    if not of_base:
        outer.append(_weight_of(model.get_output_embeddings))
    for name, parameter in model.named_parameters():
        if name in present or tied.get(name) in present or any(re.search(pattern, name) for pattern in ignored):
            continue
        kind = kind_of(name)
        is_of_block = kind != name and kind in kinds
        is_beside = kind == name and any(name.startswith(owner) and owner for owner in beside)
        if is_of_block or is_beside or any(parameter is weight for weight in outer):
            yield name


def _weight_of(get: Callable[[], Any]) -> Any:
    """The weight of the module that is got, if there is one."""
    try:
        return getattr(get(), "weight", None)
    except (AttributeError, NotImplementedError):  # of models with several, or with none
        return None


def not_tied(model: Any, headers: Mapping[str, TensorHeader]) -> Iterator[str]:
    """Yield one sentence for each weight that config.json says is another one, where the checkpoint has both.

    Args:
        headers: of all tensors, by their names in the model.
    """
    for name, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        pair = [headers[key] for key in (name, source) if key in headers]
        if len(pair) < 2:
            continue
        with reader_of(pair) as read:
            if pair[0].shape == pair[1].shape and torch.equal(*map(read, pair)):
                continue
        yield (
            f"{pair[0]}: config.json says tie_word_embeddings=true, so it is {source}, but the checkpoint has both, "
            "and they differ. transformers computes with both, other readers with the latter. Correct "
            f"tie_word_embeddings to false; or remove {name}, if it is left from another checkpoint."
        )
