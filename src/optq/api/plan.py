# SPDX-License-Identifier: Apache-2.0
"""`optq.plan`: what quantizing a model will take and give, from its config and headers, before any weight is read."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers

from optq.calibration import Calibration
from optq.compat.call import where_in
from optq.config.gptq import GPTQConfig
from optq.device.memory import GIB, free_bytes
from optq.device.placement import execution_device, working_dtype
from optq.errors import counted
from optq.events import RunLog
from optq.files.source import check_files, place_of
from optq.model import put_split
from optq.quantization.cost_estimate import Duration, estimate
from optq.quantization.plan import Plan, Target
from optq.quantization.run import Run
from optq.runs.budget import Budget, dense_bytes, whole_bytes
from optq.runs.preparation import prepare, vocabulary_of
from optq.runs.readers import as_linears, refused_by, said_of_readers
from optq.runs.validation import check_kernels, check_request
from optq.scheme import LayerScheme
from optq.torch_state import default_torch_state

from .quantize import model_without_weights


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated cost and result of a quantization run. `str()` formats it as a table.

    Args:
        linears: number of linears of each kind: (out_features, in_features, scheme).
        skipped: name of each linear of a block that stays as it is, with the reason.
        tokens: calibration tokens, all samples together.
        weaknesses: what makes the calibration data a poor basis.
        bits_per_weight: bits per weight of the quantized linears, scales and zeros included; with a budget, its limit.
        checkpoint_gib, dense_gib: the checkpoint, and the model that it is made of.
        memory_gib: on `device`, by part; at the same time in memory.
        elsewhere_gib: activations that wait in the machine's memory, or on the disk of the output folder.
        free_gib: memory that is free on `device` now.
        seconds: an estimate of the time, by part, for one process on a machine that does nothing else; empty where it
            does not fit.
        uncounted: work of the run that `seconds` leaves out.
        refused: by reader, what it will refuse and why; empty where it reads all.
        serving_gib: of `fit`, what takes the memory of a server, by part; else empty.
        original_fits: of `fit`, the model needs no quantizing to fit.
    """

    model: str
    device: str
    blocks: int
    linears: dict[tuple[int, int, LayerScheme], int]
    skipped: dict[str, str]
    tokens: int
    weaknesses: tuple[str, ...]
    bits_per_weight: float
    checkpoint_gib: float
    dense_gib: float
    memory_gib: dict[str, float]
    elsewhere_gib: float
    free_gib: float
    seconds: dict[str, float]
    uncounted: tuple[str, ...]
    refused: dict[str, tuple[str, ...]]
    serving_gib: dict[str, float]
    original_fits: bool

    @property
    def fits(self) -> bool:
        return sum(self.memory_gib.values()) <= self.free_gib

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change so that the run fits into memory; empty if it fits."""
        if self.fits:
            return ()
        largest = max(self.memory_gib, key=lambda part: self.memory_gib[part])
        return {
            "activations": ("fewer or shorter calibration samples (num_samples, model_seqlen)", "effort='fast'"),
            "one block": ("dtype=torch.bfloat16",),
        }.get(largest, ("a machine with more memory",))

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {counted(self.blocks, 'block')}, "
            f"{counted(sum(self.linears.values()), 'linear')} to quantize",
            *(
                f"  {count:5} x {out} x {columns}, {scheme.bits} bits, groups of {scheme.group_size}"
                for (out, columns, scheme), count in self.linears.items()
            ),
            *(f"  stays as it is: {name}: {reason}" for name, reason in self.skipped.items()),
            f"calibration: {counted(self.tokens, 'token')}",
            *(f"  weak: {weakness}" for weakness in self.weaknesses),
            f"result: {self.bits_per_weight:.2f} bits per weight, {self.checkpoint_gib:.2f} GiB"
            f" (now {self.dense_gib:.2f} GiB)",
            *([f"in serving: {sum(self.serving_gib.values()):.2f} GiB"] if self.serving_gib else []),
            *(f"  {gib:8.2f} GiB {part}" for part, gib in self.serving_gib.items()),
            *(["  the original model fits as well"] if self.original_fits else []),
            f"memory on {self.device}: {sum(self.memory_gib.values()):.2f} GiB of {self.free_gib:.2f} that are free",
            *(f"  {gib:8.2f} GiB {part}" for part, gib in self.memory_gib.items()),
            *([f"  {self.elsewhere_gib:8.2f} GiB activations that wait elsewhere"] if self.elsewhere_gib else []),
            *(f"  does not fit; try {advice}" for advice in self.advice),
            *([f"time: {_rounded(sum(self.seconds.values()))}"] if self.seconds else []),
            *(f"  {seconds:8.0f} s   {part}" for part, seconds in self.seconds.items()),
            *(f"  besides: {part}" for part in self.uncounted),
            *said_of_readers(self.refused),
        ]
        return "\n".join(lines)


@default_torch_state()
def plan(
    model_id_or_dir: str | os.PathLike[str],
    config: transformers.GPTQConfig | dict[str, Any],
    *,
    tensor_parallel: int = 1,
    **kwargs: Any,
) -> Estimate:
    """Say what `optq.quantize` with the same arguments will take and give. Reads the config and the data, no weights.

    The time is estimated from what this machine does in some seconds, with memory for a block and what lies outside.

    Args:
        tensor_parallel: over how many GPUs a server will split the model.
        kwargs: as for `optq.quantize`: dtype, revision, token, trust_remote_code, …
    Raises:
        ConfigError, CalibrationError, CheckpointError, ModelError: whatever would stop the run before its work.
    """
    config = GPTQConfig.from_stock(config)
    check_request(config, kwargs.get("device_map"), kwargs.get("offload_folder"))
    model = model_without_weights(place_of(model_id_or_dir), kwargs)
    check_files(place_of(model_id_or_dir), kwargs)
    prepared = prepare(model, config, where_in(kwargs))
    planned = prepared.plan
    check_kernels(model, planned, config, kwargs.get("device_map"), placed=False)
    calibration = prepared.calibration or prepared.calibration_with(partial(_stand_in, vocabulary_of(model)))
    put_split(model, prepared.experts)
    device = execution_device(config.device)
    targets = planned.all_targets
    stored = _stored_bits(config, prepared.budget, targets)
    weights = sum(math.prod(target.view.shape) for target in targets)
    left = dense_bytes(model, planned)
    memory = _memory(model, planned, calibration, device)
    activations, (on_device, _) = memory["activations"], config.activation_limits(device)
    memory["activations"] = min(activations, int(on_device))
    group_indices = sum(4 * target.view.shape[1] for target in targets)
    estimate = Estimate(
        model=place_of(model_id_or_dir),
        device=str(device),
        blocks=len(planned.without_head().blocks),
        linears=dict(Counter((*target.view.shape, target.scheme) for target in targets)),
        skipped=planned.skipped,
        tokens=calibration.info["tokens"],
        weaknesses=calibration.weak_for(planned.widest),
        bits_per_weight=stored / weights,
        checkpoint_gib=(stored / 8 + group_indices + left) / GIB,
        dense_gib=whole_bytes(model) / GIB,
        memory_gib={part: size / GIB for part, size in memory.items()},
        elsewhere_gib=max(0, activations - on_device) / GIB,
        free_gib=free_bytes(device) / GIB,
        seconds={},
        uncounted=(),
        refused=refused_by(as_linears(model, targets, config.format), planned.skipped, tensor_parallel),
        serving_gib={part: size / GIB for part, size in (prepared.budget.parts if prepared.budget else {}).items()},
        original_fits=prepared.budget is not None and prepared.budget.original_fits,
    )
    if not estimate.fits:
        return estimate
    duration = _duration(model, planned, calibration, config)
    return replace(estimate, seconds=duration.seconds, uncounted=duration.uncounted)


def _duration(model: Any, planned: Plan, calibration: Calibration, config: GPTQConfig) -> Duration:
    found = estimate(
        model,
        planned,
        calibration,
        Run(
            device=execution_device(config.device),
            sequential=config.true_sequential,
            reconstruction_passes=config.reconstruction_passes,
            log=RunLog(bar=False),
        ),
        candidates=(lambda view: config.candidates_for(view.name, *view.shape)) if config.has_budget else None,
    )
    if not config.own_text:
        return found
    return replace(found, uncounted=(*found.uncounted, "what the model writes to be calibrated on"))


def _stored_bits(config: GPTQConfig, budget: Budget | None, targets: Sequence[Target]) -> int:
    """What the linears take; with a budget, its limit, or what they take with the most bits that it may choose."""
    if budget is None:
        return sum(target.scheme.stored_bits(*target.view.shape) for target in targets)
    shapes = [(target.view.name, *target.view.shape) for target in targets]
    most = (max(each.stored_bits(*shape[1:]) for each in config.candidates_for(*shape)) for shape in shapes)
    return min(int(budget.bits), sum(most))


def _rounded(seconds: float) -> str:
    """Format seconds as a rough time in words."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"


