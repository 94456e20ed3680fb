# SPDX-License-Identifier: Apache-2.0
"""What the forwards that wait for a block cost a process: threads, CPU time and memory, by number of micro-batches.

A tiny llama of random weights is quantized on one sample per micro-batch, in a process of its own, and its threads are
counted from outside. Versions of optq take turns; the digest says whether they write the same bytes.

    python benchmarks/waiting.py
    python benchmarks/waiting.py --versions now=src before=/elsewhere/src
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import record

SAMPLES, TOKENS, TURNS, SEED = (64, 1024), 16, 3, 0
EFFORTS = ("fast", "default")

QUANTIZE = """
import json, sys, time
import torch
import optq
torch.set_num_threads(1)
torch.manual_seed(0)
rows = [{"input_ids": row.tolist()} for row in torch.randint(0, 500, (int(sys.argv[3]), int(sys.argv[4])))]
config = optq.GPTQConfig(bits=4, group_size=32, dataset=rows, batch_size=1, effort=sys.argv[5])
started = time.process_time()
optq.quantize(sys.argv[1], config, output_dir=sys.argv[2])
taken = time.process_time() - started
from optq.device.memory import peak_gib
print(json.dumps({"cpu_seconds": round(taken, 2), "peak_gib": round(peak_gib("cpu"), 3)}))
"""


def write_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measured(source: Path, code: str, samples: int, effort: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-c", QUANTIZE, str(source), output, str(samples), str(TOKENS), effort]
        environment = {**os.environ, "PYTHONPATH": code, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        watched, most = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                most = max(most, watched.num_threads())
            except psutil.Error:  # it has just ended
                break
            time.sleep(0.05)
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{code} failed")
        digest = hashlib.sha256()
        for path in sorted(Path(output).glob("*.safetensors")):
            digest.update(path.read_bytes())
    return {"most_threads": most, **json.loads(printed.splitlines()[-1]), "digest": digest.hexdigest()[:16]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["now=src"], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    versions = dict(version.split("=", 1) for version in arguments.versions)
    results: dict[str, Any] = record.read("waiting")
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        for samples in SAMPLES:
            for effort in EFFORTS:
                turns: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
                for _ in range(TURNS):
                    for name, code in versions.items():
                        turns[name].append(measured(Path(scratch), str(Path(code).resolve()), samples, effort))
                for name, found in turns.items():
                    results.setdefault(f"{samples} micro-batches, {effort}", {})[name] = {
                        "most_threads": max(each["most_threads"] for each in found),
                        "cpu_seconds": statistics.median(each["cpu_seconds"] for each in found),
                        "peak_gib": statistics.median(each["peak_gib"] for each in found),
                        "digest": " ".join(sorted({each["digest"] for each in found})),
                    }
                print(samples, effort, json.dumps(results[f"{samples} micro-batches, {effort}"]), flush=True)
    settings = {"tokens": TOKENS, "turns": TURNS, "batch_size": 1, "seed": SEED}
    record.write("waiting", settings, results, quiet=True)


if __name__ == "__main__":
    main()
