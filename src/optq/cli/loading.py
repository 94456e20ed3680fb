# SPDX-License-Identifier: Apache-2.0
"""The options that say how a model is loaded, the same for every command."""

import argparse
from typing import Any


def add_loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model is loaded")
    group.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16, float16 or auto: as it is stored (auto)")
    group.add_argument("--revision", metavar="REVISION", help="branch, tag or commit on the Hub")
    group.add_argument("--token", metavar="TOKEN", help="for private models; by default the one of `hf auth login`")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run Python files of the model")


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `from_pretrained`; what was not given is not passed on."""
    given = {name: getattr(arguments, name) for name in ("dtype", "revision", "token", "trust_remote_code")}
    return {name: value for name, value in given.items() if value is not None}
