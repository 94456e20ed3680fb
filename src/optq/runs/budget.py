# SPDX-License-Identifier: Apache-2.0
"""How many bits all linears together may take: as many as were asked for, or as a memory leaves them in serving."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from optq.compat.cache import cache_bytes
from optq.config.gptq import GPTQConfig
from optq.config.sizes import bytes_of
from optq.device.memory import GIB
from optq.errors import ConfigError, ModelError
from optq.positions import fitting, stated_positions
from optq.quantization.plan import Plan

logger = logging.getLogger(__name__)

MIB = 2**20

CONTEXT = 8192  # tokens that `fit` counts, by default
SPARE = 0.1  # of the memory, for activations and the server itself; as much as vLLM leaves by default


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What all planned linears may take together.

    Args:
        bits: scales and zeros included.
        parts: of `fit`, what takes the memory in serving, in bytes, and what is left for the linears.
        original: of `fit`, bytes of the model as it is, in serving.
    """

    bits: float
    parts: dict[str, int] = field(default_factory=dict)
    original: int = 0

    @property
    def original_fits(self) -> bool:
        return 0 < self.original <= sum(self.parts.values())

    def __str__(self) -> str:
        """How `fit` was computed, in one sentence or two."""
        also = f" The original model fits as well: it takes {_sized(self.original)}."
        return f"{_sized(sum(self.parts.values()))} in serving: {_listed(self.parts)}.{also * self.original_fits}"


class Cache(NamedTuple):
    """What a model keeps of one text: for how many tokens, and bytes."""

    tokens: int
    size: int


def cache_of(model: Any, config: GPTQConfig) -> Cache | None:
    """The cache that `fit` counts; None without it.

    Args:
        model: its experts are whole.
    Raises:
        ConfigError: nobody can tell.
    """
    if config.fit is None:
        return None
    tokens = min(CONTEXT, stated_positions(model.config) or CONTEXT)
    if config.context_length is not None:
        tokens = fitting(model, config.context_length, f"context_length={config.context_length}")
    try:
        return Cache(tokens, cache_bytes(model, tokens))
    except ModelError as error:
        raise ConfigError(
            f"fit={config.fit!r} was asked for, but how large the cache of this model is cannot be told: {error}. "
            "Subtract what it needs, and ask for target_size_gib, the size of all weights."
        ) from error


def budget_of(model: Any, config: GPTQConfig, plan: Plan, cache: Cache | None) -> Budget:
    """Bits that the config leaves for the planned linears.

    Args:
        model: may be on the meta device; its experts are split.
        cache: of `cache_of`.
    Raises:
        ConfigError: even with the smallest schemes, each linear by itself, they take more.
    """
    views = [target.view for target in plan.all_targets]
    weights = sum(math.prod(view.shape) for view in views)
    least = sum(
        min((scheme.stored_bits(*view.shape) for scheme in config.candidates_for(view.name, *view.shape)), default=0)
        for view in views
    )
    dense = 0
    if config.target_bits_per_weight is not None:
        budget = config.target_bits_per_weight * weights
        asked = f"target_bits_per_weight={config.target_bits_per_weight}"
    elif config.target_size_gib is not None:
        dense = dense_bytes(model, plan)
        budget = 8 * (config.target_size_gib * GIB - dense)
        asked = f"target_size_gib={config.target_size_gib}"
    else:
        assert cache is not None
        return _fitting(model, config, plan, cache, least)
    if budget < least:
        size = f", and the model {dense / GIB + least / 8 / GIB:.3g} GiB" if dense else ""
        raise ConfigError(
            f"{asked}, so a budget of {max(budget, 0) / weights:.3f} bits per weight was asked for, but the smallest "
            f"allowed schemes need {least / weights:.3f}{size}. Ask for more, or allow fewer bits or larger groups."
        )
    return Budget(bits=budget)


def _fitting(model: Any, config: GPTQConfig, plan: Plan, cache: Cache, least: int) -> Budget:
    """As `budget_of`, of `fit`: what a server with that memory leaves for the linears.

    Args:
        least: bits of the smallest schemes.
    """
    memory = bytes_of(config.fit)
    parts = {
        "not quantized: embeddings, norms, head": dense_bytes(model, plan),
        "indices of groups": sum(4 * target.view.shape[1] for target in plan.all_targets),
        f"cache of one text of {cache.tokens} tokens, in {str(model.dtype).removeprefix('torch.')}": cache.size,
        f"for activations and the server itself ({SPARE:.0%})": int(SPARE * memory),
    }
    left = memory - sum(parts.values())
    if 8 * left < least:
        needed = math.ceil((memory - left + least / 8 - SPARE * memory) / (1 - SPARE) / MIB)
        raise ConfigError(
            f"fit={config.fit!r} was asked for, but the smallest allowed schemes take {_sized(least / 8)}, and beside "
            f"them are {_listed(parts)}. fit='{needed}MiB' has room for all. Ask for that, for a shorter "
            "context_length, or for larger groups; serving= and dynamic may forbid smaller schemes."
        )
    original = whole_bytes(model) + cache.size + int(SPARE * memory)
    return Budget(bits=8 * left, parts=parts | {"left for quantized weights": left}, original=original)


def _listed(parts: dict[str, int]) -> str:
    return "; ".join(f"{_sized(size)} {part}" for part, size in parts.items())


def _sized(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def whole_bytes(model: Any) -> int:
    """Bytes of all parameters, each once, however often it is tied; `model` may be on the meta device."""
    return sum({id(p): p.numel() * p.element_size() for p in model.parameters()}.values())


def dense_bytes(model: Any, plan: Plan) -> int:
    """Bytes of what is not quantized; `model` may be on the meta device, and its experts are split."""
    quantized = {id(target.view.parameter) for target in plan.all_targets}
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # on the meta device they may not be tied yet
    sizes = {
        id(parameter): parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in tied
    }
    embedding = getattr(embedding_of(model), "weight", None)
    if id(embedding) in quantized:  # a tied head, which will be untied
        quantized.remove(id(embedding))
    return sum(size for identity, size in sizes.items() if identity not in quantized)


def embedding_of(model: Any) -> Any:
    """The input embedding, or None of a model that does not say which it is."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None
