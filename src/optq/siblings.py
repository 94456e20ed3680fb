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
    """What `Joined` wants of a linear, and is itself."""

    out_features: int
    siblings: "Joined | None"

    @property
    def bias(self) -> Tensor | None: ...

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


class Joined:
    """Weights in one memory, of which each has a view.

    Args:
        members: linears, or others of this class; `siblings` of each becomes this.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self._members: tuple[Member, ...] = tuple(members)
        self._positions = {member: position for position, member in enumerate(self._members)}
        self._ready: dict[int, tuple[Kernel, Prepared, Any]] = {}
        self.kernel: Kernel | None = None
        self.joint: Prepared | None = None
        self.place: Any = None
        self.out_features = sum(member.out_features for member in members)
        self.siblings: Joined | None = None
        for member in members:
            member.siblings = self

    @property
    def are_joined(self) -> bool:
        return self.joint is not None

    @property
    def bias(self) -> Tensor | None:
        """That of all outputs, or None."""
        biases = [member.bias for member in self._members]
        known = next((bias for bias in biases if bias is not None), None)
        if known is None:
            return None
        return torch.cat(
            [
                known.new_zeros(member.out_features) if bias is None else bias
                for member, bias in zip(self._members, biases, strict=True)
            ]
        )

    def joint_of(self, member: Member) -> Prepared | None:
        """What a member multiplies by for others as well, if it does."""
        return None

    def wants(self, kernel: Kernel) -> bool:
        """Whether to be joined is of use with this kernel."""
        raise NotImplementedError

    def prepared(self, member: Member, kernel: Kernel, prepared: Prepared, place: Any) -> None:
        """A member has been prepared; once all are, for the same place (device and dtype), they are joined."""
        if member not in self._positions:  # a replica, such as nn.DataParallel makes
            return
        if self.joint is not None:
            self.part(member)
        if not self.wants(kernel):
            return
        self._ready[self._positions[member]] = (kernel, prepared, place)
        if len(self._ready) < len(self._members):
            return
        ready = [self._ready[position] for position in range(len(self._members))]
        if len({(kernel.name, place) for kernel, _, place in ready}) > 1:
            return
        self._ready.clear()
        parts = [prepared for _, prepared, _ in ready]
        if kernel.joint is None or kernel.joint.why_not(parts) is not None:
            return
        self.kernel, self.place = kernel, place
        self.take_prepared(kernel.joint.of(parts))
        if self.siblings is not None and self.joint is not None:
            self.siblings.prepared(self, kernel, self.joint, place)

    def take_prepared(self, prepared: Prepared) -> None:
        """Lie there from now on."""
        assert self.kernel is not None
        assert self.kernel.joint is not None
        self.joint = prepared
        sizes = [member.out_features for member in self._members]
        for member, part in zip(self._members, self.kernel.joint.split(prepared, sizes), strict=True):
            member.take_prepared(part)

    def part(self, member: Member) -> None:
        """A member is about to be changed: until all are prepared again, each is by itself."""
        if member not in self._positions:
            return
        self._ready.pop(self._positions[member], None)
        self.kernel = self.joint = self.place = None
        if self.siblings is not None:
            self.siblings.part(self)

    def output_of(self, member: Member, x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
        """x times the member's weight."""
        return matmul(x, kernel, prepared)


class Siblings(Joined):
    """Linears with the same input, and their weights as one.

    Args:
        members: in the order in which they are called.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__(members)
        self._held: _Held | None = None
        self._missed = 0

    def joint_of(self, member: Member) -> Prepared | None:
        """The first multiplies for all."""
        return self.joint if member is self._members[0] else None

    def wants(self, kernel: Kernel) -> bool:
        return self._missed <= MOST_MISSES

    def part(self, member: Member) -> None:
        super().part(member)
        self._held = None

    def output_of(self, member: Member, x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
        """x times the member's weight, with whoever else reads x if that pays."""
        position = self._positions.get(member)
        if self.joint is None or position is None or not _may_wait(x):
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
                self.part(member)
                self._missed = MOST_MISSES + 1  # for good
                return matmul(x, kernel, prepared)
        sizes = [member.out_features for member in self._members]
        outputs: dict[int, Tensor] = {
            at: part.contiguous() for at, part in enumerate(kernel.matmul(x, self.joint).split(sizes, -1))
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
