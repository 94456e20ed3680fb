# SPDX-License-Identifier: Apache-2.0
"""Run one block on its device: with its original weights or its present ones, and in parts if memory is short."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optq.checkpoint import PackedWeight, unpack
from optq.device.memory import all_finite, release_free_memory
from optq.device.placement import placed, tensors_of, working_dtype
from optq.errors import CalibrationError, ModelError
from optq.model import LinearView, Stage, hidden_states, observe_stages, watching_sums

from .activations import ActivationStore
from .coroutines import BlockCall, SuspendedForwards
from .paused import PausedForwards
from .plan import Plan
from .report import BlockReport
from .run import Run

T = TypeVar("T")


class BlockRunner:
    """Runs one block on the device where it is quantized.

    Args:
        block: the block.
        forward: its own forward.
        store: keeps the arguments of the block's calls, and what the run has given up for want of memory.
        report: has the block's name and its linears to quantize.
    Attributes:
        part: the samples of the micro-batch that run at the moment.
        paused: forwards that wait inside the block, or None.
    """

    def __init__(
        self, block: nn.Module, forward: Callable[..., Any], store: ActivationStore, report: BlockReport
    ) -> None:
        self.forward, self.store, self.report, self._block = forward, store, report, block
        self.targets, self.device = report.targets, report.device
        self.originals = {target.view: target.view.parameter.data for target in report.targets}
        self.part = slice(None)
        self.paused: PausedForwards | None = None
        self._most_samples = 1

    def run(self, call: BlockCall, ended: Callable[[Any], None] = lambda output: None) -> Any:
        """The block's output for a call, with its present weights; `ended` is given that of each part."""
        if self.store.parts == 1:
            args, kwargs = self.store.fetched((call.args, call.kwargs))
            self._most_samples = max(self._most_samples, hidden_states((args, kwargs)).shape[0])
            output = self.forward(*args, **kwargs)
            ended(output)
            return output
        outputs = []
        try:
            for part, args, kwargs in self.in_parts(call):
                self.part = part
                outputs.append(self.forward(*args, **kwargs))
                ended(outputs[-1])
        finally:
            self.part = slice(None)
        return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)

    def in_parts(self, call: BlockCall) -> Iterator[tuple[slice, tuple[Any, ...], dict[str, Any]]]:
        """The arguments for some of the samples after the other: which ones, and what they are.

        Arguments with an entry per sample are cut; others are for all of them.
        """
        args, kwargs = self.store.fetched((call.args, call.kwargs))
        samples = hidden_states((args, kwargs)).shape[0]
        self._most_samples = max(self._most_samples, samples)

        def cut(leaf: Any, part: slice) -> Any:
            return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == samples else leaf

        for rows in torch.arange(samples).chunk(self.store.parts):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            yield part, *tree_map(partial(cut, part=part), (args, kwargs))

    def run_original(self, call: BlockCall) -> Any:
        """The block's output for a call, with its original weights."""
        with self.original_weights():
            return self.run(call)

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """A context in which the linears have their original weights."""
        present = {view: view.parameter.data for view in self.originals}
        self.restore(self.originals)
        try:
            yield
        finally:
            for view, weight in present.items():
                view.parameter.data = weight

    def restore(self, views: Iterable[LinearView]) -> None:
        """Give linears their original weights back."""
        for view in views:
            view.parameter.data = self.originals[view]

    def look(self, call: BlockCall) -> tuple[list[Stage], Any]:
        """Run the block once: which of its linears share an input, and what it returns."""
        views, output = [target.view for target in self.targets], None

        def attempt() -> list[Stage]:
            with watching_sums(self._block, {view.module for view in views}) as sums:

                def run() -> None:
                    nonlocal output
                    output = self.run(call, sums.ended)

                stages = observe_stages(views, run)
            return [replace(stage, residual=sums.residual_of(stage)) for stage in stages]

        return self.with_room(attempt), output

    def check_inputs(self, calls: list[BlockCall]) -> None:
        """Refuse inputs that are not finite.

        Raises:
            CalibrationError: the block and the micro-batch are named.
        """
        for call in calls:
            states = next((leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, Tensor)), None)
            if states is not None and not all_finite(states):
                raise CalibrationError(
                    f"The inputs of {self.report.block} are not finite (NaN or infinity) on calibration micro-batch "
                    f"{call.batch}. Load the model in float32 or bfloat16, or look for a damaged layer before it."
                )

    def write_recorded(self, recorded: dict[str, PackedWeight]) -> dict[LinearView, PackedWeight]:
        """Give linears the values that they got in a former run, which are exactly what it went on with."""
        found = {target.view: recorded[target.view.name] for target in self.targets if target.view.name in recorded}
        for view, packed in found.items():
            view.write(unpack(packed).decode().to(self.device))
        return found

    def with_room(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns. When memory runs out, some is freed, and `attempt` called again.

        Raises:
            OutOfMemoryError: there is nothing left to free.
        """
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                failed = str(error).splitlines()[0]
            if not (remedy := self._make_room()):  # outside of `except`, which holds on to what was being computed
                raise torch.OutOfMemoryError(
                    f"{failed} {self.report.block}: no micro-batch is smaller than one sample, and nothing waits on "
                    f"{self.device} any more. Choose a smaller model_seqlen, or a device with more memory."
                )
            self.report.out_of_memory(remedy)

    def _make_room(self) -> str | None:
        """Free some memory, in a way that changes no result; how, or None."""
        remedy = None
        self.store.forget_ahead()
        if self.paused is not None and len(self.paused):
            self.paused.abandon()
            self.store.pausing = False
            remedy = "every stage of a block takes a forward of its own"
        elif self.store.spill():
            remedy = "what waits between blocks waits elsewhere"
        elif self.store.parts < self._most_samples:
            self.store.parts *= 2
            remedy = f"micro-batches run in {self.store.parts} parts"
        release_free_memory()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return remedy


@contextmanager
def at_block(
    name: str, plan: Plan, forwards: SuspendedForwards, waiting: list[BlockCall], run: Run
) -> Iterator[BlockRunner]:
    """The block called `name` on the run's device, in its working dtype; back again after.

    Args:
        waiting: the calls that wait for it.
    Raises:
        ModelError: some forward waits at another block.
    """
    names, block = list(plan.blocks), plan.blocks[name]
    index = names.index(name)
    elsewhere = sorted({call.block for call in waiting} - {index})
    if elsewhere or not waiting:
        raise ModelError(
            f"The model was expected to call {name} next, but calls "
            f"{', '.join(names[other] for other in elsewhere) or 'none of the blocks'}. Models that skip or "
            "reorder blocks, or repeat only some, are not supported; name the blocks with block_name_to_quantize."
        )
    # A block that is a linear itself is called as a module, so that its inputs can be watched.
    forward = block if plan.targets[name] and plan.targets[name][0].view.module is block else None
    with placed(tensors_of(block), run.device, working_dtype(run.device)):
        report = BlockReport(block=name, targets=plan.targets[name], log=run.log, device=run.device)
        yield BlockRunner(block, forward or forwards.original_forwards[index], forwards.store, report)
