# SPDX-License-Identifier: Apache-2.0
"""Rows become lists of token ids: texts and chats through the tokenizer, ids as they are."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from optq.datasets import CHAT_COLUMNS, KNOWN_COLUMNS, TEXT_COLUMNS, accepted
from optq.errors import CalibrationError, counted

from .sources import Row, is_by_position, read_to_judge

ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for those of chat templates."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's parts that hold text."""

SAID_ELSEWHERE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What a turn without content has instead."""

BESIDE_TURNS = ("tools", "documents")
"""Columns that chat templates take besides the turns."""

RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the code of a tokenizer or a chat template may raise on data that it was not written for."""

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "labels")
"""What a tokenizer returns, as far as it may be numbers that are no integers."""


class Encoder:
    """Encodes one row of any form; loads the tokenizer at the first row that needs it.

    Attributes:
        opening: the token that the tokenizer puts before every text, once one was encoded; None if there is none.
    """

    def __init__(self, load_tokenizer: Callable[[], Any]) -> None:
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Any = None
        self.opening: int | None = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
            bos = self._tokenizer.bos_token_id
            self.opening = bos if bos is not None and self._ids("", "nothing")[:1] == [bos] else None
        return self._tokenizer

    def __call__(self, row: Row) -> list[list[int]]:
        """The tokens of a row's samples: one, or as many as the batch that it holds.

        Each has as many as there are, with the special ones that the tokenizer or the template adds.

        Raises:
            CalibrationError: the row has no known form; its place says which it is.
        """
        return list(self._samples(_in_lists(row.content), row.place))

    def _samples(self, content: Any, place: str) -> Iterator[list[int]]:
        if isinstance(content, str):
            yield self._ids(content, place)
        elif _is_chat(content):
            yield self._chat(content, place)
        elif isinstance(content, Mapping):
            yield from self._of_columns(content, place)
        elif _is_list(content) and len(content) > 1 and all(getattr(part, "ndim", 0) for part in content):
            raise CalibrationError(
                f"Calibration {place} is {len(content)} arrays without names. Name them, as in "
                '{"input_ids": ..., "attention_mask": ...}, or pass each as a sample.'
            )
        elif _are_ids(content):
            yield from _unpadded(content, None, place)
        elif _is_list(content) and len(content):
            for index, part in enumerate(content):
                yield from self._samples(part, f"{place.rstrip(',')}, row {index} of its batch,")
        else:
            raise CalibrationError(f"Calibration {place} is a {type(content).__name__}. Pass {accepted()}.")

    def _of_columns(self, row: Mapping[str, Any], place: str) -> Iterator[list[int]]:
        if "role" in row and "content" in row and not any(name in row for name in ("input_ids", *CHAT_COLUMNS)):
            raise CalibrationError(
                f"Calibration {place} is one turn of a chat. Put the turns of each chat into a list: "
                '[[{"role": "user", "content": ...}, ...], ...].'
            )
        if row.get("input_ids") is not None:
            if more := sorted(name for name, value in row.items() if name not in TEXT_INPUTS and is_fractional(value)):
                raise CalibrationError(
                    f"Calibration {place} has {', '.join(more)} besides text, and the first samples have not. Pass "
                    "what the model's processor returns for every sample, in a list."
                )
            ids = row["input_ids"]
            if is_by_position(ids) and len(ids) > ids[0].numel():
                raise CalibrationError(
                    f"Calibration {place} has input_ids of {len(ids)} tensors of {counted(ids[0].numel(), 'number')}, "
                    "as torch's default_collate makes of lists: one per position, not per sample. Pass the DataLoader "
                    "itself or its dataset, or stack them: torch.stack(input_ids, dim=1)."
                )
            yield from _unpadded(row["input_ids"], row.get("attention_mask"), place)
            return
        for column in (*CHAT_COLUMNS, *TEXT_COLUMNS):
            value, is_text = row.get(column, ()), column in TEXT_COLUMNS
            if not is_text and _is_chat(value):
                yield self._chat(value, place, _beside_turns(row, place))
                return
            if is_text and isinstance(value, str):
                yield from self._samples(value, place)
                return
            fits = (lambda part: isinstance(part, str)) if is_text else _is_chat
            if _is_list(value) and len(value) and all(map(fits, value)):
                beside = {} if is_text else {name: row[name] for name in BESIDE_TURNS if row.get(name) is not None}
                for index, part in enumerate(value):
                    where = f"{place.rstrip(',')}, row {index} of its batch,"
                    # Of a batch, each chat has its own, or all have the same.
                    own = {name: of[index] if _is_per_chat(of, len(value)) else of for name, of in beside.items()}
                    yield self._ids(part, where) if is_text else self._chat(part, where, _beside_turns(own, where))
                return
        raise CalibrationError(
            f"Calibration {place} is a dict with {sorted(map(str, row))}, of which none of {', '.join(KNOWN_COLUMNS)} "
            f"holds text, a chat or ids. Pass {accepted()}."
        )

    def _ids(self, text: str, place: str, **settings: Any) -> list[int]:
        tokenizer = self.tokenizer
        try:
            # verbose: a long document is cut into windows, so the tokenizer's warning about its length is moot
            return list(tokenizer(text, verbose=False, **settings)["input_ids"])
        except RAISED as error:
            raise CalibrationError(f"Calibration {place} cannot be encoded by the tokenizer: {error}") from error

    def _chat(
        self, turns: Sequence[Mapping[str, Any]], place: str, beside: Mapping[str, Any] | None = None
    ) -> list[int]:
        messages = [_message(turn, f"{place.rstrip(',')}, turn {index}") for index, turn in enumerate(turns)]
        if not getattr(self.tokenizer, "chat_template", None):
            raise CalibrationError(
                f"Calibration {place} is a chat, but the tokenizer has no chat template. "
                "Pass plain strings, or a tokenizer with a chat template."
            )
        refusal: CalibrationError | None = None
        try:
            text = self._rendered(messages, place, beside)
        except CalibrationError as error:
            text, refusal = "", error
        if refusal is not None or _lost(messages, text):
            # Some templates for images and text take lists of parts only, and nothing from strings.
            in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
            with suppress(CalibrationError):
                with_parts = self._rendered(in_parts, place, beside)
                if "[{" not in with_parts and not _lost(messages, with_parts):
                    text, refusal = with_parts, None
        if refusal is not None:
            raise refusal
        return self._ids(text, place, add_special_tokens=False)  # the template has them

    def _rendered(self, messages: list[dict[str, Any]], place: str, beside: Mapping[str, Any] | None) -> str:
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise CalibrationError(
                f"Calibration {place} is a chat, which takes jinja2: pip install jinja2."
            ) from error
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **(beside or {})))
        except (TemplateError, *RAISED) as error:
            raise CalibrationError(
                f"Calibration {place} is a chat that the tokenizer's chat template refuses: {error}. "
                "Bring it into the form that the template expects, or leave it out."
            ) from error


