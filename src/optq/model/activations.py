# SPDX-License-Identifier: Apache-2.0
"""What waits between blocks: on the device while there is room, then in the machine's memory, then on its disk.

Only tensors as large as the hidden states are moved; masks and rotary embeddings stay. A tensor that has gone is still
the same object, and only its data is elsewhere: the suspended forward that it belongs to refers to it as well.
"""

import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


@dataclass(kw_only=True)
class _Away:
    """Where a tensor's data is; `pages` if that is a file."""

    data: Tensor
    pages: mmap.mmap | None = None

    def __post_init__(self) -> None:
        self.forget_pages()

    def forget_pages(self) -> None:
        """They are read again when they are needed, and until then are no memory of this process."""
        if self.pages is not None and hasattr(self.pages, "madvise"):  # not on Windows
            self.pages.madvise(mmap.MADV_DONTNEED)


class ActivationStore:
    """Keeps tensors within limits, and knows what a run has given up for want of memory.

    Args:
        device: where they are needed; None: wherever they are.
        dtype: of floating ones; None: as they are.
        on_device: bytes that may wait there.
        in_memory: bytes that may wait in the machine's memory, if `device` is another one. Without a folder there is
            no limit.
        folder: for files, which have no name and vanish with the process.
    Attributes:
        on_device: the limit; 0 once memory has run out.
        pausing: forwards may wait inside a block.
        parts: in so many parts, one after the other, a micro-batch runs through a block.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        on_device: float = math.inf,
        in_memory: float = math.inf,
        folder: Path | None = None,
    ) -> None:
        self._device, self._dtype = device, dtype
        self.on_device, self._in_memory, self._folder = on_device, in_memory, folder
        self._here = WeakTensorKeyDictionary()  # tensor -> its bytes
        self._away = WeakTensorKeyDictionary()  # tensor -> _Away
        self._owned: set[int] = set()
        self.pausing = True
        self.parts = 1

    @property
    def away(self) -> dict[str, int]:
        """Bytes that wait elsewhere, by place."""
        found = {"memory": 0, "disk": 0}
        for away in self._away.values():
            found["memory" if away.pages is None else "disk"] += away.data.nbytes
        return found

    def leave_alone(self, model: nn.Module) -> None:
        """Never move the parameters and buffers of a model, which some pass to their blocks."""
        self._owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}

    def take(self, tree: T) -> T:
        """Tensors as they are needed, or away if there is no room for them."""
        tree = tree_map(self._converted, tree)
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            large = tensor.is_floating_point() and tensor.numel() >= tensors[0].numel()
            if large and tensor not in self._away and tensor.data_ptr() not in self._owned:
                self._here[tensor] = tensor.nbytes
                if sum(self._here.values()) > self.on_device:
                    self._send_away(tensor)
        return tree

    def fetched(self, tree: T) -> T:
        """The same with all tensors on the device; those that are away are copied."""
        fetched: T = tree_map(self._fetched, tree)
        return fetched

    @contextmanager
    def at_hand(self, tree: Any) -> Iterator[None]:
        """For a while, whoever refers to one of these tensors finds it on the device."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf in self._away]
        for tensor in tensors:
            tensor.data = self._fetched(tensor)
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.data = self._away[tensor].data

    def spill(self) -> bool:
        """From now on nothing waits on the device; False if nothing did, or there is no other place."""
        if not self._here or (self._is_memory and self._folder is None):
            return False
        self.on_device = 0
        for tensor in list(self._here):
            self._send_away(tensor)
        return True

    @property
    def _is_memory(self) -> bool:
        """Whether the device has no memory of its own."""
        return self._device is None or self._device.type == "cpu"

    def _converted(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf in self._away:
            return leaf
        return leaf.to(self._device, self._dtype if leaf.is_floating_point() else None)

    def _fetched(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf not in self._away:
            return leaf
        away = self._away[leaf]
        tensor = away.data.to(self._device, copy=True)
        away.forget_pages()
        return tensor

    def _send_away(self, tensor: Tensor) -> None:
        fits = not self._is_memory and self.away["memory"] + tensor.nbytes <= self._in_memory
        if self._folder is not None and not fits:
            self._away[tensor] = _in_file(tensor, self._folder)
        elif not self._is_memory:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._away[tensor] = _Away(data=pinned.copy_(tensor))
        else:
            return
        del self._here[tensor]
        tensor.data = self._away[tensor].data


def _in_file(tensor: Tensor, folder: Path) -> _Away:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(tensor.nbytes)
        pages = mmap.mmap(file.fileno(), tensor.nbytes)
    data = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    data.copy_(tensor)
    return _Away(data=data, pages=pages)
