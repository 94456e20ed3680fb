# SPDX-License-Identifier: Apache-2.0
"""Rows become lists of token ids: texts and chats through the tokenizer, ids as they are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from optq.errors import CalibrationError

from .sources import CHAT_COLUMNS, KNOWN_COLUMNS, TEXT_COLUMNS, accepted, read_to_judge

ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for those of chat templates."""


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
            self.opening = bos if bos is not None and self._ids("")[:1] == [bos] else None
        return self._tokenizer

    def __call__(self, row: Any, index: int) -> list[int]:
        """The tokens of a row, as many as there are, with the special ones that the tokenizer or the template adds.

        Raises:
            CalibrationError: the row has no known form; `index` says which it is.
        """
        if isinstance(row, str):
            return self._ids(row)
        if chat := _messages(row):
            return self._chat(chat, index)
        if isinstance(row, Mapping):
            if "input_ids" in row:
                return _unpadded(row, index)
            for column in CHAT_COLUMNS:
                if chat := _messages(row.get(column)):
                    return self._chat(chat, index)
            for column in TEXT_COLUMNS:
                if isinstance(row.get(column), str):
                    return self._ids(row[column])
        found = f"a {type(row).__name__}"
        if isinstance(row, Mapping):
            found = f"a dict with {sorted(row)}, of which none of {', '.join(KNOWN_COLUMNS)} holds text, a chat or ids"
        raise CalibrationError(f"Calibration sample {index} is {found}. Pass {accepted()}.")

    def _ids(self, text: str, **settings: Any) -> list[int]:
        # verbose: a long document is cut into windows, so the tokenizer's warning about its length is moot
        return list(self.tokenizer(text, verbose=False, **settings)["input_ids"])

    def _chat(self, messages: list[dict[str, Any]], index: int) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise CalibrationError(
                f"Calibration sample {index} is a chat, but the tokenizer has no chat template. "
                "Pass plain strings, or a tokenizer with a chat template."
            )
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self._ids(text, add_special_tokens=False)  # the template has them


def read_for_evaluation(dataset: Any, load_tokenizer: Callable[[], Any]) -> list[list[int]]:
    """Samples of token ids from one source, whole and in order; of a named dataset, its part for evaluation."""
    encode = Encoder(load_tokenizer)
    return [encode(row, index) for index, row in enumerate(read_to_judge(dataset))]


def _messages(row: Any) -> list[dict[str, Any]]:
    """A chat as templates take it, from OpenAI's form (role, content) or ShareGPT's (from, value); else nothing."""
    if isinstance(row, str) or not isinstance(row, Sequence) or not all(isinstance(turn, Mapping) for turn in row):
        return []
    if all("role" in turn for turn in row):
        return list(row)
    if all("from" in turn and "value" in turn for turn in row):
        return [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in row]
    return []


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


def joined(documents: Iterable[list[int]], separator: int) -> list[int]:
    """All documents in a row, each with the separator at its end."""
    return [token for ids in documents for token in (ids if ids[-1:] == [separator] else [*ids, separator])]


def cut(ids: list[int], window: int, opening: int | None = None) -> list[list[int]]:
    """Consecutive windows; what begins with `opening` begins with it in every window."""
    if opening is None or ids[:1] != [opening] or window < 2:
        return [ids[start : start + window] for start in range(0, len(ids), window)]
    rest = ids[1:]
    return [[opening, *rest[start : start + window - 1]] for start in range(0, max(len(rest), 1), window - 1)]
