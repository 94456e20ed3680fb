# SPDX-License-Identifier: Apache-2.0
"""The residual stream: what the output of a linear, such as o or down, is added to.

It is declared nowhere, so it is found by value in one forward of the block.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .outputs import hidden_states
from .stages import Stage, first_input

ROWS_COMPARED = 16  # of an activation


@dataclass(frozen=True)
class _Excerpt:
    """The first rows of an activation, (rows, features), and how many there are in all."""

    rows: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor) -> "_Excerpt":
        rows = x.reshape(-1, x.shape[-1])
        return cls(rows[:ROWS_COMPARED].clone(), rows.shape[0])  # some models add in place

    def like(self, other: "_Excerpt") -> bool:
        mine, others = ((one.count, one.rows.shape, one.rows.dtype, one.rows.device) for one in (self, other))
        return mine == others


class Sums:
    """What modules of a block were given and linears returned in one forward, to tell what was added to what.

    What comes after its end is another one, of more samples: ignored.
    """

    def __init__(self) -> None:
        self._has_ended = False
        self._inputs: list[tuple[nn.Module | None, _Excerpt]] = []  # in the order of calls
        self._outputs: dict[nn.Module, list[tuple[int, _Excerpt]]] = {}  # of linears; and how many inputs came before

    def called(self, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook for all modules; of the block itself, None, it wants the output."""
        if self._has_ended:
            return
        x = first_input(args, kwargs) if args or kwargs else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1:
            self._inputs.append((module, _Excerpt.of(x)))

    def returned(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A hook for linears; `output` is (..., out)."""
        if not self._has_ended:
            self._outputs.setdefault(module, []).append((len(self._inputs), _Excerpt.of(output)))

    def ended(self, output: Any) -> None:
        """To be called with what the block returned, after each forward."""
        self.called(None, (hidden_states(output),), {})
        self._has_ended = True

    def residual_of(self, stage: Stage) -> nn.Module | None:
        """The module called once whose input and the output of the stage's only linear have their sum later on.

        None where there is no such sum: where a norm or a factor lies in between.
        """
        outputs = self._outputs.get(stage.views[0].module, [])
        if len(stage.views) > 1 or len(outputs) != 1 or stage.family is not None:
            return None
        ((position, output),) = outputs
        calls = Counter(module for module, _ in self._inputs)
        before = [(module, x) for module, x in self._inputs[:position] if calls[module] == 1 and x.like(output)]
        after = [y.rows for _, y in self._inputs[position:] if y.like(output)]
        if not before or not after:
            return None
        sums = torch.stack([x.rows + output.rows for _, x in before])[:, None]
        equal = (sums == torch.stack(after)).flatten(2).all(2).any(1) & output.rows.any()  # 0 added: the input itself
        return next((module for (module, _), found in zip(before, equal.tolist(), strict=True) if found), None)


@contextmanager
def watching_sums(block: nn.Module, linears: Iterable[nn.Module]) -> Iterator[Sums]:
    """A context in which one forward of `block` is watched; `linears` are some of its modules."""
    sums = Sums()
    handles = [
        module.register_forward_pre_hook(sums.called, with_kwargs=True)
        for module in block.modules()
        if module is not block
    ]
    handles += [module.register_forward_hook(sums.returned) for module in linears]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
