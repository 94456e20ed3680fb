# SPDX-License-Identifier: Apache-2.0
"""Where calibration data comes from: names, files, folders and objects, alone or mixed by weight, become rows."""

import gzip
import json
import logging
import math
import random
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from optq.datasets import (
    DATASETS,
    FILE_SUFFIXES,
    KNOWN_COLUMNS,
    SELF,
    NamedDataset,
    accepted,
    check_sources,
    is_row,
    mixture,
    no_such_source,
    suffix_of,
)
from optq.errors import CalibrationError

logger = logging.getLogger(__name__)

ROWS_PER_SAMPLE = 16  # read of a source that may be far larger than what is drawn from it


class Row(NamedTuple):
    """A row of a source: one sample, or several if it holds a batch; and its name in errors."""

    place: str
    content: Any


GZIP = b"\x1f\x8b"
ENCODINGS = {  # what a file begins with -> how it is read; that of UTF-32 begins with that of UTF-16
    BOM_UTF8: "utf-8-sig",
    BOM_UTF32_LE: "utf-32",
    BOM_UTF32_BE: "utf-32",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
}
TABLES = {"to_pylist": (), "to_dicts": (), "to_dict": ("records",)}
"""Methods of tables (pyarrow's, polars', pandas') -> their arguments, to get rows."""


