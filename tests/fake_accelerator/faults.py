# SPDX-License-Identifier: Apache-2.0
"""Faults as are made in code for GPUs. Each is planted in optq, and has to be noticed on the fake device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def copies_are_not_waited_for() -> AbstractContextManager[None]:
    """What was copied ahead is read before it is there."""
    import accelerator

    return replaced(accelerator.Stream, "wait_event", lambda self, event: None)


def an_event_is_recorded_too_early() -> AbstractContextManager[None]:
    """The event that is waited for was recorded before the copy began."""
    from optq.quantization import activations

    def begin(self: Any, pinned: torch.Tensor) -> Any:
        with torch.cuda.stream(self._stream):
            event = self._stream.record_event()
            return pinned.to(self._device, non_blocking=True), event

    return replaced(activations._SideStream, "begin", begin)


def memory_is_given_away_while_it_is_read() -> AbstractContextManager[None]:
    """The allocator is not told that another stream reads a copy."""
    return replaced(torch.Tensor, "record_stream", lambda self, stream: None)


def costs_stay_on_the_host() -> AbstractContextManager[None]:
    """Values of the CPU meet values of the device."""
    from optq.gptq import grid

    original = grid._grouped

    def grouped(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, costs = original(*arguments)
        return weight, costs.cpu()

    return replaced(grid, "_grouped", grouped)


def a_layer_looks_at_its_values() -> AbstractContextManager[None]:
    """A check of values in a forward: every token waits for the device."""
    from optq.layers import QuantLinear

    original = QuantLinear._product

    def product(self: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.isfinite().all().item()
        return original(self, x)

    return replaced(QuantLinear, "_product", product)


def the_first_device_is_taken_for_the_present_one() -> AbstractContextManager[None]:
    def somewhere(*arguments: Any, **settings: Any) -> Any:
        if settings.get("device") == torch.device("cuda", 1):
            settings["device"] = torch.device("cuda", 0)
        return original(*arguments, **settings)

    original = torch.arange
    return replaced(torch, "arange", somewhere)


def a_block_is_remembered() -> AbstractContextManager[None]:
    """Something goes on referring to what a block was solved with."""
    from optq.gptq import hessian

    kept: list[Any] = []
    original = hessian.Hessian.__init__

    def remembered(self: Any, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        kept.append(self)

    @contextmanager
    def planted() -> Iterator[None]:
        with replaced(hessian.Hessian, "__init__", remembered):
            yield
        kept.clear()

    return planted()


def fresh_memory_is_taken_for_zeros() -> AbstractContextManager[None]:

    def zeros(*arguments: Any, **settings: Any) -> torch.Tensor:
        return torch.empty(*arguments, **settings)

    return replaced(torch, "zeros", zeros)


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    fault.__name__: fault
    for fault in (
        copies_are_not_waited_for,
        an_event_is_recorded_too_early,
        memory_is_given_away_while_it_is_read,
        costs_stay_on_the_host,
        a_layer_looks_at_its_values,
        the_first_device_is_taken_for_the_present_one,
        a_block_is_remembered,
        fresh_memory_is_taken_for_zeros,
    )
}
