# SPDX-License-Identifier: Apache-2.0
"""The model's own text as calibration data: it is loaded once more, as it is, writes, and is gone before the work."""

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optq.calibration import write_samples
from optq.compat import transformers as compat
from optq.compat.call import where_told
from optq.config.gptq import GPTQConfig
from optq.device.memory import release_free_memory
from optq.device.placement import evaluating, execution_device, placed, working_dtype
from optq.distributed import ALONE, Ranks
from optq.errors import CalibrationError, counted

from .journal import kept_samples
from .preparation import vocabulary_of

logger = logging.getLogger(__name__)


def why_not_loaded_again(files: Sequence[str]) -> str | None:
    """Why the model that is being quantized cannot be loaded a second time, or None."""
    if files and Path(files[0]).suffix not in (".safetensors", ".bin"):
        return f"{Path(files[0]).name} has to be converted first"
    return None


def write_own_text(
    model: Any, files: Sequence[str], config: GPTQConfig, samples: int, length: int, *, ranks: Ranks = ALONE
) -> list[list[int]]:
    """Samples of tokens that the original of `model` writes; what a run that goes on has written is taken over.

    Args:
        model: what is being quantized. Left as it is.
        files: its checkpoint's.
        ranks: the processes that share the run; in the first one the model writes.
    Raises:
        CalibrationError: there is no room for a text.
        OutputError: the journal belongs to another run.
    """
    opening = opening_of(model)
    if length <= len(opening):
        raise CalibrationError(
            f"model_seqlen={length} leaves no room for text: the model's own begins with "
            f"{counted(len(opening), 'token')}. "
            "Choose a larger one, 512 for instance."
        )

    def write(before: list[list[int]], keep: Callable[[list[list[int]]], None]) -> list[list[int]]:
        if config.dataset is None:
            logger.info("No dataset= was given; docs/calibration.md compares what follows with other choices.")
        logger.info(
            "The model writes its own calibration data: %s of %d tokens, begun with %s, seed %d.",
            counted(samples, "sample"),
            length,
            f"token {opening[0]}" if opening else "a random token",
            config.seed,
        )
        with _original(model, files, config.device) as original:
            written = write_samples(
                original,
                samples,
                length,
                opening=opening,
                vocabulary=vocabulary_of(model),
                seed=config.seed,
                written=before,
                keep=keep,
            )
        del original
        gc.collect()  # a model refers to itself
        release_free_memory()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return written

    asked = {"samples": samples, "length": length, "opening": opening, "seed": config.seed, "dtype": str(model.dtype)}
    return ranks.broadcast(lambda: kept_samples(config.journal_folder, files, asked, write))


def opening_of(model: Any) -> list[int]:
    """The token ids that a generated text begins with: the model's BOS token, if it has one."""
    bos = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
    return [] if bos is None else [int(bos)]


@contextmanager
def _original(model: Any, files: Sequence[str], asked: str | None) -> Iterator[Any]:
    """The model with its weights, on the device asked for; else where it runs fastest, on several if need be.

    Without files it is `model` itself, whose weights are in memory.
    """
    device = execution_device(asked)
    if not files:
        generation_config = model.generation_config
        tensors = [*model.parameters(), *model.buffers()]
        with evaluating(model), placed(tensors, device, working_dtype(device)):
            yield model
        model.generation_config = generation_config
        return
    config = copy.deepcopy(model.config)
    stated = config.__dict__.pop("quantization_config", None)  # ours
    if (base := getattr(stated, "base", None)) is not None:
        config.quantization_config = {**base, "dequantize": True}
    dtype = working_dtype(device) or model.dtype
    original = type(model).from_pretrained(
        Path(files[0]).parent,
        config=config,
        dtype=dtype,
        variant=where_told().get("variant"),
        device_map="auto" if asked is None and device.type != "cpu" else {"": device},
    )
    if base is not None:
        compat.cast(original, compat.asked_dtypes(original, dtype))
    yield original
