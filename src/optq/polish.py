# SPDX-License-Identifier: Apache-2.0
"""Polish a finished block: tune its scales and codes by gradient until its outputs are those of the original block.

The solver minimises the error of each linear's own outputs. What counts is the block's output, after attention,
activation and residual; its gradient with respect to a dense weight comes from autograd, and from there to scales and
codes by the chain rule, with rounding passed straight through (Bengio et al., arXiv:1308.3432; Cheng et al.,
"SignRound", arXiv:2309.05516). The grid stays the checkpoint's own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .gptq import stored_scales
from .model import BlockCall, LinearView, hidden_states, relative_error
from .scheme import QuantizedWeight, per_column, run_width

SCALE_RATE = 1e-2  # Adam's step for the logarithm of a scale
CODE_RATE = 5e-3  # Adam's step for a code, in codes
DECAY = (0.9, 0.99)  # of Adam's two averages: few steps, so short memories
MARGIN = 0.45  # of 0.5, where the next code begins
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Example:
    """One micro-batch: how the quantized model calls the block, and what the original block returns to the original.

    Args:
        target: hidden states (samples, tokens, features).
        mask: (samples, tokens), 0 for padding; or None.
    """

    call: BlockCall
    target: Tensor
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Polished:
    """The tuned weights in the order of the views; and the held-out loss before and after."""

    quantized: list[QuantizedWeight]
    loss_before: float
    loss: float
    passes: int


def polish(
    views: list[LinearView],
    originals: list[Tensor],
    start: list[QuantizedWeight],
    run: Callable[[BlockCall], Any],
    examples: list[Example],
    held_out: list[Example],
    passes: int,
) -> Polished:
    """Tune `start`; the views' weights end as the result decodes.

    Args:
        views: linears of the block, their weights holding the decoded `start`.
        run: executes the block.
        originals: their original weights (out, in).
        examples: one Adam step each per pass.
        held_out: after every pass the loss on these is compared with the best so far, and only the best is kept. The
            second pass in a row without improvement is the last.
        passes: at most.
    """
    tuned = [_Tuned(*one) for one in zip(views, originals, start, strict=True)]
    weights = [tuned_view.weight for tuned_view in tuned]
    loss_before = best_loss = _mean_loss(run, held_out)
    best, done, failures = start, 0, 0
    steps, step = passes * len(examples), 0
    for _ in range(passes):
        for example in examples:
            with torch.enable_grad(), _requiring_gradients(weights):
                gradients = torch.autograd.grad(_loss(run, example), weights, allow_unused=True)
            rate = 1 - step / steps
            step += 1
            for one, gradient in zip(tuned, gradients, strict=True):
                if gradient is not None:
                    one.step(one.view.as_rows(gradient).float(), step, rate)
        done += 1
        loss = _mean_loss(run, held_out)
        if loss < best_loss:
            best_loss, best, failures = loss, [one.quantized() for one in tuned], 0
        elif (failures := failures + 1) == 2:
            break
    for one, quantized in zip(tuned, best, strict=True):
        one.view.write(quantized.decode())
    return Polished(quantized=best, loss_before=loss_before, loss=best_loss, passes=done)


@contextmanager
def _requiring_gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    required = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)


class _Tuned:
    """One weight while it is tuned: latent codes and scales in float32, and Adam's averages for both."""

    def __init__(self, view: LinearView, original: Tensor, start: QuantizedWeight) -> None:
        self.view, self._start = view, start
        self.weight = view.parameter
        self._zeros = per_column(start.zeros.float(), start.group_of_column)
        self._max_code = (1 << start.bits) - 1
        self._codes = start.codes.float()
        # Inside its code's cell a weight starts where the original lies, so that those near an edge cross it first.
        position = original.float() / per_column(start.scales, start.group_of_column) + self._zeros - self._codes
        self._codes += position.clamp_(-MARGIN, MARGIN)
        self._signs, self._log_scales = start.scales.sign(), start.scales.abs().log()
        self._run = run_width(start.group_of_column, start.scales.shape[1])
        self._averages = [torch.zeros_like(tensor) for tensor in (self._codes, self._codes)]
        self._scale_averages = [torch.zeros_like(tensor) for tensor in (self._log_scales, self._log_scales)]

    def quantized(self) -> QuantizedWeight:
        return replace(self._start, codes=self._codes.round().to(torch.uint8), scales=stored_scales(self._scales()))

    def _scales(self) -> Tensor:
        return self._signs * self._log_scales.exp()

    def step(self, gradient: Tensor, number: int, rate: float) -> None:
        """One step of Adam along `gradient`, of the loss with respect to the dense weight (out, in)."""
        scales = self._scales()
        distance = self._codes.round() - self._zeros
        _adam(
            self._log_scales,
            self._sums_by_group(gradient * distance) * scales,
            self._scale_averages,
            number,
            rate * SCALE_RATE,
        )
        _adam(
            self._codes,
            gradient * per_column(scales, self._start.group_of_column),
            self._averages,
            number,
            rate * CODE_RATE,
        )
        self._codes.clamp_(0, self._max_code)
        self.view.write(self.quantized().decode())

    def _sums_by_group(self, values: Tensor) -> Tensor:
        """(out, in) -> (out, groups)."""
        if self._run is not None:
            return values.view(values.shape[0], -1, self._run).sum(-1)
        return torch.zeros_like(self._start.scales).index_add_(1, self._start.group_of_column.long(), values)


def _adam(values: Tensor, gradient: Tensor, averages: list[Tensor], number: int, rate: float) -> None:
    """Kingma & Ba, arXiv:1412.6980, in place."""
    first, second = averages
    first.lerp_(gradient, 1 - DECAY[0])
    second.lerp_(gradient.square(), 1 - DECAY[1])
    corrected = math.sqrt(1 - DECAY[1] ** number) / (1 - DECAY[0] ** number)
    values.addcdiv_(first, second.sqrt().add_(TINY), value=-rate * corrected)


def _loss(run: Callable[[BlockCall], Any], example: Example) -> Tensor:
    return relative_error(hidden_states(run(example.call)), example.target, example.mask)


def _mean_loss(run: Callable[[BlockCall], Any], examples: list[Example]) -> float:
    return sum(float(_loss(run, example)) for example in examples) / len(examples)
