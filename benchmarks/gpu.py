# SPDX-License-Identifier: Apache-2.0
"""What a GPU is asked in ten minutes: five steps, each with its own limit of time, and a table of what they found.

    make gpu-1                                       # … gpu-5, with the Python and the torch of the machine
    make gpu GPU_RESULTS=/somewhere                  # all of them
    python benchmarks/gpu.py 2 3 --results build/gpu
    python benchmarks/gpu.py --results build/gpu     # the table alone, of what is there

A step is a few programs, one after the other. One that fails, or takes longer than it may, is ended, and the next one
starts; what it had measured by then is kept. In the folder of results: the JSON of each benchmark, what each program
printed, `parts.json` with how each ended, and `summary.md`, in which every figure has its floor beside it: what bytes
or arithmetic take at least, at the rates of plain copies and products on the same machine.

Asked of the machine: torch, Triton and a C compiler, transformers, accelerate, psutil, rich, pytest; and no
network. What is missing may lie in any folder of PYTHONPATH: `pip install --target FOLDER NAME`.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEP_SECONDS = 570.0  # ten minutes, less what it takes to start and to write the table
SECONDS_TO_END = 10.0  # after which a program that was asked to end is killed
NEEDED = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "safetensors",
    "psutil",
    "rich",
    "tqdm",
    "pytest",
)
ENDED = "PASSED|FAILED|ERROR|SKIPPED"
OUTCOME = re.compile(
    rf"^(?:\[gw\d+\].*?({ENDED}) tests/|tests/\S+::.* ({ENDED})\b)", re.MULTILINE
)  # of several, or one


@dataclass(frozen=True, kw_only=True)
class Part:
    """One program of a step.

    Args:
        name: of the file with what it prints.
        command: arguments of Python, in the root of the repository.
        seconds: at most; less if the step has less left.
    """

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a part ended: "done", "failed", "ended after its time" or "not started", and after how many seconds."""

    outcome: str
    seconds: float


