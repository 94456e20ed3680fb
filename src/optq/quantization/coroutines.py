# SPDX-License-Identifier: Apache-2.0
"""Suspended forwards: the real model runs, and waits wherever it wants a block's output.

Each micro-batch runs `model(**batch)` in a thread of its own. A block's `forward` is replaced by a stand-in that
posts its arguments and waits; the driver runs the real forward as often as it likes and hands the output back. So
every block gets exactly the masks, rotary embeddings and extra arguments that the model computes for it, on any
architecture.

The threads take turns: one runs at a time, in a fixed order, so the result does not depend on scheduling.
"""

import inspect
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .activations import ActivationStore


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """A forward that waits for a block's output.

    Args:
        batch: index of the micro-batch.
        block: index of the block that is called.
        args, kwargs: what the model passes to it.
    """

    batch: int
    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A forward that has ended, with what the model returned."""

    output: Any


class _Abandoned(BaseException):
    """Ends a suspended thread. Not an `Exception`, so that no model code catches it."""


@dataclass(frozen=True)
class _Failure:
    """What a thread posts when the model raised."""

    error: BaseException


Posted = TypeVar("Posted")


class TurnThread(Generic[Posted]):
    """One micro-batch's forward. It and the driver take turns: it posts where it waits, and is answered."""

    def __init__(self, run: Callable[[], Any], index: int) -> None:
        self.index = index
        self._to_driver: queue.SimpleQueue[Posted | Finished | _Failure] = queue.SimpleQueue()
        self._to_thread: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, args=(run,), name=f"optq-batch-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> Posted | Finished:
        """Wait until the forward pauses or ends."""
        posted = self._to_driver.get()
        if isinstance(posted, _Failure):
            raise posted.error
        return posted

    def answer(self, output: Any) -> None:
        self._to_thread.put(output)

    def abandon(self) -> None:
        self._to_thread.put(_Abandoned())
        if self._thread.ident is not None:
            self._thread.join()

    def pause(self, posted: Posted) -> Any:
        """Called inside the thread."""
        self._to_driver.put(posted)
        del posted  # the driver may free what is in it while this frame waits
        output = self._to_thread.get()
        if isinstance(output, _Abandoned):
            raise output
        return output

    def _main(self, run: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():  # grad mode is per thread
                self._to_driver.put(Finished(run()))
        except _Abandoned:
            pass
        except BaseException as error:
            self._to_driver.put(_Failure(error))  # raised again in the driver


class SuspendedForwards:
    """Run `model` on every batch, pausing at each of `blocks`. A context manager: leaving it ends the threads.

    Args:
        model: called as `model(**batch)`, with `use_cache=False` where it takes that argument: a block that is run
            twice would find its own keys in the cache.
        blocks: the blocks, in order; their `forward` is replaced while the context is open.
        batches: keyword arguments of the model, tensors on its device.
        store: keeps what the blocks are called with.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        batches: Iterable[dict[str, Tensor]],
        store: ActivationStore | None = None,
    ) -> None:
        self.store = store or ActivationStore()
        self.store.leave_alone(model)
        self._blocks = blocks
        self.original_forwards = [block.forward for block in blocks]
        self._overridden = [block.__dict__.get("forward") for block in blocks]  # None: inherited from the class
        parameters = inspect.signature(model.forward).parameters
        passed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        configs: list[Any] = [getattr(model, "config", None)]
        configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
        cached = "use_cache" in parameters or (passed_on and any(hasattr(config, "use_cache") for config in configs))
        extra = {"use_cache": False} if cached else {}
        self._current = threading.local()
        self._threads = [
            TurnThread[BlockCall](self._bound(model, {**batch, **extra}, index), index)
            for index, batch in enumerate(batches)
        ]

    def __enter__(self) -> "SuspendedForwards":
        for index, block in enumerate(self._blocks):
            block.forward = self._stand_in(index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.abandon()
        for block, overridden in zip(self._blocks, self._overridden, strict=True):
            if overridden is None:
                del block.forward
            else:
                block.forward = overridden

    def start(self) -> list[BlockCall]:
        """Run every forward up to its first block."""
        calls = []
        for thread in self._threads:
            thread.start()
            if isinstance(call := self._kept(thread.wait()), BlockCall):
                calls.append(call)
        return calls

    def resume(self, call: BlockCall, output: Any) -> BlockCall | Finished:
        """Hand a block's output to the forward that waits for it, and run it to its next block or its end."""
        thread = self._threads[call.batch]
        with self.store.at_hand((call.args, call.kwargs, output)):
            thread.answer(output)
            del output
            posted = thread.wait()
        return self._kept(posted)

    def _kept(self, posted: BlockCall | Finished) -> BlockCall | Finished:
        if isinstance(posted, Finished):
            return posted
        args, kwargs = self.store.take((posted.args, posted.kwargs))
        return replace(posted, args=args, kwargs=kwargs)

    def _bound(self, model: nn.Module, batch: dict[str, Any], index: int) -> Callable[[], Any]:
        def run() -> Any:
            self._current.thread = self._threads[index]
            return model(**batch)

        return run

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            thread: TurnThread[BlockCall] | None = getattr(self._current, "thread", None)
            if thread is None:  # called by somebody else than one of our forwards
                return self.original_forwards[index](*args, **kwargs)
            return thread.pause(BlockCall(batch=thread.index, block=index, args=args, kwargs=kwargs))

        return forward