def read_for_evaluation(dataset: Any, load_tokenizer: Callable[[], Any]) -> list[list[int]]:
    """Samples of token ids from one source, whole and in order; of a named dataset, its part for evaluation."""
    encode = Encoder(load_tokenizer)
    return [ids for row in read_to_judge(dataset) for ids in encode(row)]


def is_fractional(value: Any) -> bool:
    """Whether this is an image, sound, …: an array of numbers that are no integers, with a dimension for samples."""
    if getattr(value, "ndim", 0) < 2:
        return False  # a score, or an embedding: what tables have beside a text
    return value.is_floating_point() if isinstance(value, Tensor) else getattr(value.dtype, "kind", "") == "f"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _is_chat(value: Any) -> bool:
    """Whether these are turns in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    return (
        _is_list(value)
        and len(value) > 0
        and all(isinstance(turn, Mapping) for turn in value)
        and any("role" in turn or ("from" in turn and "value" in turn) for turn in value)
    )


def _beside_turns(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a chat's row has for the template besides the turns: tools and documents, as lists.

    Raises:
        CalibrationError: one of them is something else.
    """
    found: dict[str, Any] = {}
    for name in BESIDE_TURNS:
        value = _parsed(row.get(name))
        is_nothing = value is None or (isinstance(value, float) and math.isnan(value))  # NaN: pandas' None
        if is_nothing or (isinstance(value, Sequence) and len(value) == 0):
            continue
        if _is_list(value):
            value = [_parsed(part) for part in value]
        if not _is_list(value) or not all(isinstance(part, Mapping) or callable(part) for part in value):
            raise CalibrationError(
                f"Calibration {place} has {name} that are a {type(value).__name__}; a list of dicts is needed, as the "
                "chat template takes them, or one in JSON. Leave them out if they are something else."
            )
        found[name] = [_without_nulls(part) for part in value]
    return found


