# SPDX-License-Identifier: Apache-2.0
"""Runs of a tiny model in which one call fails, as often as there are calls: `faults.py [--every N] [--kills N]`.

It must be started with interpose.c, compiled, as LD_PRELOAD (see `measured`). This process imports all that takes
long, once; each run is a fork of it. Afterwards the same call is made again, without a fault, and the folder is
compared with that of a run that nothing happened to.
"""

import argparse
import ctypes
import errno
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "mmap", "allocate")
"""Calls of the system, in the order of interpose.c."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
FAULTS = {
    "open": ("EIO", "EACCES", "ENOSPC", *SIGNALS),
    "read": ("EIO", *SIGNALS),
    "write": ("ENOSPC", "EDQUOT", "EIO", "ENOSPC from then on", *SIGNALS),
    "fsync": ("EIO", "ENOSPC", *SIGNALS),
    "rename": ("EIO", "EACCES", "ENOSPC", *SIGNALS),
    "unlink": ("EIO", "EACCES", *SIGNALS),
    "mkdir": ("EACCES", "ENOSPC", *SIGNALS),
    "mmap": ("ENOMEM", *SIGNALS),
    "allocate": ("ENOMEM", "SIGINT", "SIGKILL"),
    "forward": ("OutOfMemoryError", "KeyboardInterrupt", "SIGKILL"),
}
"""What each call fails with. "forward" is that of a decoder block, in Python."""

LONGEST = 120  # seconds of a run, which takes less than one
TEMPORARY = re.compile(r"/work-|\.partial$|\.tmp|optq-lock|optq-owner")
OUTCOMES = ("finished", "resumable", "untouched", "lost")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The `at`-th call of a kind, from 1, fails with `fault`."""

    kind: str
    at: int
    fault: str


def quantize(source: Path, output: Path) -> None:
    """A small run: two blocks, a rope, a tied head, and companions to copy."""
    import optq

    optq.quantize(source / "dense", _config(), output_dir=output)


def quantize_object(source: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM

    import optq

    optq.quantize(AutoModelForCausalLM.from_pretrained(source / "dense"), _config(), output_dir=output)


def convert(source: Path, output: Path) -> None:
    import optq

    optq.convert(source / "packed", output_dir=output, to="gptq_v2")


CALLS = {"optq.quantize": quantize, "optq.quantize of an object": quantize_object, "optq.convert": convert}
"""All that write a folder. The first goes on with what is done, the others begin anew."""


def _config() -> Any:
    import optq

    generator = random.Random(1)
    rows = [{"input_ids": [generator.randrange(4, 98) for _ in range(32)]} for _ in range(6)]
    return optq.GPTQConfig(bits=4, group_size=32, effort="fast", grid="minmax", dataset=rows)


class Interposed:
    """interpose.c in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._forwards = 0

    def arm(self, root: Path, point: Point | None) -> None:
        kind = KINDS.index(point.kind) if point is not None and point.kind in KINDS else -1
        name, _, lasting = ("", "", "") if point is None else point.fault.partition(" ")
        number = -getattr(signal, name, 0) or getattr(errno, name, 0)
        self._library.faults_arm(
            os.fsencode(root), kind, ctypes.c_long(point.at if point is not None else 0), number, bool(lasting)
        )
        self._patch_forwards(point)

    def disarm(self) -> None:
        self._library.faults_arm(b"", -1, ctypes.c_long(0), 0, 0)

    def counts(self) -> dict[str, int]:
        """Calls so far, by kind."""
        return {kind: self._library.faults_count(number) for number, kind in enumerate(KINDS)} | {
            "forward": self._forwards
        }

    def _patch_forwards(self, point: Point | None) -> None:
        import torch
        from transformers.models.llama.modeling_llama import LlamaAttention

        forward = LlamaAttention.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._forwards += 1
            if point is not None and (point.kind, point.at) == ("forward", self._forwards):
                if point.fault == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                if point.fault == "KeyboardInterrupt":
                    raise KeyboardInterrupt
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return forward(*args, **kwargs)

        LlamaAttention.forward = counted


def forked(work: Callable[[], dict[str, Any]], kill_after: float | None = None) -> dict[str, Any]:
    """What `work` returns in a process of its own; {"killed": signal} or {"hung": True} if it ends otherwise."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        os.write(writing, json.dumps(work()).encode())
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + (LONGEST if kill_after is None else kill_after)
    status, ended = 0, 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    with os.fdopen(reading) as stream:
        said = stream.read()
    if said:
        found: dict[str, Any] = json.loads(said)
        return found
    return {"hung": True} if not ended and kill_after is None else {"killed": os.WTERMSIG(status)}


def attempt(interposed: Interposed, call: Callable[[], None], root: Path, point: Point | None) -> dict[str, Any]:
    """Make a call, with a fault or without; what it ended with, and what it left in the process."""
    before, handlers = _held(root), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    from optq.runs.journal import Journal

    error, writes, write = None, [], Journal.write

    def noting(journal: Any, name: str) -> None:
        writes.append(interposed.counts()["write"])
        write(journal, name)

    Journal.write = noting
    interposed.arm(root, point)
    try:
        call()
    except BaseException as raised:
        error = raised
    counts = interposed.counts()
    interposed.disarm()
    from optq.errors import OptqError

    said = None if error is None else {"type": type(error).__name__, "named": isinstance(error, OptqError)}
    if said is not None:
        said["message"] = str(error)[:300]
    del error
    gc.collect()
    left = sorted(_held(root) - before)
    if [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != handlers:
        left.append("a handler of signals")
    return {"error": said, "left": left, "counts": counts, "writes before blocks": writes}


def be_careless() -> None:
    """Write every file of a run in its place, and believe what is found: a control, which has to lose runs."""
    from optq.files import output
    from optq.runs import journal

    @contextmanager
    def in_place(path: Path, target: Path) -> Iterator[Path]:
        yield path

    journal.written_whole = output.written_whole = in_place
    journal.digest_of_file = output.digest_of_file = lambda file: "whole"


def _held(root: Path) -> set[str]:
    """What a process must not keep: files and mappings below `root`, threads, children, hooks, torch's settings."""
    import psutil
    import torch

    links = [each for each in Path("/proc/self/fd").iterdir() if each.exists()]
    files = {f"open: {path}" for path in map(os.readlink, links) if path.startswith(str(root))}
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = {f"mapped: {line[line.index(str(root)) :]}" for line in lines if str(root) in line}
    threads = {f"thread: {thread.name}" for thread in threading.enumerate()}
    children = {f"process: {child.name()}" for child in psutil.Process().children(recursive=True)}
    modules = torch.nn.modules.module
    hooks = {f"hook: {name}" for name in vars(modules) if name.startswith("_global_") and getattr(modules, name)}
    state = {f"dtype: {torch.get_default_dtype()}", f"grad: {torch.is_grad_enabled()}"}
    return files | maps | threads | children | hooks | state


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder; of what tells the time only that it is there."""
    return {
        str(path.relative_to(folder)): None if path.suffix in (".md", ".jsonl") else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def temporary(folder: Path) -> list[str]:
    """Files that only a call that is under way has."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")] if folder.exists() else []
    return [name for name in names if TEMPORARY.search(name)]


