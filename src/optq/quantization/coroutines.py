# SPDX-License-Identifier: Apache-2.0
"""Suspended forwards: the real model runs, and waits wherever it wants a block's output.

Each micro-batch runs `model(**batch)` on a stack of its own, a greenlet's. A block's `forward` is replaced by a
stand-in that posts its arguments and waits; the driver runs the real forward as often as it likes and hands the output
back. So every block gets exactly the masks, rotary embeddings and extra arguments that the model computes for it, on
any architecture.

All of them share one thread, and with it a GPU's library handles and workspaces. Threads would need one of each: 32
MiB for every micro-batch.
"""

import inspect
import logging
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
from optq.torch_state import own_torch_state

from .activations import ActivationStore

logger = logging.getLogger(__name__)

try:
    from greenlet import getcurrent, greenlet
except ImportError:
    from .threads import getcurrent, greenlet


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


Posted = TypeVar("Posted")


class Coroutine(greenlet, Generic[Posted]):
    """The forward of one micro-batch. It and the driver take turns: it posts a request and waits.

    Args:
        owner: the object that drives it; the forward pauses only where this owner asks for it.
        forward: what runs, without gradients.
        index: number of the micro-batch.
    """

    def __init__(self, owner: object, forward: Callable[[], Any], index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index
        self._forward: Callable[[], Any] | None = forward
        # Handed over as attributes: an argument of `switch` would be kept while its caller waits.
        self._posted: Posted | Finished | None = None
        self._answer: Any = None

    @classmethod
    def current(cls, owner: object) -> "Coroutine[Any] | None":
        """The forward that is running, if it belongs to `owner`; else None."""
        running = getcurrent()
        return running if isinstance(running, cls) and running.owner is owner else None

    def wait(self) -> Posted | Finished:
        """Run the forward until it pauses or ends; what it raises is raised here."""
        self.parent = getcurrent()
        with own_torch_state():
            self.switch()
        posted, self._posted = self._posted, None
        assert posted is not None
        return posted

    def answer(self, output: Any) -> None:
        """What the forward goes on with at the next `wait`."""
        self._answer = output

    def abandon(self) -> None:
        """End the forward where it waits, and free what it holds."""
        if self:  # it has begun and not ended
            self.parent = getcurrent()
            with own_torch_state():
                self.throw()  # GreenletExit, which is no `Exception`, so that no model code catches it
        self._forward = self._posted = self._answer = None

    def pause(self, posted: Posted) -> Any:
        """Called inside the forward: post a request, and wait for the answer."""
        self._posted = posted
        del posted  # the driver may free what is in it while this frame waits
        assert self.parent is not None
        with own_torch_state():
            self.parent.switch()
        answer, self._answer = self._answer, None
        return answer

    def run(self) -> None:
        """The body, called by `greenlet`."""
        forward, self._forward = self._forward, None  # what it holds is freed as soon as it ends
        assert forward is not None
        with torch.no_grad():
            self._posted = Finished(forward())


class SuspendedForwards:
    """Run `model` on batches, pausing at each of `blocks`. A context manager.

    While it is open, the model is evaluated without gradients, and all but its blocks is on `device`; on leaving, it
    is as it was, and the forwards have ended.

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
        if greenlet.__module__ != "greenlet":
            logger.warning(
                "The package greenlet is not installed, so each micro-batch takes a thread, and with it up to 32 MiB "
                "of a GPU's memory. Install it: pip install greenlet."
            )
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
        self._forwards: list[Coroutine[BlockCall]] = []
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
        for forward in self._forwards:
            forward.abandon()
        self._undo.close()

    def ending(self) -> AbstractContextManager[None]:
        """A context in which what the model runs after its last block computes in the dtype of its blocks."""
        outside = tensors_outside(self._model, self._blocks)
        return placed(outside, self._device, working_dtype(self._device))

    def __len__(self) -> int:
        """Number of forwards started so far, which is the index of the next one."""
        return len(self._forwards)

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
            forward: Coroutine[BlockCall] = Coroutine(self, run, len(self))
            self._forwards.append(forward)
            if isinstance(call := self._kept(forward.wait()), BlockCall):
                calls.append(call)
        if not calls and len(self) > before:
            raise ModelError(f"{type(self._model).__name__} never calls {self._names[0]} on the calibration data.")
        return calls

    def resume(self, call: BlockCall, output: Any) -> BlockCall | Finished:
        """Hand a block's output to the forward that waits for it, and run it to its next block or its end."""
        forward = self._forwards[call.batch]
        with self.store.at_hand((call.args, call.kwargs, output)):
            forward.answer(output)
            del output
            posted = forward.wait()
        return self._kept(posted)

    def _kept(self, posted: BlockCall | Finished) -> BlockCall | Finished:
        if isinstance(posted, Finished):
            return posted
        args, kwargs = self.store.take((posted.args, posted.kwargs))
        return replace(posted, args=args, kwargs=kwargs)

    def abandon(self, call: BlockCall) -> None:
        """End the forward that waits here."""
        self._forwards[call.batch].abandon()

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = Coroutine.current(self)
            if running is None:  # called by somebody else than one of our forwards
                return self.original_forwards[index](*args, **kwargs)
            return running.pause(BlockCall(batch=running.index, block=index, args=args, kwargs=kwargs))

        return forward
