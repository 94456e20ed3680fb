# SPDX-License-Identifier: Apache-2.0
"""Make every call of a small run fail, or kill it at random moments; what becomes of each.

    python benchmarks/faults.py points [--every N]      takes an hour
    python benchmarks/faults.py kills [--number N]      takes minutes

The layer that does it is tests/fault_injection/faults.py. Ends with an error if a run is lost.
"""

import argparse
import signal
import sys
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/fault_injection"))

import faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("points", "kills"))
    parser.add_argument("--every", type=int, default=1, help="try one point of N, by chance (1)")
    parser.add_argument("--number", type=int, default=100, help="of kills (100)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what is in its background ignore it
    settings = {"run": "a llama of two blocks, quantized from a folder to a folder with effort='fast'", "seed": 0}
    if arguments.part == "kills":
        found = faults.measured(every=10**9, kills=arguments.number)  # and a point per call
        record.write("kills", settings, {**found["kills"], **found["control"]})
    else:
        settings |= {
            "points": f"one of {arguments.every}, by chance; of a kind at most {faults.MOST} calls, evenly among all",
            "faults": faults.FAULTS,
        }
        found = faults.measured(arguments.every)
        record.write("faults", settings, found)
    if found["problems"]:
        sys.exit(f"{len(found['problems'])} problems")


if __name__ == "__main__":
    main()
