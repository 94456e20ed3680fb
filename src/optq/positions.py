# SPDX-License-Identifier: Apache-2.0
"""How long a text a model can read at once.

Where positions are rows of a table, learned or computed, a longer text has tokens without one: an error, or on an
accelerator one that ends the process. Rotary positions, relative ones and none at all have no such end.
"""

import logging
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from optq.errors import counted

logger = logging.getLogger(__name__)

STATED = ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions", "max_seq_len")
"""Where configs say for how many tokens a model was made, the first that is there."""

TABLE = re.compile(r"pos|wpe")
"""In the name of a table of positions."""

SPARE_ROWS = 8  # at most, that such a table has beside one per position


def stated_positions(config: Any) -> int | None:
    """The number of tokens that a model was made for, as its config says; None if it does not."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = next((value for key in STATED if isinstance(value := getattr(text, key, None), int)), None)
    return found if found is not None and found > 0 else None  # XLNet's is -1: no limit


def positions_of(model: Any) -> int | None:
    """The most tokens that there are positions for; None if there is no end to them."""
    stated = stated_positions(model.config) if getattr(model, "config", None) is not None else None
    if stated is None:
        return None
    part = _text_part(model)
    tables = [rows for rows in _tables(part) if abs(rows - stated) <= SPARE_ROWS]
    if model.config.model_type == "mpt":
        tables.append(stated)  # of biases; it is made when the model runs
    return min([stated, *tables]) if tables else None


def fitting(model: Any, window: int, asked: str) -> int:
    """`window`, or as much of it as the model has positions for; what differs is said in the log.

    Args:
        asked: what the window is, for the log: "model_seqlen=4096".
    """
    limit = positions_of(model)
    if limit is not None and window > limit:
        logger.warning(
            "%s: %s has %s, so windows are cut to %d.", asked, type(model).__name__, counted(limit, "position"), limit
        )
        return limit
    stated = stated_positions(model.config) if getattr(model, "config", None) is not None else None
    if stated is not None and window > stated:
        logger.warning(
            "%s: %s was made for %d tokens at most. It reads longer windows, but was not trained on them.",
            asked,
            type(model).__name__,
            stated,
        )
    return window


def _text_part(model: Any) -> Any:
    """What reads text, of a model with towers for images or sound; the model itself if it does not say."""
    try:
        found = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return model
    is_whole = isinstance(found, nn.Module) and any(isinstance(module, nn.Embedding) for module in found.modules())
    return found if is_whole else model


def _tables(part: Any) -> Iterator[int]:
    """For how many tokens each table of positions suffices."""
    for name, module in part.named_modules():
        if isinstance(module, nn.Embedding) and TABLE.search(name):
            # RoBERTa and its kin count from after the padding's row, BART and OPT from an offset.
            unused = getattr(module, "offset", 0) + (0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - unused
            continue
        for own, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and TABLE.search(own):
                yield tensor.shape[0]
