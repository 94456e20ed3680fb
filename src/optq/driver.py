# SPDX-License-Identifier: Apache-2.0
"""Quantize a model: the whole story.

The model runs on the calibration data and pauses at its first block. The block's linears fall into stages by the
input they share. Stage by stage, the inputs are summed into a Hessian, the weights are solved and written back, so
that later stages see what the quantized model will really compute. Then the block's outputs carry the model on to the
next block.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .calibration import Calibration
from .checkpoint import pack
from .errors import CalibrationError, ConfigError, ModelError
from .gptq import Hessian, solve
from .layers import QuantLinear
from .memory import peak_gib, release_free_memory
from .model import (
    BlockCall,
    LinearView,
    Stage,
    SuspendedForwards,
    feed_stages,
    find_linears,
    observe_stages,
)
from .progress import RunLog
from .scheme import LayerScheme, QuantizedWeight

logger = logging.getLogger(__name__)

SERVABLE_GROUP_SIZES = (128, 64, 32)  # what vLLM accepts besides -1


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear that will be quantized, and how."""

    view: LinearView
    scheme: LayerScheme


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done, decided and checked before the work.

    Args:
        blocks: name and module, in order.
        targets: per block, its linears to quantize.
        skipped: name of each linear of a block that is left as it is, with the reason.
    """

    blocks: dict[str, nn.Module]
    targets: dict[str, tuple[Target, ...]]
    skipped: dict[str, str]


def plan_quantization(blocks: dict[str, nn.Module], scheme_for: Callable[[str], LayerScheme | None]) -> Plan:
    """Decide what happens to every linear of `blocks`, which may be on the meta device.

    Args:
        scheme_for: name of a linear -> its scheme, or None to leave it alone.
    Raises:
        ConfigError: a group size does not fit a layer, or nothing is left to quantize.
    """
    targets: dict[str, tuple[Target, ...]] = {}
    skipped: dict[str, str] = {}
    ragged: dict[int, set[int]] = {}
    for block_name, block in blocks.items():
        _refuse_fused_experts(block_name, block)
        chosen = []
        for name, view in find_linears(block, block_name).items():
            out_features, in_features = view.shape
            scheme = scheme_for(name)
            if scheme is None:
                skipped[name] = "excluded by the configuration"
            elif reason := scheme.why_not_packed(in_features, out_features):
                skipped[name] = reason
            elif reason := scheme.why_not_grouped(in_features):
                raise ConfigError(
                    f"{name}: {reason}. Choose another group_size, or leave this layer in full precision with "
                    f"dynamic={{'-:{name}': {{}}}}."
                )
            else:
                chosen.append(Target(view=view, scheme=scheme))
                if in_features % scheme.group_width(in_features):
                    ragged.setdefault(scheme.group_size, set()).add(in_features)
        targets[block_name] = tuple(chosen)
    if not any(targets.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ConfigError(f"No linear layer is left to quantize ({len(skipped)} skipped; {reasons or 'none found'}).")
    for name, reason in skipped.items():
        if reason != "excluded by the configuration":
            logger.warning("%s stays in full precision: %s.", name, reason)
    for group_size, widths in ragged.items():
        logger.warning(
            "group_size=%d does not divide in_features %s: the last group of each row is narrower. vLLM does not read "
            "such a checkpoint; it would accept group_size %s.",
            group_size,
            ", ".join(map(str, sorted(widths))),
            ", ".join(str(size) for size in (*SERVABLE_GROUP_SIZES, -1) if all(width % size == 0 for width in widths)),
        )
    return Plan(blocks=blocks, targets=targets, skipped=skipped)


def quantize_model(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    *,
    sequential: bool = True,
    checkpoint_format: str = "gptq",
    backend: str = "auto",
    device: torch.device | str | None = None,
    log: RunLog | None = None,
) -> None:
    """Quantize the planned linears of `model` in place: each becomes a `QuantLinear`.

    Args:
        model: its weights loaded, on any device.
        sequential: calibrate later stages of a block on the already quantized earlier ones (true_sequential).
        device: where blocks are run and solved, one at a time; by default the accelerator, if there is one.
        log: receives the events of the run.
    Raises:
        ModelError: weights are not finite; the layer is named.
        CalibrationError: activations are not finite; the block is named.
        SolveError: a layer's Hessian cannot be inverted.
    On any exception the model's hooks, flags and devices are as before; blocks finished by then stay quantized.
    """
    log = log if log is not None else RunLog()
    device = torch.device(device) if device is not None else execution_device()
    _check_weights(plan)
    names, blocks = list(plan.blocks), list(plan.blocks.values())
    log.emit(
        "started",
        blocks=len(blocks),
        linears=sum(map(len, plan.targets.values())),
        skipped=plan.skipped,
        calibration=calibration.recipe,
        device=str(device),
    )
    log.expect(len(blocks))
    started = time.monotonic()
    release_free_memory()  # encoding the calibration texts leaves a lot behind
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        stack.enter_context(_placed(_tensors_outside(model, blocks), device, None))
        batches = [batch.as_model_inputs(device) for batch in calibration.batches]
        forwards = stack.enter_context(SuspendedForwards(model, blocks, batches))
        calls = forwards.start()
        if not calls:
            raise ModelError(f"{type(model).__name__} never calls {names[0]} on the calibration data.")
        for index, (name, block) in enumerate(plan.blocks.items()):
            block_started = time.monotonic()
            _check_order(calls, index, names)
            work = _BlockWork(
                name=name,
                targets=plan.targets[name],
                forward=forwards.original_forwards[index],
                masks=[batch.attention_mask for batch in calibration.batches],
                device=device,
                log=log,
            )
            with _placed([*block.parameters(), *block.buffers()], device, work.dtype):
                calls = [work.moved(call) for call in calls]
                work.check_finite(calls)
                solved = work.solve(calls, sequential)
                if index + 1 < len(blocks):
                    calls = _continue(forwards, calls, work.run)
            layers = []
            for view, quantized, _ in solved:
                layer = QuantLinear(pack(quantized, checkpoint_format), view.bias, backend)
                _replace(model, view, layer.to(view.weight.device))
                layers.append(layer)
            work.report(layers, [loss for _, _, loss in solved], time.monotonic() - block_started)
    log.emit("finished", seconds=round(time.monotonic() - started, 3), peak_gib=_rounded(peak_gib(device)))


def _continue(forwards: SuspendedForwards, calls: list[BlockCall], run: Callable[[BlockCall], Any]) -> list[BlockCall]:
    """Run a finished block on every micro-batch and carry the model on; empties `calls`, so that inputs are freed."""
    following = []
    while calls:
        call = calls.pop(0)
        if (next_call := forwards.resume(call, run(call))) is not None:
            following.append(next_call)
    return following


def execution_device() -> torch.device:
    """The accelerator, if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class _BlockWork:
    """What is needed to quantize one block.

    Args:
        forward: the block's own forward.
        masks: per micro-batch, which tokens are real.
    """

    name: str
    targets: tuple[Target, ...]
    forward: Callable[..., Any]
    masks: list[Tensor | None]
    device: torch.device
    log: RunLog

    def run(self, call: BlockCall) -> Any:
        return self.forward(*call.args, **call.kwargs)

    @property
    def dtype(self) -> torch.dtype | None:
        """float32 on CPUs, where 16-bit products are slow and less exact; elsewhere None, the model's own."""
        return torch.float32 if self.device.type == "cpu" else None

    def moved(self, call: BlockCall) -> BlockCall:
        """The call with its tensors where, and as, the block is."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)

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

    def report(self, layers: list[QuantLinear], losses: list[float], seconds: float) -> None:
        """One line for a finished block."""
        if not layers:
            return
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        facts = {
            "relative_loss": sum(losses) / len(losses),
            "bits_per_weight": round(sum(layer.stored_bits for layer in layers) / weights, 4),
            "seconds": round(seconds, 2),
            "peak_gib": _rounded(peak_gib(self.device)),
        }
        self.log.emit("block", block=self.name, **facts)
        logger.info(
            "%s: relative loss %.2e, %.2f bits per weight, %.1f s, peak %.2f GiB",
            self.name,
            facts["relative_loss"],
            facts["bits_per_weight"],
            facts["seconds"],
            facts["peak_gib"] or math.nan,
        )

    def solve(self, calls: list[BlockCall], sequential: bool) -> list[tuple[LinearView, QuantizedWeight, float]]:
        """Quantize the block's linears, writing the rounded values into them; with each one's relative loss."""
        if not self.targets:
            return []
        scheme_of = {target.view.name: target.scheme for target in self.targets}
        stages = observe_stages([target.view for target in self.targets], lambda: self.run(calls[0]))
        reached = {view.name for stage in stages for view in stage.views}
        for name in scheme_of.keys() - reached:
            logger.warning("%s stays in full precision: the calibration data never reaches it.", name)
            self.log.emit("unreached", linear=name)
        solved = []
        for group in [[stage] for stage in stages] if sequential else [stages]:
            hessians = self._observe(group, calls)
            for stage, hessian in zip(group, hessians, strict=True):
                solved += self._solve_stage(stage, hessian, scheme_of)
                release_free_memory()
                self.log.advance(1 / len(stages), stage=stage.name, loss=f"{solved[-1][2]:.2e}")
        return solved

    def _observe(self, stages: list[Stage], calls: list[BlockCall]) -> list[Hessian]:
        """One Hessian per stage, over all micro-batches."""
        hessians = {id(stage): Hessian(stage.in_features, self.device) for stage in stages}
        for call in calls:
            mask = self.masks[call.batch]

            def feed(stage: Stage, x: Tensor, mask: Tensor | None = mask) -> None:
                # A mask only fits inputs that still have one row per token.
                fits = mask is not None and mask.numel() * x.shape[-1] == x.numel()
                hessians[id(stage)].add(x, mask.bool().to(x.device) if mask is not None and fits else None)

            feed_stages(stages, lambda call=call: self.run(call), feed)  # type: ignore[misc]
        return [hessians[id(stage)] for stage in stages]

    def _solve_stage(
        self, stage: Stage, hessian: Hessian, scheme_of: dict[str, LayerScheme]
    ) -> list[tuple[LinearView, QuantizedWeight, float]]:
        """Solve the stage's linears, stacked where they have the same scheme."""
        mean = hessian.mean()
        solved = []
        for scheme in dict.fromkeys(scheme_of[view.name] for view in stage.views):
            views = [view for view in stage.views if scheme_of[view.name] == scheme]
            rows = [view.shape[0] for view in views]
            started = time.monotonic()
            solution = solve(torch.cat([view.weight for view in views]), mean, scheme, name=views[0].name)
            seconds = time.monotonic() - started
            parts = zip(
                views,
                solution.quantized.split_rows(rows),
                solution.lost.split(rows),
                solution.energy.split(rows),
                strict=True,
            )
            for view, quantized, lost, energy in parts:
                view.write(quantized.decode())
                loss = float(lost.sum() / energy.sum()) if float(energy.sum()) > 0 else 0.0
                solved.append((view, quantized, loss))
                self.log.emit(
                    "linear",
                    block=self.name,
                    linear=view.name,
                    bits=scheme.bits,
                    group_size=scheme.group_size,
                    relative_loss=loss,
                    damping=solution.damping,
                    dead_columns=solution.dead_columns,
                    tokens=hessian.tokens,
                    seconds=round(seconds * view.shape[0] / sum(rows), 4),  # its share of the stacked solve
                    peak_gib=_rounded(peak_gib(self.device)),
                )
        return solved


