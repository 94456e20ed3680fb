# SPDX-License-Identifier: Apache-2.0
"""The rules of `dynamic`: patterns of layers' names, and how the layers that match differ from the others."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from optq.errors import ConfigError
from optq.readers import FUSED_NAMES
from optq.scheme import BITS, SERVED_GROUP_SIZES, LayerScheme

from .counterparts import why_unknown
from .field import short
from .fields import FIELDS

logger = logging.getLogger(__name__)

Rules = dict[str, dict[str, Any]]

OVERRIDES = ("bits", "group_size", "sym", "desc_act", "damp_percent")
"""What a rule may change."""


def checked_rules(rules: Rules | None, *, of_file: bool) -> Rules | None:
    """The rules, each setting checked as the field of its name.

    Args:
        of_file: keep settings that are none of ours.
    Raises:
        ConfigError: one does not fit; rule and setting are named.
    """
    checked: Rules = {}
    for pattern, settings in (rules or {}).items():
        if not isinstance(pattern, str) or not isinstance(settings, dict):
            raise ConfigError(
                f"dynamic: {short(pattern)}: {short(settings)} was asked for; the first is a pattern, and the second "
                f"a dict of settings: {', '.join(OVERRIDES)}; or {{}}."
            )
        try:
            re.compile(pattern_in(pattern))
        except re.error as error:
            raise ConfigError(f"dynamic: {pattern!r} is not a regular expression: {error}.") from error
        checked[pattern] = dict(settings)
        for key, value in settings.items():
            label = f"dynamic: {pattern!r}: {key}"
            if key in OVERRIDES:
                checked[pattern][key] = FIELDS[key].checked(value, label)
            elif not of_file:
                raise ConfigError(
                    f"{label}={short(value)} was asked for; {why_unknown(str(key), OVERRIDES, 'setting')}"
                )
    return None if rules is None else checked


def rules_of_file(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Rules of `dynamic` from JSON: null instead of a rule is an empty one, and null settings are left out."""
    read = {}
    for pattern, settings in rules.items():
        if isinstance(settings, dict):
            known = {key: FIELDS[key].from_json(value) for key, value in settings.items() if key in OVERRIDES}
            others = {key: value for key, value in settings.items() if key not in OVERRIDES}
            if others:
                logger.warning(
                    "In the quantization_config, dynamic: %r sets %s, which has no effect; what can be set is %s.",
                    *(pattern, ", ".join(map(repr, others)), ", ".join(OVERRIDES)),
                )
            settings = {key: value for key, value in (others | known).items() if value is not None or key in others}
        read[pattern] = {} if settings is None else settings
    return read


def matching(rules: Rules | None, name: str) -> str | None:
    """The pattern that counts for the linear of this name: the first that matches."""
    return next((pattern for pattern in rules or {} if re.match(pattern_in(pattern), name)), None)


def choices_of(base: LayerScheme, serving: str | None, out_features: int, in_features: int) -> Iterator[LayerScheme]:
    """The schemes that a budget may choose from for a linear of this shape."""
    sizes = (base.group_size,) if serving is None else dict.fromkeys((base.group_size, *SERVED_GROUP_SIZES))
    for bits in BITS:
        # With two bits, only a grid that need not be centred on zero is of use.
        symmetric = base.symmetric and (bits > 2 or serving is not None)
        for size in sizes:
            scheme = replace(base, bits=bits, symmetric=symmetric, group_size=size)
            fits = not scheme.why_not_grouped(in_features) and not scheme.why_not_packed(in_features, out_features)
            if fits and not (serving is not None and scheme.why_not_served(in_features)):
                yield scheme


def dynamic_rules(scheme_of: Mapping[str, LayerScheme], base: LayerScheme) -> Rules:
    """Rules for the linears whose scheme is not `base`, one per parent module and scheme."""
    members: dict[tuple[str, LayerScheme], list[str]] = {}
    for name, scheme in scheme_of.items():
        if scheme != base:
            parent, _, child = name.rpartition(".")
            members.setdefault((parent, scheme), []).append(child)
    unchanged = _settings_of(base).items()
    return {
        f"+:{pattern_of(parent, children)}": dict(
            item for item in _settings_of(scheme).items() if item not in unchanged
        )
        for (parent, scheme), children in members.items()
    }


def pattern_of(parent: str, children: list[str]) -> str:
    """A regular expression for linears of one parent module, and for what servers make of them."""
    # vLLM asks by the name of the fused layer.
    fused = [whole for whole, parts in FUSED_NAMES.items() if set(parts) <= set(children)]
    names = "|".join(map(re.escape, (*children, *fused)))
    return rf"^{re.escape(parent)}\.(?:{names})$" if parent else f"^(?:{names})$"


def _settings_of(scheme: LayerScheme) -> dict[str, Any]:
    """The settings by which a rule of `dynamic` states a scheme."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.act_order == "desc_act",
    }


def pattern_in(key: str) -> str:
    """The regular expression of a rule; a key without a sign means "+"."""
    return key[2:] if key[:2] in ("-:", "+:") else key
