# SPDX-License-Identifier: Apache-2.0
"""Decoding speed at batch 1, as `generate` delivers it."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """Tokens per second of greedy decoding; the best of several runs, and all of them."""

    tokens_per_second: float
    runs: tuple[float, ...]


@torch.no_grad()
def decode_speed(model: Any, prompt: Tensor, tokens: int = 32, repeats: int = 3) -> DecodeSpeed:
    """Time `generate` on one prompt, after one short run to warm up.

    Args:
        prompt: (1, length) int64.
        tokens: new tokens per run, exactly. The time to read the prompt is included, so keep it short.
        repeats: runs; noise only ever slows a run down, so the best one is reported.
    """
    prompt = prompt.to(model.device)
    arguments = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=2, min_new_tokens=2, **arguments)
    runs = []
    for _ in range(repeats):
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **arguments)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        runs.append(tokens / (time.perf_counter() - started))
    return DecodeSpeed(tokens_per_second=max(runs), runs=tuple(runs))
