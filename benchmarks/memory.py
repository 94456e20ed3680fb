# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `optq.quantize` against the depth of the model, and resuming after being killed.

Models of random weights and equal width are written to disk and quantized, each in its own process; one also with much
calibration data, with and without a limit for what waits between blocks. Then a run is killed at random moments, as
often as asked, and repeated until it ends; its bytes are compared with those of a run that was left alone.

    python benchmarks/memory.py [--parts depth limits killed] [--kills 20]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

DEPTHS, HIDDEN, SEED = (8, 64), 512, 0
LIMITED: dict[str, dict[str, Any]] = {
    "4 096 tokens": {},
    "131 072 tokens": {"samples": 1024},
    "131 072 tokens, 64 MiB for activations": {"samples": 1024, "activation_memory": {"cpu": "64MiB"}},
}
KILLED_DEPTH, KILLED_HIDDEN = 12, 128

QUANTIZE = """
import json, sys
import torch
import optq
torch.manual_seed(0)
settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
rows = [{"input_ids": row.tolist()} for row in torch.randint(0, 1000, (settings.pop("samples", 32), 128))]
optq.quantize(sys.argv[1], optq.GPTQConfig(bits=4, group_size=64, dataset=rows, **settings), output_dir=sys.argv[2])
from optq.device.memory import peak_gib
print(json.dumps({"peak_rss_mb": round(peak_gib("cpu") * 2**30 / 1e6)}))
"""


PARTS = ("depth", "limits", "killed")


def model(depth: int, hidden: int, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def depths(scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for depth in DEPTHS:
        source = model(depth, HIDDEN, scratch / f"depth-{depth}")
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        started = time.perf_counter()
        command = [sys.executable, "-c", QUANTIZE, str(source), str(scratch / f"out-{depth}")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(depth)] = {
            "dense_mb_on_disk": round(size / 1e6),
            **json.loads(ran.stdout.splitlines()[-1]),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(depth, found[str(depth)], flush=True)
    least, most = (found[str(depth)]["peak_rss_mb"] for depth in DEPTHS)
    return {"blocks": found, "peak_ratio": round(most / least, 3)}


def limits(scratch: Path) -> dict[str, Any]:
    """The same data with and without a limit for what waits between blocks, and little data."""
    source = model(DEPTHS[0], HIDDEN, scratch / "limited")
    found: dict[str, Any] = {}
    for name, settings in LIMITED.items():
        started = time.perf_counter()
        command = [sys.executable, "-c", QUANTIZE, str(source), str(scratch / name), json.dumps(settings)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = {
            **json.loads(ran.stdout.splitlines()[-1]),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(name, found[name], flush=True)
    many, limited = (weights(scratch / name) for name in list(LIMITED)[1:])
    return {"runs": found, "identical": many == limited}


def kills(scratch: Path, count: int) -> dict[str, Any]:
    source = model(KILLED_DEPTH, KILLED_HIDDEN, scratch / "killed")
    command = [sys.executable, "-c", QUANTIZE, str(source)]
    started = time.perf_counter()
    subprocess.run([*command, str(scratch / "whole")], capture_output=True, check=True)
    whole_run = time.perf_counter() - started
    expected = weights(scratch / "whole")
    chance, moments, identical, output = random.Random(SEED), [], 0, scratch / "resumed"
    runs = 0
    while len(moments) < count:
        process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(0.2, 1.0) * whole_run)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            partial = output / ".optq-partial"
            if partial.exists() or not (output / "config.json").exists():
                moments.append(len(list(partial.glob("block-*.safetensors"))))
                continue
            # Else it had finished, and was killed while Python ended.
        runs += 1
        identical += weights(output) == expected
        print(f"run {runs} ended, {identical} identical; killed with so many finished blocks: {moments}", flush=True)
        output = scratch / f"resumed-{runs}"
    subprocess.run([*command, str(output)], capture_output=True, check=True)
    identical += weights(output) == expected
    return {"kills": count, "finished_blocks_when_killed": moments, "runs": runs + 1, "identical": identical}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    results = record.read("memory")
    with tempfile.TemporaryDirectory() as scratch:
        if "depth" in arguments.parts:
            results["depth"] = depths(Path(scratch))
        if "limits" in arguments.parts:
            results["limits"] = limits(Path(scratch))
        if "killed" in arguments.parts:
            results["killed"] = kills(Path(scratch), arguments.kills)
    settings = {
        "hidden_size": HIDDEN,
        "calibration": "32 x 128 random tokens",
        "config": "4 bits, groups of 64, default effort",
        "killed_model": f"{KILLED_DEPTH} blocks, {KILLED_HIDDEN} wide",
        "seed": SEED,
    }
    record.write("memory", settings, results)


if __name__ == "__main__":
    main()
