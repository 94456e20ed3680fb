# SPDX-License-Identifier: Apache-2.0
"""Calibration data: texts, chats, datasets, files or token ids become micro-batches of tokens.

Every source ends as lists of token ids, one per sample, without padding. Samples longer than the window are cut into
consecutive windows and nothing is joined across samples. Padding is added per micro-batch only, and masked.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import CalibrationError

logger = logging.getLogger(__name__)

SHORTEST_SAMPLE = 2  # tokens
DEFAULT_WINDOW = 2048  # tokens
DEFAULT_SAMPLES = 128  # windows drawn from a source that is larger than a calibration set
TOKENS_PER_MICRO_BATCH = 2048
TOKENS_PER_STEP = 512  # of a micro-batch that is a step of gradient descent: many small steps get further
FEW_TOKENS = 16384
SHORT_SAMPLES = 128  # tokens
SAMPLES_PER_PROBE = 16  # one sample in so many is held out to judge the result …
MOST_PROBES = 8
PROBE_TOKENS = 512  # … by its first tokens, so that the logits stay small


Sample = TypeVar("Sample")


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """A dataset of the Hub: arguments of `datasets.load_dataset`, the column with text, and whether it is one text."""

    path: str
    column: str
    one_document: bool
    arguments: dict[str, Any]
    evaluation: dict[str, Any]


_C4 = {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}
_C4_VALIDATION = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"}
DATASETS = {
    "wikitext2": NamedDataset(
        path="Salesforce/wikitext",
        column="text",
        one_document=True,
        arguments={"name": "wikitext-2-raw-v1", "split": "train"},
        evaluation={"split": "test"},
    ),
    "c4": NamedDataset(path="allenai/c4", column="text", one_document=False, arguments=_C4, evaluation=_C4_VALIDATION),
    "c4-new": NamedDataset(
        path="allenai/c4", column="text", one_document=False, arguments=_C4, evaluation=_C4_VALIDATION
    ),
    "ptb": NamedDataset(
        path="ptb-text-only/ptb_text_only",
        column="sentence",
        one_document=True,
        # The repository's loading script is not run; the Hub's own conversion to Parquet is read.
        arguments={"split": "train", "revision": "refs/convert/parquet"},
        evaluation={"split": "test"},
    ),
}
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "content", "sentence")
CHAT_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples that run together.

    Args:
        input_ids: (samples, longest) int64, padded on the right.
        attention_mask: (samples, longest) int64, 1 for real tokens; None when there is no padding.
        decoded: the model's decoder reads the same tokens as its encoder.
        inputs: of a sample that is more than text: all that the model is called with. `input_ids` are then those that
            it predicts.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    decoded: bool = False
    inputs: Mapping[str, Tensor] | None = None

    @property
    def next_ids(self) -> Tensor:
        """The token that follows each, (samples, longest) int64; -1 where none does."""
        following = torch.full_like(self.input_ids, -1)
        following[:, :-1] = self.input_ids[:, 1:]
        if self.attention_mask is not None:
            following[:, :-1].masked_fill_(self.attention_mask[:, 1:] == 0, -1)
        return following

    def as_model_inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Keyword arguments for the model."""
        if self.inputs is not None:
            return {name: tensor.to(device) for name, tensor in self.inputs.items()}
        inputs = {"input_ids": self.input_ids.to(device)}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask.to(device)
        if self.decoded:
            inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        return inputs


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the model is calibrated on.

    Args:
        batches: micro-batches, longest samples first.
        recipe: what was used, for the checkpoint and the log: counts and a hash, never the texts.
        probes: micro-batches on which the quantized model is compared with the original one.
        probes_held_out: whether they are kept out of `batches`.
        weaknesses: what makes this data a poor basis, in words.
    """

    batches: tuple[MicroBatch, ...]
    recipe: dict[str, Any]
    probes: tuple[MicroBatch, ...] = ()
    probes_held_out: bool = False
    weaknesses: tuple[str, ...] = ()

    def weak_for(self, in_features: int) -> tuple[str, ...]:
        """`weaknesses`, and whether the tokens suffice for a linear of so many inputs."""
        tokens = self.recipe["tokens"]
        if tokens >= in_features:
            return self.weaknesses
        return (
            *self.weaknesses,
            f"{tokens} tokens cannot determine the {in_features} x {in_features} Hessian of the widest linear: "
            f"use at least {in_features}, better {8 * in_features}",
        )


def prepare_calibration(
    dataset: Any,
    load_tokenizer: Callable[[], Any],
    *,
    vocabulary: int,
    window: int,
    samples: int | None = None,
    batch_size: int | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    probe: bool = True,
    decoded: bool = False,
    micro_batch_tokens: int = TOKENS_PER_MICRO_BATCH,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """Turn whatever `GPTQConfig.dataset` accepts into micro-batches.

    Args:
        dataset: a list of strings, of chats, of dicts with input_ids, or of what a processor returns for one sample
            with images or sound; a `datasets.Dataset`; a path to a file; or a key of `DATASETS`.
        load_tokenizer: called only if there is text to encode.
        vocabulary: rows of the model's input embedding; every token id must be below.
        window: longest sequence, in tokens.
        samples: windows to use at most, drawn with `seed`; by default all of a list, and 128 of anything else.
        batch_size: samples per micro-batch; by default as many as fit in `micro_batch_tokens`.
        pad_token_id: fills up shorter samples; they are masked, so any id of the vocabulary does.
        probe: set samples apart to judge the result with: one in 16, at most 8, drawn with `seed`. Of fewer than 16
            samples none is held out; the longest is then used for both.
        decoded: of a model with an encoder and a decoder: both read the text.
        dtype: of images and sound, the model's.
    Raises:
        CalibrationError: the data is missing, empty, too short, of an unknown form, or does not fit the vocabulary.
    """
    if isinstance(dataset, Sequence) and any(_is_more_than_text(row) for row in dataset):
        rows = [_whole(row, index, decoded, dtype) for index, row in enumerate(dataset)]
        return _prepare_whole(dataset, rows, vocabulary, window, samples, seed, probe)
    samples_read, bounded = _read(dataset, load_tokenizer)
    if not samples_read:
        raise CalibrationError(f"The calibration dataset is empty. Pass {_accepted()}.")
    windows = [ids[start : start + window] for ids in samples_read for start in range(0, len(ids), window)]
    long_enough = [ids for ids in windows if len(ids) >= SHORTEST_SAMPLE]
    if not long_enough:
        longest = max(len(ids) for ids in samples_read)
        raise CalibrationError(
            f"All {len(samples_read)} calibration samples are shorter than {SHORTEST_SAMPLE} tokens (the longest has "
            f"{longest}). Pass longer texts: a few hundred tokens each, some ten thousand in all."
        )
    if dropped := len(windows) - len(long_enough):
        logger.warning("%d calibration samples shorter than %d tokens are left out.", dropped, SHORTEST_SAMPLE)
    limit = samples if samples is not None else (None if bounded else DEFAULT_SAMPLES)
    chosen = _draw(long_enough, limit, seed)
    _check_vocabulary(max(max(ids) for ids in chosen), vocabulary)
    fitted, probes = _set_apart(chosen, seed) if probe else (chosen, [])
    tokens = sum(map(len, fitted))
    held_out = len(chosen) - len(fitted)
    recipe = {
        "source": _source_name(dataset),
        "samples": len(fitted),
        "held_out": held_out,
        "tokens": tokens,
        "longest": max(map(len, fitted)),
        "seed": seed,
        "sha256": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
    }
    logger.info(
        "Calibration: %d samples, %d tokens, at most %d each; %d more samples are held out to judge the result.",
        recipe["samples"],
        tokens,
        recipe["longest"],
        held_out,
    )
    return Calibration(
        batches=tuple(_batches(fitted, batch_size, pad_token_id or 0, micro_batch_tokens, decoded)),
        recipe=recipe,
        probes=tuple(_batches([ids[:PROBE_TOKENS] for ids in probes], 1, pad_token_id or 0, decoded=decoded)),
        probes_held_out=held_out > 0,
        weaknesses=tuple(_weaknesses(chosen, window, samples)),
    )


def _prepare_whole(
    dataset: Any, rows: list[MicroBatch], vocabulary: int, window: int, limit: int | None, seed: int, probe: bool
) -> Calibration:
    """Samples that are more than text: each is run as it is, by itself."""
    chosen = _draw(rows, limit, seed, _length)
    _check_vocabulary(max(int(row.input_ids.max()) for row in chosen), vocabulary)
    fitted, probes = _set_apart(chosen, seed, _length) if probe else (chosen, [])
    held_out = len(chosen) - len(fitted)
    digest = hashlib.sha256()
    for row in chosen:
        for name, tensor in sorted((row.inputs or {}).items()):
            digest.update(name.encode() + bytes_of(tensor))
    lengths = [_length(row) for row in fitted]
    names = sorted(set().union(*(row.inputs or {} for row in chosen)))
    recipe = {
        "source": _source_name(dataset),
        "samples": len(fitted),
        "held_out": held_out,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "inputs": names,
        "seed": seed,
        "sha256": digest.hexdigest(),
    }
    logger.info("Calibration: %d samples with %s, as they are.", len(fitted), ", ".join(names))
    return Calibration(
        batches=tuple(fitted),
        recipe=recipe,
        probes=tuple(probes),
        probes_held_out=held_out > 0,
        weaknesses=tuple(_weaknesses([row.input_ids.flatten().tolist() for row in chosen], window, limit)),
    )


def _length(row: MicroBatch) -> int:
    return row.input_ids.numel()


def bytes_of(tensor: Tensor) -> bytes:
    """Shape and values, for hashes."""
    return str(tuple(tensor.shape)).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _is_more_than_text(row: Any) -> bool:
    """Whether a row has images or sound in numbers."""
    return isinstance(row, Mapping) and any(
        isinstance(value, Tensor) and value.is_floating_point() for value in row.values()
    )


def _whole(row: Any, index: int, decoded: bool, dtype: torch.dtype) -> MicroBatch:
    """What a processor has returned for one sample, with or without labels."""
    if not isinstance(row, Mapping):
        raise CalibrationError(
            f"Calibration sample {index} is a {type(row).__name__}, but others have images or sound. Pass what the "
            "model's processor returns for every sample, with return_tensors='pt'."
        )
    inputs = {name: value for name, value in row.items() if isinstance(value, Tensor)}
    labels = inputs.pop("labels", None)
    if decoded and "decoder_input_ids" not in inputs:
        predicted = labels if labels is not None else inputs.get("input_ids")
        if predicted is None:
            raise CalibrationError(
                f"Calibration sample {index} has {', '.join(sorted(inputs))}, but nothing for the decoder to read. "
                "Add decoder_input_ids or labels: the text that belongs to it, encoded."
            )
        inputs["decoder_input_ids"] = predicted.clamp(min=0)  # -100: of no interest to the loss
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is None or ids.ndim != 2 or ids.numel() == 0:
        raise CalibrationError(
            f"Calibration sample {index} has {', '.join(sorted(inputs))}, but no input_ids of shape (samples, "
            "tokens). Pass what the model's processor returns for one sample, with return_tensors='pt'."
        )
    mask = inputs.get("attention_mask")
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    fits = mask is not None and mask.shape == ids.shape and not bool(mask.all())
    return MicroBatch(input_ids=ids, attention_mask=mask if fits else None, inputs=inputs)


def _check_vocabulary(largest: int, vocabulary: int) -> None:
    if largest >= vocabulary:
        raise CalibrationError(
            f"The calibration data has token id {largest}, but the model's vocabulary ends at {vocabulary - 1}. "
            "The tokenizer does not belong to this model; pass tokenizer= with the right one, or leave it out to take "
            "the one in the model's folder."
        )


def _set_apart(
    samples: list[Sample],
    seed: int,
    length: Callable[[Sample], int] = len,  # type: ignore[assignment]
) -> tuple[list[Sample], list[Sample]]:
    """The samples to calibrate on, and those to judge the result with."""
    count = min(len(samples) // SAMPLES_PER_PROBE, MOST_PROBES)
    if count == 0:
        return samples, [max(samples, key=length)]
    drawn = set(random.Random(seed).sample(range(len(samples)), count))
    return (
        [sample for index, sample in enumerate(samples) if index not in drawn],
        [sample for index, sample in enumerate(samples) if index in drawn],
    )


def _weaknesses(samples: list[list[int]], window: int, asked: int | None) -> Iterable[str]:
    tokens = sum(map(len, samples))
    if tokens < FEW_TOKENS:
        yield f"{tokens} tokens in all are few: {FEW_TOKENS} or more are usual"
    if repeated := len(samples) - len(set(map(tuple, samples))):
        yield f"{repeated} of {len(samples)} samples are exact repetitions of others and add nothing"
    if asked is not None and len(samples) < asked:
        yield f"only {len(samples)} samples of the {asked} asked for were found"
    if (longest := max(map(len, samples))) < min(window, SHORT_SAMPLES):
        yield f"the longest sample has {longest} tokens, so the model is never seen reading long texts"


def require_dataset(dataset: Any) -> None:
    """Raise a `CalibrationError` if there is none at all, which is known before anything is loaded."""
    if dataset is None:
        raise CalibrationError(f"Quantizing needs calibration data: pass dataset= with {_accepted()}.")


def _read(dataset: Any, load_tokenizer: Callable[[], Any]) -> tuple[list[list[int]], bool]:
    """The samples as token ids, and whether the user bounded their number by listing them."""
    require_dataset(dataset)
    if isinstance(dataset, (str, Path)):
        rows, bounded = _read_source(str(dataset)), False
    elif hasattr(dataset, "column_names"):
        rows, bounded = _read_columns(dataset), False
    elif isinstance(dataset, Sequence):
        rows, bounded = dataset, True
    else:
        raise CalibrationError(f"dataset= is a {type(dataset).__name__}; pass {_accepted()}.")
    encode = _Encoder(load_tokenizer)
    return [encode(row, index) for index, row in enumerate(rows)], bounded


def read_for_evaluation(dataset: Any, load_tokenizer: Callable[[], Any]) -> list[list[int]]:
    """Samples of token ids from whatever `prepare_calibration` takes; of a named dataset, its part for evaluation."""
    if isinstance(dataset, str) and dataset in DATASETS:
        named = DATASETS[dataset]
        dataset = _read_named(named, {**named.arguments, **named.evaluation})
    samples, _ = _read(dataset, load_tokenizer)
    return samples


def _source_name(dataset: Any) -> str:
    """What the recipe calls the data: its name on the Hub, the kind of file, or the type of the object."""
    if not isinstance(dataset, (str, Path)):
        return type(dataset).__name__
    return str(dataset) if dataset in DATASETS else f"{Path(dataset).suffix} file"


def _accepted() -> str:
    return (
        "a list of strings, a list of chats, a list of dicts with input_ids, a list of what a processor returns for "
        "samples with images or sound, a datasets.Dataset, a path to a "
        f"{'/'.join(FILE_SUFFIXES)} file, or one of the names {', '.join(DATASETS)}"
    )


class _Encoder:
    """Encodes one row of any form; loads the tokenizer at the first row that needs it."""

    def __init__(self, load_tokenizer: Callable[[], Any]) -> None:
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def __call__(self, row: Any, index: int) -> list[int]:
        if isinstance(row, str):
            # verbose: a long document is cut into windows, so the tokenizer's warning about its length is moot
            return list(self.tokenizer(row, verbose=False)["input_ids"])
        if _is_chat(row):
            return self._chat(row, index)
        if isinstance(row, Mapping):
            if "input_ids" in row:
                return _unpadded(row, index)
            for column in CHAT_COLUMNS:
                if _is_chat(row.get(column)):
                    return self._chat(row[column], index)
            for column in TEXT_COLUMNS:
                if isinstance(row.get(column), str):
                    return self(row[column], index)
        found = f"a dict with {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise CalibrationError(f"Calibration sample {index} is {found}. Pass {_accepted()}.")

    def _chat(self, chat: Any, index: int) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise CalibrationError(
                f"Calibration sample {index} is a chat, but the tokenizer has no chat template. "
                "Pass plain strings, or a tokenizer with a chat template."
            )
        text = self.tokenizer.apply_chat_template(list(chat), tokenize=False)
        return list(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )  # the template has them


def _is_chat(row: Any) -> bool:
    return (
        isinstance(row, Sequence)
        and not isinstance(row, str)
        and len(row) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in row)
    )


def _unpadded(row: Mapping[str, Any], index: int) -> list[int]:
    """The real tokens of a row with input_ids and, maybe, attention_mask."""
    ids = torch.as_tensor(row["input_ids"]).reshape(-1)
    mask = row.get("attention_mask")
    if mask is not None:
        mask = torch.as_tensor(mask).reshape(-1).bool()
        if mask.shape != ids.shape:
            raise CalibrationError(
                f"Calibration sample {index} has {ids.numel()} input_ids and {mask.numel()} entries in attention_mask."
            )
        ids = ids[mask]
    if ids.is_floating_point() or (ids.numel() and int(ids.min()) < 0):
        raise CalibrationError(f"Calibration sample {index} has input_ids that are not non-negative integers.")
    return [int(token) for token in ids]


def _read_columns(dataset: Any) -> Iterable[Any]:
    """Rows of a `datasets.Dataset`."""
    known = ("input_ids", *CHAT_COLUMNS, *TEXT_COLUMNS)
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise CalibrationError(f"dataset= is a DatasetDict with splits {', '.join(columns)}; pass one of them.")
    if not any(column in columns for column in known):
        raise CalibrationError(f"The dataset has columns {', '.join(columns)}; one of {', '.join(known)} is needed.")
    rows: Iterable[Any] = dataset
    return rows


def _read_source(source: str) -> Sequence[Any] | Iterable[Any]:
    """Rows of a file, or of a named dataset."""
    if source in DATASETS:
        return _read_named(DATASETS[source], DATASETS[source].arguments)
    path = Path(source)
    if not path.is_file() or path.suffix not in FILE_SUFFIXES:
        raise CalibrationError(f"dataset={source!r} is neither a known name nor a readable file. Pass {_accepted()}.")
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    if path.suffix == ".parquet":
        return _read_columns(_datasets("a .parquet file").load_dataset("parquet", data_files=str(path), split="train"))
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path} is not valid {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds a {type(rows).__name__}; a list of texts, chats or dicts is needed.")
    return rows


def _read_named(named: NamedDataset, arguments: dict[str, Any]) -> list[str]:
    rows = list(_datasets("a dataset by name").load_dataset(named.path, **arguments)[named.column])
    # With the empty lines, as the GPTQ paper's code joins them: else perplexities cannot be compared with others'.
    return ["\n\n".join(rows)] if named.one_document else [text for text in rows if text.strip()]


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"Reading {purpose} needs the package datasets: pip install datasets.") from error
    return datasets


def _draw(
    windows: list[Sample],
    limit: int | None,
    seed: int,
    length: Callable[[Sample], int] = len,  # type: ignore[assignment]
) -> list[Sample]:
    """At most `limit` windows: a seeded choice among the longest ones, in their original order."""
    if limit is None or len(windows) <= limit:
        return windows
    shuffled = list(range(len(windows)))
    random.Random(seed).shuffle(shuffled)
    shuffled.sort(key=lambda index: -length(windows[index]))  # stable: equal lengths stay shuffled
    return [windows[index] for index in sorted(shuffled[:limit])]


def _batches(
    samples: list[list[int]],
    batch_size: int | None,
    pad_token_id: int,
    tokens: int = TOKENS_PER_MICRO_BATCH,
    decoded: bool = False,
) -> Iterable[MicroBatch]:
    """Pad samples of similar length together."""
    pending = sorted(samples, key=len, reverse=True)  # stable
    while pending:
        longest = len(pending[0])
        count = batch_size if batch_size is not None else max(1, tokens // longest)
        rows, pending = pending[:count], pending[count:]
        input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        yield MicroBatch(input_ids=input_ids, attention_mask=None if bool(mask.all()) else mask, decoded=decoded)
