# SPDX-License-Identifier: Apache-2.0
"""Make every call of a small run fail, and kill it at random moments; what becomes of each. Takes half an hour.

    python benchmarks/faults.py [--every N] [--kills N]

The layer that does it is tests/fault_injection/faults.py. Ends with an error if a run is lost.
"""

import argparse
import sys
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/fault_injection"))

import faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try one point of N, by chance (1)")
    parser.add_argument("--kills", type=int, default=100, help="at random moments (100)")
    arguments = parser.parse_args()
    results = faults.measured(arguments.every, arguments.kills)
    settings = {
        "run": "a llama of two blocks, quantized from a folder to a folder with effort='fast'",
        "points": f"one of {arguments.every}, by chance, of at most {faults.MOST} calls of a kind, evenly among all",
        "faults": faults.FAULTS,
        "seed": 0,
    }
    record.write("faults", settings, results)
    if results["problems"]:
        sys.exit(f"{len(results['problems'])} problems")


if __name__ == "__main__":
    main()
