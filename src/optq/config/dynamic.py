# SPDX-License-Identifier: Apache-2.0
"""The rules of `dynamic`: patterns of layers' names, and how the layers that match differ from the others."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import regex  # a match of it may take no more than some time, which one of `re` may not

from optq.errors import ConfigError
from optq.readers import pattern_of
from optq.scheme import BITS, SERVED_GROUP_SIZES, LayerScheme

from .counterparts import why_unknown
from .field import short
from .fields import FIELDS

logger = logging.getLogger(__name__)

Rules = dict[str, dict[str, Any]]

OVERRIDES = ("bits", "group_size", "sym", "desc_act", "damp_percent")
"""What a rule may change."""


MOST_PATTERNS, LONGEST_PATTERN = 10_000, 4_000
"""Rules that are more than the name of linears, and the characters of one: a file may hold millions."""

SECONDS = 0.1
"""For one match: as a pattern is written by a stranger, it may take longer than anyone lives."""

EXACT = regex.compile(
    r"\^(?:(?P<parent>(?:[\w-]|\\[.-])+)\\\.)?(?:\(\?:(?P<several>(?:[\w-]|\\-|\|)+)\)|(?P<one>[\w-]+))\$"
)
"""A pattern that matches nothing but the names that it lists, as `pattern_of` writes them."""


def checked_rules(rules: Rules | None, *, of_file: bool) -> Rules | None:
    """The rules, each setting checked as the field of its name.

    Args:
        of_file: keep settings that are none of ours.
    Raises:
        ConfigError: one does not fit; rule and setting are named.
    """
    checked: Rules = {}
    refuse_too_many(rules or {})
    for pattern, settings in (rules or {}).items():
        if not isinstance(pattern, str) or not isinstance(settings, dict):
            raise ConfigError(
                f"dynamic: {short(pattern)}: {short(settings)} was asked for; the first is a pattern, and the second "
                f"a dict of settings: {', '.join(OVERRIDES)}; or {{}}."
            )
        if not names_in(pattern_in(pattern)):
            _compiled(pattern_in(pattern))
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
    refuse_too_many(rules)
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
    """The pattern that counts for the linear of this name: the first that matches.

    Raises:
        ConfigError: it takes too long to find out.
    """
    return _found(tuple(rules), name) if rules else None


def matches(pattern: str, name: str, where: str = "dynamic") -> bool:
    """Whether a regular expression matches the start of a name.

    Raises:
        ConfigError: it is none, or it takes too long to find out.
    """
    try:
        return _compiled(pattern, where).match(name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ConfigError(
            f"{where}: {short(pattern)} takes longer than {SECONDS} s to be compared with {name!r}: it has repeats "
            "inside of repeats, or as many. Write a simpler pattern, such as one that ends with a layer's own name."
        ) from error


def _found(patterns: tuple[str, ...], name: str) -> str | None:
    exact, others = _indexed(patterns)
    limit = exact.get(name, len(patterns))
    place = next((place for place in others if place < limit and matches(pattern_in(patterns[place]), name)), limit)
    return patterns[place] if place < len(patterns) else None


@lru_cache(maxsize=8)
def _indexed(patterns: tuple[str, ...]) -> tuple[dict[str, int], list[int]]:
    """The first pattern that lists each name, by its place; and the places of those that are no lists."""
    exact: dict[str, int] = {}
    others = []
    for place, pattern in enumerate(patterns):
        names = names_in(pattern_in(pattern))
        for name in names:
            exact.setdefault(name, place)
        if not names:
            others.append(place)
    return exact, others


def names_in(pattern: str) -> list[str]:
    """The names that a pattern lists; empty if it is more than a list."""
    if (found := EXACT.fullmatch(pattern)) is None:
        return []
    parent = f"{found['parent']}." if found["parent"] else ""
    return [f"{parent}{name}".replace("\\", "") for name in (found["one"] or found["several"]).split("|")]


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _compiled(pattern: str, where: str = "dynamic") -> Any:
    if len(pattern) > LONGEST_PATTERN:
        raise ConfigError(
            f"{where}: {short(pattern)} has {len(pattern)} characters; {LONGEST_PATTERN} are allowed. Write several."
        )
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: {short(pattern)} is not a regular expression: {error}.") from error


def refuse_too_many(rules: Mapping[Any, Any]) -> None:
    """Refuse more rules than can be looked through for every linear.

    Raises:
        ConfigError: there are more than `MOST_PATTERNS` that do not just list names.
    """
    if len(rules) <= MOST_PATTERNS:
        return
    # What does not begin with ^ is no list of names; to look closer takes seconds for a million.
    count = sum(not (isinstance(pattern, str) and pattern_in(pattern).startswith("^")) for pattern in rules)
    if count <= MOST_PATTERNS:
        count = sum(not (isinstance(pattern, str) and names_in(pattern_in(pattern))) for pattern in rules)
    if count > MOST_PATTERNS:
        raise ConfigError(
            f"dynamic has {count} patterns; {MOST_PATTERNS} are allowed, and as many as there are of those that only "
            "list names, such as ^model\\.layers\\.0\\.mlp\\.(?:up_proj|gate_proj)$. Write fewer that match more."
        )


def choices_of(base: LayerScheme, serving: str | None, out_features: int, in_features: int) -> Iterator[LayerScheme]:
    """The schemes that a budget may choose from for a linear of this shape."""
    served = serving in ("vllm", "sglang")
    sizes = dict.fromkeys((base.group_size, *SERVED_GROUP_SIZES)) if served else (base.group_size,)
    for bits in BITS:
        # With two bits, only a grid that need not be centred on zero is of use.
        symmetric = base.symmetric and (bits > 2 or served)
        for size in sizes:
            scheme = replace(base, bits=bits, symmetric=symmetric, group_size=size)
            fits = not scheme.why_not_grouped(in_features) and not scheme.why_not_packed(in_features, out_features)
            if fits and not (served and scheme.not_served(in_features)):
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
