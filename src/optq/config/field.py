# SPDX-License-Identifier: Apache-2.0
"""What is to be known of a field of the config, and whether a value fits it.

Imports neither torch nor transformers, so that the command line's `--help` appears at once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from functools import cached_property
from itertools import islice
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from optq.errors import ConfigError

SHORT = 80  # characters of a value in a message
WRONG = object()
"""No value of a kind."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """Declaration of one field of the config.

    Args:
        help: for the docs page, the docstring and `--help`; Markdown.
        unset: what None, or an option that is not given, stands for.
        stored: config.json has it. All others say how to run, not what the checkpoint is.
        decisive: the checkpoint's bytes depend on it, so a run that goes on needs the same.
        least, above, below: bounds of a number.
        allowed: the only values, where the annotation does not list them.
        fits, wanted: of a type that does not say it all, whether a value is one, and in words what it has to be.
        lenient: of a file, a value that does not fit is left aside: to read the checkpoint it is not needed.
        option: it has a command-line option, named like it; `options` are other names, the first is shown first.
    """

    name: str
    annotation: Any
    section: str
    help: str
    default: Any = MISSING
    unset: str = ""
    stored: bool = False
    decisive: bool = True
    least: int | None = None
    above: int | None = None
    below: int | None = None
    allowed: tuple[Any, ...] = ()
    fits: Callable[[Any], bool] | None = None
    wanted: str = ""
    lenient: bool = False
    option: bool = True
    options: tuple[str, ...] = ()

    @cached_property
    def optional(self) -> bool:
        return self.default is None if self.annotation is Any else type(None) in get_args(self.annotation)

    @cached_property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self._member) if get_origin(self._member) is Literal else self.allowed

    @cached_property
    def kind(self) -> Any:
        """int, float, bool, str, dict, list or, of anything else, object."""
        kind = str if get_origin(self._member) is Literal else get_origin(self._member) or self._member
        return kind if isinstance(kind, type) and kind in (int, float, bool, str, dict, list) else object

    @property
    def _member(self) -> Any:
        """The annotation without None."""
        is_union = get_origin(self.annotation) in (Union, UnionType)
        return get_args(self.annotation)[0] if is_union else self.annotation

    @property
    def flags(self) -> tuple[str, ...]:
        """The field's option names on the command line."""
        flags = (*self.options, f"--{self.name.replace('_', '-')}")
        return tuple(dict.fromkeys(flags)) if self.option else ()

    @property
    def shown_default(self) -> str:
        if self.unset or self.default is None:
            return self.unset or "none"
        return "required" if self.default is MISSING else str(self.default)

    def checked(self, value: Any, label: str | None = None) -> Any:
        """The value, as Python's own type if it is a number of another library.

        Args:
            label: how an error calls it, if not by its name.
        Raises:
            ConfigError: it does not fit.
        """
        value = value.value if isinstance(value, Enum) else value  # other tools have enumerations
        if value is None and self.optional:
            return None
        found = value if self.fits is not None else PARSERS[self.kind](value)
        if self.fits(found) if self.fits is not None else found is not WRONG and self._admits(found):
            return found
        raise ConfigError(f"{label or self.name}={short(value)} was asked for; {self.wanted or self._wanted}.")

    def why_refused(self, value: Any) -> str | None:
        try:
            self.checked(value)
        except ConfigError as error:
            return str(error)
        return None

    def from_json(self, value: Any) -> Any:
        """Convert a value from JSON to the field's type: files may say 0 or 1 for a switch."""
        return bool(value) if self.kind is bool and type(value) is int and value in (0, 1) else value

    def _admits(self, value: Any) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def _wanted(self) -> str:
        """What a value has to be."""
        none = ", or None for the default" if self.optional else ""
        if self.choices:
            return f"allowed are {', '.join(map(repr, self.choices))}{none}"
        if self.kind is bool:
            return f"allowed are True and False (in a file also 1 and 0){none}"
        if self.kind is int and self.least is not None:
            return f"it is {'a positive integer' if self.least == 1 else f'an integer, {self.least} or more'}{none}"
        if self.below is not None:
            return f"it is a fraction above {self.above} and below {self.below}{none}"
        if self.kind is float and self.above is not None:
            return f"it is a positive finite number{none}"
        kinds = {int: "an integer", float: "a finite number", str: "text that is not empty"}
        return f"it is {kinds[self.kind]}{none}"


def _integer(value: Any) -> Any:
    """One of 64 bits at most, as torch has them."""
    is_one = not isinstance(value, bool) and isinstance(value, Integral) and abs(int(value)) < 2**63
    return int(value) if is_one else WRONG


def _number(value: Any) -> Any:
    """A finite one; an int stays an int."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return WRONG
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        return WRONG
    return (int(value) if isinstance(value, Integral) else float(value)) if is_finite else WRONG


def _switch(value: Any) -> Any:
    kind = type(value)
    is_numpys = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    return bool(value) if kind is bool or is_numpys else WRONG


def _text(value: Any) -> Any:
    return value if is_text(value) else WRONG


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


PARSERS: dict[Any, Callable[[Any], Any]] = {int: _integer, float: _number, bool: _switch, str: _text}
"""By the kind of a field: what a value is in Python, or `WRONG`. The other kinds have `fits`."""


def short(value: Any, depth: int = 3) -> str:
    """Format a setting in one line, down to `depth`; objects that are no settings by their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
    elif isinstance(value, Mapping) and depth:
        parts = (f"{short(key)}: {short(part, depth - 1)}" for key, part in islice(value.items(), SHORT))
        text = "{" + ", ".join(parts) + "}"
    elif isinstance(value, (list, tuple)) and all(isinstance(part, (str, list)) for part in value) and len(value) < 9:
        text = "[" + ", ".join(short(part, depth - 1) if depth else "…" for part in value) + "]"
    else:
        return kind_of_value(value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 1]}…"


def kind_of_value(value: Any) -> str:
    """A name as it is; for anything else its type and length."""
    if isinstance(value, str):
        return short(value)
    try:
        count = f" of {len(value)}"
    except TypeError:  # also of tensors without dimensions
        count = ""
    return f"<{type(value).__name__}{count}>"
