# SPDX-License-Identifier: Apache-2.0
"""`optq.card`: a model card made from what a run measured, not from what it promised."""

import json
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from optq.config.gptq import GPTQConfig
from optq.errors import CheckpointError, counted
from optq.events import Quality
from optq.files.source import place_of
from optq.report import Run, notes_on, read_run
from optq.version import __version__, how_to_install, pip_install

from .inspect import Inspection, inspect

INSTALLED = how_to_install().replace(pip_install(), f"`{pip_install()}`")

USE = {
    "transformers": (
        f"{INSTALLED}, then ",
        "AutoModelForCausalLM.from_pretrained({string})",
        "; no import of optq",
    ),
    "gptqmodel": ("", "GPTQModel.load({string})", ""),
    "sglang": ("", "python -m sglang.launch_server --model-path {word}", ""),
    "vllm": ("", "vllm serve {word}", ""),
    "vllm+optq": (f"{INSTALLED} beside vLLM, then ", "vllm serve {word}", ""),
}
"""By reader: how it is told to use the checkpoint; its name as a string of Python, or as a word of the shell."""

MARKUP = re.compile(r"[\\`*<>\[\]|#]|(?<!\w)_|_(?!\w)")
"""What Markdown could read as something else than text; an underscore inside of a word is none."""


def card(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> str:
    """The text of a README.md for a checkpoint that `optq.quantize` has written.

    Args:
        folder: the checkpoint's, with its log.
        repo_id: its name on the Hub, for the commands on the card; by default the folder's name.
    Raises:
        CheckpointError: nothing in the folder is quantized.
        ReportError: it holds no log of a run.
    """
    folder = Path(place_of(folder))
    found = inspect(folder)
    if found.config is None:
        raise CheckpointError(f"{folder} is not quantized, so there is nothing to write a card of.")
    run = read_run(folder)
    source = run.started.model
    base = Path(source).name if run.started.from_folder else source  # no path of the machine that made it
    on_hub = "/" in base
    name = repo_id or folder.resolve().name
    data = ModelCardData(
        base_model=base if on_hub else None,
        license=_licence(source, on_hub),
        library_name="transformers",
        tags=["gptq", f"{found.config.bits}-bit", "optq"],
        **({"base_model_relation": "quantized"} if on_hub else {}),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_text(name)}\n",
        f"{_text(base)}, quantized with GPTQ by optq {__version__}: "
        f"{found.config.bits} bits, {_groups(found.config)}, {'symmetric' if found.config.sym else 'asymmetric'}; "
        f"{found.bits_per_weight:.2f} bits per weight, scales and zeros included; "
        f"{found.size_gib:.3g} GiB.\n",
        _closeness(run),
        _widths(found),
        _usage(name, found),
        _info(run, found.config),
        _notes(run),
    ]
    return "\n".join(section for section in sections if section)


def _licence(source: str, on_hub: bool) -> str | None:
    """The licence that the original's model card states, if it has a card that can be read."""
    readme = Path(source, "README.md")
    if not on_hub and not readme.exists():
        return None
    try:
        original = ModelCard.load(source if on_hub else readme)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None
    licence: str | None = original.data.license
    return licence


def _groups(config: GPTQConfig) -> str:
    return "a scale per row" if config.group_size == -1 else f"groups of {config.group_size}"


def _closeness(run: Run) -> str:
    quality = run.last(Quality)
    if quality is None:
        return "It was not compared with the original.\n"
    where = "rows held out of" if quality.held_out else "rows of"
    figures = {
        "perplexity, times the original's": ("perplexity_ratio", "{:.3f}"),
        "KL divergence, nats per token": ("divergence", "{:.4f}"),
        "same most likely token": ("agreement", "{:.1%}"),
    }
    found = {title: (getattr(quality, key), form) for title, (key, form) in figures.items()}
    known: dict[str, str] = {"verdict": run.verdict} if run.verdict else {}
    known |= {title: form.format(value) for title, (value, form) in found.items() if value is not None}
    return (
        f"## Beside the original\n\nOn {counted(quality.tokens, 'token')}, {where} the calibration data:\n\n"
        + _table("figure", "value", known)
    )


def _widths(found: Inspection) -> str:
    """Which linears have how many bits, where that is not the same for all."""
    widths: Counter[tuple[int, int]] = Counter()
    for (_, _, _, scheme), count in found.linears.items():
        widths[scheme.bits, scheme.group_size] += count
    if len(widths) == 1 and not found.dense:
        return ""
    rows = {
        f"{bits} bits, group size {size}": counted(count, "linear") for (bits, size), count in sorted(widths.items())
    }
    rows |= {f"not quantized: {_code(kind)}": counted(count, "tensor") for kind, count in found.dense.items()}
    return "## What is stored\n\n" + _table("how", "what", rows)


def _usage(name: str, found: Inspection) -> str:
    lines = {
        reader: f"no: {_text('; '.join(reasons))}" if (reasons := found.refused[reader]) else _told(name, *USE[reader])
        for reader in USE
        if reader != "vllm+optq" or found.refused["vllm"]
    }
    return "## Use\n\n" + _table("with", "how", lines)


def _info(run: Run, config: GPTQConfig) -> str:
    calibration = dict(run.started.calibration)
    sources = calibration.pop("sources", None) or [{"name": calibration["source"]}]
    described = [
        ", ".join(
            str(value) if key == "name" else f"{key} {value}" for key, value in source.items() if value is not None
        )
        for source in sources
    ]
    wanted = ("effort", "grid", "propagation", "refinement", "polish", "damp_percent", "static_groups", "desc_act")
    stated = config.to_dict()
    facts: dict[str, Any] = {key: stated[key] for key in wanted if key in stated}
    facts |= {
        "calibration": "; ".join(described),
        "samples": calibration["samples"],
        "tokens": calibration["tokens"],
        "seed": calibration["seed"],
        "sha256 of the token ids": calibration["sha256"],
        "device": run.started.device,
        "minutes": f"{run.seconds / 60:.1f}",
    }
    return "## How it was made\n\n" + _table("setting", "value", {key: _text(value) for key, value in facts.items()})


def _notes(run: Run) -> str:
    notes = notes_on(run)
    return "## To be known\n\n" + "".join(f"- {_text(note)}\n" for note in notes) if notes else ""


def _told(name: str, before: str, call: str, after: str) -> str:
    string = json.dumps(name, ensure_ascii=False)
    return f"{before}{_code(call.format(string=string, word=shlex.quote(name)))}{after}"


def _text(value: object) -> str:
    """Anything as one line of text that Markdown and HTML leave alone: names come from folders and files of others."""
    return MARKUP.sub(lambda found: "\\" + found[0], " ".join(str(value).split())).replace("&", "&amp;")


def _code(value: str) -> str:
    """One line of code, in a table, with as many backticks around it as it needs."""
    line = " ".join(value.split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " * ("`" in line)
    return f"{fence}{space}{line}{space}{fence}"


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines]) + "\n"
