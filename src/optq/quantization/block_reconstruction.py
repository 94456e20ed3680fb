# SPDX-License-Identifier: Apache-2.0
"""Block reconstruction: tune a block's scales and codes by gradient until its outputs are the original block's.

The solver minimises the error of each linear's own outputs. What counts is the block's output, after attention,
activation and residual; its gradient with respect to a dense weight comes from autograd, and from there to scales and
codes by the chain rule, with rounding passed straight through (Bengio et al., arXiv:1308.3432; Cheng et al.,
"SignRound", arXiv:2309.05516). The grid stays the checkpoint's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from optq.distributed import ALONE, Ranks
from optq.gptq import stored_scales
from optq.kernels import has_bfloat16_instructions
from optq.model import hidden_states, relative_error
from optq.scheme import QuantizedWeight, per_column, run_width

from .coroutines import BlockCall
from .report import Solved
from .runner import BlockRunner

# Adam's first steps. Measured on two blocks of SmolLM2 at 4, 3 and 2 bits: with twice the CODE_RATE, the first pass at
# 4 bits does more harm than the following ones can mend; with half of it, three passes do not reach as far.
CODE_RATE = 2.5e-3  # in codes
SCALE_RATE = 4e-2  # of a scale's logarithm, times 2 ** -bits: so much moves the outermost code by as much at any width
DECAY = (0.9, 0.99)  # of Adam's two averages: few steps, so short memories
TINY = 1e-12  # Adam's ε: gradients may be very small
MARGIN = 0.45  # of 0.5, where the next code begins


@dataclass(frozen=True, kw_only=True)
class Example:
    """One micro-batch: the quantized model's call of the block, and the original block's output in the original model.

    Args:
        target: hidden states (samples, tokens, features).
        mask: (samples, tokens), 0 for padding; or None.
    """

    call: BlockCall
    target: Tensor
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return self.target[..., 0].numel() if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Result of `reconstruct`: the tuned linears, and the held-out loss before and after."""

    solved: list[Solved]
    loss_before: float
    loss: float
    passes: int


def reconstruct(
    runner: BlockRunner,
    solved: list[Solved],
    examples: list[Example],
    held_out: list[Example],
    passes: int,
    ranks: Ranks = ALONE,
) -> Reconstruction:
    """Tune the solved linears of a block; their weights end as the result decodes.

    Args:
        runner: runs the block, whose linears hold the decoded `solved`.
        examples: one Adam step each per pass.
        held_out: after every pass the loss on these is compared with the best so far, and only the best is kept. The
            second pass in a row without improvement is the last.
        passes: at most.
        ranks: processes with other examples; a step follows the mean of their gradients.
    """
    tuned = [_Tuned(done, done.view.as_rows(runner.originals[done.view])) for done in solved]
    weights = [one.view.parameter for one in tuned]

    def mean_loss() -> float:
        losses = [runner.with_room(partial(_loss_of, runner, one)) for one in held_out]
        total, count = ranks.all_reduce_numbers(sum(losses), len(losses))
        return total / count

    loss_before = best_loss = mean_loss()
    best, done, failures = [done.quantized for done in solved], 0, 0
    steps_per_pass = max(ranks.all_gather(len(examples)))
    adam, falling_rate = _adam(tuned, passes * steps_per_pass)
    for _ in range(passes):
        for step in range(steps_per_pass):
            example = examples[step % len(examples)]  # one who has fewer begins again
            gradients = runner.with_room(partial(_gradients, runner, example, weights))
            if ranks.size > 1:
                gradients = [_mean_over(ranks, *one) for one in zip(gradients, weights, strict=True)]
            reached = [(one, gradient) for one, gradient in zip(tuned, gradients, strict=True) if gradient is not None]
            for one, gradient in reached:
                one.take(one.view.as_rows(gradient).float())
            adam.step()
            adam.zero_grad()
            falling_rate.step()
            for one, _ in reached:
                one.write()
        done += 1
        loss = mean_loss()
        if loss < best_loss:
            best_loss, best, failures = loss, [one.quantized() for one in tuned], 0
        elif (failures := failures + 1) == 2:
            break
    for one, quantized in zip(tuned, best, strict=True):
        one.view.write(quantized.decode())
    return Reconstruction(
        solved=[replace(one, quantized=quantized) for one, quantized in zip(solved, best, strict=True)],
        loss_before=loss_before,
        loss=best_loss,
        passes=done,
    )


