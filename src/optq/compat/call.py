# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` was asked for: where the model comes from, and where it is to be placed.

transformers tells a quantizer the model's name and its files, but neither the revision, subfolder and token that were
asked for nor whether code may be run, and of the placement the device_map only. The tokenizer has to come from that
place, and the finished model goes where it was asked, so a call's arguments are kept for as long as it lasts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FOR_ALL = ("token", "cache_dir", "local_files_only", "trust_remote_code")
"""What holds for whatever is read along with the model."""

FOR_ONE = ("revision", "subfolder")
"""What holds for the model's own repository or folder only."""

FOR_WEIGHTS = ("variant",)
"""What holds for nothing else in there."""

PLACEMENT = ("max_memory", "offload_folder", "offload_buffers")
"""What belongs to a device_map."""

DTYPE = ("dtype", "torch_dtype")
"""What is the same; the second is older."""

NAME = "pretrained_model_name_or_path"

_TOLD: ContextVar[Mapping[str, Any] | None] = ContextVar("optq_told", default=None)


@contextmanager
def called_with(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Keep the arguments of a `from_pretrained` for as long as it runs."""
    token = _TOLD.set(kwargs)
    try:
        yield
    finally:
        _TOLD.reset(token)


def told(names: Iterable[str]) -> dict[str, Any]:
    """Those of the running `from_pretrained`'s arguments that have these names and are not None."""
    kwargs = _TOLD.get() or {}
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def name_told() -> str:
    """The id or folder of the model that the running `from_pretrained` loads, or "this model"."""
    return str(told((NAME,)).get(NAME, "this model"))


def where_told() -> dict[str, Any]:
    """The running `from_pretrained`'s arguments that say where the model is: revision, subfolder, token, …"""
    return told((*FOR_ALL, *FOR_ONE, *FOR_WEIGHTS))


def where_in(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where the model is: revision, subfolder, token, …"""
    return {key: kwargs[key] for key in (*FOR_ALL, *FOR_ONE, *FOR_WEIGHTS) if kwargs.get(key) is not None}


def where_for(name: str, model: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which the tokenizer called `name` is read, when `model` is where `where` says."""
    keys = (*FOR_ALL, *FOR_ONE) if name == model else FOR_ALL
    return {key: value for key, value in where.items() if key in keys}
