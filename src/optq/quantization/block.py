# SPDX-License-Identifier: Apache-2.0
"""Quantize one block: stage by stage, each calibrated on what the already quantized ones really compute."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from optq.checkpoint import PackedWeight, unpack
from optq.device.memory import all_finite, free_bytes, peak_gib, release_free_memory
from optq.distributed import ALONE, Ranks
from optq.errors import CalibrationError, ModelError, counted
from optq.events import (
    BlockQuantized,
    BlockReconstructed,
    LinearQuantized,
    OutOfMemory,
    RunLog,
    StarvedExperts,
    Unreached,
    rounded,
)
from optq.gptq import Hessian, InputDrift, Solution, solve, stacked
from optq.model import LinearView, Stage, feed_stages, fitting_mask, hidden_states, independent_groups, observe_stages
from optq.scheme import LayerScheme, QuantizedWeight

from .activations import ActivationStore
from .block_reconstruction import Example, reconstruct
from .coroutines import BlockCall
from .paused import PausedForwards
from .plan import Target

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSED_SHARE = 0.5  # of the free memory, for what forwards hold while they wait inside a block


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A linear that is done."""

    view: LinearView
    quantized: QuantizedWeight
    relative_loss: float


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one micro-batch shows.

    Args:
        inputs: of each stage, with the samples that they belong to.
        originals: the same in the original model, in the same order.
        original_output: of the original block, if it was wanted.
    """

    inputs: dict[Stage, list[tuple[slice, Tensor]]]
    originals: dict[Stage, list[Tensor]]
    original_output: Any


@dataclass(kw_only=True)
class BlockWork:
    """One block, on the device where it is quantized.

    Args:
        forward: the block's own forward.
        masks: per micro-batch, which tokens are real.
        store: keeps the arguments of the block's calls.
        ranks: who work on the same block with other micro-batches.
    """

    name: str
    targets: tuple[Target, ...]
    forward: Callable[..., Any]
    masks: list[Tensor | None]
    device: torch.device
    log: RunLog
    store: ActivationStore
    ranks: Ranks = ALONE
    _originals: dict[LinearView, Tensor] = field(init=False)
    _observing_seconds: float = field(init=False, default=0.0)
    _part: slice = field(init=False, default_factory=lambda: slice(None))  # the samples that run
    _most_samples: int = field(init=False, default=1)
    _paused: PausedForwards | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._originals = {target.view: target.view.parameter.data for target in self.targets}

    def run(self, call: BlockCall) -> Any:
        args, kwargs = self.store.fetched((call.args, call.kwargs))
        self._most_samples = max(self._most_samples, hidden_states((args, kwargs)).shape[0])
        if self.store.parts == 1:
            return self.forward(*args, **kwargs)
        outputs = []
        try:
            for part, part_args, part_kwargs in _in_parts(args, kwargs, self.store.parts):
                self._part = part
                outputs.append(self.forward(*part_args, **part_kwargs))
        finally:
            self._part = slice(None)
        return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)

    def with_room(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns. When memory runs out, it is made, and `attempt` called again.

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
                    f"{failed} {self.name}: no micro-batch is smaller than one sample, and nothing waits on "
                    f"{self.device} any more. Choose a smaller model_seqlen, or a device with more memory."
                )
            logger.warning("%s: out of memory on %s; from now on %s.", self.name, self.device, remedy)
            self.log.emit(OutOfMemory(block=self.name, remedy=remedy))

    def _make_room(self) -> str | None:
        """Free some memory, in a way that changes no result; how, or None."""
        remedy = None
        self.store.forget_ahead()
        if self._paused is not None and len(self._paused):
            self._paused.abandon()
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

    def run_original(self, call: BlockCall) -> Any:
        """As the block was before it was quantized."""
        with self._original_weights():
            return self.run(call)

    def restore(self, views: Iterable[LinearView]) -> None:
        """Give linears their original weights back."""
        for view in views:
            view.parameter.data = self._originals[view]

    def write_recorded(self, recorded: dict[str, PackedWeight]) -> dict[LinearView, PackedWeight]:
        """Give linears the values that they got in a former run, which are exactly what it went on with."""
        found = {target.view: recorded[target.view.name] for target in self.targets if target.view.name in recorded}
        for view, packed in found.items():
            view.write(unpack(packed).decode().to(self.device))
        return found

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        present = {view: view.parameter.data for view in self._originals}
        for view, weight in self._originals.items():
            view.parameter.data = weight
        try:
            yield
        finally:
            for view, weight in present.items():
                view.parameter.data = weight

    def check_finite(self, calls: list[BlockCall]) -> None:
        for call in calls:
            states = next((leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, Tensor)), None)
            if states is not None and not all_finite(states):
                raise CalibrationError(
                    f"The inputs of {self.name} are not finite (NaN or infinity) on calibration micro-batch "
                    f"{call.batch}. Load the model in float32 or bfloat16, or look for a damaged layer before it."
                )

    def solve(
        self,
        calls: list[BlockCall],
        references: dict[int, BlockCall],
        sequential: bool,
        *,
        original_outputs: bool = True,
        own_outputs: bool = False,
    ) -> tuple[list[Solved], dict[int, Any]]:
        """Quantize the block's linears, writing the rounded values into them.

        Args:
            calls: the micro-batches to calibrate on, as the quantized model computes them.
            references: the same micro-batches as the original model computes them, by number; empty if earlier layers'
                errors are not to be propagated.
            sequential: calibrate later stages on the already quantized earlier ones.
            original_outputs, own_outputs: whether the outputs of the original block for the reference calls, and those
                of the quantized one for the calls, are of use.
        Returns:
            What was solved, and outputs by the number of the call, as far as they are wanted and came about.
        """
        if not self.targets:
            return [], {}
        scheme_of = {target.view.name: target.scheme for target in self.targets}
        views = [target.view for target in self.targets]
        stages = self.with_room(lambda: observe_stages(views, partial(self.run, calls[0])))
        reached = {view.name for stage in stages for view in stage.views}
        for name in scheme_of.keys() - reached:
            logger.warning("%s stays in full precision: the calibration data never reaches it.", name)
            self.log.emit(Unreached(block=self.name, linear=name))
        solved: list[Solved] = []
        outputs: dict[int, Any] = {}
        groups = independent_groups(stages)
        stages = [stage for group in groups for stage in group]
        self._check_agreement(stages)
        if not sequential:
            groups = [stages]
        with PausedForwards(groups) as paused:
            self._paused = paused
            if len(groups) > 1:
                self._pause(paused, stages, calls, references)
            for group in groups:
                # Nothing of the original block changes in between, so its last run is also the one that goes on.
                kept = outputs if original_outputs and group is groups[-1] else None
                for stage, done in self._solve(self.observe(group, calls, references, kept, paused), scheme_of):
                    solved += done
                    self.log.advance(1 / len(stages), stage=stage.name, loss=f"{solved[-1].relative_loss:.2e}")
            if own_outputs:
                for call in calls:
                    output = self.with_room(partial(paused.output_of, call.batch)) if call.batch in paused else None
                    if output is not None:
                        outputs[call.batch] = self.store.take(output)
        return solved, outputs

    def _pause(
        self, paused: PausedForwards, stages: list[Stage], calls: list[BlockCall], references: dict[int, BlockCall]
    ) -> None:
        """Start as many forwards as find room; the others are run anew for every stage."""
        if not self.store.pausing or not all(stage.orderly for stage in stages):
            return  # what was called before its turn would have gone on with other weights
        states = [hidden_states((*call.args, *call.kwargs.values())) for call in calls]
        inputs = sum(stage.rows * stage.in_features for stage in stages) * states[0].element_size()
        bytes_per_value = 2 * inputs / states[0].numel() * (1 + bool(references))  # and about as much in between
        room = self._room()
        if room < bytes_per_value * sum(map(torch.numel, states)):
            release_free_memory()  # so that what earlier blocks left behind counts as free
            room = self._room()
        for position, call in enumerate(calls):
            room -= bytes_per_value * states[position].numel()
            if room < 0:
                found = counted(len(calls), "micro-batch", "micro-batches")
                logger.info("%s: memory for %d of %s at once.", self.name, position, found)
                return
            try:
                paused.start(call.batch, partial(self.run, call))
                if references:
                    paused.start(references[call.batch].batch, partial(self.run, references[call.batch]))
            except torch.OutOfMemoryError:
                self.store.pausing = False
                paused.abandon()
                return

    def _room(self) -> float:
        """Bytes that paused forwards may take; processes on CPUs share what is free."""
        sharing = self.ranks.size if self.device.type == "cpu" else 1
        return min(PAUSED_SHARE * free_bytes(self.device) / sharing, self.store.on_device)

    def _check_agreement(self, stages: list[Stage]) -> None:
        """Processes that differ here would wait for one another forever."""
        if len({*self.ranks.all_gather(tuple(stage.name for stage in stages))}) > 1:
            raise ModelError(
                f"{self.name}: which linears run, or in which order, depends on the data, so that several processes "
                "cannot share it. Quantize this model with one process."
            )

    def observe(
        self,
        stages: list[Stage],
        calls: list[BlockCall],
        references: dict[int, BlockCall],
        outputs: dict[int, Any] | None = None,
        paused: PausedForwards | None = None,
    ) -> list[tuple[Stage, Hessian, InputDrift | None]]:
        """The statistics of each stage's inputs over all micro-batches; the reference calls' outputs go to `outputs`.

        Args:
            paused: forwards that wait inside the block; micro-batches that are not among them are run.
        """
        started = time.monotonic()
        hessians = {stage: Hessian(stage.in_features, self.device) for stage in stages}
        # The original model may route a token to another expert, so that experts' inputs cannot be compared.
        compared = [stage for stage in stages if references and stage.family is None]
        drifts = {stage: InputDrift(stage.in_features, self.device) for stage in compared}

        def needs(call: BlockCall) -> Any:
            """None where a forward waits inside the block, and has it."""
            running = [
                other for other in (call, references.get(call.batch)) if other and other.batch not in (paused or ())
            ]
            return [(other.args, other.kwargs) for other in running]

        for call in self.store.in_turn(calls, needs):
            reference = references[call.batch] if references and (compared or outputs is not None) else None
            seen = self.with_room(
                partial(self._watch, stages, compared, call, reference, paused, to_the_end=outputs is not None)
            )
            if reference is not None and outputs is not None:
                outputs[reference.batch] = self.store.take(seen.original_output)
            mask = self.masks[call.batch]
            for stage, inputs in seen.inputs.items():
                for number, (part, x) in enumerate(inputs):
                    keep = fitting_mask(None if mask is None else mask[part], x)
                    hessians[stage].add(x, keep)
                    if stage in drifts:
                        drifts[stage].add(seen.originals[stage][number], x, keep)
        for statistics in (*hessians.values(), *drifts.values()):
            statistics.all_reduce(self.ranks)
        self._support_starved(hessians)
        self._observing_seconds += time.monotonic() - started
        return [(stage, hessians[stage], drifts.get(stage)) for stage in stages]

    def _support_starved(self, hessians: dict[Stage, Hessian]) -> None:
        """Where an expert saw fewer tokens than it has inputs, all experts' mean makes up for the rest."""
        families: dict[tuple[str, ...], list[Hessian]] = {}
        for stage, hessian in hessians.items():
            if stage.family is not None:
                families.setdefault(stage.family, []).append(hessian)
        for family, members in families.items():
            full = [member for member in members if member.tokens]  # what follows changes only the others' sums
            starved = [member for member in members if member.tokens < member.features]
            if not starved or not full:
                continue
            tokens = [member.tokens for member in members]
            mean = Hessian(members[0].features, self.device)
            mean.support(full, 1)
            for member in starved:
                member.support([mean], member.features - member.tokens)
            logger.warning(
                "%s: %d of %d experts saw fewer calibration tokens than the %d inputs of %s, %d of them none. The "
                "layer's mean over all experts makes up for what they lack; more calibration data would be better.",
                self.name,
                len(starved),
                len(members),
                members[0].features,
                " and ".join(name.rpartition(".")[2] for name in family),
                tokens.count(0),
            )
            self.log.emit(StarvedExperts(block=self.name, family=list(family), tokens=tokens))

    def _watch(
        self,
        stages: list[Stage],
        compared: list[Stage],
        call: BlockCall,
        reference: BlockCall | None,
        paused: PausedForwards | None,
        to_the_end: bool,
    ) -> "_Seen":
        """The inputs of `stages` on one micro-batch, and those of `compared` in the original model."""
        originals: dict[Stage, list[Tensor]] = {stage: [] for stage in compared}
        inputs: dict[Stage, list[tuple[slice, Tensor]]] = {stage: [] for stage in stages}
        output, in_parts = None, self.store.parts > 1

        def keep_original(stage: Stage, x: Tensor) -> None:
            originals[stage].append(x)

        def keep(stage: Stage, x: Tensor) -> None:
            inputs[stage].append((self._part, x))

        if reference is not None and paused is not None and reference.batch in paused:
            with self._original_weights():
                _feed_paused(paused, reference.batch, compared, keep_original)
                output = paused.output_of(reference.batch) if to_the_end else None
        elif reference is not None:
            run_original = partial(self.run_original, reference)
            output = feed_stages(compared, run_original, keep_original, to_the_end=to_the_end or in_parts)
        if paused is not None and call.batch in paused:
            _feed_paused(paused, call.batch, stages, keep)
        else:
            feed_stages(stages, partial(self.run, call), keep, to_the_end=in_parts)
        return _Seen(inputs=inputs, originals=originals, original_output=output)

    def _solve(
        self, observed: list[tuple[Stage, Hessian, InputDrift | None]], scheme_of: dict[str, LayerScheme]
    ) -> Iterator[tuple[Stage, list[Solved]]]:
        """Solve stages that do not depend on one another.

        Each process solves some of them; where there are fewer than processes, some rows of every one.
        """
        rank, size = self.ranks.rank, self.ranks.size
        shared = len(observed) < size
        at_once = 1 if shared else size
        for turn in (observed[start : start + at_once] for start in range(0, len(observed), at_once)):
            if shared:
                own = self.with_room(partial(self._solutions, *turn[0], scheme_of, rank, size))
                found = [[_joined(parts) for parts in zip(*self.ranks.all_gather(own), strict=True)]]
            else:
                own = []
                if rank < len(turn):
                    own = self.with_room(partial(self._solutions, *turn[rank], scheme_of))
                found = self.ranks.all_gather(own)
            for (stage, hessian, _), solutions in zip(turn, found, strict=False):
                done = []
                for (scheme, views), (solution, seconds) in zip(
                    _by_scheme(stage, scheme_of).items(), solutions, strict=True
                ):
                    done += self._write(views, scheme, solution.to(self.device), hessian.tokens, seconds)
                yield stage, done

    def _solutions(
        self,
        stage: Stage,
        hessian: Hessian,
        drift: InputDrift | None,
        scheme_of: dict[str, LayerScheme],
        part: int = 0,
        parts: int = 1,
    ) -> list[tuple[Solution, float]]:
        """The stage's linears solved, stacked where they have the same scheme, and the seconds per row.

        Args:
            part, parts: only this one of so many parts of their rows.
        """
        mean = hessian.mean()
        mean_drift = None if drift is None else drift.mean()
        found = []
        for scheme, views in _by_scheme(stage, scheme_of).items():
            started = time.monotonic()
            rows = torch.cat([view.weight for view in views]).tensor_split(parts)[part]
            try:
                solution = solve(rows, mean, scheme, drift=mean_drift, name=views[0].name)
            except ModelError as error:  # of weights that are too large
                largest = max(views, key=lambda view: float(view.weight.abs().max()))
                raise ModelError(f"{largest.name}: {error}") from error
            seconds = (time.monotonic() - started) / rows.shape[0]  # per row: its share of the stacked solve
            found.append((solution if self.ranks.size == 1 else solution.to("cpu"), seconds))
        return found

    def _write(
        self, views: list[LinearView], scheme: LayerScheme, solution: Solution, tokens: int, seconds_per_row: float
    ) -> list[Solved]:
        rows = [view.shape[0] for view in views]
        parts = zip(
            views,
            write_rows(views, solution.quantized),
            *(values.split(rows) for values in (solution.loss, solution.rtn_loss, solution.energy)),
            strict=True,
        )
        solved = []
        for view, quantized, loss, rtn_loss, energy in parts:
            total = float(energy.sum())
            loss, rtn_relative_loss = (float(part.sum()) / total if total > 0 else 0.0 for part in (loss, rtn_loss))
            solved.append(Solved(view=view, quantized=quantized, relative_loss=loss))
            self.log.emit(
                LinearQuantized(
                    block=self.name,
                    linear=view.name,
                    family=view.family,
                    shape=list(view.shape),
                    bits=scheme.bits,
                    group_size=scheme.group_size,
                    stored_bits=scheme.stored_bits(*view.shape),
                    relative_loss=loss,
                    rtn_relative_loss=rtn_relative_loss,
                    damping=solution.damping,
                    damping_asked=scheme.damping,
                    dead_columns=solution.dead_columns,
                    tokens=tokens,
                    seconds=round(seconds_per_row * view.shape[0], 4),
                    peak_gib=rounded(peak_gib(self.device)),
                )
            )
        return solved

    def reconstruct(
        self,
        solved: list[Solved],
        calls: list[BlockCall],
        held_out: list[BlockCall],
        outputs: dict[int, Any],
        passes: int,
    ) -> list[Solved]:
        """Tune the finished block's scales and codes towards the original block's outputs.

        Args:
            calls, held_out: the micro-batches to tune on, and those to judge by, as the quantized model computes them.
            outputs: of the original block, by the number of the quantized model's micro-batch.
            passes: over `calls`, at most.
        """
        started = time.monotonic()
        examples = [
            Example(call=call, target=hidden_states(outputs[call.batch]), mask=self.masks[call.batch])
            for call in (*calls, *held_out)
        ]
        reconstructed = reconstruct(
            [done.view for done in solved],
            [done.view.as_rows(self._originals[done.view]) for done in solved],
            [done.quantized for done in solved],
            self.run,
            examples[: len(calls)],
            examples[len(calls) :],
            passes,
            self.ranks,
            attempt=self.with_room,
            pieces=self._pieces,
        )
        self.log.emit(
            BlockReconstructed(
                block=self.name,
                held_out_loss_before=reconstructed.loss_before,
                held_out_loss=reconstructed.loss,
                passes=reconstructed.passes,
                seconds=round(time.monotonic() - started, 2),
            )
        )
        return [
            replace(done, quantized=quantized) for done, quantized in zip(solved, reconstructed.quantized, strict=True)
        ]

    def _pieces(self, example: Example) -> list[Example]:
        """What is run of it at once; after memory has run out, a part."""
        if self.store.parts == 1:
            return [example]
        args, kwargs = self.store.fetched((example.call.args, example.call.kwargs))
        self._most_samples = max(self._most_samples, hidden_states((args, kwargs)).shape[0])
        return [
            Example(
                call=replace(example.call, args=part_args, kwargs=part_kwargs),
                target=example.target[part],
                mask=None if example.mask is None else example.mask[part],
            )
            for part, part_args, part_kwargs in _in_parts(args, kwargs, self.store.parts)
        ]

    def report(self, solved: list[Solved], seconds: float) -> None:
        """One line for a finished block."""
        if not solved:
            return
        scheme_of = {target.view: target.scheme for target in self.targets}
        shapes = {done.view: done.view.shape for done in solved}
        stored_bits = sum(scheme_of[view].stored_bits(*shape) for view, shape in shapes.items())
        done = BlockQuantized(
            block=self.name,
            relative_loss=sum(done.relative_loss for done in solved) / len(solved),
            bits_per_weight=round(stored_bits / sum(map(math.prod, shapes.values())), 4),
            seconds=round(seconds, 2),
            observing_seconds=round(self._observing_seconds, 2),
            peak_gib=rounded(peak_gib(self.device)),
        )
        self.log.emit(done)
        logger.info(
            "%s: relative loss %.2e, %.2f bits per weight, %.1f s, peak %.2f GiB; %s left, about %s",
            self.name,
            done.relative_loss,
            done.bits_per_weight,
            done.seconds,
            done.peak_gib or math.nan,
            counted(self.log.blocks_left, "block"),
            timedelta(seconds=round(self.log.seconds_left)),
        )


