# SPDX-License-Identifier: Apache-2.0
"""Samples are drawn, set apart for judging the result, and padded into micro-batches."""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from optq.datasets import SELF, accepted, check_sources, is_row, mixture
from optq.errors import CalibrationError, counted

from .encoding import TEXT_INPUTS, Encoder, cut, is_fractional, joined
from .sources import Row, is_in_memory, name_of, read, shares

logger = logging.getLogger(__name__)

SHORTEST_SAMPLE = 2  # tokens
DEFAULT_SAMPLES = 128  # windows drawn from a source that is larger than a calibration set
TOKENS_PER_MICRO_BATCH = 2048
TOKENS_PER_STEP = 512  # of a micro-batch that is a step of gradient descent: many small steps get further
FEW_TOKENS = 16384
SHORT_SAMPLES = 128  # tokens
SAMPLES_PER_HELD_OUT = 16  # one sample in so many is held out to judge the result …
MOST_HELD_OUT = 8
HELD_OUT_TOKENS = 512  # … by its first tokens, so that the logits stay small


Sample = TypeVar("Sample")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Calibration samples that the model runs on together.

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
        """The token that follows each position, (samples, longest) int64; -1 where none does."""
        following = torch.full_like(self.input_ids, -1)
        following[:, :-1] = self.input_ids[:, 1:]
        if self.attention_mask is not None:
            following[:, :-1].masked_fill_(self.attention_mask[:, 1:] == 0, -1)
        return following

    def as_model_inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Keyword arguments for the model, on `device`: `inputs` where the samples are more than text.

        Else input_ids, and attention_mask if there is padding, both (samples, longest) int64; with `decoded` the same
        two for the decoder as well.
        """
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
    """Calibration data of a model.

    Args:
        batches: micro-batches, longest samples first.
        info: facts for the checkpoint and the log: counts and a hash, never the texts.
        held_out: micro-batches on which the quantized model is compared with the original one.
        truly_held_out: whether they are kept out of `batches`.
        weaknesses: what makes this data a poor basis, one sentence each.
    """

    batches: tuple[MicroBatch, ...]
    info: dict[str, Any]
    held_out: tuple[MicroBatch, ...] = ()
    truly_held_out: bool = False
    weaknesses: tuple[str, ...] = ()

    def weak_for(self, in_features: int) -> tuple[str, ...]:
        """`weaknesses`, and whether the tokens suffice for a linear of so many inputs."""
        tokens = self.info["tokens"]
        if tokens >= in_features:
            return self.weaknesses
        return (
            *self.weaknesses,
            f"{counted(tokens, 'token')} cannot determine the {in_features} x {in_features} Hessian of the widest "
            f"linear: use at least {in_features}, better {8 * in_features}",
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings that turn calibration data into micro-batches for one model.

    Args:
        vocabulary: rows of the model's input embedding; every token id must be below.
        window: longest sequence, in tokens.
        samples: windows to use at most, drawn with `seed`; by default all of a list, and 128 of anything else. Of
            several sources, each gives its share by weight.
        batch_size: samples per micro-batch; by default as many as fit in `micro_batch_tokens`.
        pad_token_id: fills up shorter samples; they are masked, so any id does, and what is none stands for 0.
        hold_out: set samples apart to judge the result with: one in 16, at most 8, drawn with `seed`. Of fewer than 16
            samples none is held out; the longest is then used for both.
        decoded: of a model with an encoder and a decoder: both read the text.
        dtype: of images and sound, the model's.
        separator: join the samples of each source, with this token at the end of each, before they are cut into
            windows; None: nothing is joined.
        padded: whether samples of unequal length may run together.
    """

    vocabulary: int
    window: int
    samples: int | None = None
    batch_size: int | None = None
    pad_token_id: int | None = None
    seed: int = 0
    hold_out: bool = True
    decoded: bool = False
    micro_batch_tokens: int = TOKENS_PER_MICRO_BATCH
    dtype: torch.dtype = torch.float32
    separator: int | None = None
    padded: bool = True

    @property
    def padding(self) -> int:
        """The token id to pad with: the model's pad_token_id, or 0 where that is not in its vocabulary."""
        asked = self.pad_token_id
        return asked if isinstance(asked, int) and 0 <= asked < self.vocabulary else 0


