# SPDX-License-Identifier: Apache-2.0
"""What a configuration means for a model: which linears are quantized and how, and on what data. No weight is read."""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from optq.calibration import (
    TOKENS_PER_MICRO_BATCH,
    TOKENS_PER_STEP,
    Calibration,
    Sampling,
    accepted,
    prepare_calibration,
)
from optq.compat import transformers as compat
from optq.config.gptq import GPTQConfig
from optq.config.metadata import without_effect
from optq.errors import CalibrationError, ConfigError, ModelError
from optq.model import Experts, find_blocks, find_fused_experts, find_linears, put_fused, put_split
from optq.positions import fitting, positions_of, stated_positions
from optq.quantization.plan import Plan, plan_quantization

from .budget import Budget, budget_of, cache_of, embedding_of
from .readers import refuse_unserved

logger = logging.getLogger(__name__)

LONGEST = 2048  # tokens of a calibration sequence, by default
MIXTURE = re.compile(r"expert|moe", re.IGNORECASE)  # in the name of a class
LONGEST_WRITTEN = 512  # of one that the model writes itself: each takes a forward pass


Write = Callable[[int, int], list[list[int]]]
"""Has the model write: so many samples of so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is decided before any work: the plan, the calibration data and the experts to split.

    Args:
        calibration: None if the model has to write some of it first.
        calibration_with: the data once it can.
        experts: by name, those that will be split into linears; the plan's targets are among these. The model still
            holds them in fused form.
        budget: of bits, if one was asked for; then the plan's schemes are not the last word.
    """

    plan: Plan
    calibration: Calibration | None
    calibration_with: Callable[[Write | None], Calibration]
    experts: dict[str, Experts]
    budget: Budget | None


def prepare(model: Any, config: GPTQConfig, where: Mapping[str, Any]) -> Preparation:
    """The plan and the calibration data for a model, which may be on the meta device and is left as it is.

    Args:
        where: arguments of `from_pretrained` with which the model is found, and its tokenizer.
    Raises:
        ConfigError, CalibrationError, ModelError: whatever can be refused before any work.
    """
    if config.own_text and (reason := why_not_written(model)):
        raise CalibrationError(
            f"{'No dataset= was given, and this model' if config.dataset is None else type(model).__name__} cannot "
            f"write its own calibration data: {reason}. Pass dataset= with {accepted()}."
        )
    plan, experts, budget = plan_for(model, config)
    refuse_unserved(model, plan, config)
    with torch.device("cpu"):  # transformers calls us inside torch.device("meta")
        prepared = _data_for(model, config, where)
        calibration = None if config.own_text else prepared(None)
    return Preparation(plan=plan, calibration=calibration, calibration_with=prepared, experts=experts, budget=budget)


def plan_for(model: Any, config: GPTQConfig) -> tuple[Plan, dict[str, Experts], Budget | None]:
    """Which linears are quantized and how; by name the experts that some of them are split from; and the budget."""
    blocks = find_blocks(model, config.block_name_to_quantize)
    head = _head(model)
    if config.lm_head and not any(map(find_linears, head.values())):
        raise ConfigError(
            f"lm_head=True was asked for, but {type(model).__name__} has no linear output head; leave it False."
        )
    experts = {
        f"{block_name}.{name}": Experts(fused, compat.expert_names(model, f"{block_name}.{name}"))
        for block_name, block in blocks.items()
        for name, fused in find_fused_experts(block).items()
    }
    cache = cache_of(model, config)
    put_split(model, experts)
    try:
        names = [name for block_name, block in blocks.items() for name in find_linears(block, block_name)]
        idle = without_effect(config, [*names, *head])
        named = next(iter(head)) if config.lm_head else None
        try:
            plan = plan_quantization({**blocks, **head} if named else blocks, config.scheme_for, named)
        except ConfigError as error:
            raise ConfigError(" ".join((str(error), *idle))) from error
        for sentence in idle:
            logger.warning("%s", sentence)
        if named and not plan.targets[named]:
            logger.warning(
                "lm_head=True was asked for, but %s stays as it is, and config.json will say lm_head=false: %s.",
                named,
                plan.skipped[named],
            )
            plan = plan.without_head()
        budget = budget_of(model, config, plan, cache) if config.has_budget else None
        _refuse_shared(model, plan)
    finally:
        put_fused(model, experts)
    planned = {target.view.name for target in plan.all_targets}
    experts = {name: one for name, one in experts.items() if any(linear.startswith(f"{name}.") for linear in planned)}
    for module in experts.values():
        module.every_token = config.calibrate_all_experts
    return plan, experts, budget