def _stand_in(vocabulary: int, samples: int, length: int) -> list[list[int]]:
    """Placeholder data with as many tokens as the model will write: their number is all that counts here."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (samples, length), generator=generator, device="cpu").tolist()


def _memory(model: Any, planned: Plan, calibration: Calibration, device: torch.device) -> dict[str, int]:
    """Bytes of memory that a run takes on the device, by part."""
    size = (working_dtype(device) or model.dtype).itemsize
    outside = [p for name, p in model.named_parameters() if not any(name.startswith(f"{b}.") for b in planned.blocks)]
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in planned.blocks.values())
    streams = 2 if planned.propagates else 1
    width = model.config.get_text_config(decoder=True).hidden_size
    return {
        "embeddings, norms, head": sum(parameter.numel() * size for parameter in outside),
        "one block": 2 * largest * size,  # as it was, and as it becomes
        "Hessians": 4 * 3 * planned.widest**2 + max(map(_hessians, planned.targets.values())),
        "activations": streams * calibration.info["tokens"] * width * size,
    }


def _hessians(targets: Sequence[Target]) -> int:
    """Bytes of the Hessians that exist at once: of one stage, or of all experts of a layer."""
    experts = Counter(target.view.family for target in targets)
    return max(
        (
            4 * target.view.shape[1] ** 2 * (experts[target.view.family] if target.view.family else 1)
            for target in targets
        ),
        default=0,
    )
