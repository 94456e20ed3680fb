# SPDX-License-Identifier: Apache-2.0
"""Write a benchmark's result with all that is needed to judge it: versions, machine, seed, commit."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("OPTQ_RESULTS") or Path(__file__).resolve().parent / "results")


def write(name: str, settings: dict[str, Any], results: dict[str, Any], *, quiet: bool = False) -> Path:
    """benchmarks/results/NAME.json, or in the folder OPTQ_RESULTS of the environment."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"settings": settings, "results": results, "environment": environment()}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(json.dumps(content["results"], indent=2))
    return path


def read(name: str) -> dict[str, Any]:
    """The results in that file so far; none without it."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    return found


def measured_at() -> dict[str, Any]:
    """What a single row says of its circumstances, where rows are measured one by one."""
    here = environment()
    return {key: here[key] for key in ("date", "commit", "threads", "device")}


def source() -> str:
    """Which src/ is measured: git's hash of it, which stays when only other folders change."""
    changed = _git("status", "--porcelain", "--", "src")
    return f"src {_git('rev-parse', 'HEAD:src')[:12]}{' and uncommitted changes' if changed else ''}"


def environment() -> dict[str, Any]:
    import torch

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("optq", "torch", "triton", "transformers", "safetensors")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # such as optq itself where only its sources are
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    known = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if flag in flags
    ]
    return f"{name} ({', '.join(known)})"