def prepare_calibration(
    dataset: Any,
    load_tokenizer: Callable[[], Any],
    how: Sampling,
    write: Callable[[int], list[list[int]]] | None = None,
) -> Calibration:
    """Turn whatever `GPTQConfig.dataset` accepts into micro-batches.

    Args:
        dataset: a list of strings, chats, dicts with input_ids, or of what a processor returns for images or sound;
            what a tokenizer returns; a `datasets.Dataset`, DataLoader or other iterable of these; a path; a name; or
            several of these with weights.
        load_tokenizer: called only if there is text to encode.
        write: has the model write so many samples, for dataset="self".
    Raises:
        CalibrationError: the data is missing, empty, too short, of an unknown form, or does not fit the vocabulary.
    """
    check_sources(dataset)
    limit = DEFAULT_SAMPLES if how.samples is None and not is_in_memory(dataset) else how.samples
    dataset, whole = _peeked(dataset)
    if whole:
        found = read(dataset, limit, how.seed)[0]
        rows = [_whole(row, how.decoded, how.dtype) for row in islice(found, None if is_in_memory(dataset) else limit)]
        return _prepare_whole(dataset, rows, how)
    windows_of = partial(
        _windows,
        encode=Encoder(load_tokenizer),
        window=how.window,
        separator=how.separator,
        seed=how.seed,
        write=write,
    )
    chosen, sources, unmet = _gather(mixture(dataset), limit, how.seed, windows_of)
    check_vocabulary(max(max(ids) for ids in chosen), how.vocabulary)
    fitted, held_out = _set_apart(chosen, how.seed) if how.hold_out else (chosen, [])
    info: dict[str, Any] = {
        "source": ", ".join(source["name"] for source in sources),
        "sources": sources,
        "samples": len(fitted),
        "held_out": len(chosen) - len(fitted),
        "tokens": sum(map(len, fitted)),
        "longest": max(map(len, fitted)),
        "seed": how.seed,
        "sha256": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
    }
    logger.info(
        "Calibration: %s (%s), %s, at most %d each; %s held out to judge the result.",
        counted(len(fitted), "sample"),
        ", ".join(f"{source['samples']} of {source['name']}" for source in sources),
        counted(info["tokens"], "token"),
        info["longest"],
        counted(info["held_out"], "more sample is", "more samples are"),
    )
    return Calibration(
        batches=tuple(_batches(fitted, how.batch_size, how.padding, how.micro_batch_tokens, how.decoded, how.padded)),
        info=info,
        held_out=tuple(_batches([ids[:HELD_OUT_TOKENS] for ids in held_out], 1, how.padding, decoded=how.decoded)),
        truly_held_out=info["held_out"] > 0,
        weaknesses=(*unmet, *_weaknesses(chosen, how.window, how.samples)),
    )


def _gather(
    parts: list[tuple[Any, float]],
    limit: int | None,
    seed: int,
    windows_of: Callable[[Any, int | None], tuple[list[list[int]], dict[str, Any]]],
) -> tuple[list[list[int]], list[dict[str, Any]], list[str]]:
    """Distinct samples of all sources by weight, what the info says of each source, and which give too few."""
    chosen: list[list[int]] = []
    sources: list[dict[str, Any]] = []
    unmet: list[str] = []
    taken: set[tuple[int, ...]] = set()
    repeated = 0
    counts = [limit] if limit is None else shares([weight for _, weight in parts], limit)
    for (source, weight), count in zip(parts, counts, strict=True):
        if count == 0:
            continue
        windows, facts = windows_of(source, count)
        distinct = [list(ids) for ids in dict.fromkeys(map(tuple, windows)) if ids not in taken]
        repeated += len(windows) - len(distinct)
        drawn = _draw(distinct, count, seed)
        taken.update(map(tuple, drawn))
        chosen += drawn
        sources.append({"name": name_of(source), "weight": weight, **facts, "samples": len(drawn)})
        if len(parts) > 1 and count is not None and len(drawn) < count:
            unmet.append(
                f"{name_of(source)} has {counted(len(drawn), 'sample')}, but {count} are its share of the mixture"
            )
    if repeated:
        logger.warning(
            "%s of others and left out.",
            counted(
                repeated, "calibration sample is an exact repetition", "calibration samples are exact repetitions"
            ),
        )
    return chosen, sources, unmet


