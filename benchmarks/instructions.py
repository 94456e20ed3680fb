# SPDX-License-Identifier: Apache-2.0
"""Instructions per weight of the Triton product, as compiled, and how many there is time for. No GPU is needed.

With few rows a product waits for the weights: a GPU's memory brings so many per second, and its processors start so
many instructions per second. The quotient is how many a weight may take; more than that, and the instructions decide.

    python benchmarks/instructions.py               # about 5 minutes
    python benchmarks/instructions.py --programs    # what every program uses that can be chosen: half an hour
"""

import json
import subprocess
import sys
from typing import Any

import record

GROUP_SIZE, GRID_BITS = 128, 32  # of the kernel's own grid: a scale and a zero
# Processors, and clock (Hz) from NVIDIA's whitepapers; bytes per second as measured by large copies.
GPUS: dict[str, tuple[str, int, float, float]] = {
    "H200": ("sm_90", 132, 1.83e9, 4.3e12),
    "A100 80GB": ("sm_80", 108, 1.41e9, 1.8e12),
}
THREADS_PER_CLOCK = 4 * 32  # instructions that a processor starts


def affordable(gpu: str, bits: int) -> float:
    """Instructions of a thread in the time in which memory brings a weight to it."""
    _, processors, clock, bandwidth = GPUS[gpu]
    weights = bandwidth / ((bits + GRID_BITS / GROUP_SIZE) / 8)
    return round(processors * THREADS_PER_CLOCK * clock / weights, 2)


def compiled(*options: str) -> list[dict[str, Any]]:
    """What the Triton programs use, as the script of the tests finds it."""
    script = record.RESULTS.parent.parent / "tests/kernels/ahead_of_time.py"
    ran = subprocess.run([sys.executable, script, *options], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def programs() -> None:
    """Count by architecture: products of weights and of experts, dequantizing, and the solver's loops."""
    found: dict[str, dict[str, int]] = {}
    for facts in compiled():
        row = found.setdefault(
            facts["target"], dict.fromkeys(("programs", "with spills", "without matrix products"), 0)
        )
        row["programs"] += 1
        row["with spills"] += bool(facts["spills"] or facts["stack"])
        is_product = facts["program"].endswith("product")
        row["without matrix products"] += is_product and not facts.get("tensor_core", facts.get("matrix_core"))
        row["most shared bytes"] = max(row.get("most shared bytes", 0), facts["shared_bytes"])
    record.write("programs", {"programs": "every tiling, bits, dtype, groups of 32 and 128"}, found)


def main() -> None:
    if "--programs" in sys.argv:
        programs()
        return
    found: dict[str, Any] = {
        gpu: {"affordable": {bits: affordable(gpu, bits) for bits in (2, 3, 4, 8)}} for gpu in GPUS
    }
    names = {target: gpu for gpu, (target, *_) in GPUS.items()}
    for facts in compiled("--loops"):
        gpu = found.setdefault(names.get(facts["target"], facts["target"]), {})
        per_weight = round(facts["loop_instructions"] / facts["weights_per_thread"], 2)
        gpu.setdefault(f"up to {facts['most_rows']} rows", {})[facts["bits"]] = per_weight
        for name in ("reg", "shared_bytes", "spills"):
            gpu[f"most {name}"] = max(gpu.get(f"most {name}", 0), facts[name])
    settings = {"group_size": GROUP_SIZE, "activations": "bfloat16", "unit": "instructions of a thread per weight"}
    record.write("instructions", settings, found)


if __name__ == "__main__":
    main()
