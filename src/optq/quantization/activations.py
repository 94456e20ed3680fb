# SPDX-License-Identifier: Apache-2.0
"""What waits between blocks: on the device while there is room, then in the machine's memory, then on its disk.

Only tensors as large as the hidden states are moved; masks and rotary embeddings stay. A tensor that has gone is still
the same object, and only its data is elsewhere: the suspended forward that it belongs to refers to it as well.
"""

import math
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
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
class _Here:
    """Stands for a tensor that waits on the device."""


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


class _Tally:
    """The bytes of what is alive, by place: summing them up for every tensor anew would take longer the more wait."""

    def __init__(self) -> None:
        self.bytes = {"device": 0, "memory": 0, "disk": 0}

    def add(self, held: "_Here | _Away", place: str, size: int) -> None:
        """Count so many bytes as long as `held` lives."""
        self.bytes[place] += size
        weakref.finalize(held, self._remove, place, size).atexit = False

    def _remove(self, place: str, size: int) -> None:
        self.bytes[place] -= size


class _SideStream:
    """Copies from pinned memory to a CUDA device while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def begin(self, pinned: Tensor) -> tuple[Tensor, Any]:
        """The copy, and what says that it is complete."""
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True), self._stream.record_event()

    def finish(self, copy: Tensor, complete: Any) -> Tensor:
        """The copy, to be used by what comes on the present stream."""
        present = torch.cuda.current_stream(self._device)
        present.wait_event(complete)
        copy.record_stream(present)  # else its memory could get new contents while it is read
        return copy


class ActivationStore:
    """Keeps activations within memory limits, and records what a run gave up when memory ran out.

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
        self._here = WeakTensorKeyDictionary()  # tensor -> _Here
        self._away = WeakTensorKeyDictionary()  # tensor -> _Away
        self._tally = _Tally()
        self._side = _SideStream(device) if device is not None and device.type == "cuda" else None
        self._ahead: dict[int, tuple[Tensor, Any]] = {}  # by the id of what is away: copies for the present item
        self._coming: dict[int, tuple[Tensor, Any]] = {}  # and for the next one
        self._owned: set[int] = set()
        self.pausing = True
        self.parts = 1

    @property
    def here(self) -> int:
        """Bytes of activations that are kept on the device."""
        return self._tally.bytes["device"]

    @property
    def away(self) -> dict[str, int]:
        """Bytes of activations that are kept elsewhere, by place: "memory" or "disk"."""
        return {place: self._tally.bytes[place] for place in ("memory", "disk")}

    def leave_alone(self, model: nn.Module) -> None:
        """Never move the parameters and buffers of `model`, which some models pass to their blocks."""
        self._owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}

    def take(self, tree: T) -> T:
        """Convert the tensors of a tree to device and dtype, and move large ones away if the device has no room."""
        tree = tree_map(self._converted, tree)
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            large = tensor.is_floating_point() and tensor.numel() >= tensors[0].numel()
            if large and tensor not in self._away and tensor.data_ptr() not in self._owned:
                self._here[tensor] = _Here()
                self._tally.add(self._here[tensor], "device", tensor.nbytes)
                if self.here > self.on_device:
                    self._send_away(tensor)
        return tree

    def fetched(self, tree: T) -> T:
        """A copy of a tree with all its tensors on the device."""
        fetched: T = tree_map(self._fetched, tree)
        return fetched

    def in_turn(self, items: Iterable[T], needs: Callable[[T], Any]) -> Iterator[T]:
        """Iterate over `items`; meanwhile what the next one needs is copied from pinned memory to the device.

        Args:
            needs: the tensors that will be fetched for an item.
        """
        remaining = iter(items)
        try:
            item = next(remaining, None)
            while item is not None:
                following = next(remaining, None)
                self._coming = {} if following is None else self._begun(needs(following))
                yield item
                self._ahead, self._coming = self._coming, {}  # what was not used is dropped
                item = following
        finally:
            self.forget_ahead()

    def forget_ahead(self) -> None:
        """Free the copies that `in_turn` made ahead."""
        self._ahead, self._coming = {}, {}

    @contextmanager
    def at_hand(self, tree: Any) -> Iterator[None]:
        """A context in which the data of a tree's tensors is on the device, for all who refer to them."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf in self._away]
        for tensor in tensors:
            tensor.data = self._fetched(tensor)
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.data = self._away[tensor].data

    def spill(self) -> bool:
        """Keep nothing on the device from now on; False if nothing was there, or there is no other place."""
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

    def _begun(self, tree: Any) -> dict[int, tuple[Tensor, Any]]:
        if self._side is None:
            return {}
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf in self._away]
        away = {id(leaf): self._away[leaf] for leaf in tensors}
        return {number: self._side.begin(one.data) for number, one in away.items() if one.pages is None}

    def _converted(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf in self._away:
            return leaf
        return leaf.to(self._device, self._dtype if leaf.is_floating_point() else None)

    def _fetched(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf not in self._away:
            return leaf
        if self._side is not None and id(leaf) in self._ahead:
            return self._side.finish(*self._ahead.pop(id(leaf)))
        away = self._away[leaf]
        tensor = away.data.to(self._device, copy=True)
        away.forget_pages()
        return tensor

    def _send_away(self, tensor: Tensor) -> None:
        fits = not self._is_memory and self.away["memory"] + tensor.nbytes <= self._in_memory
        if self._folder is not None and not fits:
            away = _in_file(tensor, self._folder)
        elif not self._is_memory:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            away = _Away(data=pinned.copy_(tensor))
        else:
            return
        self._away[tensor] = away
        self._tally.add(away, "memory" if away.pages is None else "disk", tensor.nbytes)
        del self._here[tensor]
        tensor.data = away.data


def _in_file(tensor: Tensor, folder: Path) -> _Away:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(tensor.nbytes)
        pages = mmap.mmap(file.fileno(), tensor.nbytes)
    data = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    data.copy_(tensor)
    return _Away(data=data, pages=pages)
