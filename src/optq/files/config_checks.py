# SPDX-License-Identifier: Apache-2.0
"""What the config of a quantized model may say at all, whatever its class: before anyone makes a model of it."""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from optq.config.dynamic import OVERRIDES, patterns_in
from optq.config.field import short
from optq.errors import CheckpointError, found_in

COUNTS, SIZES = ("_layers", "n_layer", "_experts"), ("_size", "_dim", "_heads", "n_embd", "n_head", "d_model", "d_ff")
"""How names of sizes in a config end: of numbers of modules, and of widths."""

MOST_LAYERS, LARGEST_SIZE = 10_000, 2**31 - 1

DEEPEST, MOST_ENTRIES = 50, 100_000
"""Levels of a config, which is copied recursively; and its entries besides rules of `dynamic`."""

LIMITS = ("_limit", "_limits", "_max", "_min")
"""How names end of what may be infinite: Mamba's time_step_limit is."""

EPSILONS, BASES = ("_eps", "_epsilon"), ("rope_theta", "rotary_emb_base")

PARTS = ("decoder", "generator", "text_config")
"""Where transformers looks for the config of the part of a model that writes text."""


def check_model_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a quantized checkpoint's config that nothing can be computed with, or only in years.

    Args:
        config: what config.json says; of a model that is not quantized, anything.
    Raises:
        CheckpointError: a size is negative or beyond all models, a number is not finite, or something is nested deeply
            or in a place where the model has none.
        ConfigError: `dynamic` has too many rules.
    """
    stated = config.get("quantization_config")
    if not stated:
        return
    if isinstance(stated, dict) and isinstance(stated.get("dynamic"), dict):
        with found_in(f"{source}/config.json: quantization_config"):
            patterns_in(stated["dynamic"])  # transformers formats them for its log several times
        rules = [rule for rule in stated["dynamic"].values() if not _is_of_settings(rule)]
        stated = {**stated, "dynamic": rules}  # of many rules, these only take time to look at
    of_the_model = {key: value for key, value in config.items() if key != "quantization_config"}
    place = f"{source}/config.json"
    if (count := sum(1 for _ in _entries({**of_the_model, "quantization_config": stated}, place))) > MOST_ENTRIES:
        raise CheckpointError(
            f"{place} has {count} entries besides rules of dynamic; {MOST_ENTRIES} are read. It is of a stranger; "
            "download it again from where you trust it."
        )
    named = config.get("transformers_weights")
    if named is not None and (not isinstance(named, str) or named != os.path.basename(named)):
        raise CheckpointError(
            f"{place} says transformers_weights={short(named)}; it is the name of a file beside it. Correct or remove "
            "it."
        )
    check_numbers(of_the_model, place)
    known = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
    if known is None or known.get_text_config is not PreTrainedConfig.get_text_config:
        return
    for part in PARTS:
        if config.get(part) is not None and part not in known.sub_configs:
            raise CheckpointError(
                f"{source}/config.json has a {part}, which a model of type {config['model_type']} does not have. "
                "Remove it, or download the file again."
            )


def _is_of_settings(rule: Any) -> bool:
    """Whether a rule of `dynamic` has nothing but numbers for what a rule may set."""
    return (
        isinstance(rule, dict)
        and rule.keys() <= {*OVERRIDES}
        and not any(isinstance(value, (dict, list)) for value in rule.values())
    )


def check_numbers(config: Mapping[str, Any], place: str) -> None:
    """Refuse numbers of a model's config that no model has.

    Args:
        place: the file, for the message.
    Raises:
        CheckpointError: as `check_model_config`.
    """
    for key, value in _entries(config, place):
        if type(value) is int and key.endswith((*COUNTS, *SIZES)):
            most = MOST_LAYERS if key.endswith(COUNTS) else LARGEST_SIZE
            allowed = "" if -1 <= value <= most else f"at most {most} are read"
        elif type(value) not in (int, float):
            continue
        elif not math.isfinite(value) and not (key.endswith(LIMITS) and not math.isnan(value)):
            allowed = "it is a finite number"
        elif key.endswith(EPSILONS):
            allowed = "" if 0 <= value < 1 else "it is a small number, 0 or more"
        elif key in BASES:
            allowed = "" if value >= 1 else "it is 1 or more"
        else:
            continue
        if allowed:
            raise CheckpointError(
                f"{place} says {key}={value}; {allowed}. The file is damaged or of a stranger; download it again from "
                "where you trust it."
            )


def _entries(config: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """What a config says, each with its name; of what is in lists, with that of the list.

    Raises:
        CheckpointError: it is nested deeply.
    """
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if depth > DEEPEST:
            raise CheckpointError(f"{place}: {name} is nested more than {DEEPEST} levels deep. Correct or remove it.")
        if isinstance(value, Mapping):
            waiting += [(str(key), inside, depth + 1) for key, inside in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(name, inside, depth + 1) for inside in value]
        else:
            yield name, value
