# SPDX-License-Identifier: Apache-2.0
"""Threads: whether many that share one packed model generate what one alone does.

    python benchmarks/threads.py --threads 24 --seconds 120

First, eight threads at once call models that nobody has called before, which is when a layer chooses its kernel and
lays out its codes. Then each thread generates for some time, from prompts of various lengths, also several at once.
Every result is compared with that of one thread: tokens have to be equal.
"""

import argparse
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

import optq
import record
import soak

SEED = 0
SHAPES = ((1, 4), (1, 17), (3, 9), (1, 40), (8, 5), (2, 33))
"""Prompts and their tokens, which decide how a layer multiplies."""

FIRST_CALLERS = 8


def prompts() -> list[torch.Tensor]:
    """Token ids (prompts, tokens), one batch of each of `SHAPES`."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(4, 128, shape, generator=generator) for shape in SHAPES]


def generated(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """The tokens of each prompt of a batch (prompts, tokens), continued by 16."""
    tokens: list[list[int]] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
    ).tolist()
    return tokens


def run(model: Any, expected: list[list[list[int]]], threads: int, is_over: Callable[[int], bool]) -> dict[str, int]:
    """Let threads generate at once, each beginning with another batch.

    Args:
        expected: the tokens of `prompts()`, by one thread.
        is_over: whether a thread that has made so many generations is to end.
    Returns:
        How many generations there were, of how many the tokens differ, and how many ended with an error.
    """
    begin, found = threading.Barrier(threads), []

    def work(first: int) -> None:
        counts = {"generations": 0, "differences": 0, "errors": 0}
        found.append(counts)
        pairs = list(zip(prompts(), expected, strict=True))
        begin.wait()
        for ids, tokens in islice(cycle(pairs), first, None):
            if is_over(counts["generations"]):
                return
            counts["generations"] += 1
            try:
                counts["differences"] += generated(model, ids) != tokens
            except Exception:  # whatever it is, it is counted
                counts["errors"] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {what: sum(counts[what] for counts in found) for what in found[0]}


def save_packed(folder: Path) -> Path:
    """The tiny llama of `soak`, quantized."""
    dense, packed = folder / "dense", folder / "packed"
    soak.save_model(dense)
    config = optq.GPTQConfig(bits=4, group_size=32, dataset=soak.ROWS, quality_gate="off")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(packed)
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--models", type=int, default=20, help="called first by eight threads")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        packed = save_packed(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(packed)
        expected = [generated(model, ids) for ids in prompts()]
        firsts = [
            run(AutoModelForCausalLM.from_pretrained(packed), expected, FIRST_CALLERS, lambda done: done >= 1)
            for _ in range(asked.models)
        ]
        end = time.monotonic() + asked.seconds
        together = run(model, expected, asked.threads, lambda done: time.monotonic() > end)
    results = {
        "first_calls": {what: sum(each[what] for each in firsts) for what in together},
        "generating": together,
    }
    settings = {"threads": asked.threads, "seconds": asked.seconds, "models": asked.models, "seed": SEED}
    record.write("threads", settings, results)


if __name__ == "__main__":
    main()
