# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes itself, to be calibrated on: what it was trained on, as far as it remembers.

Tokens are sampled from the model's own distribution, and used as they are. A text that ends is followed by another one
in the same sample, as in training.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

TOP_K = 50  # likeliest tokens that one is drawn from: the tail of a small model's distribution is noise
TOKENS_AT_ONCE = 16384  # of all samples that are written together; their keys and values are in memory


def write_samples(
    model: Any, samples: int, length: int, *, opening: Sequence[int], vocabulary: int, seed: int
) -> list[list[int]]:
    """Let a model write.

    Args:
        model: one of transformers that generates, with its weights. Its generation config is replaced.
        length: tokens of each sample, the opening included.
        opening: tokens that every sample begins with; if there are none, one drawn from the vocabulary.
        seed: the same one gives the same tokens, on the same machine.
    """
    from transformers import GenerationConfig

    # A fresh one: a checkpoint's own may end texts early, forbid tokens or narrow the distribution.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=TOP_K, pad_token_id=0)
    device = model.get_input_embeddings().weight.device
    at_once = max(1, TOKENS_AT_ONCE // length)
    written: list[list[int]] = []
    began = time.monotonic()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))), torch.no_grad():
        torch.manual_seed(seed)
        while len(written) < samples:
            count = min(at_once, samples - len(written))
            if opening:
                start = torch.tensor([list(opening)] * count, device=device)
            else:
                start = torch.randint(vocabulary, (count, 1)).to(device)
            ids = model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=length - start.shape[1], use_cache=True
            )
            written += ids.tolist()
            logger.info(
                "Written %d of %d samples of %d tokens, %.0f s.",
                len(written),
                samples,
                length,
                time.monotonic() - began,
            )
    return written