def _adam(tuned: list["_Tuned"], steps: int) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Kingma & Ba, arXiv:1412.6980; and what lets its rates fall to nothing over so many steps."""
    adam = torch.optim.Adam(
        [
            {"params": [one.codes for one in tuned], "lr": CODE_RATE},
            *({"params": [one.log_scales], "lr": SCALE_RATE / 2**one.bits} for one in tuned),
        ],
        betas=DECAY,
        eps=TINY,
        fused=True,
    )
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)


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


def _rough_products(device: torch.device) -> torch.autocast:
    """bfloat16 for the products behind a gradient, where a CPU has instructions for it: three times as fast.

    Elsewhere the model's own dtype is the fast one already. Losses that decide are always computed in full.
    """
    enabled = device.type == "cpu" and has_bfloat16_instructions()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class _Tuned:
    """One weight while it is tuned.

    Attributes:
        codes: (out, in) float32, latent: the nearest integers are the codes.
        log_scales: (out, groups) float32, of the scales' sizes.
    """

    def __init__(self, solved: Solved, original: Tensor) -> None:
        self.view, self._start = solved.view, solved.quantized
        start, self.bits = self._start, self._start.bits
        self._zeros = per_column(start.zeros.float(), start.group_of_column)
        self._max_code = (1 << self.bits) - 1
        self.codes = start.codes.float()
        self._steps = self.codes - self._zeros  # the present weight, in scales
        # Inside its code's cell a weight starts where the original lies, so that those near an edge cross it first.
        position = original.float() / per_column(start.scales, start.group_of_column) - self._steps
        self.codes += position.clamp_(-MARGIN, MARGIN)
        self._signs, self.log_scales = start.scales.sign(), start.scales.abs().log()
        self._run = run_width(start.group_of_column, start.scales.shape[1])

    def quantized(self) -> QuantizedWeight:
        return replace(self._start, codes=self.codes.round().to(torch.uint8), scales=stored_scales(self._scales()))

    def _scales(self) -> Tensor:
        return self._signs * self.log_scales.exp()

    def take(self, gradient: Tensor) -> None:
        """Give codes and scales their gradients; `gradient` is the dense weight's, (out, in), and is spent."""
        scales = self._scales()
        self.log_scales.grad = self._sums_by_group(gradient * self._steps) * scales
        self.codes.grad = gradient.mul_(per_column(scales, self._start.group_of_column))

    def write(self) -> None:
        """Bring the dense weight up to date; the same values as `quantized` decodes, with less work."""
        torch.round(self.codes.clamp_(0, self._max_code), out=self._steps).sub_(self._zeros)
        self.view.write(self._steps * per_column(stored_scales(self._scales()), self._start.group_of_column))

    def _sums_by_group(self, values: Tensor) -> Tensor:
        """(out, in) -> (out, groups)."""
        if self._run is not None:
            return values.view(values.shape[0], -1, self._run).sum(-1)
        return torch.zeros_like(self._start.scales).index_add_(1, self._start.group_of_column.long(), values)


def _mean_over(ranks: Ranks, gradient: Tensor | None, weight: Tensor) -> Tensor:
    """Over all processes; one whose example does not reach the weight counts as well."""
    return ranks.all_reduce(torch.zeros_like(weight) if gradient is None else gradient.contiguous()).div_(ranks.size)


def _pieces(runner: BlockRunner, example: Example) -> list[Example]:
    """What is run of it at once; after memory has run out, a part."""
    if runner.store.parts == 1:
        return [example]
    return [
        Example(
            call=replace(example.call, args=args, kwargs=kwargs),
            target=example.target[part],
            mask=None if example.mask is None else example.mask[part],
        )
        for part, args, kwargs in runner.in_parts(example.call)
    ]


def _gradients(runner: BlockRunner, example: Example, weights: list[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of the loss towards each weight; None where the loss does not depend on it."""
    total: list[Tensor | None] = [None] * len(weights)
    pieces = _pieces(runner, example)
    for piece in pieces:
        share = piece.tokens / example.tokens if len(pieces) > 1 else 1.0
        with torch.enable_grad(), _requiring_gradients(weights), _rough_products(weights[0].device):
            found = torch.autograd.grad(_loss(runner, piece) * share, weights, allow_unused=True)
        total = [_sum_of(*both) for both in zip(total, found, strict=True)]
    return total


def _sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one.add_(other)


def _loss_of(runner: BlockRunner, example: Example) -> float:
    pieces = _pieces(runner, example)
    if len(pieces) == 1:
        return float(_loss(runner, pieces[0]))
    return sum(float(_loss(runner, piece)) * piece.tokens for piece in pieces) / example.tokens


def _loss(runner: BlockRunner, example: Example) -> Tensor:
    return relative_error(hidden_states(runner.run(example.call)), example.target, example.mask)
