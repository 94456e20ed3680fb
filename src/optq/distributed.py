# SPDX-License-Identifier: Apache-2.0
"""The processes that share a run, as `torchrun` and `accelerate launch` start them.

Each process has a part of the calibration data and solves a part of the weights; what they find is summed or gathered,
so that all of them go on with the same numbers. The first process writes.
"""

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import OptqError, RankError

MEETING = timedelta(minutes=10)  # until all have come
PATIENCE = timedelta(hours=24)  # then: the first one may write texts, and a process that ends is noticed at once

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. With `size` 1 nothing is sent, and methods return their argument.

    Every process must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> tuple[T, ...]:
        """This process's share of `items`: every `size`-th one, so that lengths differ by one at most."""
        return tuple(items[self.rank :: self.size])

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of any shape (...) over all processes, in place."""
        if self.size > 1:
            with _in_company(self):
                dist.all_reduce(tensor, group=_group())
        return tensor

    def all_reduce_numbers(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        return self.all_reduce(torch.tensor(numbers, dtype=torch.float64)).tolist() if self.size > 1 else list(numbers)

    def all_gather(self, value: T) -> list[T]:
        """Gather `value` of every process, in the order of ranks. Tensors in it should be on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _in_company(self):
            dist.all_gather_object(found, value, group=_group())
        return found

    def broadcast(self, call: Callable[[], T]) -> T:
        """Run `call` in the first process only, and return its result, or raise its error, in all of them.

        Errors other than `OptqError` are raised in the others by name only.
        """
        if self.size == 1:
            return call()
        answer: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.is_first:
            try:
                answer[0] = call()
            except Exception as error:
                failed = error
                answer[1] = error if isinstance(error, OptqError) else RankError(f"{type(error).__name__}: {error}")
        with _in_company(self):
            dist.broadcast_object_list(answer, src=0, group=_group())
        if failed is not None:
            raise failed
        if answer[1] is not None:
            raise answer[1]
        found: T = answer[0]
        return found


ALONE = Ranks()


def join() -> Ranks:
    """This process among those that were started together; waits for the others, and is silent unless it is the first.

    Raises:
        RankError: the others do not come, or there are more of them than accelerators.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(_own_accelerator())
        from torch.distributed.rendezvous import rendezvous  # not there in every build of torch

        try:
            store, rank, size = next(rendezvous("env://", timeout=MEETING))
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, but they do not "
                f"find each other: {error}. Start them with torchrun or accelerate launch, or unset WORLD_SIZE."
            ) from error
        _meet(store, size)
        dist.init_process_group(store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    elif dist.get_world_size() > 1:
        _meet(dist.distributed_c10d._get_default_store(), dist.get_world_size())
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if ranks.size > 1:
        _group()
    if not ranks.is_first:
        logging.getLogger("optq").setLevel(logging.ERROR)
    return ranks


def _own_accelerator() -> int:
    """The index of the accelerator that this process has to itself."""
    index, here = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if index >= here:
        raise RankError(
            f"LOCAL_RANK={index} says that at least {index + 1} processes were started on this machine, which has "
            f"{here} accelerator{'s' * (here > 1)}; each process needs one to itself. Start no more than that "
            f"(torchrun --nproc-per-node={here}), or hide the accelerators from them to use the CPU."
        )
    return index


@cache
def _group() -> Any:
    """A process group of our own, with a timeout and backends that other users of torch.distributed do not set."""
    return dist.new_group(timeout=PATIENCE, backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


_meetings = 0


def _meet(store: Any, size: int) -> None:
    """Wait until all processes have come here: where only the first one quantizes, it would wait for them forever."""
    global _meetings  # of this process, as many as of every other
    _meetings += 1
    deadline = time.monotonic() + MEETING.total_seconds()
    place = f"optq/{_meetings}"
    arrived = store.add(place, 1)
    while arrived < size:
        if time.monotonic() > deadline:
            raise RankError(
                f"{size} processes were started together, but only {arrived} of them came to "
                f"quantize within {MEETING}. Make the same call in all of them; or quantize in one process before "
                "torch.distributed is initialised, with WORLD_SIZE unset."
            )
        time.sleep(0.02)
        arrived = store.add(place, 0)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _in_company(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"Another of the {ranks.size} processes of this run has ended, so number {ranks.rank} ends as well "
            f"({str(error).splitlines()[0]}). What the other has printed says why. Once that is mended, the same "
            "command goes on where optq.quantize was."
        ) from error
