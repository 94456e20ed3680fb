# SPDX-License-Identifier: Apache-2.0
"""Where calibration data comes from: names, files, folders and objects, alone or mixed by weight, become rows."""

import difflib
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from optq.errors import CalibrationError

logger = logging.getLogger(__name__)

SELF = "self"
"""The name of the text that the model writes itself."""

ROWS_PER_SAMPLE = 16  # read of a source that may be far larger than what is drawn from it
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
        "samples with images or sound, a datasets.Dataset, a path to a "
        f"{'/'.join(FILE_SUFFIXES)} file or a folder of them or of datasets.save_to_disk, one of the names "
        f"{', '.join((SELF, *DATASETS))}, or several of these by weight: 'wikitext2:0.7,./my.jsonl:0.3'"
    )


def mixture(dataset: Any) -> list[tuple[Any, float]]:
    """What the data is drawn from, with weights: one source, unless `dataset` is a dict or such a string.

    Raises:
        CalibrationError: weights that are no finite positive numbers, or all zero.
    """
    if isinstance(dataset, Mapping):
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


def check_sources(dataset: Any) -> None:
    """Refuse weights that make no sense, and names and paths that do not exist, before anything is loaded."""
    for source, _ in mixture(dataset):
        if isinstance(source, (str, Path)) and not _exists(str(source)):
            raise CalibrationError(_no_such_source(str(source)))


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


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` things divided by weight, by largest remainder."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [math.floor(share) for share in exact]
    remainders = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])  # stable
    for index in remainders[: count - sum(whole)]:
        whole[index] += 1
    return whole


def name_of(source: Any) -> str:
    """What the recipe calls a source: its name on the Hub, the kind of file, or the type of the object; no path."""
    if not isinstance(source, (str, Path)):
        return type(source).__name__
    if source == SELF or source in DATASETS:
        return str(source)
    return f"{Path(source).suffix} file" if Path(source).is_file() else "folder"


def read(source: Any, samples: int | None, seed: int) -> tuple[Iterable[Any], dict[str, Any]]:
    """The rows of one source, and what the recipe says of them beyond its name.

    Args:
        samples: how many will be drawn: of longer sources, ROWS_PER_SAMPLE times as many rows are chosen with `seed`,
            or read from the start of what has no length. None: all rows.
    Raises:
        CalibrationError: there is no such source, it cannot be read, or has no known column.
    """
    rows: Iterable[Any]
    if isinstance(source, (str, Path)):
        if str(source) in DATASETS:
            named = DATASETS[str(source)]
            return _read_named(named, named.arguments, samples, seed)
        rows = _read_path(Path(source))
    elif hasattr(source, "column_names"):
        rows = _with_known_column(source)
    elif isinstance(source, Sequence):
        rows = source
    else:
        raise CalibrationError(f"dataset= is a {type(source).__name__}; pass {accepted()}.")
    return _some(rows, samples, seed), {}


def read_to_judge(dataset: Any) -> Iterable[Any]:
    """All rows of one source, in order; of a named dataset, of its part for evaluation.

    Raises:
        CalibrationError: as `read`; or there are several sources, or no such part.
    """
    check_sources(dataset)
    parts = mixture(dataset)
    source = parts[0][0]
    if len(parts) > 1 or (isinstance(source, str) and source == SELF):
        raise CalibrationError(
            f"dataset={dataset!r} does not say which text models are judged on: name one source, and not {SELF!r}."
        )
    if not isinstance(source, (str, Path)) or str(source) not in DATASETS:
        return read(source, None, seed=0)[0]
    named = DATASETS[str(source)]
    if named.evaluation is None:
        kept = ", ".join(name for name, other in DATASETS.items() if other.evaluation is not None)
        raise CalibrationError(f"{source!r} has no part for evaluation. Pass a file of your own, or one of {kept}.")
    return _read_named(named, {**named.arguments, **named.evaluation}, None, seed=0)[0]


def _some(rows: Any, samples: int | None, seed: int) -> Any:
    """So many of the rows that `samples` can be drawn from them."""
    if samples is None:
        return rows
    most = ROWS_PER_SAMPLE * samples
    if not hasattr(rows, "__len__"):
        return islice(rows, most)
    if len(rows) <= most:
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), most))]


def _with_known_column(dataset: Any) -> Iterable[Any]:
    """Rows of a `datasets.Dataset` or `IterableDataset`."""
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise CalibrationError(f"The dataset is a DatasetDict with splits {', '.join(columns)}; pass one of them.")
    if columns is not None and not any(column in columns for column in KNOWN_COLUMNS):  # None: not known in advance
        raise CalibrationError(
            f"The dataset has columns {', '.join(columns)}; one of {', '.join(KNOWN_COLUMNS)} is needed."
        )
    rows: Iterable[Any] = dataset
    return rows


def _read_path(path: Path) -> Sequence[Any] | Iterable[Any]:
    """Rows of a file, of all files of a folder, or of a dataset saved as a folder."""
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _with_known_column(_datasets("a saved dataset").load_from_disk(str(path)))
        files = sorted(file for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
        if files:
            return [row for file in files for row in _read_file(file)]
    elif path.is_file() and path.suffix in FILE_SUFFIXES:
        return _read_file(path)
    raise CalibrationError(_no_such_source(str(path)))


def _no_such_source(source: str) -> str:
    close = difflib.get_close_matches(source, (SELF, *DATASETS), n=2)
    name, colon, weight = source.rpartition(":")
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if colon and _exists(name):
        hint = f" {name!r} exists, but its weight {weight!r} is not a number."
    elif len(source.split()) > 3:
        hint = " A text itself goes into a list."
    return f"dataset={source[:200]!r} is neither a known name nor a readable file or folder.{hint} Pass {accepted()}."


def _read_file(path: Path) -> Sequence[Any]:
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            found: list[Any] = parquet.read_table(path).to_pylist()
        except ArrowInvalid as error:
            raise CalibrationError(f"{path} is not a valid Parquet file: {error}.") from error
        return found
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text) if path.suffix == ".json" else list(map(json.loads, filter(str.strip, text.split("\n"))))
        )
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path} is not valid {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds a {type(rows).__name__}; a list of texts, chats or dicts is needed.")
    return rows


def _read_named(
    named: NamedDataset, arguments: Mapping[str, Any], samples: int | None, seed: int
) -> tuple[list[Any], dict[str, Any]]:
    """Rows of a dataset of the Hub, as `read`: shuffled if not all are wanted."""
    datasets = _datasets("a dataset by name")
    revision = _revision(named.path, arguments.get("revision"))
    pinned = {"revision": revision} if revision is not None else {}
    most = None if named.one_document or samples is None else ROWS_PER_SAMPLE * samples
    try:
        rows = datasets.load_dataset(named.path, **{**arguments, **pinned})
        if most is not None:
            rows = rows.shuffle(seed=seed, **({"buffer_size": 2 * most} if arguments.get("streaming") else {}))
        rows = list(islice(rows, most))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"{named.path} could not be read from the Hub: {error} "
            "Without a connection, pass a local file, or dataset='self' for text that the model writes itself."
        ) from error
    found = [_sample(row, named) for row in rows]
    if named.one_document:
        # With the empty lines, as the GPTQ paper's code joins them: else perplexities cannot be compared with others'.
        found = ["\n\n".join(found)]
    return [row for row in found if not isinstance(row, str) or row.strip()], {
        "path": named.path,
        "revision": revision,
    }


def _revision(path: str, revision: str | None) -> str | None:
    """The commit that will be read; None without a connection, when `datasets` reads what it has kept."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of whichever HTTP library this version uses

    try:
        sha: str | None = HfApi().dataset_info(path, revision=revision).sha
    except (OSError, HTTPError) as error:
        logger.info("The revision of %s is not known: %s", path, error)
        return None
    return sha


def _sample(row: Mapping[str, Any], named: NamedDataset) -> Any:
    if missing := [column for column in named.columns if column not in row]:
        raise CalibrationError(
            f"{named.path} has columns {', '.join(row)}, but no {', '.join(missing)}: it has changed. "
            "Download it and pass a local file with a text column."
        )
    values = [row[column] for column in named.columns]
    return values[0] if len(values) == 1 else "\n\n".join(value for value in values if value)


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"Reading {purpose} needs the package datasets: pip install datasets.") from error
    return datasets
