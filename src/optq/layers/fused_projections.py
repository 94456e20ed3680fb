# SPDX-License-Identifier: Apache-2.0
"""Linears that read the same input, such as q, k and v, make one product while few tokens come.

Then a product's cost is that of starting it. The first of them to be called multiplies by the weights of all, and the
others find their outputs ready. Each stays a module of its own, with its hooks, adapters and tensors.

Whether the input is really the same is seen, not assumed: it must be the same tensor, unchanged since. Where it is
not, as in cross-attention, a linear multiplies alone; and where that happens again and again, all do from then on.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from optq.kernels import Held, Kernel, Prepared, matmul
from optq.readers import FUSED_NAMES

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
    """A linear of `FusedWeights`; `FusedWeights` is one itself."""

    out_features: int
    held: Held | None
    fused: "FusedWeights | None"

    @property
    def bias(self) -> Tensor | None:
        """(out,) or None."""

    def take_prepared(self, prepared: Prepared) -> None: ...


class _Waiting(NamedTuple):  # made at every product, in a third of a dataclass's time
    """Outputs that wait for their linears, in the thread that made them.

    Args:
        x: a weak reference to the input that they were made of.
        version: of the input: how often it has been written to.
        weights: a weak reference to what it was multiplied by.
        outputs: by the position of the linear.
    """

    x: Any
    version: int
    weights: Any
    outputs: dict[int, Tensor]

    def is_of(self, x: Tensor, weights: Held) -> bool:
        return self.x() is x and self.version == x._version and self.weights() is weights


class FusedWeights:
    """Weights with a common input that are concatenated in one memory; each member holds a view.

    Args:
        members: linears, or others of this class; `fused` of each becomes this.
    Attributes:
        held: all weights as one; None while they are apart.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self._members: tuple[Member, ...] = tuple(members)
        self._positions = {member: position for position, member in enumerate(self._members)}
        self.held: Held | None = None
        self.out_features = sum(member.out_features for member in members)
        self.fused: FusedWeights | None = None
        for member in members:
            member.fused = self

    @property
    def are_fused(self) -> bool:
        return self.held is not None

    @property
    def bias(self) -> Tensor | None:
        """The members' biases, concatenated, (out,); zeros for a member without one. None if no member has one."""
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
        """The joined weight that a call of `member` may multiply by instead of its own, or None."""
        return None

    def wants(self, kernel: Kernel) -> bool:
        """Whether joining the weights pays with this kernel."""
        raise NotImplementedError

    def prepared(self, member: Member, held: Held) -> None:
        """Called when a member's codes are laid out: join the weights once one kernel has laid out all."""
        if member not in self._positions:  # a replica, such as nn.DataParallel makes
            return
        if self.held is not None:
            self.part(member)
        if not self.wants(held.kernel):
            return
        ready = [each.held for each in self._members]
        if any(each is None or (each.kernel.name, each.device) != (held.kernel.name, held.device) for each in ready):
            return
        parts = [each.prepared for each in ready if each is not None]
        joint = held.kernel.joint
        if joint is None or joint.why_not(parts) is not None:
            return
        # Seen by other threads at once, so it is whole before. Whether all members have been asked for a dtype is not
        # known here.
        joined = replace(held, prepared=joint.of(parts), products={})
        self._hold(joined)
        if self.fused is not None:
            self.fused.prepared(self, joined)

    def take_prepared(self, prepared: Prepared) -> None:
        """Use `prepared` as the joined weight, and give every member its view of it."""
        held = self.held
        assert held is not None
        self._hold(replace(held, prepared=prepared))

    def _hold(self, held: Held) -> None:
        joint = held.kernel.joint
        assert joint is not None
        self.held = held
        sizes = [member.out_features for member in self._members]
        for member, part in zip(self._members, joint.split(held.prepared, sizes), strict=True):
            member.take_prepared(part)

    def part(self, member: Member) -> None:
        """Called before a member changes: use no joined weight until all members are prepared again."""
        if member not in self._positions:
            return
        self.held = None
        if self.fused is not None:
            self.fused.part(self)

    def bias_changed(self) -> None:
        """Called when a member's bias has been replaced: forget what was derived from all biases."""
        held = self.held
        if held is not None:
            self.held = replace(held, products={})
        if self.fused is not None:
            self.fused.bias_changed()

    def output_of(self, member: Member, x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
        """x (..., in) times the member's weight: (..., out) in x's dtype, without bias."""
        return matmul(x, kernel, prepared)


class FusedProjections(FusedWeights):
    """Linears with a common input, such as q, k and v, that share one product.

    Args:
        members: in the order in which they are called.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__(members)
        self._of_thread = _OfThread()
        self._in_vain = False

    @property
    def are_fused(self) -> bool:
        return self.held is not None and not self._in_vain

    def joint_of(self, member: Member) -> Prepared | None:
        """The joined weight for the first member, whose call multiplies for all; None for the others."""
        held = self.held
        return held.prepared if held is not None and member is self._members[0] else None

    def wants(self, kernel: Kernel) -> bool:
        return not self._in_vain

    def output_of(self, member: Member, x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
        """x (..., in) times the member's weight: (..., out) in x's dtype, without bias.

        The first member's call computes the outputs of all members if that pays; the others' calls return theirs.
        """
        held, position = self.held, self._positions.get(member)
        if held is None or position is None or self._in_vain or held.kernel.name != kernel.name or not _may_wait(x):
            return matmul(x, kernel, prepared)
        mine = self._of_thread
        waiting = mine.waiting
        if (
            waiting is not None
            and waiting.is_of(x, held)
            and (output := waiting.outputs.pop(position, None)) is not None
        ):
            if not waiting.outputs:
                mine.waiting = None
                mine.missed = 0
            return output
        if position:
            return matmul(x, kernel, prepared)
        if waiting is not None:
            mine.missed += 1
            if mine.missed >= MOST_MISSES:
                self._in_vain, mine.waiting = True, None  # for good, and for all threads
                return matmul(x, kernel, prepared)
        sizes = [member.out_features for member in self._members]
        outputs: dict[int, Tensor] = {
            at: part.contiguous() for at, part in enumerate(kernel.matmul(x, held.prepared).split(sizes, -1))
        }
        first = outputs.pop(0)
        mine.waiting = _Waiting(weakref.ref(x), x._version, weakref.ref(held), outputs)
        return first


class _OfThread(threading.local):
    """What a thread has left to be fetched. A copy, or another process, begins with nothing."""

    waiting: _Waiting | None = None
    missed = 0

    def __reduce__(self) -> tuple[type["_OfThread"], tuple[()]]:
        return _OfThread, ()


def _may_wait(x: Tensor) -> bool:
    """Whether outputs of x may be made before they are asked for."""
    return not (
        torch.compiler.is_compiling()  # a graph holds every product by itself
        or (torch.is_grad_enabled() and x.requires_grad)
        or x.is_inference()  # which does not know how often it has been written to
        or x.numel() > MOST_TOKENS * x.shape[-1]
    )


def find_fusable(model: nn.Module, kind: type[nn.Module]) -> list[tuple[Any, ...]]:
    """Modules of a class that may read the same input, by their names, in the order of their calls."""
    found = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in SAME_INPUT:
            layers = tuple(children[name] for name in names if isinstance(children.get(name), kind))
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                found.append(layers)
    return found