class Laboratory:
    """A call, and the folder that it writes when nothing happens.

    Args:
        call: one of `CALLS`.
        root: a folder with the models; everything else happens in it.
    """

    def __init__(self, call: str, root: Path, interposed: Interposed) -> None:
        self._call, self._root, self._interposed = call, root, interposed
        self._output = root / "out"
        self.seconds = math.inf
        for _ in range(3):  # the shortest: others may have waited for the processor
            shutil.rmtree(self._output, ignore_errors=True)
            started = time.monotonic()
            found = self._attempt(None)
            self.seconds = min(self.seconds, time.monotonic() - started)
        assert found["error"] is None and not found["left"], found
        self.counts: dict[str, int] = found["counts"]
        self._before_block = next(iter(found["writes before blocks"]), 0)
        self.expected = contents(self._output)
        shutil.rmtree(self._output)

    def _attempt(self, point: Point | None, kill_after: float | None = None, careless: bool = False) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            if careless:
                be_careless()
            made = partial(CALLS[self._call], self._root / "source", self._output)
            return attempt(self._interposed, made, self._root, point)

        return forked(work, kill_after)

    @property
    def goes_on(self) -> bool:
        """Whether the same call returns what it has finished before."""
        return self._call == "optq.quantize"

    def points(self, every: int) -> list[Point]:
        """Every call and what it can fail with; of the calls of a kind `MOST`. One of `every` of them, by chance."""
        all_points = [
            Point(kind=kind, at=at, fault=fault)
            for kind, faults in FAULTS.items()
            for at in range(1, self.counts[kind] + 1, max(1, -(-self.counts[kind] // MOST)))
            for fault in faults
        ]
        return random.Random(0).sample(all_points, -(-len(all_points) // every))

    def torn(self) -> list[Point]:
        """Points at which the file of the first block is half written."""
        return [Point(kind="write", at=self._before_block + number, fault="SIGKILL") for number in (1, 2)]

    def judge(self, point: Point | None, *, kill_after: float | None = None, careless: bool = False) -> dict[str, Any]:
        """One call with a fault, or killed, and the same call once more."""
        output = self._output
        first = self._attempt(point, kill_after, careless)
        begun = output.exists() and any(output.iterdir())
        stayed = [*first.get("left", ()), *(temporary(output) if "error" in first else ())]
        finished = first.get("error", "") is None and contents(output) == self.expected
        again = self._attempt(None, None, careless)
        good = contents(output) == self.expected and again.get("left") == []
        good &= again.get("error", "") is None or (begun and not self.goes_on and again["error"]["named"])
        shutil.rmtree(output, ignore_errors=True)
        outcome = "finished" if finished else "resumable" if begun else "untouched"
        if not good or "hung" in first:
            outcome = "lost"
        excused = point is not None and any(test(point) for test in EXCUSES.values())
        return {"call": self._call, "outcome": outcome, "first": first, "excused": excused, "stayed": stayed} | (
            {} if good else {"again": again}
        )


EXCUSES: dict[str, Callable[[Point], bool]] = {
    "what could not be removed is there until the next call": lambda point: point.kind == "unlink",
    "Ctrl-C may come between opening a file and knowing its number, or into cleaning up": lambda point: (
        point.fault == "SIGINT"
    ),
    "torch keeps a file open that it could not map": lambda point: point.kind == "mmap",
}
"""What may stay in the process or the folder until the next call, and of which points."""

MOST = 60
"""Calls of a kind that are made to fail, at most: evenly among all."""


def tried(every: int, kills: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What became of each point of each call, and of kills of the first one at random moments."""
    from tqdm import tqdm

    from conftest import save_tiny_llama

    tqdm.monitor_interval = 0  # no thread, which a fork would lack
    tqdm.set_lock(threading.RLock())  # not the one that all forks share: whoever is killed with it would keep it
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "run"
        source, interposed = root / "source", Interposed()
        source.mkdir(parents=True)
        save_tiny_llama(source / "dense")
        quantize(source, source / "packed")
        convert(source, root / "imported")  # with all that is imported at first use, so that no fork has to
        shutil.rmtree(root / "imported")
        gc.collect()
        gc.freeze()  # what forks have in common is neither looked at by their collectors nor copied
        for call in CALLS:
            laboratory = Laboratory(call, root, interposed)
            yield "calls", laboratory.counts
            for point in laboratory.points(every):
                yield point, laboratory.judge(point)
            if not laboratory.goes_on:
                continue
            moments, killed = random.Random(0), 0
            while killed < kills:
                moment = moments.uniform(0, laboratory.seconds)
                found = laboratory.judge(None, kill_after=moment)
                if "killed" in found["first"]:  # else it had ended before
                    killed += 1
                    yield moment, found
            for point in laboratory.torn():
                yield "careless", laboratory.judge(point, careless=True)


def summed(every: int, kills: int) -> dict[str, Any]:
    """The outcomes by call, kind and fault, and everything that is not as it should be."""
    tables: dict[str, dict[str, Counter[str]]] = {}
    calls: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    excused: Counter[bool] = Counter()
    problems: list[dict[str, Any]] = []
    for point, found in tried(every, kills):
        if point == "calls":
            calls.update(found)
            continue
        keys = {"kills": "at random moments"}
        if point == "careless":
            keys = {"control": "a journal that checks nothing"}
        elif isinstance(point, Point):
            keys = {"call": found["call"], "kind": point.kind, "fault": point.fault, "all": "all"}
        for table, key in keys.items():
            tables.setdefault(table, {}).setdefault(key, Counter())[found["outcome"]] += 1
        if point == "careless":
            continue
        if error := found["first"].get("error"):
            errors["named by optq" if error["named"] else error["type"]] += 1
        excused[found["excused"]] += bool(found["stayed"])
        if found["outcome"] == "lost" or (found["stayed"] and not found["excused"]):
            problems.append({"point": asdict(point) if isinstance(point, Point) else point, **found})
    return {
        "calls": dict(calls),
        **{table: {key: _row(rows[key]) for key in sorted(rows)} for table, rows in tables.items()},
        "errors": dict(errors.most_common()),
        "left until the next call": {"points": excused[True], "as": list(EXCUSES)},
        "problems": problems,
    }


def _row(counter: Counter[str]) -> dict[str, int]:
    return {"points": counter.total(), **{outcome: counter[outcome] for outcome in OUTCOMES}}


def measured(every: int = 1, kills: int = 0) -> dict[str, Any]:
    """`summed`, in a process that has interpose.c between itself and the C library."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "interpose.so")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "interpose.c", "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *sys.path[1:]])  # as this process finds optq
        command = [sys.executable, __file__, "--every", str(every), "--kills", str(kills)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(summed(arguments.every, arguments.kills)))
