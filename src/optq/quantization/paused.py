# SPDX-License-Identifier: Apache-2.0
"""Forwards of one block that wait at the inputs of its stages while their linears are solved.

So one forward per micro-batch serves all stages of a block, and its output as well. The price is that what a forward
holds at that point stays in memory; those that find no room are run anew for every stage instead, with the same
result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from optq.model.stages import Stage, first_input

from .coroutines import Coroutine, Finished


@dataclass(frozen=True)
class _AtGroup:
    """What a forward posts when it reaches a group of stages."""

    index: int
    x: Tensor | Sequence[Tensor]


class PausedForwards:
    """Run a block in forwards that take turns. A context manager: leaving it ends them.

    Args:
        groups: as of `independent_groups`, in the order in which the block reaches them, each once per forward.
    """

    def __init__(self, groups: list[list[Stage]]) -> None:
        self._groups = groups
        self._forwards: dict[int, Coroutine[_AtGroup]] = {}
        self._reached: dict[int, _AtGroup | Finished] = {}
        self._residuals: dict[tuple[int, nn.Module], Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "PausedForwards":
        for index, group in enumerate(self._groups):
            module, _ = group[0].stop
            self._handles.append(module.register_forward_pre_hook(self._hook(index), with_kwargs=True))
        # Ahead of those that pause: the residual stream's module may be a stage's own.
        residuals = {stage.residual for group in self._groups for stage in group if stage.residual is not None}
        for module in residuals:
            handle = module.register_forward_pre_hook(self._keep_residual, with_kwargs=True, prepend=True)
            self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()
        for handle in self._handles:
            handle.remove()

    def __contains__(self, number: int) -> bool:
        return number in self._forwards

    def __len__(self) -> int:
        return len(self._forwards)

    def start(self, number: int, run: Callable[[], Any]) -> None:
        """Start a forward, and run it up to its first group."""
        forward: Coroutine[_AtGroup] = Coroutine(self, run, number)
        self._forwards[number] = forward
        self._reached[number] = forward.wait()

    def abandon(self) -> None:
        """End all forwards and free what they hold."""
        for forward in self._forwards.values():
            forward.abandon()
        self._forwards.clear()
        self._reached.clear()
        self._residuals.clear()

    def inputs_of(self, number: int, group: list[Stage]) -> dict[Stage, tuple[Tensor, Tensor | None]]:
        """Run a forward up to a group of stages: their inputs, (..., in), and residual streams, (..., out) or None.

        Stages without tokens are left out. A residual stream is handed out once.
        """
        wanted = self._groups.index(group)
        while isinstance(reached := self._reached[number], _AtGroup) and reached.index < wanted:
            self._run_on(number)
        if not isinstance(reached, _AtGroup) or reached.index > wanted:
            return {}
        places = {stage: stage.stop[1] for stage in group}
        inputs = {stage: reached.x if place is None else reached.x[place] for stage, place in places.items()}
        return {
            stage: (x, None if stage.residual is None else self._residuals.pop((number, stage.residual), None))
            for stage, x in inputs.items()
            if isinstance(x, Tensor) and x.numel()
        }

    def output_of(self, number: int) -> Any:
        """Run a forward to its end, and return the block's output."""
        while not isinstance(reached := self._reached[number], Finished):
            self._run_on(number)
        del self._reached[number]
        self._forwards.pop(number)
        return reached.output

    def _run_on(self, number: int) -> None:
        del self._reached[number]  # and with it the input that has been seen
        self._reached[number] = self._forwards[number].wait()

    def _keep_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (running := Coroutine.current(self)) is not None:
            self._residuals[running.index, module] = first_input(args, kwargs)

    def _hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (running := Coroutine.current(self)) is not None:  # else somebody else runs the block
                running.pause(_AtGroup(index, first_input(args, kwargs)))

        return hook