def _refuse_shared(model: Any, plan: Plan) -> None:
    """Refuse linears that have several names: each can be replaced once, and calibrated in one place."""
    planned = {id(target.view.module) for target in plan.all_targets}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in planned:
            names.setdefault(id(module), []).append(name)
    for found in names.values():
        if len(found) > 1:
            raise ModelError(
                f"{type(model).__name__} has one linear under several names: {', '.join(found[:3])}"
                f"{' …' * (len(found) > 3)}. It or a module around it is shared, and cannot be quantized in several "
                "places. Put a copy.deepcopy() of that module into all places but one, or exclude these linears with "
                "dynamic."
            )


def why_not_written(model: Any) -> str | None:
    """Why a model cannot write texts, or None."""
    if _has_decoder_inputs(model):
        return "it reads a text with its encoder before it writes another"
    if model.main_input_name != "input_ids":
        return f"it reads {model.main_input_name}"
    if not model.can_generate():
        return f"{type(model).__name__} does not predict the next token"
    return None


def _has_decoder_inputs(model: Any) -> bool:
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def vocabulary_of(model: Any) -> int:
    """Number of token ids that the model's embedding has."""
    embedding = embedding_of(model)
    if isinstance(getattr(embedding, "weight", None), torch.Tensor):
        return int(embedding.weight.shape[0])
    return int(model.config.get_text_config(decoder=True).vocab_size)  # some have an embedding per codebook


def _head(model: Any) -> dict[str, nn.Module]:
    """The output head by name, if there is one."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    return {} if name is None else {name: head}


def _data_for(model: Any, config: GPTQConfig, where: Mapping[str, Any]) -> Callable[[Write | None], Calibration]:
    """What makes the calibration data: all that the model has to say about it is asked here."""
    compat.check_tokenizer(config.tokenizer)
    text_config = model.config.get_text_config(decoder=True)
    if config.model_seqlen is not None:
        longest = fitting(model, config.model_seqlen, f"model_seqlen={config.model_seqlen}")
    else:
        longest = min(LONGEST, stated_positions(model.config) or LONGEST, positions_of(model) or LONGEST)
    length = longest if config.model_seqlen is not None else min(longest, LONGEST_WRITTEN)
    padding = config.pad_token_id
    prepared = partial(
        prepare_calibration,
        config.calibration_data,
        partial(compat.load_tokenizer, config.tokenizer, model.config.name_or_path, where),
        Sampling(
            vocabulary=vocabulary_of(model),
            window=longest,
            samples=config.num_samples,
            batch_size=config.batch_size,
            pad_token_id=padding if padding is not None else getattr(text_config, "pad_token_id", None),
            seed=config.seed,
            hold_out=config.quality_gate != "off",
            decoded=_has_decoder_inputs(model),
            dtype=model.dtype,
            micro_batch_tokens=TOKENS_PER_STEP if config.reconstruction_passes else TOKENS_PER_MICRO_BATCH,
            separator=_end_of_text(text_config) if config.packing else None,
            padded=_may_be_padded(model),
        ),
    )
    return lambda write: prepared(write=None if write is None else lambda count: write(count, length))


def _may_be_padded(model: Any) -> bool:
    """Whether padding on the right of a sample, masked, changes nothing of what the model's linears see of its tokens.

    What stands after a token is nothing to a model that writes; others may look there, whatever the mask says. To an
    expert, padding that is routed to it is a token like any other.
    """
    if why_not_written(model) is not None and not _has_decoder_inputs(model):
        return False
    if model.config.model_type == "xlnet":  # its blocks read (length, samples, width), where no mask fits
        return False
    return not any(MIXTURE.search(type(module).__name__) for module in model.modules())


def _end_of_text(text_config: Any) -> int:
    """The token that ends a text."""
    found = getattr(text_config, "eos_token_id", None)
    if isinstance(found, (list, tuple)):  # chat models: the first ends a text, the others a turn
        found = found[0]
    if found is None:
        raise ConfigError(
            "packing=True joins texts by the model's eos_token_id, but its config has none; set it there."
        )
    return int(found)
