# SPDX-License-Identifier: Apache-2.0
"""Forwards of one block that wait at the input of each stage while its linears are solved.

So one forward per micro-batch serves all stages of a block, and its output as well. The price is that what a forward
holds at that point stays in memory; those that find no room are run anew for every stage instead, with the same
result.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .forwards import Finished, TurnThread
from .stages import Stage, first_input


@dataclass(frozen=True)
class _AtStage:
    """What a forward posts when it reaches a stage."""

    index: int
    x: Tensor


class PausedForwards:
    """Run a block in threads that take turns. A context manager: leaving it ends them.

    Args:
        stages: in the order in which the block reaches them, each once per forward.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self._index_of = {stage: index for index, stage in enumerate(stages)}
        self._threads: dict[int, TurnThread[_AtStage]] = {}
        self._reached: dict[int, _AtStage | Finished] = {}
        self._current = threading.local()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "PausedForwards":
        for stage, index in self._index_of.items():
            hook = self._hook(index)
            self._handles.append(stage.views[0].module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads.values():
            thread.abandon()
        for handle in self._handles:
            handle.remove()

    def __contains__(self, number: int) -> bool:
        return number in self._threads

    def __len__(self) -> int:
        return len(self._threads)

    def start(self, number: int, run: Callable[[], Any]) -> None:
        """Begin a forward, up to its first stage."""

        def main() -> Any:
            self._current.thread = thread
            return run()

        thread: TurnThread[_AtStage] = TurnThread(main, number)
        self._threads[number] = thread
        thread.start()
        self._reached[number] = thread.wait()

    def input_of(self, number: int, stage: Stage) -> Tensor | None:
        """Let a forward run on to a stage: its input there, or None if it ended, or went on, without reaching it."""
        wanted = self._index_of[stage]
        while isinstance(reached := self._reached[number], _AtStage) and reached.index < wanted:
            self._run_on(number)
        return reached.x if isinstance(reached, _AtStage) and reached.index == wanted else None

    def output_of(self, number: int) -> Any:
        """Let a forward run to its end."""
        while not isinstance(reached := self._reached[number], Finished):
            self._run_on(number)
        del self._reached[number]
        self._threads.pop(number)
        return reached.output

    def _run_on(self, number: int) -> None:
        thread = self._threads[number]
        del self._reached[number]  # and with it the input that has been seen
        thread.answer(None)
        self._reached[number] = thread.wait()

    def _hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            thread: TurnThread[_AtStage] | None = getattr(self._current, "thread", None)
            if thread is not None:  # else somebody else runs the block
                thread.pause(_AtStage(index, first_input(args, kwargs)))

        return hook