def pytest_part(name: str, selected: str, seconds: float) -> Part:
    processes = str(max(1, min(8, (os.cpu_count() or 1) // 2)))  # compiling is what takes the time
    at_once = ("--numprocesses", processes) if find_spec("xdist") else ()
    # Warnings of versions that nobody has tried are no failures.
    flags = ("-m", "gpu", "-v", "--tb=short", "-o", "filterwarnings=default", *at_once)
    return Part(name=name, command=("-m", "pytest", "tests/test_gpu.py", "-k", selected, *flags), seconds=seconds)


def benchmark(name: str, script: str, *arguments: str, seconds: float) -> Part:
    return Part(name=name, command=(f"benchmarks/{script}.py", *arguments), seconds=seconds)


PRODUCTS = "error_is_at_most_twice or err_at_most_twice"  # hundreds of shapes, each of which is compiled
STEPS: dict[int, tuple[Part, ...]] = {
    1: (
        pytest_part("tests", f"not ({PRODUCTS})", seconds=280),
        pytest_part("tests-of-products", PRODUCTS, seconds=STEP_SECONDS),
    ),
    2: (
        benchmark("kernels-4-bits", "kernels", "--bits", "4", "--models", "8B", seconds=280),
        benchmark("kernels-other-bits", "kernels", "--bits", "2", "3", "8", "--models", "8B", seconds=STEP_SECONDS),
    ),
    3: (
        benchmark("large-tiny", "large", "--only", "tiny*", seconds=150),
        benchmark("experts", "experts", seconds=STEP_SECONDS),
    ),
    4: (
        benchmark("solver", "solver", seconds=220),
        benchmark("large-8B-in-part", "large", "--only", "8B in part", seconds=STEP_SECONDS),
    ),
    5: (benchmark("generate", "generate", seconds=STEP_SECONDS),),
}


def run(parts: Sequence[Part], folder: Path, seconds: float = STEP_SECONDS) -> dict[str, Ended]:
    """Run parts one after the other, whatever becomes of each; how they ended is in `parts.json` as well.

    Args:
        seconds: for all of them together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    ended: dict[str, Ended] = {}
    for part in parts:
        left = deadline - time.monotonic()
        ended[part.name] = (
            run_part(part, folder, min(part.seconds, left)) if left > 0 else Ended(outcome="not started", seconds=0.0)
        )
        print(part.name, ended[part.name].outcome, f"{ended[part.name].seconds:.0f} s", flush=True)
        known = read_json(folder / "parts.json")
        facts = known | {name: asdict(each) for name, each in ended.items()}
        (folder / "parts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return ended


def run_part(part: Part, folder: Path, seconds: float) -> Ended:
    """Run one program; it and what it has started end with its time."""
    started = time.monotonic()
    environment = {**os.environ, "OPTQ_RESULTS": str(folder.resolve()), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / f"{part.name}.txt").open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # and no session of its own, which whoever ends ours would pass over
        )
        try:
            outcome = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            outcome = "ended after its time"
        finally:
            end(process)
    return Ended(outcome=outcome, seconds=round(time.monotonic() - started, 1))


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process with all that it has started in its group, also if the process itself is gone."""
    for kind, patience in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


Row = tuple[str, str, str, str]
"""Figure, measured, floor, the part of the measured time that the floor is."""


def row(figure: str, measured: float, floor: float, unit: str, *, more_is_better: bool = False) -> Row:
    share = measured / floor if more_is_better else floor / measured if measured else 0.0
    return figure, f"{measured:g} {unit}", f"{floor:g} {unit}", f"{share:.0%}"


def rows_of_kernels(results: dict[str, Any]) -> Iterator[Row]:
    for shape, by_rows in results.items():
        for rows, facts in by_rows.items():
            for way, taken in facts["us"].items():
                floor = facts["dense_floor_us"] if way == "dense bfloat16" else facts["floor_us"]
                yield row(f"{shape}, {rows} rows: {way}", taken, floor, "us")


def rows_of_experts(results: dict[str, Any]) -> Iterator[Row]:
    for name, by_tokens in results.items():
        for tokens, facts in by_tokens.items():
            for way, taken in facts["us"].items():
                yield row(f"{name}, {tokens} tokens: {way}", taken, facts["floor_us"], "us")


def rows_of_solver(results: dict[str, Any]) -> Iterator[Row]:
    for shape, facts in results.items():
        for effort in ("fast", "default"):
            floor = facts[effort]["floor"]
            for way, taken in facts[effort].items():
                if way != "floor":
                    yield row(f"solve {shape}, {effort}: {way}", taken, floor, "s")


def rows_of_large(results: dict[str, Any]) -> Iterator[Row]:
    for name, facts in results.items():
        for part, floor in facts["bound_by_part"].items():
            if part in facts["by_part"]:
                yield row(f"quantize {name}: {part}", facts["by_part"][part], floor, "s")
        whole = sum(facts["bound_by_part"].values())
        yield row(f"quantize {name}: all; peak memory {facts['peak_gib']:.2f} GiB", facts["seconds"], whole, "s")


def rows_of_generate(results: dict[str, Any]) -> Iterator[Row]:
    for way, facts in results.items():
        for model, rate in facts.get("tokens_per_second", {}).items():
            most = facts["most_tokens_per_second"][model]
            yield row(f"{way}: {model}", rate, most, "tokens/s", more_is_better=True)


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "kernels": rows_of_kernels,
    "experts": rows_of_experts,
    "solver": rows_of_solver,
    "large": rows_of_large,
    "generate": rows_of_generate,
}
"""By the first word of a file's name: the rows of its results."""


def tests_of(printed: Path) -> str:
    """How many tests of a log passed, failed and so on, also where pytest was ended before it could say so."""
    text = printed.read_text(encoding="utf-8", errors="replace")
    found = Counter(match[1] or match[2] for match in OUTCOME.finditer(text))
    return ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(found.items())) or "no test ended"


def summary(folder: Path) -> str:
    """Markdown: how the parts ended, and all figures with their floors."""
    lines = ["| part | ended | seconds | |", "|---|---|---|---|"]
    for name, facts in read_json(folder / "parts.json").items():
        tests = tests_of(folder / f"{name}.txt") if name.startswith("tests") else ""
        lines.append(f"| {name} | {facts['outcome']} | {facts['seconds']} | {tests} |")
    lines += ["", "| figure | measured | floor | of the floor |", "|---|---|---|---|"]
    for path in sorted(folder.glob("*-*.json")):
        for cells in ROWS[path.name.partition("-")[0]](read_json(path)["results"]):
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", type=int, choices=STEPS, metavar="STEP", help="1 … 5")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}. Install what is missing, or name a folder that has it "
            "in PYTHONPATH; `pip install --target FOLDER NAME` makes one."
        )
    has_gpu = "import torch, sys; sys.exit(not torch.accelerator.is_available())"
    if arguments.steps and subprocess.run([sys.executable, "-c", has_gpu], check=False).returncode:
        raise SystemExit(
            f"The torch of {sys.executable} sees no GPU, and every step measures one; nothing was run. Is the driver "
            "there, and is this torch built for GPUs? `make test` is for machines without one."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and with us what we have started
    failed = False
    for step in arguments.steps:
        ended = run(STEPS[step], arguments.results)
        failed |= any(each.outcome != "done" for each in ended.values())
    table = summary(arguments.results)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "summary.md").write_text(table, encoding="utf-8")
    print(table)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
