# SPDX-License-Identifier: Apache-2.0
"""What `optq.plan` says of the time, and the progress after the third block, beside what runs really take.

Each case plans and then quantizes in a process of its own. Of SmolLM2-135M-Instruct only the first blocks are there,
as the time is linear in them; the other model has random weights. Calibration is on random tokens: which ones makes no
difference to the time.

All seconds, also those that the estimates are made from, are the process's CPU time: on one core, with one thread,
what it takes where nothing else is going on. So the figures hold on machines that are shared.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/duration.py [--only "SmolLM2*"]

Rows are written to benchmarks/results/duration.json as they are done.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from functools import wraps
from pathlib import Path
from typing import Any

import memory
import quality
import record

BLOCKS = 6  # of SmolLM2's 30
SMOLLM2 = {"source": "SmolLM2", "samples": 64, "length": 512, "bits": 4, "group_size": 64}
FEWER = {**SMOLLM2, "samples": 32}
WIDE = {"source": "random", "depth": 4, "width": 1024, "samples": 32, "length": 256, "bits": 4, "group_size": 128}
CASES: dict[str, dict[str, Any]] = {
    "SmolLM2, fast": {**SMOLLM2, "effort": "fast"},
    "SmolLM2, default": SMOLLM2,
    "1024 wide, fast": {**WIDE, "effort": "fast"},
    "1024 wide, default": WIDE,
    "SmolLM2, half the data, with its head": {**FEWER, "lm_head": True},
    "SmolLM2, half the data, 3.3 bits per weight": {**FEWER, "target_bits_per_weight": 3.3},
    "SmolLM2, half the data, max": {**FEWER, "effort": "max"},
    "SmolLM2, half the data, 2 bits asymmetric, groups of 32": {**FEWER, "bits": 2, "sym": False, "group_size": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--plan-only", action="store_true", help="keep what the runs took, and plan once more")
    parser.add_argument("--case", nargs=3, metavar=("SETTINGS", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        settings, source, output = arguments.case
        print(json.dumps(in_this_process(json.loads(settings), source, output)))
        return
    results = record.read("duration")
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in CASES.items():
            if fnmatch(name, arguments.only):
                source = str(source_of(case, Path(scratch)))
                output = "" if arguments.plan_only else str(Path(scratch, name))
                found = in_a_new_process(case, source, output)
                results[name] = {**results.get(name, {}), **found, "measured_at": record.measured_at()}
                print(name, json.dumps(found, indent=1), flush=True)
                record.write("duration", {"blocks_of_smollm2": BLOCKS, "cases": CASES}, results, quiet=True)


def source_of(case: dict[str, Any], scratch: Path) -> Path:
    folder = scratch / case["source"]
    if folder.exists():
        return folder
    if case["source"] == "random":
        return memory.model(case["depth"], case["width"], folder)
    whole = Path(quality.model_folder())
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS}))
    return folder


def in_a_new_process(case: dict[str, Any], source: str, output: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(case), source, output]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def in_this_process(case: dict[str, Any], source: str, output: str) -> dict[str, Any]:
    time.monotonic = time.perf_counter = time.process_time  # before anybody takes them
    import torch

    import optq

    settings = {key: value for key, value in case.items() if key not in ("source", "depth", "width")}
    torch.manual_seed(0)
    rows = torch.randint(0, 1000, (settings.pop("samples"), settings.pop("length"))).tolist()
    config = optq.GPTQConfig(**settings, dataset=[{"input_ids": row} for row in rows])
    started = time.monotonic()
    estimate = optq.plan(source, config, dtype=torch.float32)
    found: dict[str, Any] = {
        "planning_seconds": round(time.monotonic() - started, 1),
        "predicted": {part: round(seconds, 1) for part, seconds in estimate.seconds.items()},
    }
    if not output:
        return found
    spent, left = watched(), seconds_left()
    optq.quantize(source, config, output_dir=output, dtype=torch.float32)
    log = [json.loads(line) for line in Path(output, "quantization_log.jsonl").read_text().splitlines()]
    return {**found, **what_it_took(log, spent, left)}


def watched(before_and_after: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Seconds by part, from now on. What one part does inside another counts for the outer one only.

    Args:
        before_and_after: waits for what still runs elsewhere.
    """
    import optq.hf.quantizing
    import optq.quantization.bit_allocation
    import optq.quantization.block
    import optq.quantization.driver
    import optq.quantization.stage_solver
    from optq.gptq import Hessian, InputDrift
    from optq.hf.streaming import StreamedBlocks
    from optq.runs.journal import Journal

    spent: dict[str, float] = {}
    inside: list[str] = []

    def watch(owner: Any, name: str, part: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before_and_after()
            started = time.monotonic()
            inside.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                inside.pop()
                before_and_after()
                if not inside:
                    spent[part] = spent.get(part, 0.0) + time.monotonic() - started

        setattr(owner, name, timed)

    watch(optq.hf.quantizing, "allocate", "search of the best bits")
    watch(StreamedBlocks, "read", "reading and writing")
    watch(optq.quantization.driver, "pack", "reading and writing")
    watch(Journal, "write", "reading and writing")
    watch(Hessian, "add", "Hessians")
    watch(InputDrift, "add", "Hessians")
    watch(optq.quantization.stage_solver, "solve", "solving")
    watch(optq.quantization.block, "reconstruct", "block reconstruction")
    return spent


def seconds_left() -> list[float]:
    """After each block, from now on."""
    from optq.events import RunLog

    found: list[float] = []
    emit = RunLog.emit

    def emitted(log: RunLog, kind: str, **facts: Any) -> None:
        emit(log, kind, **facts)
        if kind == "block":
            found.append(log.seconds_left)

    RunLog.emit = emitted  # type: ignore[method-assign]
    return found


def what_it_took(log: list[dict[str, Any]], spent: dict[str, float], left: list[float]) -> dict[str, Any]:
    blocks = [event for event in log if event["event"] == "block"]
    (finished,) = (event for event in log if event["event"] == "finished")
    apart = spent.get("search of the best bits", 0.0)
    spent = {**spent, "forwards": finished["seconds"] - sum(spent.values()) + apart}
    after = sum(event["seconds"] for event in blocks[3:])
    return {
        "real": {part: round(seconds, 1) for part, seconds in spent.items()},
        "block_seconds": [event["seconds"] for event in blocks],
        "left_after_third_block": {"estimated": round(left[2], 1), "real": round(after, 1)},
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