def is_in_memory(dataset: Any) -> bool:
    """Whether the samples are an object in memory, such as a list, so that all of them are meant to be used."""
    return (
        (isinstance(dataset, Sequence) and not isinstance(dataset, str))
        or is_row(dataset)
        or hasattr(dataset, "tolist")  # a tensor, an array, a column of a table
    )


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` things divided by weight, by largest remainder."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [math.floor(share) for share in exact]
    remainders = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])  # stable
    for index in remainders[: count - sum(whole)]:
        whole[index] += 1
    return whole


def name_of(source: Any) -> str:
    """The name of a source in calibration info: its name on the Hub, kind of file or type of object; never a path."""
    if not isinstance(source, (str, Path)):
        return "iterator" if isinstance(source, Iterator) else type(source).__name__
    if source == SELF or source in DATASETS:
        return str(source)
    return f"{suffix_of(Path(source))} file" if Path(source).is_file() else "folder"


def read(source: Any, samples: int | None, seed: int) -> tuple[Iterable[Row], dict[str, Any]]:
    """The rows of one source, and what the calibration info says of them beyond its name.

    Args:
        samples: how many will be drawn: of longer sources, ROWS_PER_SAMPLE times as many rows are chosen with `seed`,
            or read from the start of what has no length. None: all rows.
    Raises:
        CalibrationError: there is no such source, it cannot be read, or has no known column.
    """
    if isinstance(source, (str, Path)):
        if str(source) in DATASETS:
            named = DATASETS[str(source)]
            return _read_named(named, named.arguments, samples, seed)
        return _some(_read_path(Path(source)), samples, seed), {}
    rows = _rows_of(source)
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return [Row(f"sample {index}", rows[index]) for index in _some(range(len(rows)), samples, seed)], {}
    return _some((Row(f"sample {index}", row) for index, row in enumerate(rows)), samples, seed), {}


def _rows_of(source: Any) -> Any:
    """The rows of an object: what has a length and is indexed, or at least can be iterated."""
    if isinstance(source, DataLoader) and source.collate_fn is default_collate:
        return map(_stacked, source)
    if is_row(source) or (hasattr(source, "tolist") and _is_numeric(source)):
        return [source]  # one row, which may hold a batch
    if hasattr(source, "columns"):
        for method, arguments in TABLES.items():
            if hasattr(source, method):
                return getattr(source, method)(*arguments)
    if hasattr(source, "column_names"):
        return _with_known_column(source)
    if hasattr(source, "tolist"):
        return source.tolist()
    indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if isinstance(source, (bytes, bytearray, memoryview, Mapping)) or not (indexed or isinstance(source, Iterable)):
        hint = " Call it, and pass what it returns." if callable(source) else ""
        raise CalibrationError(f"dataset= is a {type(source).__name__}; pass {accepted()}.{hint}")
    return source


def _stacked(batch: Any) -> Any:
    """What torch's default_collate makes of lists, a tensor per position, as a tensor with a row per sample."""
    if not isinstance(batch, Mapping):
        return batch
    return {name: torch.stack(list(value), 1) if is_by_position(value) else value for name, value in batch.items()}


def is_by_position(value: Any) -> bool:
    """Whether these are tensors of one dimension and one length, in a list: samples, or positions of samples."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(part, Tensor) and part.ndim == 1 and part.shape == value[0].shape for part in value)
    )


def _is_numeric(array: Any) -> bool:
    return isinstance(array, Tensor) or getattr(getattr(array, "dtype", None), "kind", "") in ("i", "u", "f", "b")


def read_to_judge(dataset: Any) -> Iterable[Row]:
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
    if isinstance(rows, Iterator):
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


def _read_path(path: Path) -> Sequence[Row] | Iterator[Row]:
    """Rows of a file, of all files of a folder, or of a dataset saved as a folder."""
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            load = _datasets("a saved dataset").load_from_disk
            try:
                saved = list(_with_known_column(load(str(path))))
            except (OSError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, CalibrationError):
                    raise
                raise CalibrationError(f"{path} is no dataset that can be read: {error}.") from error
            return [Row(f"sample {index} of {path}", row) for index, row in enumerate(saved)]
        files = sorted(file for file in path.iterdir() if suffix_of(file) in FILE_SUFFIXES)
        if files:
            return [row for file in files for row in _read_file(file)]
    elif path.is_file() and suffix_of(path) in FILE_SUFFIXES:
        return _read_file(path)
    raise CalibrationError(no_such_source(str(path)))


def _read_file(path: Path) -> list[Row]:
    """Rows with the file, and their lines or numbers in it, as their places."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        found = _read_parquet(path)
    else:
        text = _text_of(path)
        if suffix == ".txt":
            return [Row(f"text {path}", text)]
        found = _read_lines(path, text) if suffix == ".jsonl" else _read_json(path, text)
    if not found:
        raise CalibrationError(f"{path} is empty. Leave it out, or write samples to it.")
    for place, content in found:
        if not isinstance(content, (str, list, dict)):
            raise CalibrationError(
                f"Calibration {place} is {_json_type(content)}; it has to be a text, a chat or a dict with one of "
                f"{', '.join(KNOWN_COLUMNS)}."
            )
    return found


def _text_of(path: Path) -> str:
    """A file's text: UTF-8, or what a byte order mark at its start says; decompressed, if need be."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}.") from error
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    advice = "Save it as UTF-8: iconv -f ITS_ENCODING -t UTF-8 does."
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CalibrationError(
            f"{path} is not {encoding.upper()} text: line {line}, {error.reason}. {advice}"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise CalibrationError(
            f"{path}, line {line} has a NUL character, so it is no text, or UTF-16 without a byte order mark. {advice}"
        )
    if not text.strip():
        raise CalibrationError(f"{path} is empty. Leave it out, or write a text to it.")
    return text


def _read_lines(path: Path, text: str) -> list[Row]:
    """The rows of a JSONL file."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(Row(f"sample in {path}, line {number},", json.loads(line)))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                kind = suffix_of(path)[1:].upper()
                raise CalibrationError(f"{path}, line {number}{column}, is not valid {kind}: {reason}.") from error
    return rows


def _read_json(path: Path, text: str) -> list[Row]:
    """The rows of a JSON file: a list, or an object per line under the wrong suffix."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            return _read_lines(path, text)
        raise CalibrationError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, list):
        raise CalibrationError(f"{path} holds {_json_type(found)}; a list of texts, chats or dicts is needed.")
    return [Row(f"sample {index} of {path}", row) for index, row in enumerate(found)]


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
        columns = table.column_names
    except (ArrowException, OSError, UnicodeError) as error:
        raise CalibrationError(f"{path} is not a valid Parquet file: {error}.") from error
    if not any(column in columns for column in KNOWN_COLUMNS):
        raise CalibrationError(
            f"{path} has columns {', '.join(columns)}; one of {', '.join(KNOWN_COLUMNS)} is needed."
        )
    try:
        rows = table.to_pylist()
    except (ArrowException, ValueError) as error:  # of text that is not UTF-8, times that Python does not know
        raise CalibrationError(f"{path} has values that cannot be read: {error}. Write the file again.") from error
    return [Row(f"sample {index} of {path}", row) for index, row in enumerate(rows)]


def _json_type(value: Any) -> str:
    return {dict: "a dict", str: "a text", type(None): "null", bool: "true or false"}.get(
        type(value), f"a number, {value}"
    )


def _read_named(
    named: NamedDataset, arguments: Mapping[str, Any], samples: int | None, seed: int
) -> tuple[list[Row], dict[str, Any]]:
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
            f"{named.path} could not be read from the Hub: {str(error).rstrip('.')}. "
            "Without a connection, pass a local file, or dataset='self' for text that the model writes itself."
        ) from error
    found = [_sample(row, named) for row in rows]
    if named.one_document:
        # With the empty lines, as the GPTQ paper's code joins them: else perplexities cannot be compared with others'.
        found = ["\n\n".join(found)]
    kept = [row for row in found if not isinstance(row, str) or row.strip()]
    return [Row(f"sample {index} of {named.path}", row) for index, row in enumerate(kept)], {
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
