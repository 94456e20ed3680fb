# SPDX-License-Identifier: Apache-2.0
"""What commands share: the options that say which model is meant and how it is loaded, and a type of options."""

import argparse
from typing import Any


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which revision of a model is read, and with what permissions."""
    group = parser.add_argument_group("how the model is found")
    group.add_argument("--revision", metavar="REVISION", help="branch, tag or commit on the Hub")
    group.add_argument("--token", metavar="TOKEN", help="for private models; by default the one of `hf auth login`")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run Python files of the model")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_source`, and the dtype in which weights are loaded."""
    add_source(parser)
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="float32, bfloat16, float16 or auto: as it is stored (auto)",
    )


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `from_pretrained`; what was not given, or is no option of the command, is not passed on."""
    given = {name: getattr(arguments, name, None) for name in ("dtype", "revision", "token", "trust_remote_code")}
    return {name: value for name, value in given.items() if value is not None}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)
