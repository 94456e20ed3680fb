# SPDX-License-Identifier: Apache-2.0
"""What to try if the result is not close enough: commands that differ from the run's own by one thing each."""

import json
import math
import shlex
from dataclasses import dataclass
from typing import Any

from optq.calibration import DATASETS, FEW_TOKENS, SELF
from optq.errors import counted
from optq.readers import FUSED_NAMES, pattern_of
from optq.scheme import LayerScheme

from .run import Run, bits_per_weight, percent

WORST = 5  # linears that get 8 bits
MORE_BITS = {2: 3, 3: 4, 4: 8}
BUDGETS = ("--target-bits-per-weight", "--target-size-gib", "--fit")  # options that choose the bits of all linears
MARGIN = 0.25  # bits per weight that a budget may spend more


@dataclass(frozen=True, kw_only=True)
class Step:
    """A thing to try: why, and the command that does it, into a new folder."""

    why: str
    command: str

    def __str__(self) -> str:
        return f"{self.why}: {self.command}"


def next_steps(run: Run) -> list[Step]:
    """What brings a run's result closer to the original, cheapest for the reader of it first.

    Empty where it is as good as the original already, was not judged, or its log does not say what was asked for.
    """
    options = (run.started.run or {}).get("options")
    if run.verdict in (None, "as good as the original") or not isinstance(options, list):
        return []
    found = [*_more_text(run, options), *_more_effort(options), *_eight_bits(run, options), *_more_bits(run, options)]
    return [Step(why=why, command=_command(run, changed, name)) for why, changed, name in found]


Changed = tuple[str, list[str], str]
"""Why, the options, and what distinguishes the folder's name."""


def _more_text(run: Run, options: list[str]) -> list[Changed]:
    calibration = run.started.calibration
    tokens, samples, asked = calibration["tokens"], calibration["samples"], _value(options, "--dataset") or SELF
    if tokens >= FEW_TOKENS:
        return []
    why = f"more calibration text, since {tokens} tokens are few"
    if asked in (SELF, *DATASETS):
        more = math.ceil(FEW_TOKENS * samples / tokens)
        return [(why, _with(options, "--num-samples", str(more)), "more-text")]
    if "," in asked or ":" in asked or asked == "DATASET":
        return []
    return [(why, _with(options, "--dataset", f"{asked}:0.5,wikitext2:0.5"), "more-text")]


def _more_effort(options: list[str]) -> list[Changed]:
    if _value(options, "--effort") == "max" or _value(options, "--polish"):
        return []
    return [("more time, for the same size", _with(options, "--effort", "max"), "max")]


def _eight_bits(run: Run, options: list[str]) -> list[Changed]:
    """The linears with the largest losses, and what servers fuse with them."""
    linears = {linear.linear: linear for linear in run.linears if linear.family is None}
    worst = sorted((x for x in linears.values() if x.bits < 8), key=lambda linear: -linear.relative_loss)[:WORST]
    chosen: dict[str, list[str]] = {}
    for linear in worst:
        parent, _, child = linear.linear.rpartition(".")
        fused = next((parts for parts in FUSED_NAMES.values() if child in parts), (child,))
        names = chosen.setdefault(parent, [])
        names += [name for name in fused if f"{parent}.{name}" in linears and name not in names]
    if not chosen or any(flag in options for flag in BUDGETS):
        return []
    rules = {f"+:{pattern_of(parent, names)}": {"bits": 8} for parent, names in chosen.items()}
    rules |= json.loads(_value(options, "--dynamic") or "{}")  # the first match counts
    wide = [linears[f"{parent}.{name}"] for parent, names in chosen.items() for name in names]
    now, weights = bits_per_weight(run.linears), sum(linear.weights for linear in run.linears)
    stored = [LayerScheme(bits=8, group_size=x.group_size).stored_bits(*x.shape) - x.stored_bits for x in wide]
    why = (
        f"8 bits for {counted(len(worst), 'linear')} losing up to {percent(worst[0].relative_loss)} "
        f"({now:.2f} to {now + sum(stored) / weights:.2f} bits per weight)"
    )
    return [(why, _with(options, "--dynamic", json.dumps(rules)), "8-bit")]


def _more_bits(run: Run, options: list[str]) -> list[Changed]:
    found: list[Changed] = []
    bits = int(_value(options, "--bits") or 4)
    if any(flag in options for flag in BUDGETS):
        return found
    if "--dynamic" not in options and bits < 8:
        budget = f"{bits_per_weight(run.linears) + MARGIN:.2f}"
        why = f"a budget of {budget} bits per weight, spent where it helps most"
        found.append((why, _with(options, "--target-bits-per-weight", budget), "budget"))
    if run.verdict == "poor" and bits in MORE_BITS:
        more = str(MORE_BITS[bits])
        found.append((f"{more} bits instead of {bits}", _with(options, "--bits", more), f"{more}-bits"))
    return found


def _value(options: list[str], flag: str) -> str | None:
    return options[options.index(flag) + 1] if flag in options else None


def _with(options: list[str], flag: str, value: str) -> list[str]:
    if flag not in options:
        return [*options, flag, value]
    place = options.index(flag) + 1
    return [*options[:place], value, *options[place + 1 :]]


def _command(run: Run, options: list[str], name: str) -> str:
    words: list[Any] = ["quantize", "--model", run.started.model, *options, f"{run.folder}-{name}"]
    return f"optq {shlex.join(map(str, words))}"
