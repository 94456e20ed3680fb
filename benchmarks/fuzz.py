# SPDX-License-Identifier: Apache-2.0
"""Fuzzing: what strangers' files and settings do to whatever reads them.

    python benchmarks/fuzz.py --seconds 60               # all targets, in equal parts
    python benchmarks/fuzz.py --executions 200000 --targets GPTQConfig.from_dict dynamic
    python benchmarks/fuzz.py --seconds 600 --guided      # by coverage, where the package atheris is installed

The targets are those of tests/hostile/fuzzing.py. A crash is every exception that is not optq's own, an error that
does not name the file, and five seconds without an end. What crashed is printed, and can be run again:
--again 'TARGET' 00ff….
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import record

TESTS = Path(__file__).resolve().parent.parent / "tests"
SECONDS = 5
"""Longer is called a hang."""


class Hang(BaseException):
    """No exception that anything in between would catch."""


def _too_long(*_: Any) -> None:
    raise Hang(f"longer than {SECONDS} seconds")


class Tally:
    """What came of the executions of one target."""

    def __init__(self) -> None:
        self.executions, self.crashes, self.longest = 0, {}, 0.0
        self.began = time.monotonic()

    def execute(self, target: Any, data: bytes) -> None:
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            target(data)
        except (Exception, Hang) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
            self.crashes.setdefault(where, {"said": str(error)[:300], "bytes": data.hex()})
        finally:
            signal.alarm(0)
        self.executions += 1
        self.longest = max(self.longest, time.monotonic() - began)

    def as_dict(self) -> dict[str, Any]:
        return {
            "executions": self.executions,
            "crashes": len(self.crashes),
            "seconds": round(time.monotonic() - self.began, 1),
            "longest_seconds": round(self.longest, 2),
            **({"found": self.crashes} if self.crashes else {}),
        }


@contextmanager
def all_targets() -> Iterator[dict[str, Any]]:
    """The targets, and what they need in a temporary folder."""
    sys.path[:0] = [str(TESTS / "hostile"), str(TESTS)]
    import fuzzing
    import trial

    import optq
    from conftest import save_tiny_llama, save_tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        dense = save_tiny_llama(place / "dense", num_hidden_layers=1)
        rows = [{"input_ids": list(range(4, 52))}] * 16
        trial.make_good(dense, place / "packed", optq.GPTQConfig(bits=4, group_size=32), rows)
        scratch = place / "scratch"
        scratch.mkdir()
        yield fuzzing.targets(scratch, dense, place / "packed", save_tiny_tokenizer(place))


def run_blindly(targets: dict[str, Any], seconds: float, executions: float, seed: int) -> dict[str, Any]:
    import fuzzing

    results = {}
    for name, target in targets.items():
        tally = Tally()
        for data in fuzzing.inputs(seed):
            if time.monotonic() - tally.began >= seconds or tally.executions >= executions:
                break
            tally.execute(target, data)
        results[name] = tally.as_dict()
    return results


def run_guided(names: Iterable[str], seconds: float, seed: int) -> dict[str, Any]:
    """Each target in a process of its own, as libFuzzer never returns."""
    results = {}
    for name in names:
        with tempfile.NamedTemporaryFile(suffix=".json") as told:
            command = [sys.executable, __file__, "--inside", told.name, "--targets", name]
            done = subprocess.run([*command, "--seconds", str(seconds), "--seed", str(seed)], check=False)
            content = Path(told.name).read_text()
            if not content:
                sys.exit(f"{name}: ended with {done.returncode} and told nothing")
            results[name] = json.loads(content)
    return results


def inside(name: str, told: Path, seconds: float, seed: int) -> None:
    """Coverage-guided, in this process."""
    import atheris

    with atheris.instrument_imports(include=["optq"]), all_targets() as targets:
        tally = Tally()

        def one(data: bytes) -> None:
            tally.execute(targets[name], data)
            if tally.executions % 200 == 0 or time.monotonic() - tally.began > seconds - 1:
                told.write_text(json.dumps(tally.as_dict()))

        atheris.Setup(
            [name, f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=64", "-timeout=60"], one
        )
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="in all; 60 unless there are --executions")
    parser.add_argument("--executions", type=int, help="of each target")
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    parser.add_argument("--again", nargs=2, metavar=("TARGET", "BYTES"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _too_long)
    seconds = asked.seconds or (float("inf") if asked.executions else 60.0)
    if asked.inside:
        inside(asked.targets[0], asked.inside, seconds, asked.seed)
        return
    with all_targets() as targets:
        if asked.again:
            targets[asked.again[0]](bytes.fromhex(asked.again[1]))
            return
        chosen = {name: targets[name] for name in asked.targets or targets}
        each = seconds / len(chosen)
        if asked.guided:
            results = run_guided(chosen, each, asked.seed)
        else:
            results = run_blindly(chosen, each, asked.executions or float("inf"), asked.seed)
    record.write("fuzz", {"seed": asked.seed, "guided": asked.guided, "seconds_allowed": SECONDS}, results)
    if any(row["crashes"] for row in results.values()):
        sys.exit("There were crashes.")


if __name__ == "__main__":
    main()
