# SPDX-License-Identifier: Apache-2.0
"""The rules of `dynamic`: patterns of layers' names, and how the layers that match differ from the others."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from time import perf_counter
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


MOST_RULES, MOST_CHARACTERS, MOST_ALTERNATIVES = 60_000, 10_000_000, 300_000
"""Of `dynamic`, and of all its patterns together: more than a mixture of 100 layers with 256 experts needs."""

MOST_PATTERNS, LONGEST_PATTERN, LARGEST_PATTERNS = 10_000, 4_000, 50_000
"""Patterns that are more than the names of linears, the characters of one, and those of all, each counted as often as
the numbers in braces repeat it: so often it is compiled. A file of a stranger may hold any number of them."""

SECONDS, SECONDS_IN_ALL, SECONDS_PER_NAME = 0.1, 2.0, 0.01
"""For one match; for compiling all patterns of a config; for comparing them with names, as much and some more for each
name. As a pattern is written by a stranger, it may take longer than anyone lives."""

EXACT = re.compile(
    r"\^(?:(?P<parent>(?:[\w-]|\\[.-])[\w-]*(?:\\[.-][\w-]*)*)\\\.)?(?:\(\?:(?P<several>(?:[\w|-]|\\-)+)\)|(?P<one>[\w-]+))\$"
)
"""A pattern that matches nothing but the names that it lists, as `pattern_of` writes them."""

REPEAT = re.compile(r"\{\s*([0-9]+)")


def checked_rules(rules: Rules | None, *, of_file: bool) -> Rules | None:
    """The rules, each setting checked as the field of its name.

    Args:
        of_file: keep settings that are none of ours.
    Raises:
        ConfigError: one does not fit; rule and setting are named.
    """
    checked: Rules = {}
    patterns_in(rules or {})
    for pattern, settings in (rules or {}).items():
        if not isinstance(pattern, str) or not isinstance(settings, dict):
            raise ConfigError(
                f"dynamic: {short(pattern)}: {short(settings)} was asked for; the first is a pattern, and the second "
                f"a dict of settings: {', '.join(OVERRIDES)}; or {{}}."
            )
        checked[pattern] = own = dict(settings)
        for key, value in settings.items():
            if key in OVERRIDES:
                own[key] = FIELDS[key].checked(value, f"dynamic: {pattern!r}: {key}")
            elif not of_file:
                raise ConfigError(
                    f"dynamic: {pattern!r}: {key}={short(value)} was asked for; "
                    f"{why_unknown(str(key), OVERRIDES, 'setting')}"
                )
    return None if rules is None else checked


def rules_of_file(rules: dict[str, Any]) -> dict[str, Any]:
    """Rules of `dynamic` from JSON: null instead of a rule is an empty one, and null settings are left out."""
    patterns_in(rules)
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
    if not rules:
        return None
    _, keys, patterns = _looked_through(rules)
    place = patterns.first(name)
    return None if place is None else keys[place]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `dynamic` matches the start of a name.

    Raises:
        ConfigError: as `Patterns`, or it takes too long to find out.
    """
    return patterns_of((pattern,), "dynamic").first(name) is not None


