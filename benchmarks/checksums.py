# SPDX-License-Identifier: Apache-2.0
"""What part of a run's CPU time goes into the checksums of its weights and blocks, at effort="fast" and little data.

That is where the share is largest: it falls with the calibration data, and with the effort. Random weights of the
widths of a model with 1.1 billion; the time is linear in blocks.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/checksums.py
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import optq
import record
from optq.files import output
from optq.runs import journal

WIDTHS = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
SETTINGS = {"blocks": 2, "vocabulary": 32000, "samples": 16, "tokens each": 256, "effort": "fast", "dtype": "bfloat16"}


def main() -> None:
    torch.manual_seed(0)
    model_config = LlamaConfig(
        **WIDTHS, num_hidden_layers=SETTINGS["blocks"], vocab_size=SETTINGS["vocabulary"], dtype="bfloat16"
    )
    rows = torch.randint(0, SETTINGS["vocabulary"], (SETTINGS["samples"], SETTINGS["tokens each"])).tolist()
    spent: dict[str, float] = {}
    for name in ("digest_of", "digest_of_file", "_identity"):
        setattr(journal, name, timed(getattr(journal, name), name.strip("_"), spent))
    output.digest_of_file = journal.digest_of_file  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16).save_pretrained(source)
        config = optq.GPTQConfig(
            bits=4, group_size=128, effort=SETTINGS["effort"], dataset=[{"input_ids": row} for row in rows]
        )
        started = time.process_time()
        optq.quantize(source, config, output_dir=Path(folder, "out"))
        seconds = time.process_time() - started
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    record.write(
        "checksums",
        {**WIDTHS, **SETTINGS},
        {
            "cpu_seconds": round(seconds, 2),
            "checksums_cpu_seconds": {name: round(each, 3) for name, each in spent.items()},
            "share": round(sum(spent.values()) / seconds, 5),
            "model_mib": round(size / 2**20),
        },
    )


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def outer(*args: Any) -> Any:
        started = time.process_time()
        found = function(*args)
        spent[name] = spent.get(name, 0) + time.process_time() - started
        return found

    return outer


if __name__ == "__main__":
    main()