def _in_parts(
    args: tuple[Any, ...], kwargs: dict[str, Any], parts: int
) -> Iterator[tuple[slice, tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a block for some of the samples after the other: which ones, and what they are."""
    samples = hidden_states((args, kwargs)).shape[0]
    for rows in torch.arange(samples).chunk(parts):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        yield part, *tree_map(partial(_samples_of, part, samples), (args, kwargs))


def _samples_of(part: slice, samples: int, leaf: Any) -> Any:
    """Of an argument with an entry for each sample those of some samples; other arguments are for all of them."""
    return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == samples else leaf


def _by_scheme(stage: Stage, scheme_of: dict[str, LayerScheme]) -> dict[LayerScheme, list[LinearView]]:
    found: dict[LayerScheme, list[LinearView]] = {}
    for view in stage.views:
        found.setdefault(scheme_of[view.name], []).append(view)
    return found


def _joined(parts: Sequence[tuple[Solution, float]]) -> tuple[Solution, float]:
    """What processes found for consecutive rows, and the slowest one's seconds per row of all."""
    solutions, seconds = zip(*parts, strict=True)
    return stacked(list(solutions)), max(seconds) / len(parts)


def _feed_paused(
    paused: PausedForwards, number: int, group: list[Stage], feed: Callable[[Stage, Tensor], None]
) -> None:
    if group:
        for stage, x in paused.inputs_of(number, group).items():
            feed(stage, x)


def write_rows(views: Iterable[LinearView], stacked: QuantizedWeight) -> list[QuantizedWeight]:
    """Give linears that were solved as one matrix their rounded values; what each of them got."""
    views = list(views)
    parts = stacked.split_rows([view.shape[0] for view in views])
    for view, quantized in zip(views, parts, strict=True):
        view.write(quantized.decode())
    return parts
