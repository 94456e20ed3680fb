# SPDX-License-Identifier: Apache-2.0
"""Which tool wrote a checkpoint, as far as it says so, and how that tool stores zeros."""

import re
from collections.abc import Mapping
from typing import Any


def writers_of(meta: Mapping[str, Any] | None, unknown: Mapping[str, Any]) -> tuple[str, ...]:
    """The tools that wrote a checkpoint, as "name:version".

    Args:
        meta, unknown: of its quantization_config.
    """
    wrote = (meta or {}).get("quantizer")
    tools = wrote if isinstance(wrote, (list, tuple)) else (wrote,)
    by_auto_round = ("auto-round",) if "autoround_version" in unknown else ()
    return (*(tool.lower() for tool in tools if isinstance(tool, str)), *by_auto_round)


def zero_format_of(checkpoint_format: str, writers: tuple[str, ...]) -> str:
    """The format of zeros, which in v1 depends on the tool that wrote the checkpoint; see `checkpoint/zeros.py`."""
    if checkpoint_format != "gptq":
        return checkpoint_format
    for tool in writers:
        if tool.startswith("gptqmodel"):
            version = re.search(r"(\d+)\.(\d+)", tool)
            is_older = version is not None and (int(version[1]), int(version[2])) < (6, 1)
            return "gptq:gptqmodel-6" if is_older else "gptq:gptqmodel"
        if re.match(r"(intel/)?auto[-_]?round", tool):
            return "gptq:auto-round"
    return "gptq"