class Patterns:
    """Regular expressions of a stranger, with which names are compared in a bounded time.

    Args:
        patterns: in the order in which they count.
        where: what they are called in errors.
    Raises:
        ConfigError: there are too many, or one is too long, repeats too often or is no regular expression.
    """

    def __init__(self, patterns: tuple[str, ...], where: str) -> None:
        self._patterns, self._where = patterns, where
        self._listed: dict[str, int] = {}  # the first pattern that lists a name
        self._found: dict[str, int | None] = {}
        self._seconds = 0.0
        for what, count, most in (
            ("patterns", len(patterns), MOST_RULES),
            ("characters in its patterns", sum(map(len, patterns)), MOST_CHARACTERS),
            ("alternatives in its patterns", sum(pattern.count("|") for pattern in patterns), MOST_ALTERNATIVES),
        ):
            if count > most:
                raise ConfigError(f"{where} has {count} {what}; {most} are allowed. Write fewer that match more.")
        others = []
        for place, pattern in enumerate(patterns):
            names = names_in(pattern)
            for name in names:
                self._listed.setdefault(name, place)
            if not names:
                others.append(place)
        if len(others) > MOST_PATTERNS:
            raise ConfigError(
                f"{where} has {len(others)} patterns; {MOST_PATTERNS} are allowed, and {MOST_RULES} that only list "
                "names, such as ^model\\.layers\\.0\\.mlp\\.(?:up_proj|gate_proj)$. Write fewer that match more."
            )
        self._compiled = self._compile(others)

    def _compile(self, places: Iterable[int]) -> dict[int, Any]:
        compiled, size, began = {}, 0, perf_counter()
        for place in places:
            pattern = self._patterns[place]
            size += _size(pattern)
            if len(pattern) > LONGEST_PATTERN:
                raise ConfigError(
                    f"{self._where}: {short(pattern)} has {len(pattern)} characters; {LONGEST_PATTERN} are allowed. "
                    "Write several."
                )
            if size > LARGEST_PATTERNS or perf_counter() - began > SECONDS_IN_ALL:
                raise ConfigError(
                    f"{self._where}: up to {short(pattern)}, the patterns have {size} characters, counted as often as "
                    f"the numbers in braces repeat them; {LARGEST_PATTERNS} are allowed, and {SECONDS_IN_ALL:.0f} s "
                    "for compiling them. Write fewer and simpler ones."
                )
            try:
                compiled[place] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise ConfigError(f"{self._where}: {short(pattern)} is not a regular expression: {error}.") from error
        return compiled

    def first(self, name: str) -> int | None:
        """The place of the first pattern that matches the start of a name; None if there is none.

        Raises:
            ConfigError: it takes too long to find out.
        """
        if name not in self._found:
            limit = self._listed.get(name, len(self._patterns))
            place = next((place for place in self._compiled if place < limit and self._matches(place, name)), limit)
            self._found[name] = place if place < len(self._patterns) else None
        return self._found[name]

    def _matches(self, place: int, name: str) -> bool:
        pattern, began = self._patterns[place], perf_counter()
        try:
            found = self._compiled[place].match(name, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise ConfigError(
                f"{self._where}: {short(pattern)} takes longer than {SECONDS} s to be compared with {name!r}: it has "
                "repeats inside of repeats, or as many. Write a simpler pattern, such as one that ends with a layer's "
                "own name."
            ) from error
        self._seconds += perf_counter() - began
        if self._seconds > (allowed := SECONDS_IN_ALL + SECONDS_PER_NAME * len(self._found)):
            raise ConfigError(
                f"{self._where}: comparing {len(self._compiled)} patterns with {len(self._found) + 1} names takes "
                f"more than {allowed:.2f} s; at {short(pattern)} it was given up. Write fewer and simpler ones."
            )
        return found


@lru_cache(maxsize=8)
def patterns_of(patterns: tuple[str, ...], where: str) -> Patterns:
    """The same `Patterns` for equal ones, so that copies of a config share what has been found."""
    return Patterns(patterns, where)


def patterns_in(rules: dict[str, Any]) -> Patterns:
    """The patterns of `dynamic`.

    Raises:
        ConfigError: as `Patterns`.
    """
    return _looked_through(rules)[2]


_LAST: list[tuple[dict[str, Any], tuple[str, ...], Patterns]] = []


def _looked_through(rules: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], Patterns]:
    """Rules, their keys and patterns. The last ones are kept: to compare all keys takes longer than to find a name."""
    newest = next(reversed(rules), None)
    for last in _LAST:
        if last[0] is rules and len(last[1]) == len(rules) and (not rules or last[1][-1] == newest):
            return last
    keys = tuple(rules)
    patterns = patterns_of(tuple(pattern_in(key) if isinstance(key, str) else "" for key in keys), "dynamic")
    _LAST[:] = [(rules, keys, patterns)]
    return rules, keys, patterns


def names_in(pattern: str) -> list[str]:
    """The names that a pattern lists; empty if it is more than a list."""
    if pattern[:1] != "^" or (found := EXACT.fullmatch(pattern)) is None:
        return []
    parent = f"{found['parent']}." if found["parent"] else ""
    return [f"{parent}{name}".replace("\\", "") for name in (found["one"] or found["several"]).split("|")]


def _size(pattern: str) -> int:
    """The characters of a pattern, as often as the numbers in braces say, were each inside of the others."""
    times = 1
    for least in REPEAT.findall(pattern):
        times = min(times * max(int(least), 1), LARGEST_PATTERNS + 1)
    return times * len(pattern)


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
