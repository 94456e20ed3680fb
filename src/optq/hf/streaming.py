# SPDX-License-Identifier: Apache-2.0
"""Blocks that stay on disk until their turn comes.

While transformers reads the weights, every decoder block is away: a stand-in without parameters is in its place, so
nothing of it is read. Afterwards the block is put back, still on the meta device, and `read` fills it when the driver
arrives there. The memory that a model takes is then that of its embeddings, one block, and whatever is kept of the
blocks that are done.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from optq.checkpoint import open_whole
from optq.compat import transformers as compat
from optq.errors import ModelError, counted
from optq.model import Experts, put_fused, put_split

logger = logging.getLogger(__name__)


class StreamedBlocks:
    """The blocks of a model, and the files that hold their tensors.

    Args:
        model: on the meta device, as transformers hands it over before it reads the weights.
        blocks: by name.
        files: the checkpoint's safetensors files.
        experts: by name, those to be split into linears once their block has been read; fused in the model until then.
        base: the `compat.dequantizer` of a checkpoint that is not dense.
    """

    def __init__(
        self,
        model: Any,
        blocks: dict[str, nn.Module],
        files: Iterable[str],
        experts: dict[str, Experts] | None = None,
        base: Any = None,
    ) -> None:
        self._model = model
        self._base = base
        self._blocks = blocks
        self._experts = {
            block: {name: module for name, module in (experts or {}).items() if name.startswith(f"{block}.")}
            for block in blocks
        }
        self._keys = _keys_by_block(model, blocks, files, base)
        self._ignored = model._keys_to_ignore_on_load_unexpected

    def leave(self) -> None:
        """Take the blocks out of the model, so that their weights are not read."""
        for name in self._blocks:
            self._model.set_submodule(name, nn.Module())
        # With the blocks away, transformers may not recognise that their names lack the base model's.
        prefix = f"{self._model.base_model_prefix}."
        names = {*self._blocks, *(name.removeprefix(prefix) for name in self._blocks)}
        patterns = [rf"^{re.escape(name)}\." for name in names]
        self._model._keys_to_ignore_on_load_unexpected = {*(self._ignored or ()), *patterns}

    def come_back(self) -> None:
        """Put the blocks, without their tensors, where they were."""
        for name, block in self._blocks.items():
            self._model.set_submodule(name, block)
            block.train(self._model.training)  # switched meanwhile
        self._model._keys_to_ignore_on_load_unexpected = self._ignored

    def read(self, name: str) -> None:
        """Fill a block with its tensors, on the CPU.

        Raises:
            ModelError: the checkpoint lacks some of them, or holds experts of an unknown kind.
        """
        if name not in self._blocks:  # the head, which was read with the rest
            return
        block, experts = self._blocks[name], self._experts[name]
        put_fused(self._model, experts)
        with _opened(self._keys[name]) as slices:
            compat.load_tensors(self._model, slices, self._base)
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data = tensor.data.clone()  # what lies in the mapped file would keep all of it mapped, for one norm
        compat.initialise_buffers(self._model, name)
        missing = [key for key, tensor in block.state_dict(keep_vars=True).items() if tensor.is_meta]
        if missing:
            raise ModelError(
                f"The checkpoint has no {name}.{missing[0]}"
                + (f" and lacks {counted(len(missing) - 1, 'more tensor')} of this block" if len(missing) > 1 else "")
                + ". It is incomplete, or belongs to another architecture."
            )
        for module in experts.values():
            module.take_weights()
        put_split(self._model, experts)

    def drop(self, name: str) -> None:
        """Free a block's tensors again."""
        if name in self._blocks:
            self._blocks[name].to("meta")


def why_not_streamed(model: Any, blocks: dict[str, nn.Module], files: list[str]) -> str | None:
    """Why the whole model has to be read at once, or None."""
    if not files:
        return "its weights come from no files"
    unsafe = [file for file in files if not file.endswith(".safetensors")]
    if unsafe:
        return f"{Path(unsafe[0]).name} is no safetensors file; save the model once more to get some"
    tied = [
        name
        for pair in model.all_tied_weights_keys.items()
        for name in pair
        if any(name.startswith(f"{block}.") for block in blocks)
    ]
    if tied:
        return f"{tied[0]} is shared with another part of the model"
    parameters = [parameter for block in blocks.values() for parameter in block.parameters()]
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        return "blocks share weights with one another"
    foreign = next(filter(None, (compat.foreign_buffer(model, name) for name in blocks)), None)
    return f"{foreign} is initialised from outside of its block" if foreign else None


def _keys_by_block(
    model: Any, blocks: dict[str, nn.Module], files: Iterable[str], base: Any
) -> dict[str, dict[str, list[str]]]:
    """Block -> file -> the names, in that file, of the block's tensors."""
    file_of: dict[str, str] = {}
    for file in files:
        with open_whole(file) as opened:
            file_of |= dict.fromkeys(opened.keys(), file)
    keys: dict[str, dict[str, list[str]]] = {name: {} for name in blocks}
    for key, renamed in compat.names_in_model(file_of, model, base).items():
        block = _prefix_among(renamed, blocks)
        if block is not None:
            keys[block].setdefault(file_of[key], []).append(key)
    return keys


def _prefix_among(name: str, blocks: dict[str, nn.Module]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts)))
    return next((prefix for prefix in prefixes if prefix in blocks), None)


@contextmanager
def _opened(keys: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Slices that are read when they are asked for. Closing unmaps the files, which would count as memory."""
    opened = {file: open_whole(file) for file in keys}
    try:
        yield {key: opened[file].get_slice(key) for file, names in keys.items() for key in names}
    finally:
        for handle in opened.values():
            handle.__exit__(None, None, None)
