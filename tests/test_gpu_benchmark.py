# SPDX-License-Identifier: Apache-2.0
"""`make gpu-1` … `gpu-5` lose no figure, whatever becomes of a program, and ask for nothing that is not there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("optimum", "datasets", "gguf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
FACTS = {"us": {"optq triton": 4.0, "dense bfloat16": 8.0}, "floor_us": 2.0, "dense_floor_us": 6.0}
MEASURES = f"""
import sys
sys.path.insert(0, "benchmarks")
import record
record.write("kernels-a-gpu", {{}}, {{"a shape": {{"1": {FACTS}}}}})
"""
HANGS = f"""
import json, os, subprocess, sys, time
with open(os.environ["OPTQ_RESULTS"] + "/kernels-before-it-hung.json", "w") as file:
    json.dump({{"results": {{"a shape": {{"1": {FACTS}}}}}}}, file)
print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu

        return gpu
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_parts_that_fail_or_hang_end_and_what_was_measured_stays(gpu, tmp_path):
    parts = [
        gpu.Part(name="fails", command=("-c", "raise SystemExit('broken')"), seconds=60),
        gpu.Part(name="hangs", command=("-c", HANGS), seconds=1),
        gpu.Part(name="measures", command=("-c", MEASURES), seconds=60),
    ]
    ended = gpu.run(parts, tmp_path)
    assert [each.outcome for each in ended.values()] == ["failed", "ended after its time", "done"]
    assert "broken" in (tmp_path / "fails.txt").read_text()
    child = int((tmp_path / "hangs.txt").read_text().split("child ")[1].split()[0])
    assert not is_running(child)
    table = gpu.summary(tmp_path)
    assert "| hangs | ended after its time |" in table
    assert "| a shape, 1 rows: optq triton | 4 us | 2 us | 50% |" in table
    assert "| a shape, 1 rows: dense bfloat16 | 8 us | 6 us | 75% |" in table
    assert table.count("dense bfloat16") == 2  # also what was measured by the program that hung


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has one")
def test_without_a_gpu_nothing_is_run_and_that_is_said(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "1", "--results", str(tmp_path / "results")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "sees no GPU, and every step measures one; nothing was run" in ran.stderr
    assert not (tmp_path / "results").exists()


def test_a_step_ends_with_its_time(gpu, tmp_path):
    sleeps = ("-c", "import time; time.sleep(60)")
    started = time.monotonic()
    ended = gpu.run([gpu.Part(name=name, command=sleeps, seconds=60) for name in "ab"], tmp_path, seconds=1)
    assert time.monotonic() - started < 20
    assert [each.outcome for each in ended.values()] == ["ended after its time", "not started"]
    assert json.loads((tmp_path / "parts.json").read_text())["b"] == {"outcome": "not started", "seconds": 0.0}


def test_steps_have_ten_minutes_and_their_programs_are_there(gpu):
    for parts in gpu.STEPS.values():
        assert sum(part.seconds for part in parts[:-1]) < gpu.STEP_SECONDS < 600
        assert all(Path(ROOT, part.command[0]).exists() or part.command[:2] == ("-m", "pytest") for part in parts)


@pytest.mark.parametrize(
    "printed",
    [
        "tests/test_gpu.py::test_a[gate and up] PASSED [ 50%]\ntests/test_gpu.py::test_b FAILED [100%]\n"
        "FAILED tests/test_gpu.py::test_b - assert False\n",
        "[gw0] [ 50%] PASSED tests/test_gpu.py::test_a[gate and up] \n[gw1] [100%] FAILED tests/test_gpu.py::test_b \n"
        "FAILED tests/test_gpu.py::test_b - assert False\n",
    ],
    ids=["one process", "several"],
)
def test_tests_are_counted_once_also_in_a_log_that_ends_early(gpu, printed, tmp_path):
    (tmp_path / "tests.txt").write_text(printed)
    assert gpu.tests_of(tmp_path / "tests.txt") == "1 failed, 1 passed"
    (tmp_path / "tests.txt").write_text(printed.splitlines()[0])
    assert gpu.tests_of(tmp_path / "tests.txt") == "1 passed"


@pytest.mark.long
def test_gpu_tests_are_collected_without_what_such_machines_lack(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "--collect-only", "-q"]
    paths = os.pathsep.join((str(tmp_path), "src"))
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "test_triton_error_is_at_most_twice_torchs" in ran.stdout
    absent = [sys.executable, "-c", "import gguf"]
    assert subprocess.run(absent, env={**os.environ, "PYTHONPATH": paths}, capture_output=True).returncode
