# SPDX-License-Identifier: Apache-2.0
"""`optq.evaluate` and `optq.compare`: how good, how large and how fast models are, all by the same protocols."""

import gc
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from optq.calibration import SELF, check_vocabulary, read_for_evaluation, write_samples
from optq.compat.call import where_in
from optq.compat.transformers import load_tokenizer
from optq.device.placement import execution_device
from optq.errors import CalibrationError, ConfigError, counted
from optq.evaluation import (
    Comparison,
    Perplexity,
    Protocol,
    Span,
    Speed,
    Verdict,
    compare_on,
    generation_speed,
    no_perplexity,
    perplexity_on,
    spans,
    verdict_of,
)
from optq.files.source import model_config_of, place_of
from optq.layers import QuantLinear
from optq.positions import fitting, positions_of, stated_positions
from optq.runs.own_text import opening_of
from optq.runs.preparation import LONGEST_WRITTEN, vocabulary_of
from optq.torch_state import default_torch_state

from .inspect import inspect

logger = logging.getLogger(__name__)

WINDOW = 2048  # tokens, as in the GPTQ paper
STRIDE = 512  # tokens, as in transformers' guide
OWN_TOKENS = 16384  # that the original writes to be judged on
OWN_SEED = 2**31 - 1  # other than any that people calibrate with
PROMPT = 128  # tokens of the text that speed is measured on
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, there was a little girl who",
    "Question: Tom has three apples and buys two more. How many apples does he have?\nAnswer:",
)
ANSWER = 32  # tokens


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measurements of one model.

    Args:
        model: its id or folder.
        bits_per_weight: bits per weight of its quantized linears; see `optq.inspect`.
        size_gib: size of its files with weights.
        perplexities: perplexity by protocol, which is described in words.
        comparison: with the original, on the tokens of the first protocol; None for the original itself.
        speeds: one per batch size asked for.
        answers: its continuation of each of `PROMPTS`, if asked for.
        kernels: number of quantized linears by kernel.
    """

    model: str
    bits_per_weight: float
    size_gib: float
    perplexities: dict[str, Perplexity]
    comparison: Comparison | None = None
    speeds: tuple[Speed, ...] = ()
    answers: tuple[str, ...] = ()
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict | None:
        """Quality in one word, by perplexity relative to the original's; None if no perplexity was compared."""
        return None if self.comparison is None else verdict_of(self.comparison.perplexity_ratio)


@default_torch_state()
def evaluate(
    model: str | os.PathLike[str], *, baseline: str | os.PathLike[str] | None = None, **kwargs: Any
) -> Evaluation:
    """Measure one model, and compare it with the original if that is named. For the arguments see `compare`."""
    return compare([model], baseline=baseline, **kwargs)[0]


