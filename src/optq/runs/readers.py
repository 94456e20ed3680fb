# SPDX-License-Identifier: Apache-2.0
"""Who will read the result: known before the work, and said again at its end.

Whoever learns it from the server that was to load the checkpoint has lost all the work.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optq.config.gptq import GPTQConfig
from optq.errors import ConfigError
from optq.files.source import head_width_of, parallel_plan_of
from optq.quantization.plan import Plan, Target
from optq.readers import NAMES, Linear, refusals, rules_of, split_of
from optq.scheme import SERVED_GROUP_SIZES

logger = logging.getLogger(__name__)

ASKED = ("transformers", "vllm", "sglang", "gptqmodel")
"""Those of `READERS` that everybody is told about."""


def as_linears(model: Any, targets: Iterable[Target], checkpoint_format: str) -> list[Linear]:
    """The planned linears in the form that `optq.readers` checks."""
    plan = parallel_plan_of(model.config)
    return [
        Linear(
            name=target.view.name,
            out_features=target.view.shape[0],
            in_features=target.view.shape[1],
            scheme=target.scheme,
            split=split_of(target.view.name, plan),
            head_width=head_width_of(target.view.name, model.config),
            checkpoint_format=checkpoint_format,
        )
        for target in targets
    ]


def refused_by(linears: Sequence[Linear], dense: Iterable[str], parts: int = 1) -> dict[str, tuple[str, ...]]:
    """By reader, what it refuses of a checkpoint with these linears packed and those left dense, on so many GPUs."""
    left = list(dense)
    return {reader: refusals(reader, linears, parts, left) for reader in ASKED}


def said_of_readers(refused: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on who reads a checkpoint, and who does not and why; readers with the same reasons in one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for reader, reasons in refused.items():
        groups.setdefault(tuple(reasons), []).append(f"{NAMES[reader]} {rules_of(reader).versions[-1]}")
    told = [f"{_listed(groups[()])} read{'s' * (len(groups[()]) == 1)} it."] if () in groups else []
    for reasons, readers in groups.items():
        if reasons:
            verb = "does" if len(readers) == 1 else "do"
            told.append(f"{_listed(readers)} {verb} not: {'; '.join(reasons)}.")
    if refused.get("vllm") and not refused["transformers"]:
        told.append("Where optq is installed beside it, vLLM reads it, too.")
    return told


def say_readers(linears: Sequence[Linear], dense: Iterable[str], server: str | None, *, finished: bool) -> None:
    """Log who will read the checkpoint, or does now that it is finished; as a warning if `server` does not.

    Args:
        server: vLLM, where none is asked for: SGLang refuses many small models whatever their settings are.
    """
    refused = refused_by(linears, dense)
    is_served = not refused[server or "vllm"]
    opening = "The checkpoint is finished:" if finished else "Who will read the checkpoint:"
    advice = "" if is_served or finished else " serving='vllm' (--for vllm) keeps to what it reads."
    level = logging.INFO if is_served else logging.WARNING
    logger.log(level, "%s %s%s", opening, " ".join(said_of_readers(refused)), advice)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def refuse_unserved(model: Any, plan: Plan, config: GPTQConfig) -> None:
    """Refuse a model that, quantized like this, the server of `serving` would not read.

    Raises:
        ConfigError: says all reasons, and what to change.
    """
    server = config.serving
    if server is None or config.has_budget:  # a budget chooses among what is read
        return
    linears = as_linears(model, plan.all_targets, config.format)
    if reasons := refusals(server, linears, dense=plan.skipped):
        fits = served_group_size(linears, plan.skipped, server)
        advice = f" group_size={fits} would be read." * (fits is not None)
        raise ConfigError(
            f"serving={server!r} was asked for, but {NAMES[server]} does not read {'; '.join(reasons)}.{advice}"
        )


def served_group_size(linears: Sequence[Linear], dense: Iterable[str], server: str) -> int | None:
    """The largest group size, or -1, with which a server reads these linears, whatever theirs is; or None."""
    left = list(dense)
    for size in (*SERVED_GROUP_SIZES, -1):
        resized = [replace(linear, scheme=replace(linear.scheme, group_size=size)) for linear in linears]
        if not refusals(server, resized, dense=left):
            return size
    return None
