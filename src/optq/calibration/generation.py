# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes itself, to be calibrated on: what it was trained on, as far as it remembers.

Tokens are sampled from the model's own distribution, and used as they are. A text that ends is followed by another one
in the same sample, as in training.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from optq.errors import counted

logger = logging.getLogger(__name__)

TOP_K = 50  # likeliest tokens that one is drawn from: the tail of a small model's distribution is noise
TOKENS_AT_ONCE = 16384  # of all samples that are written together; their keys and values are in memory
FEWEST_PARTS = 4  # that are written one after the other: what is finished is kept if the rest is interrupted …
SMALLEST_PART = 8  # samples: each part reads all weights for every token


def write_samples(
    model: Any,
    samples: int,
    length: int,
    *,
    opening: Sequence[int],
    vocabulary: int,
    seed: int,
    written: Sequence[list[int]] = (),
    keep: Callable[[list[list[int]]], None] = lambda written: None,
) -> list[list[int]]:
    """Generate calibration samples with a model: lists of token ids, one per sample.

    Args:
        model: one of transformers that generates, with its weights. Its generation config is replaced.
        length: tokens of each sample, the opening included.
        opening: tokens that every sample begins with; if there are none, one drawn from the vocabulary.
        seed: the same one gives the same tokens, on the same machine.
        written: what a call with the same arguments had written when it was interrupted; this one goes on.
        keep: called with all that is written so far, after every part.
    """
    from transformers import GenerationConfig

    # A fresh one: a checkpoint's own may end texts early, forbid tokens or narrow the distribution.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=TOP_K, pad_token_id=0)
    device = model.get_input_embeddings().weight.device
    at_once = max(1, min(TOKENS_AT_ONCE // length, max(SMALLEST_PART, -(-samples // FEWEST_PARTS))))
    done = list(written)
    began = time.monotonic()
    bar = tqdm(total=samples * length, initial=len(done) * length, desc="Writing text", unit=" tokens", disable=None)
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))), torch.no_grad(), bar:
        while len(done) < samples:
            torch.manual_seed(random.Random(f"{seed}, {len(done)}").getrandbits(63))  # whatever was before this part
            count = min(at_once, samples - len(done))
            if opening:
                start = torch.tensor([list(opening)] * count, device=device)
            else:
                start = torch.randint(vocabulary, (count, 1)).to(device)
            bar.update(start.numel())
            ids = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length - start.shape[1],
                use_cache=True,
                stopping_criteria=[_shown_on(bar)],
            )
            done += ids.tolist()
            keep(done)
            logger.info(
                "Written %d of %s of %d tokens, %.0f s.",
                len(done),
                counted(samples, "sample"),
                length,
                time.monotonic() - began,
            )
    return done


def _shown_on(bar: Any) -> Callable[[Tensor, Any], Tensor]:
    """A criterion of `generate` that stops nothing: it is asked after every token of each sample."""

    def asked(ids: Tensor, scores: Any) -> Tensor:
        bar.update(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return asked