def _windows(
    source: Any,
    count: int | None,
    *,
    encode: Encoder,
    window: int,
    separator: int | None,
    seed: int,
    write: Callable[[int], list[list[int]]] | None,
) -> tuple[list[list[int]], dict[str, Any]]:
    """All windows of one source that are long enough, and facts for the info."""
    if isinstance(source, str) and source == SELF:
        if write is None or count is None:
            raise CalibrationError(f"dataset={SELF!r} needs a model that can write. Pass {accepted()}.")
        return write(count), {}
    rows, facts = read(source, count, seed)
    documents = [ids for row in rows for ids in encode(row)]
    if not documents:
        hint = " An iterator can be read only once." if isinstance(source, Iterator) else ""
        raise CalibrationError(f"The calibration dataset ({name_of(source)}) is empty.{hint} Pass {accepted()}.")
    whole = documents if separator is None else [joined(documents, separator)]
    windows = [ids for document in whole for ids in cut(document, window, encode.opening)]
    long_enough = [ids for ids in windows if len(ids) >= SHORTEST_SAMPLE]
    if not long_enough:
        raise CalibrationError(
            f"Every calibration sample is shorter than {SHORTEST_SAMPLE} tokens: of {len(documents)}, the longest has "
            f"{max(map(len, documents))}. Pass longer texts: a few hundred tokens each, some ten thousand in all."
        )
    if dropped := len(windows) - len(long_enough):
        logger.warning(
            "%s shorter than %d tokens %s left out.",
            counted(dropped, "calibration sample"),
            SHORTEST_SAMPLE,
            "is" if dropped == 1 else "are",
        )
    return long_enough, facts


def _prepare_whole(dataset: Any, rows: list[MicroBatch], how: Sampling) -> Calibration:
    """Samples that are more than text: each is run as it is, by itself."""
    chosen = _draw(rows, how.samples, how.seed, _length)
    check_vocabulary(max(int(row.input_ids.max()) for row in chosen), how.vocabulary)
    fitted, held_out = _set_apart(chosen, how.seed, _length) if how.hold_out else (chosen, [])
    held_out_samples = len(chosen) - len(fitted)
    digest = hashlib.sha256()
    for row in chosen:
        for name, tensor in sorted((row.inputs or {}).items()):
            digest.update(name.encode() + bytes_of(tensor))
    lengths = [_length(row) for row in fitted]
    names = sorted(set().union(*(row.inputs or {} for row in chosen)))
    info = {
        "source": name_of(dataset),
        "samples": len(fitted),
        "held_out": held_out_samples,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "inputs": names,
        "seed": how.seed,
        "sha256": digest.hexdigest(),
    }
    logger.info("Calibration: %s with %s, as they are.", counted(len(fitted), "sample"), ", ".join(names))
    return Calibration(
        batches=tuple(fitted),
        info=info,
        held_out=tuple(held_out),
        truly_held_out=held_out_samples > 0,
        weaknesses=tuple(_weaknesses([row.input_ids.flatten().tolist() for row in chosen], how.window, how.samples)),
    )


def _length(row: MicroBatch) -> int:
    return row.input_ids.numel()


def bytes_of(tensor: Tensor) -> bytes:
    """Shape and values of a tensor of any shape (...) and dtype as bytes, to be hashed."""
    return str(tuple(tensor.shape)).encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _peeked(dataset: Any) -> tuple[Any, bool]:
    """The data, none of it consumed, and whether its samples are more than text."""
    if isinstance(dataset, (str, Path)) or (isinstance(dataset, Mapping) and not is_row(dataset)):
        return dataset, False
    if isinstance(dataset, Mapping):
        return dataset, _is_more_than_text(dataset)
    if isinstance(dataset, Sequence):
        return dataset, any(map(_is_more_than_text, dataset))
    if not isinstance(dataset, Iterable) or hasattr(dataset, "columns") or hasattr(dataset, "tolist"):
        return dataset, False  # one batch, or one column
    first = list(islice(dataset, 1))
    return (
        chain(first, dataset) if isinstance(dataset, Iterator) else dataset,
        any(map(_is_more_than_text, first)),
    )


