# SPDX-License-Identifier: Apache-2.0
"""The command line: `optimum-cli export gptq`, `optimum-cli gptq …`, and the same as `python -m optq …`.

Only parses and prints: each command calls one public function. Nothing heavy is imported before a command runs, so
that help appears at once.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from optq.version import __version__

from .command import EXIT_CODES as EXIT_CODES
from .command import Command as Command
from .command import execute as execute
from .evaluating import bench, compare, evaluate
from .inspecting import card, inspect, kernels, report
from .quantizing import convert, onnx, plan, push
from .quantizing import export as EXPORT

COMMANDS = (plan, inspect, evaluate, compare, bench, kernels, report, card, push, convert, onnx)
"""Those of `optimum-cli gptq`, in the order of a user's day."""


def main(arguments: list[str] | None = None) -> int:
    """`optq` and `python -m optq`: the same commands, with `quantize` for `export gptq`. Returns the exit code."""
    prog = "optq" if Path(sys.argv[0]).stem == "optq" else "python -m optq"
    parser = argparse.ArgumentParser(
        prog=prog, description="GPTQ checkpoints: make them, judge them, and know who reads them."
    )
    parser.add_argument("--version", action="version", version=f"optq {__version__}")
    places = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (replace(EXPORT, name="quantize"), *COMMANDS):
        place = places.add_parser(command.name, help=command.summary)
        command.declare(place)
        place.set_defaults(command=command)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow, and has the package
        import argcomplete

        argcomplete.autocomplete(parser)
    parsed = parser.parse_args(arguments)
    return execute(parsed.command, parsed)
