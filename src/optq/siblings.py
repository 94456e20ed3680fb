# SPDX-License-Identifier: Apache-2.0
"""Linears that read the same input, such as q, k and v, make one product while few tokens come.

Then a product's cost is that of starting it. The first of them to be called multiplies by the weights of all, and the
others find their outputs ready. Each stays a module of its own, with its hooks, adapters and tensors.

Whether the input is really the same is seen, not assumed: it must be the same tensor, unchanged since. Where it is
not, as in cross-attention, a linear multiplies alone; and where that happens again and again, all do from then on.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optq.kernels import Kernel, Prepared, matmul
from optq.serving import FUSED_NAMES

SAME_INPUT = (
    *FUSED_NAMES.values(),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
"""Names under which modules of one parent may read the same input, in the order in which they are called."""

MOST_TOKENS = 64  # beyond, what a product costs is its arithmetic, and one is no faster than several
MOST_MISSES = 3  # products in a row whose further outputs nobody wanted


class Member(Protocol):
    """What `Siblings` want of a linear."""

    out_features: int
    siblings: "Siblings | None"

    def take_prepared(self, prepared: Prepared) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Outputs that wait for their linears.

    Args:
        x: a weak reference to the input that they were made of.
        version: of the input: how often it has been written to.
        outputs: by the position of the linear.
    """

    x: Any
    version: int
    outputs: dict[int, Tensor]

    def is_of(self, x: Tensor) -> bool:
        return self.x() is x and self.version == x._version


class Siblings:
    """Linears with the same input, and their weights as one.

    Args:
        layers: in the order in which they are called; `siblings` of each becomes this.
    """

    def __init__(self, layers: Sequence[Member]) -> None:
        self._layers = tuple(layers)
        self._positions = {layer: position for position, layer in enumerate(layers)}
        self._ready: dict[int, tuple[Kernel, Prepared, Any]] = {}
        self._joint: Prepared | None = None
        self._held: _Held | None = None
        self._missed = 0
        for layer in layers:
            layer.siblings = self

    @property
    def are_joined(self) -> bool:
        return self._joint is not None

    def joint_of(self, layer: Member) -> Prepared | None:
        """What the first layer multiplies by, for all; None for the others, and where they are not joined."""
        return self._joint if layer is self._layers[0] else None

    def prepared(self, layer: Member, kernel: Kernel, prepared: Prepared, place: Any) -> None:
        """A linear has been prepared; once all are, for the same place (device and dtype), they are joined."""
        if layer not in self._positions:
            return
        if self._joint is not None:
            self.part()
        self._ready[self._positions[layer]] = (kernel, prepared, place)
        if len(self._ready) < len(self._layers) or self._missed > MOST_MISSES:
            return
        ready = [self._ready[position] for position in range(len(self._layers))]
        if len({(kernel.name, place) for kernel, _, place in ready}) > 1:
            return
        self._ready.clear()
        parts = [prepared for _, prepared, _ in ready]
        if kernel.joint is None or kernel.joint.why_not(parts) is not None:
            return
        self._joint = kernel.joint.of(parts)
        for layer, part in zip(
            self._layers, kernel.joint.split(self._joint, [layer.out_features for layer in self._layers]), strict=True
        ):
            layer.take_prepared(part)

    def part(self) -> None:
        """A linear is about to be changed: until all are prepared again, each multiplies alone."""
        self._ready.clear()
        self._joint = self._held = None

    def output_of(self, layer: Member, x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
        """x times the layer's weight, with whoever else reads x if that pays."""
        position = self._positions.get(layer)  # None: of a replica, such as nn.DataParallel makes
        if self._joint is None or position is None or not _may_wait(x):
            return matmul(x, kernel, prepared)
        held = self._held
        if held is not None and held.is_of(x) and (output := held.outputs.pop(position, None)) is not None:
            if not held.outputs:
                self._held = None
                self._missed = 0
            return output
        if position:
            return matmul(x, kernel, prepared)
        if held is not None:
            self._missed += 1
            if self._missed >= MOST_MISSES:
                self.part()
                self._missed = MOST_MISSES + 1  # for good
                return matmul(x, kernel, prepared)
        sizes = [layer.out_features for layer in self._layers]
        outputs: dict[int, Tensor] = {
            at: part.contiguous() for at, part in enumerate(kernel.matmul(x, self._joint).split(sizes, -1))
        }
        first = outputs.pop(0)
        self._held = _Held(x=weakref.ref(x), version=x._version, outputs=outputs)
        return first

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # weak references cannot be copied


def _may_wait(x: Tensor) -> bool:
    """Whether outputs of x may be made before they are asked for."""
    return not (
        torch.compiler.is_compiling()  # a graph holds every product by itself
        or (torch.is_grad_enabled() and x.requires_grad)
        or x.is_inference()  # which does not know how often it has been written to
        or x.numel() > MOST_TOKENS * x.shape[-1]
    )


def find_siblings(model: nn.Module, kind: type[nn.Module]) -> list[tuple[Any, ...]]:
    """Modules of a class that may read the same input, by their names, in the order of their calls."""
    found = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in SAME_INPUT:
            layers = tuple(children[name] for name in names if isinstance(children.get(name), kind))
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                found.append(layers)
    return found