def _is_more_than_text(row: Any) -> bool:
    """Whether a row has images or sound in numbers."""
    return isinstance(row, Mapping) and any(
        name not in TEXT_INPUTS and is_fractional(value) for name, value in row.items()
    )


def _whole(found: Row, decoded: bool, dtype: torch.dtype) -> MicroBatch:
    """What a processor has returned for one sample, with or without labels."""
    place, row = found
    if not isinstance(row, Mapping):
        raise CalibrationError(
            f"Calibration {place} is a {type(row).__name__}, but others have images or sound. Pass what the "
            "model's processor returns for every sample, with return_tensors='pt'."
        )
    inputs = {
        name: torch.as_tensor(value)
        for name, value in row.items()
        if isinstance(value, Tensor) or getattr(getattr(value, "dtype", None), "kind", "") in ("i", "u", "b", "f")
    }
    labels = inputs.pop("labels", None)
    if decoded and "decoder_input_ids" not in inputs:
        predicted = labels if labels is not None else inputs.get("input_ids")
        if predicted is None:
            raise CalibrationError(
                f"Calibration {place} has {', '.join(sorted(inputs))}, but nothing for the decoder to read. "
                "Add decoder_input_ids or labels: the text that belongs to it, encoded."
            )
        inputs["decoder_input_ids"] = predicted.clamp(min=0)  # -100: of no interest to the loss
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if ids is None or ids.ndim != 2 or ids.numel() == 0:
        raise CalibrationError(
            f"Calibration {place} has {', '.join(sorted(inputs))}, but no input_ids of shape (samples, "
            "tokens). Pass what the model's processor returns for one sample, with return_tensors='pt'."
        )
    mask = inputs.get("attention_mask")
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    fits = mask is not None and mask.shape == ids.shape and not bool(mask.all())
    return MicroBatch(input_ids=ids, attention_mask=mask if fits else None, inputs=inputs)


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Refuse data of which a token has no embedding.

    Raises:
        CalibrationError: it has.
    """
    if largest >= vocabulary:
        raise CalibrationError(
            f"The data has token id {largest}, but the model's vocabulary ends at {vocabulary - 1}. "
            "The tokenizer does not belong to this model; pass tokenizer= with the right one, or leave it out to take "
            "the one in the model's folder."
        )


def _set_apart(
    samples: list[Sample],
    seed: int,
    length: Callable[[Sample], int] = len,  # type: ignore[assignment]
) -> tuple[list[Sample], list[Sample]]:
    """The samples to calibrate on, and those to judge the result with."""
    count = min(len(samples) // SAMPLES_PER_HELD_OUT, MOST_HELD_OUT)
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
        yield f"{counted(tokens, 'token in all is', 'tokens in all are')} few: {FEW_TOKENS} or more are usual"
    if asked is not None and len(samples) < asked:
        found = counted(len(samples), f"sample of the {asked} asked for was", f"samples of the {asked} asked for were")
        yield f"only {found} found"
    if (longest := max(map(len, samples))) < min(window, SHORT_SAMPLES):
        yield f"the longest sample has {counted(longest, 'token')}, so the model is never seen reading long texts"


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
    padded: bool = True,
) -> Iterable[MicroBatch]:
    """Samples of similar length together, or of equal length if they must not be padded."""
    pending = sorted(samples, key=len, reverse=True)  # stable
    while pending:
        longest = len(pending[0])
        count = batch_size if batch_size is not None else max(1, tokens // longest)
        if not padded:
            count = min(count, sum(len(ids) == longest for ids in pending))
        rows, pending = pending[:count], pending[count:]
        input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        yield MicroBatch(input_ids=input_ids, attention_mask=None if bool(mask.all()) else mask, decoded=decoded)
