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
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from optq.device.placement import evaluating, placed, tensors_outside, working_dtype
from optq.errors import ModelError

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


class TurnThread(threading.Thread, Generic[Posted]):
    """The thread of one micro-batch's forward. It and the driver take turns: it posts a request and waits.

    Args:
        owner: the object that drives it; the thread pauses only where this owner asks for it.
    """

    def __init__(self, owner: object, run: Callable[[], Any], index: int) -> None:
        super().__init__(name=f"optq-batch-{index}", daemon=True)
        self.owner, self.index, self._forward = owner, index, run
        self._to_driver: queue.SimpleQueue[Posted | Finished | _Failure] = queue.SimpleQueue()
        self._to_thread: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @classmethod
    def current(cls, owner: object) -> "TurnThread[Any] | None":
        """The running thread, if it belongs to `owner`; else None."""
        thread = threading.current_thread()
        return thread if isinstance(thread, cls) and thread.owner is owner else None

    def wait(self) -> Posted | Finished:
        """Wait until the forward pauses or ends."""
        posted = self._to_driver.get()
        if isinstance(posted, _Failure):
            try:
                raise posted.error
            finally:
                del posted  # this frame and the error would keep one another, and what the forward was computing
        return posted

    def answer(self, output: Any) -> None:
        self._to_thread.put(output)

    def abandon(self) -> None:
        self._to_thread.put(_Abandoned)
        self.join()

    def pause(self, posted: Posted) -> Any:
        """Called inside the thread: post a request, and wait for the answer."""
        self._to_driver.put(posted)
        del posted  # the driver may free what is in it while this frame waits
        output = self._to_thread.get()
        if output is _Abandoned:
            raise _Abandoned  # made here: in a variable it would keep this frame, and so all that the forward computed
        return output

    def run(self) -> None:
        """The body of the thread, called by `threading.Thread`."""
        forward, self._forward = self._forward, lambda: None  # what it holds is freed as soon as it ends
        try:
            with torch.no_grad():  # grad mode is per thread
                self._to_driver.put(Finished(forward()))
        except _Abandoned:
            pass
        except BaseException as error:
            self._to_driver.put(_Failure(error))  # raised again in the driver


class SuspendedForwards:
    """Run `model` on batches, pausing at each of `blocks`. A context manager.

    While it is open, the model is evaluated without gradients, and all but its blocks is on `device`; on leaving, it
    is as it was, and the threads have ended.

    Args:
        model: called as `model(**batch)`, with `use_cache=False` where it takes that argument: a block that is run
            twice would find its own keys in the cache.
        blocks: by name, in order; their `forward` is replaced while the context is open.
        store: keeps what the blocks are called with; None: on `device`, in the dtype that blocks work in.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        device: torch.device,
        store: ActivationStore | None = None,
    ) -> None:
        self.store = store or ActivationStore(device, working_dtype(device))
        self.store.leave_alone(model)
        self._model, self._device = model, device
        self._names, self._blocks = list(blocks), list(blocks.values())
        self.original_forwards = [block.forward for block in self._blocks]
        parameters = inspect.signature(model.forward).parameters
        passed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        configs: list[Any] = [getattr(model, "config", None)]
        configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
        cached = "use_cache" in parameters or (passed_on and any(hasattr(config, "use_cache") for config in configs))
        self._extra = {"use_cache": False} if cached else {}
        self._threads: list[TurnThread[BlockCall]] = []
        self._undo = ExitStack()

    def __enter__(self) -> "SuspendedForwards":
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self._model))
            stack.enter_context(placed(tensors_outside(self._model, self._blocks), self._device, None))
            for index, block in enumerate(self._blocks):
                overridden = block.__dict__.get("forward")  # None: inherited from the class
                undo = (delattr, block, "forward") if overridden is None else (setattr, block, "forward", overridden)
                stack.callback(*undo)
                block.forward = self._stand_in(index)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.abandon()
        self._undo.close()

    def ending(self) -> AbstractContextManager[None]:
        """A context in which what the model runs after its last block computes in the dtype of its blocks."""
        outside = tensors_outside(self._model, self._blocks)
        return placed(outside, self._device, working_dtype(self._device))

    def __len__(self) -> int:
        """Number of forwards started so far, which is the index of the next one."""
        return len(self._threads)

    def start(self, batches: Iterable[dict[str, Tensor]]) -> list[BlockCall]:
        """Start a forward on each batch, and run it up to its first block; those that call no block are left out.

        Args:
            batches: keyword arguments of the model on its device, such as input_ids (samples, longest) int64.
        Raises:
            ModelError: none of the forwards calls a block.
        """
        calls, before = [], len(self)
        for batch in batches:
            run = partial(self._model, **{**batch, **self._extra})
            thread: TurnThread[BlockCall] = TurnThread(self, run, len(self))
            self._threads.append(thread)
            thread.start()
            if isinstance(call := self._kept(thread.wait()), BlockCall):
                calls.append(call)
        if not calls and len(self) > before:
            raise ModelError(f"{type(self._model).__name__} never calls {self._names[0]} on the calibration data.")
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

    def abandon(self, call: BlockCall) -> None:
        """End the forward that waits here."""
        self._threads[call.batch].abandon()

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            thread = TurnThread.current(self)
            if thread is None:  # called by somebody else than one of our forwards
                return self.original_forwards[index](*args, **kwargs)
            return thread.pause(BlockCall(batch=thread.index, block=index, args=args, kwargs=kwargs))

        return forward