def _refuse_fused_experts(block_name: str, block: nn.Module) -> None:
    """Experts fused into one 3-D parameter hold most weights of a block; leaving them out silently would be a lie."""
    for module_name, module in block.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1:
                raise ModelError(
                    f"{block_name}.{module_name}.{name} is a parameter of shape {tuple(parameter.shape)}: experts "
                    "of a mixture, fused into one tensor. Such models are not supported yet; nothing was quantized."
                )


def _check_weights(plan: Plan) -> None:
    for targets in plan.targets.values():
        for target in targets:
            if not bool(target.view.weight.isfinite().all()):
                raise ModelError(
                    f"{target.view.name} has weights that are not finite (NaN or infinity). The checkpoint is "
                    "damaged, or its values overflow the dtype it is loaded in; nothing was quantized."
                )


def _check_order(calls: list[BlockCall], index: int, names: list[str]) -> None:
    """Every micro-batch must wait at the same block."""
    waiting = sorted({call.block for call in calls})
    if waiting != [index]:
        raise ModelError(
            f"The model was expected to call {names[index]} next, but calls "
            f"{', '.join(names[other] for other in waiting) or 'none of the blocks'}. Models that skip, repeat or "
            "reorder their blocks are not supported; name the blocks with block_name_to_quantize."
        )


def _tensors_outside(model: nn.Module, blocks: list[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of the model that belong to no block: embeddings, norms, heads."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [
        tensor
        for module in model.modules()
        if id(module) not in inside
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


def _replace(model: nn.Module, view: LinearView, layer: QuantLinear) -> None:
    model.set_submodule(view.name, layer)
    view.module.to("meta")  # the plan still refers to it: without this, every dense weight would live to the end


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and the like; restore every module's own flag."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():  # by name: a quantized layer takes over its predecessor's flag
            module.training = training[name]


@contextmanager
def _placed(tensors: list[Tensor], device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Move parameters and buffers to `device`, floating ones to `dtype` if given; back again after.

    Values written in between are kept: they come back cast to the tensor's own dtype.
    """
    homes: list[tuple[Tensor, torch.device, torch.dtype]] = []
    try:
        for tensor in tensors:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if tensor.device.type != device.type or tensor.dtype != wanted:
                homes.append((tensor, tensor.device, tensor.dtype))
                tensor.data = tensor.data.to(device, wanted)
        yield
    finally:
        for tensor, home, own_dtype in homes:
            tensor.data = tensor.data.to(home, own_dtype)


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 3)
