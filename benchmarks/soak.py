# SPDX-License-Identifier: Apache-2.0
"""Soak: what a process keeps of quantize → save → load → generate, cycle after cycle.

    python benchmarks/soak.py --cycles 200

After each cycle: resident memory, file descriptors, threads and living tensors. The slopes are those of a straight
line through the second half, when caches are full.
"""

import argparse
import gc
import logging
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import optq
import record

ROWS = [{"input_ids": list(range(4 + start, 52 + start))} for start in range(16)]


def save_model(folder: Path) -> None:
    """A tiny random llama of two blocks."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**small, **heads, dtype="float32")).save_pretrained(folder)


def cycle(dense: Path) -> list[int]:
    """Quantize a model, save, load, and let it generate: the tokens."""
    config = optq.GPTQConfig(bits=4, group_size=32, dataset=ROWS, quality_gate="off")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        tokens = loaded.generate(torch.arange(4, 12)[None], max_new_tokens=16, do_sample=False)
    return tokens[0].tolist()


def kept() -> dict[str, float]:
    """What this process holds now."""
    gc.collect()
    process = psutil.Process()
    return {
        "resident_mib": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
    }


def slope(values: list[float]) -> float:
    """Of the straight line with the least squares, per step."""
    steps = torch.arange(len(values), dtype=torch.float64)
    steps -= steps.mean()
    return float((steps * torch.tensor(values, dtype=torch.float64)).sum() / (steps**2).sum())


def run(dense: Path, cycles: int) -> list[dict[str, float]]:
    """What is held after each cycle. Raises AssertionError if one generates other tokens than the first."""
    first, found = cycle(dense), []
    for _ in range(cycles):
        assert cycle(dense) == first, "a cycle generated other tokens than the first"
        found.append(kept())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=200)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        found = run(Path(folder), asked.cycles)
    results: dict[str, Any] = {}
    for what in found[0]:
        values = [each[what] for each in found]
        settled = values[len(values) // 2 :]
        results[what] = {
            "first": round(values[0], 1),
            "last": round(values[-1], 1),
            "slope_per_cycle": round(slope(settled), 4),
        }
    record.write("soak", {"cycles": asked.cycles}, results)


if __name__ == "__main__":
    main()
