# SPDX-License-Identifier: Apache-2.0
"""Two processes with a thread each against one process with two threads, on two cores.

SmolLM2-135M-Instruct, 64 x 512 tokens of WikiText-2's validation text, float32. Both ways run in turn, as often as
asked; the median wall time of each is compared, from the start of `optq.quantize` to its end.

    python benchmarks/processes.py --data FOLDER [--rounds 2] [--effort fast]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import quality
import record

CORES = 2

QUANTIZE = """
import json, os, sys, time
import torch
import optq
source, rows, output, effort = sys.argv[1:]
data = [{"input_ids": row} for row in json.load(open(rows))]
config = optq.GPTQConfig(bits=4, group_size=64, effort=effort, dataset=data)
started = time.monotonic()
optq.quantize(source, config, output_dir=output, dtype=torch.float32)
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(time.monotonic() - started))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--effort", default="fast")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    source = quality.model_folder()
    seconds: dict[str, list[float]] = {"one process": [], "two processes": []}
    quality_of: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = quality.calibration_rows(AutoTokenizer.from_pretrained(source), arguments.data / "wikitext2-valid.txt")
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "quantize.py").write_text(QUANTIZE)
        for _ in range(arguments.rounds):
            for way, found in seconds.items():
                output = folder / f"{way} {len(found)}"
                found.append(run(way, folder, source, output, arguments.effort))
                log = [json.loads(line) for line in (output / "quantization_log.jsonl").read_text().splitlines()]
                quality_of[way] = next(event for event in log if event["event"] == "quality")
                print(f"{way}: {found[-1]:.1f} s", flush=True)
    alone, together = (statistics.median(found) for found in seconds.values())
    results = {
        "seconds": {way: [round(one, 1) for one in found] for way, found in seconds.items()},
        "two_processes_to_one": round(together / alone, 3),
        "divergence": {way: event["divergence"] for way, event in quality_of.items()},
    }
    settings = {"model": "SmolLM2-135M-Instruct", "tokens": [64, 512], "effort": arguments.effort, "cores": CORES}
    record.write("processes", settings, results)


def run(way: str, folder: Path, source: str, output: Path, effort: str) -> float:
    """Seconds."""
    two = way == "two processes"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CORES}"] if two else []
    script = [str(folder / "quantize.py"), source, str(folder / "rows.json"), str(output), effort]
    threads = {"OMP_NUM_THREADS": "1" if two else str(CORES)}
    ended = subprocess.run(
        [sys.executable, *launcher, *script],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **threads},
    )
    return float(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
