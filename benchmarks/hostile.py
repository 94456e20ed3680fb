# SPDX-License-Identifier: Apache-2.0
"""Hostile checkpoints: what loading, inspecting and converting make of every kind of damage.

    python benchmarks/hostile.py

The kinds are those of tests/hostile/cases.py. Each is done to a copy of a good checkpoint, for each verb in a process
of its own, which is given five seconds.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import record

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests" / name) for name in ("hostile", "")]
import cases  # noqa: E402
import trial  # noqa: E402

import optq  # noqa: E402
from conftest import save_tiny_llama  # noqa: E402

RESULT = "hostile"


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "packed")
        generator = torch.Generator().manual_seed(1)
        rows = [{"input_ids": row.tolist()} for row in torch.randint(4, 90, (16, 48), generator=generator)]
        dense = save_tiny_llama(Path(scratch, "dense"))
        trial.make_good(dense, folder, optq.GPTQConfig(bits=4, group_size=32), rows)
        good = trial.make_others(dense, folder)
        for case in cases.cases():
            row = results.setdefault(case.group, {"kinds": 0, "most_megabytes": 0.0, "longest_seconds": 0.0})
            row["kinds"] += 1
            place, wanted = good[case.form]
            for verb, made in trial.trial(case, place, Path(scratch, "trial"), wanted).items():
                counts = Counter(row.get(verb, {}))
                counts[made["outcome"]] += 1
                row[verb] = dict(counts)
                row["most_megabytes"] = max(row["most_megabytes"], made.get("megabytes", 0))
                row["longest_seconds"] = max(row["longest_seconds"], made.get("seconds", 0))
                if made["outcome"] not in trial.GOOD:
                    bad.append(f"{case.group}: {case.name}: {verb}: {made['outcome']}: {made['said']}")
        megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    record.write(RESULT, {"seconds_allowed": trial.SECONDS, "megabytes_of_weights": round(megabytes, 2)}, results)
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