@default_torch_state()
def compare(
    models: Sequence[str | os.PathLike[str]],
    *,
    baseline: str | os.PathLike[str] | None = None,
    dataset: Any = "wikitext2",
    tokenizer: Any = None,
    protocols: Sequence[Protocol] = ("consecutive", "sliding"),
    window: int = WINDOW,
    stride: int | None = None,
    tokens: int | None = None,
    batch_sizes: Sequence[int] = (),
    answers: bool = False,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> list[Evaluation]:
    """Measure any number of models on the same text.

    Args:
        models: ids or folders, dense or quantized.
        baseline: the original, which stays in memory beside each of them. By default nothing is compared.
        dataset: the text, in any form that `GPTQConfig.dataset` takes; of a named dataset its part for evaluation;
            "self": text that the baseline writes, not what it writes to be calibrated on. Samples are one text.
        tokenizer: object, id or folder; by default the baseline's, else the first model's.
        protocols: see `optq.evaluation.Protocol`; not "rolling".
        window, stride: tokens read at once, at most what all models can; the step of "sliding", by default up to 512.
        tokens: number of tokens of the text to use at most, from its start.
        batch_sizes: for which the speed of generation is measured, after a prompt from the text.
        answers: have each model continue a few prompts.
        device, kwargs: by default the accelerator; for `from_pretrained`: dtype, revision, token, trust_remote_code, …
    Raises:
        CalibrationError: the text cannot be read, or is shorter than a window.
        ConfigError: one of the models does not predict the next token, or has another vocabulary than the baseline.
    """
    device = execution_device(device)
    names = [place_of(model) for model in models]
    origin = None if baseline is None else place_of(baseline)
    reference = origin or names[0]
    window = _common_window(_checked_configs(names, origin, kwargs), window)
    encoder = cache(lambda: load_tokenizer(tokenizer, reference, where_in(kwargs)))
    original = None if origin is None else _load(origin, device, kwargs)
    if original is not None:
        window = fitting(original, window, f"window={window}")
    stride = min(STRIDE, window // 2) if stride is None else stride
    is_own = isinstance(dataset, str) and dataset == SELF
    samples = _own_text(original, tokens) if is_own else read_for_evaluation(dataset, encoder)
    ids = torch.tensor([token for sample in samples for token in sample][:tokens])
    yardstick = _Yardstick(
        encoder=encoder,
        ids=ids,
        cuts={_in_words(protocol, window, stride): _cut(ids, protocol, window, stride) for protocol in protocols},
        batch_sizes=tuple(batch_sizes),
        answers=answers,
    )
    found = []
    for name in names:
        model = original if name == origin else _load(name, device, kwargs)
        found.append(yardstick.measure(name, model, None if name == origin else original, kwargs))
        del model
        gc.collect()  # a model refers to itself, and the next one is to find its memory free
    return found


@default_torch_state()
def bench(
    model: str | os.PathLike[str],
    *,
    batch_sizes: Sequence[int] = (1, 16, 32, 64),
    prompt: int = PROMPT,
    new: int = 32,
    runs: int = 3,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> list[Speed]:
    """Measure how fast a model reads and generates.

    Args:
        model: id or folder, dense or quantized by any tool.
        batch_sizes: sequences at once.
        prompt, new: tokens of each sequence to read, seeded random ones, and to generate.
        runs: number of repetitions, whose medians are reported.
        device, kwargs: see `compare`.
    """
    device = execution_device(device)
    model_config_of(place_of(model), kwargs)  # says what is not there
    loaded = _load(place_of(model), device, kwargs)
    generator = torch.Generator().manual_seed(0)
    prompt = _room(loaded, prompt, new)
    ids = torch.randint(vocabulary_of(loaded), (1, prompt), generator=generator, device="cpu")
    return [generation_speed(loaded, ids, batch, new, runs) for batch in batch_sizes]


def _room(model: Any, prompt: int, new: int) -> int:
    """How many tokens of a prompt the model has positions for, besides those that it writes."""
    room = fitting(model, prompt + new, f"A prompt of {prompt} and {new} new tokens") - new
    if room < 1:
        raise ConfigError(
            f"{new} new tokens were asked for, but {type(model).__name__} has positions for {room + new} in all, "
            "with the prompt. Ask for fewer."
        )
    return room


def _checked_configs(names: list[str], origin: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The models' configs by name, if all can be measured and compared."""
    configs = {name: model_config_of(name, kwargs) for name in dict.fromkeys([origin or names[0], *names])}
    for name, config in configs.items():
        _check_predicts(name, config)
        if origin is not None:
            _check_comparable(name, config, origin, configs[origin])
    return configs


def _common_window(configs: Mapping[str, Any], window: int) -> int:
    """`window`, or as much of it as all models have positions for; what differs is said in the log."""
    stated = {name: stated_positions(config) for name, config in configs.items()}
    shortest = min(stated, key=lambda name: stated[name] or window)
    limit = stated[shortest] or window
    if limit < window:
        positions = counted(limit, "position")
        logger.warning("window=%d: %s has %s, so windows are cut to %d.", window, shortest, positions, limit)
    return min(limit, window)


def _check_predicts(name: str, config: Any) -> None:
    """Refuse what AutoModelForCausalLM would not load, or would load with a head that it makes up.

    Raises:
        ConfigError: the model does not predict the next token.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(no_perplexity(name, "reads one text with its encoder to write another"))
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(no_perplexity(name, f"is of the type {config.model_type!r}, which writes no text"))
    headless = AutoModel._model_mapping.get(type(config), None)
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)  # None: one that transformers does not have
        if found is None or (found is headless and config.get_text_config(decoder=True).tie_word_embeddings):
            continue  # the second: its embeddings are its head
        if not found.can_generate():
            raise ConfigError(no_perplexity(name, f"is a {architecture}, which does not predict the next token"))


def _check_comparable(name: str, config: Any, origin: str, original: Any) -> None:
    """Refuse models that spread their probabilities over different tokens.

    Raises:
        ConfigError: the vocabularies differ in size.
    """
    sizes = [getattr(found.get_text_config(decoder=True), "vocab_size", None) for found in (config, original)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ConfigError(
            f"{name} has a vocabulary of {sizes[0]} tokens, and the baseline {origin} one of {sizes[1]}; only models "
            "with the same one can be compared. Resize the baseline's embeddings as the model's were "
            "(resize_token_embeddings), or leave baseline= out."
        )


def _load(name: str, device: torch.device, kwargs: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", "device_map": device, **kwargs}).eval()


def _own_text(original: Any, tokens: int | None) -> list[list[int]]:
    if original is None:
        raise CalibrationError(f"dataset={SELF!r} is text that the original writes: name it as the baseline.")
    generation_config, wanted = original.generation_config, OWN_TOKENS if tokens is None else tokens
    # No longer than what is read of it; two tokens are the shortest text, and refused later, with what to do.
    length = min(LONGEST_WRITTEN, positions_of(original) or LONGEST_WRITTEN, max(wanted, 2))
    count = -(-wanted // length)
    try:
        return write_samples(
            original,
            count,
            length,
            opening=opening_of(original),
            vocabulary=vocabulary_of(original),
            seed=OWN_SEED,
        )
    finally:
        original.generation_config = generation_config


def _cut(ids: Tensor, protocol: Protocol, window: int, stride: int) -> list[Span]:
    try:
        return spans(ids.numel(), protocol, window, stride)
    except ValueError as error:
        raise CalibrationError(f"{error} Name a longer text, a shorter window, or a smaller stride.") from error


def _in_words(protocol: Protocol, window: int, stride: int) -> str:
    return {
        "consecutive": f"consecutive windows of {window}",
        "sliding": f"sliding window of {window}, stride {stride}",
        "rolling": f"rolling window of {window}",
    }[protocol]


@dataclass(frozen=True, kw_only=True)
class _Yardstick:
    """The text, protocols and baseline by which all models are measured."""

    encoder: Callable[[], Any]  # the tokenizer, loaded when it is needed
    ids: Tensor  # (tokens,)
    cuts: dict[str, list[Span]]
    batch_sizes: tuple[int, ...]
    answers: bool

    def measure(self, name: str, model: Any, original: Any, kwargs: dict[str, Any]) -> Evaluation:
        started = time.monotonic()
        check_vocabulary(int(self.ids.max()), vocabulary_of(model))
        comparison, perplexities = None, {}
        for index, (protocol, cut) in enumerate(self.cuts.items()):
            if original is not None and index == 0:
                comparison = compare_on(original, model, self.ids, cut)
                assert comparison.perplexity is not None
                perplexities[protocol] = Perplexity(perplexity=comparison.perplexity, tokens=comparison.tokens)
            else:
                perplexities[protocol] = perplexity_on(model, self.ids, cut)
        facts = inspect(name, **kwargs)
        evaluation = Evaluation(
            model=name,
            bits_per_weight=facts.bits_per_weight,
            size_gib=facts.size_gib,
            perplexities=perplexities,
            comparison=comparison,
            speeds=self._speeds(model),
            answers=tuple(_answer(model, self.encoder(), prompt) for prompt in PROMPTS) if self.answers else (),
            kernels=dict(Counter(x.kernel_name or "" for x in model.modules() if isinstance(x, QuantLinear))),
        )
        logger.info("%s: measured in %.0f s.", name, time.monotonic() - started)
        return evaluation

    def _speeds(self, model: Any) -> tuple[Speed, ...]:
        if not self.batch_sizes:
            return ()
        prompt = self.ids[None, : _room(model, PROMPT, ANSWER)]
        return tuple(generation_speed(model, prompt, batch, ANSWER) for batch in self.batch_sizes)


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy, so that two models can be told apart by the first word that differs."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
