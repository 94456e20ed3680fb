# SPDX-License-Identifier: Apache-2.0
"""What calibration data may be named by: datasets of the Hub, files and folders, and mixtures of them by weight.

Imports neither torch nor transformers, so that a name that there is not is refused at once.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CalibrationError

SELF = "self"
"""The name of the text that the model writes itself."""

WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>-?(?:\d+\.?\d*|\.\d+))")


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """A dataset of the Hub that is read without running any code of its own.

    Args:
        path, arguments: of `datasets.load_dataset`. Large ones are streamed.
        columns: a sample's text or chat; several texts are joined by blank lines.
        evaluation: arguments that differ for the part that models are judged on; None if there is no such part.
        purpose, licence: for the reader.
        one_document: whether the rows are lines of one text.
    """

    path: str
    arguments: Mapping[str, Any]
    columns: tuple[str, ...]
    purpose: str
    licence: str
    evaluation: Mapping[str, Any] | None = None
    one_document: bool = False


_C4 = NamedDataset(
    path="allenai/c4",
    arguments={"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train", "streaming": True},
    columns=("text",),
    purpose="English web pages",
    licence="ODC-BY",
    evaluation={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
)
DATASETS = {
    "wikitext2": NamedDataset(
        path="Salesforce/wikitext",
        arguments={"name": "wikitext-2-raw-v1", "split": "train"},
        columns=("text",),
        purpose="English encyclopedia",
        licence="CC-BY-SA-3.0",
        evaluation={"split": "test"},
        one_document=True,
    ),
    "c4": _C4,
    "c4-new": _C4,
    "ptb": NamedDataset(
        path="ptb-text-only/ptb_text_only",
        # The repository's loading script is not run; the Hub's own conversion to Parquet is read.
        arguments={"split": "train", "revision": "refs/convert/parquet"},
        columns=("sentence",),
        purpose="English newspaper, lower case",
        licence="LDC, for research",
        evaluation={"split": "test"},
        one_document=True,
    ),
    "code": NamedDataset(
        path="ise-uiuc/Magicoder-OSS-Instruct-75K",
        arguments={"split": "train", "streaming": True},
        columns=("problem", "solution"),
        purpose="programming tasks and solutions in nine languages",
        licence="MIT",
    ),
    "math": NamedDataset(
        path="HuggingFaceTB/finemath",
        arguments={"name": "finemath-4plus", "split": "train", "streaming": True},
        columns=("text",),
        purpose="web pages that teach mathematics",
        licence="ODC-BY",
    ),
    "chat": NamedDataset(
        path="HuggingFaceH4/ultrachat_200k",
        arguments={"split": "train_sft", "streaming": True},
        columns=("messages",),
        purpose="conversations of several turns; needs a chat template",
        licence="MIT",
        evaluation={"split": "test_sft"},
    ),
    "medical": NamedDataset(
        path="FreedomIntelligence/medical-o1-reasoning-SFT",
        arguments={"name": "en", "split": "train"},
        columns=("Question", "Complex_CoT", "Response"),
        purpose="medical questions, reasoning and answers",
        licence="Apache-2.0",
    ),
    "finance": NamedDataset(
        path="gbharti/finance-alpaca",
        arguments={"split": "train"},
        columns=("instruction", "input", "output"),
        purpose="questions on finance and answers",
        licence="MIT",
    ),
    "multilingual": NamedDataset(
        path="CohereLabs/aya_dataset",
        arguments={"split": "train"},
        columns=("inputs", "targets"),
        purpose="prompts and answers written by people in 65 languages",
        licence="Apache-2.0",
        evaluation={"split": "test"},
    ),
}
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "content", "sentence")
CHAT_COLUMNS = ("messages", "conversations")
KNOWN_COLUMNS = ("input_ids", *CHAT_COLUMNS, *TEXT_COLUMNS)


def accepted() -> str:
    return (
        "a list of strings, a list of chats, a list of dicts with input_ids, a list of what a processor returns for "
        "samples with images or sound, what a tokenizer returns for texts, a datasets.Dataset, a DataLoader or "
        f"another iterable of these, a path to a {'/'.join(FILE_SUFFIXES)} file or a folder of them or of "
        "datasets.save_to_disk, one of the names "
        f"{', '.join((SELF, *DATASETS))}, or several of these by weight: 'wikitext2:0.7,./my.jsonl:0.3'"
    )


def mixture(dataset: Any) -> list[tuple[Any, float]]:
    """The sources of calibration data with their weights: one, unless `dataset` is a dict or such a string.

    Raises:
        CalibrationError: weights that are no finite positive numbers, or all zero.
    """
    if isinstance(dataset, Mapping) and not (is_row(dataset) or hasattr(dataset, "column_names")):
        weights = dict(dataset)
    elif isinstance(dataset, str):
        weights = _weights_in(dataset)
    else:
        return [(dataset, 1.0)]
    if not weights:
        raise CalibrationError(f"dataset={dataset!r} names no source. Pass {accepted()}.")
    for source, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise CalibrationError(
                f"dataset: the weight of {source!r} is {weight!r}; it is a number, 0 or more, such as 0.5."
            )
    if not any(weights.values()):
        raise CalibrationError(f"dataset: all weights of {', '.join(map(str, weights))} are 0; one has to count.")
    return [(source, float(weight)) for source, weight in weights.items() if weight]


def is_row(dataset: Any) -> bool:
    """Whether this is one row, which may hold a batch, as a tokenizer returns it, and not sources by weight."""
    return isinstance(dataset, Mapping) and any(
        key in dataset and not isinstance(dataset[key], (int, float)) for key in KNOWN_COLUMNS
    )


def check_sources(dataset: Any) -> None:
    """Refuse weights that make no sense, and names and paths that do not exist, before anything is loaded.

    Raises:
        CalibrationError: what is wrong with them; or a list holds nothing but names and paths, which are no texts.
    """
    if isinstance(dataset, Sequence) and not isinstance(dataset, str) and len(dataset) and all(map(_is_name, dataset)):
        named = ",".join(map(str, dataset))
        raise CalibrationError(
            f"dataset={[str(part) for part in dataset]} is a list of names or files; the strings of a list are read "
            f"as texts. Pass one string, {named!r}; a weight may follow each, as in 'wikitext2:0.7,./my.jsonl:0.3'."
        )
    for source, _ in mixture(dataset):
        if isinstance(source, (str, Path)) and not _exists(str(source)):
            raise CalibrationError(no_such_source(str(source)))


def _is_name(part: Any) -> bool:
    """Whether a string of a list is meant as a source, with or without a weight, and not as a text."""
    if isinstance(part, Path):
        return True
    if not isinstance(part, str):
        return False
    match = WEIGHTED.fullmatch(part)
    return any(
        name in (SELF, *DATASETS) or (suffix_of(Path(name)) in FILE_SUFFIXES and os.path.isfile(name))
        for name in (part, match["source"] if match else part)
    )


def _weights_in(text: str) -> dict[str, float]:
    if _exists(text):
        return {text: 1.0}
    weights: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        match = None if _exists(part) else WEIGHTED.fullmatch(part)
        source, weight = (match["source"], float(match["weight"])) if match else (part, 1.0)
        weights[source] = weights.get(source, 0.0) + weight
    return weights


def _exists(source: str) -> bool:
    return source == SELF or source in DATASETS or os.path.exists(source)


def suffix_of(path: Path) -> str:
    """What kind of file it is, compressed or not."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def no_such_source(source: str) -> str:
    close = difflib.get_close_matches(source, (SELF, *DATASETS), n=2)
    name, colon, weight = source.rpartition(":")
    kinds = ", ".join(FILE_SUFFIXES)
    if os.path.isdir(source):
        return f"dataset={source[:200]!r} is a folder without files of text ({kinds}) or a saved dataset."
    if os.path.exists(source):
        return f"dataset={source[:200]!r} is a file of a kind that is not read; {kinds} are, and each as .gz."
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if colon and _exists(name):
        hint = f" {name!r} exists, but its weight {weight!r} is not a number."
    elif len(source.split()) > 3:
        hint = " A text itself goes into a list."
    return f"dataset={source[:200]!r} is neither a known name nor a readable file or folder.{hint} Pass {accepted()}."