def _is_per_chat(value: Any, chats: int) -> bool:
    return _is_list(value) and len(value) == chats and all(part is None or _is_list(_parsed(part)) for part in value)


def _parsed(value: Any) -> Any:
    """What is JSON in a text, as tables keep what has no columns of its own; all else as it is."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _without_nulls(value: Any) -> Any:
    """Without what tables fill up where some rows have a key and others have not."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if _is_list(value) else value


def _in_lists(value: Any) -> Any:
    """Convert arrays of objects, which pandas makes of the lists in a column, back to lists."""
    if getattr(getattr(value, "dtype", None), "kind", "") == "O" and getattr(value, "ndim", 0):
        return [_in_lists(part) for part in value.tolist()]
    if isinstance(value, dict):
        return {key: _in_lists(part) for key, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_in_lists(part) for part in value]
    return value


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A turn as templates take it, its content a string.

    Raises:
        CalibrationError: it says nothing, or something that is no text.
    """
    # Tables fill up what some rows lack with None, and templates ask only whether it is there.
    message = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise CalibrationError(f"Calibration {place} has no role, but {', '.join(map(str, turn))}; a role is a text.")
    content = turn.get("content") if "role" in turn else turn.get("value")
    message["role"] = ROLES.get(role, role) if "role" not in turn else role
    message["content"] = _text_of(content, place)
    if content is None and not any(message.get(key) for key in SAID_ELSEWHERE):
        raise CalibrationError(
            f"Calibration {place} ({role}) has no content. Give it a text; only one with {', '.join(SAID_ELSEWHERE)} "
            "may do without."
        )
    return message


def _text_of(content: Any, place: str) -> str:
    """The text of a content, which may be a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    if not _is_list(parts):
        raise CalibrationError(
            f"Calibration {place} has a content that is a {type(content).__name__}; text is needed."
        )
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise CalibrationError(
                f"Calibration {place} has a part that is no text, of the type {kind!r}; of chats, only text is read. "
                "Leave it out, or pass what the model's processor returns for the sample."
            )
        texts.append(text)
    return "\n".join(texts)


