# SPDX-License-Identifier: Apache-2.0
"""What part of loading a packed checkpoint goes into checking it: shapes of the model, and values of small tensors.

Random weights, rounded to nearest, of the widths of a model with 1.1 billion. Medians of several loads in one process.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/checks.py
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import optq
import record
from optq.checkpoint import pack
from optq.gptq import round_to_nearest
from optq.hf import loading
from optq.scheme import LayerScheme

WIDTHS = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
BLOCKS, VOCABULARY, LOADS = 6, 32000, 7


def main() -> None:
    torch.set_num_threads(1)
    spent: dict[str, float] = {}
    loading.check_complete = timed(loading.check_complete, "shapes", spent)
    unusable = loading.unusable  # whatever it yields is wrong, so all of it is asked for here
    loading.unusable = timed(lambda *args: list(unusable(*args)), "values", spent)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for group_size in (128, 32):
            folder = written(Path(scratch, str(group_size)), group_size)
            shares, seconds = [], []
            for _ in range(LOADS):
                spent.clear()
                started = time.process_time()
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
                seconds.append(time.process_time() - started)
                shares.append(sum(spent.values()) / seconds[-1])
            results[f"groups of {group_size}"] = {
                "cpu_seconds": round(statistics.median(seconds), 3),
                "share": round(statistics.median(shares), 4),
                "shares": [round(share, 4) for share in sorted(shares)],
                "mib": round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20),
            }
    record.write("checks", {**WIDTHS, "blocks": BLOCKS, "vocabulary": VOCABULARY, "bits": 4, "loads": LOADS}, results)


def written(folder: Path, group_size: int) -> Path:
    """A packed checkpoint of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**WIDTHS, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, dtype="bfloat16")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    scheme = LayerScheme(bits=4, group_size=group_size)
    tensors = {}
    for name, tensor in model.state_dict().items():
        linear = name.removesuffix(".weight")
        if ".layers." in name and tensor.ndim == 2:
            packed = pack(round_to_nearest(tensor.float(), scheme))
            tensors |= {f"{linear}.{part}": value for part, value in packed.tensors().items()}
        else:
            tensors[name] = tensor.contiguous()
    folder.mkdir()
    model.config.quantization_config = optq.GPTQConfig(bits=4, group_size=group_size).to_dict()
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def outer(*args: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - started

    return outer


if __name__ == "__main__":
    main()
