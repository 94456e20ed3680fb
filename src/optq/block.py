# SPDX-License-Identifier: Apache-2.0
"""Quantize one block: stage by stage, each calibrated on what the already quantized ones really compute."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .checkpoint import PackedWeight, unpack
from .errors import CalibrationError, ModelError
from .gptq import Hessian, InputDrift, Solution, solve, stacked
from .memory import free_bytes, peak_gib, release_free_memory
from .model import (
    BlockCall,
    LinearView,
    PausedForwards,
    Stage,
    feed_stages,
    fitting_mask,
    hidden_states,
    independent_groups,
    observe_stages,
)
from .placement import working_dtype
from .planning import Target
from .polish import Example, polish
from .progress import RunLog, rounded
from .ranks import ALONE, Ranks
from .scheme import LayerScheme, QuantizedWeight

logger = logging.getLogger(__name__)

PAUSED_SHARE = 0.5  # of the free memory, for what forwards hold while they wait inside a block


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A linear that is done."""

    view: LinearView
    quantized: QuantizedWeight
    relative_loss: float


@dataclass(kw_only=True)
class BlockWork:
    """One block, on the device where it is quantized.

    Args:
        forward: the block's own forward.
        masks: per micro-batch, which tokens are real.
        ranks: who work on the same block with other micro-batches.
    """

    name: str
    targets: tuple[Target, ...]
    forward: Callable[..., Any]
    masks: list[Tensor | None]
    device: torch.device
    log: RunLog
    ranks: Ranks = ALONE
    _originals: dict[LinearView, Tensor] = field(init=False)
    _observing_seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._originals = {target.view: target.view.parameter.data for target in self.targets}

    def run(self, call: BlockCall) -> Any:
        return self.forward(*call.args, **call.kwargs)

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

    def moved(self, call: BlockCall) -> BlockCall:
        """The call with its tensors where, and as, the block is."""
        dtype = working_dtype(self.device)

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, dtype if leaf.is_floating_point() else None)

        args, kwargs = tree_map(move, (call.args, call.kwargs))
        return BlockCall(batch=call.batch, block=call.block, args=args, kwargs=kwargs)

    def check_finite(self, calls: list[BlockCall]) -> None:
        for call in calls:
            states = next((leaf for leaf in (*call.args, *call.kwargs.values()) if isinstance(leaf, Tensor)), None)
            if states is not None and not bool(states.isfinite().all()):
                raise CalibrationError(
                    f"The inputs of {self.name} are not finite (NaN or infinity) on calibration micro-batch "
                    f"{call.batch}. Load the model in float32 or bfloat16, or look for a damaged layer before it."
                )

    def solve(
        self,
        calls: list[BlockCall],
        twins: dict[int, BlockCall],
        sequential: bool,
        *,
        original_outputs: bool = True,
        own_outputs: bool = False,
    ) -> tuple[list[Solved], dict[int, Any]]:
        """Quantize the block's linears, writing the rounded values into them.

        Args:
            calls: the micro-batches to calibrate on, as the quantized model computes them.
            twins: the same micro-batches as the original model computes them, by number; empty if earlier layers'
                errors are not to be propagated.
            sequential: calibrate later stages on the already quantized earlier ones.
            original_outputs, own_outputs: whether the outputs of the original block for the twins, and those of the
                quantized one for the calls, are of use.
        Returns:
            What was solved, and outputs by the number of the call, as far as they are wanted and came about.
        """
        if not self.targets:
            return [], {}
        scheme_of = {target.view.name: target.scheme for target in self.targets}
        stages = observe_stages([target.view for target in self.targets], lambda: self.run(calls[0]))
        reached = {view.name for stage in stages for view in stage.views}
        for name in scheme_of.keys() - reached:
            logger.warning("%s stays in full precision: the calibration data never reaches it.", name)
            self.log.emit("unreached", block=self.name, linear=name)
        solved: list[Solved] = []
        outputs: dict[int, Any] = {}
        groups = independent_groups(stages)
        stages = [stage for group in groups for stage in group]
        self._check_agreement(stages)
        if not sequential:
            groups = [stages]
        with PausedForwards(groups) as paused:
            if len(groups) > 1:
                self._pause(paused, stages, calls, twins)
            for group in groups:
                # Nothing of the original block changes in between, so its last run is also the one that goes on.
                kept = outputs if original_outputs and group is groups[-1] else None
                for stage, done in self._solve(self.observe(group, calls, twins, kept, paused), scheme_of):
                    solved += done
                    self.log.advance(1 / len(stages), stage=stage.name, loss=f"{solved[-1].relative_loss:.2e}")
            if own_outputs:
                outputs |= {call.batch: paused.output_of(call.batch) for call in calls if call.batch in paused}
        return solved, outputs

    def _pause(
        self, paused: PausedForwards, stages: list[Stage], calls: list[BlockCall], twins: dict[int, BlockCall]
    ) -> None:
        """Start as many forwards as find room; the others are run anew for every stage."""
        if not all(stage.orderly for stage in stages):
            return  # what was called before its turn would have gone on with other weights
        states = [hidden_states((*call.args, *call.kwargs.values())) for call in calls]
        inputs = sum(stage.rows * stage.in_features for stage in stages) * states[0].element_size()
        bytes_per_value = 2 * inputs / states[0].numel() * (1 + bool(twins))  # and about as much in between
        room = self._room()
        if room < bytes_per_value * sum(map(torch.numel, states)):
            release_free_memory()  # so that what earlier blocks left behind counts as free
            room = self._room()
        for position, call in enumerate(calls):
            room -= bytes_per_value * states[position].numel()
            if room < 0:
                logger.info("%s: memory for %d of %d micro-batches at once.", self.name, position, len(calls))
                return
            paused.start(call.batch, lambda call=call: self.run(call))  # type: ignore[misc]
            if twins:
                twin = twins[call.batch]
                paused.start(twin.batch, lambda twin=twin: self.run(twin))  # type: ignore[misc]

    def _room(self) -> float:
        """Bytes that paused forwards may take; processes on CPUs share what is free."""
        return PAUSED_SHARE * free_bytes(self.device) / (self.ranks.size if self.device.type == "cpu" else 1)

    def _check_agreement(self, stages: list[Stage]) -> None:
        """Processes that differ here would wait for one another forever."""
        if len({*self.ranks.gathered(tuple(stage.name for stage in stages))}) > 1:
            raise ModelError(
                f"{self.name}: which linears run, or in which order, depends on the data, so that several processes "
                "cannot share it. Quantize this model with one process."
            )

    def observe(
        self,
        stages: list[Stage],
        calls: list[BlockCall],
        twins: dict[int, BlockCall],
        outputs: dict[int, Any] | None = None,
        paused: PausedForwards | None = None,
    ) -> list[tuple[Stage, Hessian, InputDrift | None]]:
        """The statistics of each stage's inputs over all micro-batches; the twins' outputs go to `outputs`.

        Args:
            paused: forwards that wait inside the block; micro-batches that are not among them are run.
        """
        started = time.monotonic()
        hessians = {stage: Hessian(stage.in_features, self.device) for stage in stages}
        # The original model may route a token to another expert, so that experts' inputs cannot be compared.
        compared = [stage for stage in stages if twins and stage.family is None]
        drifts = {stage: InputDrift(stage.in_features, self.device) for stage in compared}
        for call in calls:
            originals: dict[Stage, list[Tensor]] = {stage: [] for stage in compared}
            if twins and (compared or outputs is not None):
                self._feed_originals(compared, twins[call.batch], originals, outputs, paused)
            mask = self.masks[call.batch]

            def feed(
                stage: Stage,
                x: Tensor,
                mask: Tensor | None = mask,
                originals: dict[Stage, list[Tensor]] = originals,
            ) -> None:
                keep = fitting_mask(mask, x)
                hessians[stage].add(x, keep)
                if stage in drifts:
                    drifts[stage].add(originals[stage].pop(0), x, keep)

            if paused is not None and call.batch in paused:
                _feed_paused(paused, call.batch, stages, feed)
            else:
                feed_stages(stages, lambda call=call: self.run(call), feed)  # type: ignore[misc]
        for statistics in (*hessians.values(), *drifts.values()):
            statistics.add_up(self.ranks)
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
            self.log.emit("starved_experts", block=self.name, family=family, tokens=tokens)

    def _feed_originals(
        self,
        stages: list[Stage],
        twin: BlockCall,
        originals: dict[Stage, list[Tensor]],
        outputs: dict[int, Any] | None,
        paused: PausedForwards | None,
    ) -> None:
        def keep(stage: Stage, x: Tensor) -> None:
            originals[stage].append(x)

        if paused is not None and twin.batch in paused:
            with self._original_weights():
                _feed_paused(paused, twin.batch, stages, keep)
                if outputs is not None:
                    outputs[twin.batch] = paused.output_of(twin.batch)
            return
        output = feed_stages(stages, lambda: self.run_original(twin), keep, to_the_end=outputs is not None)
        if outputs is not None:
            outputs[twin.batch] = output

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
                own = self._solutions(*turn[0], scheme_of, rank, size)
                found = [[_joined(parts) for parts in zip(*self.ranks.gathered(own), strict=True)]]
            else:
                found = self.ranks.gathered(self._solutions(*turn[rank], scheme_of) if rank < len(turn) else [])
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
            solution = solve(rows, mean, scheme, drift=mean_drift, name=views[0].name)
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
            *(values.split(rows) for values in (solution.lost, solution.nearest_lost, solution.energy)),
            strict=True,
        )
        solved = []
        for view, quantized, lost, nearest_lost, energy in parts:
            total = float(energy.sum())
            loss, nearest_loss = (float(part.sum()) / total if total > 0 else 0.0 for part in (lost, nearest_lost))
            solved.append(Solved(view=view, quantized=quantized, relative_loss=loss))
            self.log.emit(
                "linear",
                block=self.name,
                linear=view.name,
                family=view.family,
                shape=list(view.shape),
                bits=scheme.bits,
                group_size=scheme.group_size,
                stored_bits=scheme.stored_bits(*view.shape),
                relative_loss=loss,
                nearest_relative_loss=nearest_loss,
                damping=solution.damping,
                damping_asked=scheme.damping,
                dead_columns=solution.dead_columns,
                tokens=tokens,
                seconds=round(seconds_per_row * view.shape[0], 4),
                peak_gib=rounded(peak_gib(self.device)),
            )
        return solved

    def polish(
        self,
        solved: list[Solved],
        calls: list[BlockCall],
        probes: list[BlockCall],
        outputs: dict[int, Any],
        passes: int,
    ) -> list[Solved]:
        """Tune the finished block's scales and codes towards the original block's outputs.

        Args:
            calls, probes: the micro-batches to tune on, and those to judge by, as the quantized model computes them.
            outputs: of the original block, by the number of the quantized model's micro-batch.
            passes: over `calls`, at most.
        """
        started = time.monotonic()
        examples = [
            Example(call=call, target=hidden_states(outputs[call.batch]), mask=self.masks[call.batch])
            for call in (*calls, *probes)
        ]
        polished = polish(
            [done.view for done in solved],
            [done.view.as_rows(self._originals[done.view]) for done in solved],
            [done.quantized for done in solved],
            self.run,
            examples[: len(calls)],
            examples[len(calls) :],
            passes,
            self.ranks,
        )
        self.log.emit(
            "polished",
            block=self.name,
            held_out_loss_before=polished.loss_before,
            held_out_loss=polished.loss,
            passes=polished.passes,
            seconds=round(time.monotonic() - started, 2),
        )
        return [replace(done, quantized=quantized) for done, quantized in zip(solved, polished.quantized, strict=True)]

    def report(self, solved: list[Solved], seconds: float) -> None:
        """One line for a finished block."""
        if not solved:
            return
        scheme_of = {target.view: target.scheme for target in self.targets}
        shapes = {done.view: done.view.shape for done in solved}
        stored_bits = sum(scheme_of[view].stored_bits(*shape) for view, shape in shapes.items())
        facts = {
            "relative_loss": sum(done.relative_loss for done in solved) / len(solved),
            "bits_per_weight": round(stored_bits / sum(map(math.prod, shapes.values())), 4),
            "seconds": round(seconds, 2),
            "observing_seconds": round(self._observing_seconds, 2),
            "peak_gib": rounded(peak_gib(self.device)),
        }
        self.log.emit("block", block=self.name, **facts)
        logger.info(
            "%s: relative loss %.2e, %.2f bits per weight, %.1f s, peak %.2f GiB; %d blocks left, about %s",
            self.name,
            facts["relative_loss"],
            facts["bits_per_weight"],
            facts["seconds"],
            facts["peak_gib"] or math.nan,
            self.log.blocks_left,
            timedelta(seconds=round(self.log.seconds_left)),
        )


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
