# SPDX-License-Identifier: Apache-2.0
"""Walk through a model block by block: its forwards wait at each, and the block visits the device for its work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optq.checkpoint import PackedWeight
from optq.device.placement import evaluating, placed, tensors_of, tensors_outside, working_dtype
from optq.distributed import ALONE, Ranks
from optq.errors import ModelError
from optq.events import RunLog

from .activations import ActivationStore
from .block import BlockWork
from .coroutines import BlockCall, SuspendedForwards
from .plan import Plan


class BlockSource(Protocol):
    """Where blocks come from that are not in memory."""

    def read(self, name: str) -> None:
        """Fill a block with its tensors."""

    def drop(self, name: str) -> None:
        """Free a block's tensors again."""


class BlockSink(Protocol):
    """Where finished blocks go at once, and what it has of a former run."""

    def recorded(self, name: str) -> dict[str, PackedWeight] | None:
        """The packed linears of a block that was finished before, by name; None if it was not."""

    def write(self, name: str) -> None:
        """Take a finished block."""


@contextmanager
def in_memory(name: str, source: BlockSource | None) -> Iterator[None]:
    """A block with its tensors, for a while."""
    if source is None:
        yield
        return
    source.read(name)
    try:
        yield
    finally:
        source.drop(name)


@contextmanager
def suspended(
    model: nn.Module,
    plan: Plan,
    inputs: list[dict[str, Any]],
    device: torch.device,
    store: ActivationStore | None = None,
) -> Iterator[tuple[SuspendedForwards, list[BlockCall]]]:
    """One forward per entry of `inputs`, all waiting at the first block; on leaving, the model is as it was.

    Args:
        store: keeps what waits; by default on `device`.
    Raises:
        ModelError: the model never calls the first block.
    """
    blocks = list(plan.blocks.values())
    with (
        torch.no_grad(),
        evaluating(model),
        placed(tensors_outside(model, blocks), device, None),
        SuspendedForwards(model, blocks, inputs, store or ActivationStore(device, working_dtype(device))) as forwards,
    ):
        waiting = forwards.start()
        if not waiting:
            raise ModelError(f"{type(model).__name__} never calls {next(iter(plan.blocks))} on the calibration data.")
        yield forwards, waiting


@contextmanager
def at_work(
    name: str,
    forwards: SuspendedForwards,
    waiting: list[BlockCall],
    plan: Plan,
    masks: list[Tensor | None],
    device: torch.device,
    log: RunLog,
    ranks: Ranks = ALONE,
) -> Iterator[BlockWork]:
    """The block called `name` on `device`.

    Args:
        waiting: the calls that wait for it.
        masks: per micro-batch, which tokens are real.
        ranks: who work on the same block with other micro-batches.
    Raises:
        ModelError: some forward waits at another block.
    """
    names = list(plan.blocks)
    index, block = names.index(name), plan.blocks[name]
    elsewhere = sorted({call.block for call in waiting} - {index})
    if elsewhere or not waiting:
        raise ModelError(
            f"The model was expected to call {name} next, but calls "
            f"{', '.join(names[other] for other in elsewhere) or 'none of the blocks'}. Models that skip or "
            "reorder blocks, or repeat only some, are not supported; name the blocks with block_name_to_quantize."
        )
    with placed(tensors_of(block), device, working_dtype(device)):
        work = BlockWork(
            name=name,
            targets=plan.targets[name],
            # The head is its own only linear: called as a module, so that its inputs can be watched.
            forward=block if name == plan.head else forwards.original_forwards[index],
            masks=masks,
            device=device,
            log=log,
            store=forwards.store,
            ranks=ranks,
        )
        yield work