def _lost(messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether something that a user said is missing in a rendered chat."""
    return any(message["role"] == "user" and message["content"].strip() not in text for message in messages)


def _are_ids(value: Any) -> bool:
    """Whether this is a list or an array of numbers, to any depth."""
    if hasattr(value, "ndim") and hasattr(value, "dtype"):
        return True
    return _is_list(value) and len(value) > 0 and (isinstance(value[0], (int, float)) or _are_ids(value[0]))


def _sequences(value: Any) -> list[Any]:
    """The rows of a batch of any depth: lists and arrays of one dimension."""
    if hasattr(value, "ndim") and hasattr(value, "dtype"):
        return (
            [value.reshape(1)]
            if value.ndim == 0
            else [value]
            if value.ndim == 1
            else [row for part in value for row in _sequences(part)]
        )
    if _is_list(value) and any(_is_list(part) or getattr(part, "ndim", 0) > 0 for part in value):
        return [row for part in value for row in _sequences(part)]
    return [value]


def _unpadded(ids: Any, mask: Any, place: str) -> Iterator[list[int]]:
    """The real tokens of every sample in input_ids and, maybe, attention_mask."""
    for name, value in (("input_ids", ids), ("attention_mask", mask)):
        for part in value if _is_list(value) else [value]:
            if isinstance(part, Tensor) and "sparse" in str(part.layout):
                raise CalibrationError(
                    f"Calibration {place} has {name} in a sparse tensor, {part.layout}; a dense one is needed: pass "
                    "to_dense() of it."
                )
    rows = _sequences(ids)
    masks = [None] * len(rows) if mask is None else _sequences(mask)
    if len(rows) != len(masks):
        raise CalibrationError(
            f"Calibration {place} has {counted(len(rows), 'row')} of input_ids and {len(masks)} of attention_mask."
        )
    is_added = _is_added([_as_tensor(kept, place, "attention_mask") for kept in masks if kept is not None])
    for index, (row, kept) in enumerate(zip(rows, masks, strict=True)):
        where = place if len(rows) == 1 else f"{place.rstrip(',')}, row {index} of its batch,"
        found = _integers(row, where)
        if kept is not None:
            keep = _kept(kept, is_added, where)
            if keep.shape != found.shape:
                raise CalibrationError(
                    f"Calibration {where} has {found.numel()} input_ids and {keep.numel()} entries in attention_mask."
                )
            found = found[keep]
        yield [int(token) for token in found]


def _integers(row: Any, place: str) -> Tensor:
    """(tokens,) int64."""
    found = _as_tensor(row, place, "input_ids")
    if found.ndim == 0:
        raise CalibrationError(f"Calibration {place} has {found.item()} in the place of a list of input_ids.")
    if found.numel() == 0:
        return found.to(torch.int64)
    is_integer = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not is_integer or int(found.to(torch.int64).min()) < 0:
        raise CalibrationError(
            f"Calibration {place} has input_ids that are not non-negative integers: {found.dtype}, "
            f"{found.tolist()[:8]} …."
        )
    return found.to(torch.int64)


def _is_added(masks: Sequence[Tensor]) -> bool:
    """Whether masks are to be added to scores, so that real tokens have 0, and not 1; without a real one, none is."""
    are_floats = len(masks) > 0 and all(mask.is_floating_point() for mask in masks)
    return are_floats and (any(bool((mask < 0).any()) for mask in masks) or not any(map(torch.any, masks)))


def _kept(mask: Any, is_added: bool, place: str) -> Tensor:
    """Which tokens are real, (tokens,) bool."""
    found = _as_tensor(mask, place, "attention_mask").to(torch.float64)
    if bool(found.isnan().any()) or bool(((found > 0) if is_added else (found < 0)).any()):
        raise CalibrationError(f"Calibration {place} has an attention_mask that is not made of 0 and 1.")
    return found == 0 if is_added else found != 0


def _as_tensor(row: Any, place: str, name: str) -> Tensor:
    """A row of numbers on the CPU, with as few copies as possible."""
    try:
        if not isinstance(row, Tensor) and getattr(row, "dtype", None) is not None and not row.dtype.isnative:
            row = row.astype(row.dtype.newbyteorder("="))
        return torch.as_tensor(row).detach().cpu()
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CalibrationError(f"Calibration {place} has {name} that are not integers: {error}.") from error


def joined(documents: Iterable[list[int]], separator: int) -> list[int]:
    """Concatenate documents of token ids, each followed by the separator."""
    return [token for ids in documents for token in (ids if ids[-1:] == [separator] else [*ids, separator])]


def cut(ids: list[int], window: int, opening: int | None = None) -> list[list[int]]:
    """Consecutive windows; what begins with `opening` begins with it in every window."""
    if opening is None or ids[:1] != [opening] or window < 2:
        return [ids[start : start + window] for start in range(0, len(ids), window)]
    rest = ids[1:]
    return [[opening, *rest[start : start + window - 1]] for start in range(0, max(len(rest), 1), window - 1)]
