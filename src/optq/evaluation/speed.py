# SPDX-License-Identifier: Apache-2.0
"""Speed of generation, as `generate` delivers it: reading the prompt and writing new tokens apart."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from optq.device.memory import peak_gib


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of generation; medians over the runs.

    Args:
        batch: sequences at once.
        prompt, new: tokens of each.
        first_seconds: from the call to the first new token of all sequences.
        prompt_tokens_per_second: of all sequences together, until the first new token.
        new_tokens_per_second: of all sequences together, after the first new token.
        step_seconds: from one new token to the next: the 50th, 90th and 99th percentile over all steps of all runs.
        peak_gib: peak memory; of the process on a CPU, None where the system does not tell.
    """

    batch: int
    prompt: int
    new: int
    first_seconds: float
    prompt_tokens_per_second: float
    new_tokens_per_second: float
    step_seconds: tuple[float, float, float]
    peak_gib: float | None


@torch.no_grad()
def generation_speed(model: Any, prompt: Tensor, batch: int = 1, new: int = 32, runs: int = 3) -> Speed:
    """Time greedy `generate`, after one short run to warm up.

    Args:
        prompt: (1, tokens) int64; every sequence of the batch starts with it.
        new: new tokens per sequence, exactly; at least 2.
    """
    prompt = prompt.to(model.device).expand(batch, -1)
    _clocked(model, prompt, 2)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    timed = [_clocked(model, prompt, new) for _ in range(runs)]
    first = statistics.median(run[0] for run in timed)
    steps = [step for run in timed for step in run[1:]]
    cuts = statistics.quantiles(steps, n=100, method="inclusive") if len(steps) > 1 else steps * 99
    return Speed(
        batch=batch,
        prompt=prompt.shape[1],
        new=new,
        first_seconds=first,
        prompt_tokens_per_second=prompt.numel() / first,
        new_tokens_per_second=statistics.median(batch * (new - 1) / sum(run[1:]) for run in timed),
        step_seconds=(cuts[49], cuts[89], cuts[98]),
        peak_gib=peak_gib(model.device),
    )


class _Clock(StoppingCriteria):
    """Notes the time after every new token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _clocked(model: Any, prompt: Tensor, new: int) -> list[float]:
    """Seconds until each new token since the one before."""
    clock = _Clock()
    started = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [after - before for before, after in zip([started, *clock.times], clock.times, strict=False)]
