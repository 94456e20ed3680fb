# SPDX-License-Identifier: Apache-2.0
"""Tuning a finished block by gradient."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optq.events import RunLog
from optq.gptq import solve
from optq.model import find_linears
from optq.quantization.activations import ActivationStore
from optq.quantization.block_reconstruction import Example, _gradients, _loss_of, reconstruct
from optq.quantization.coroutines import BlockCall
from optq.quantization.plan import Target
from optq.quantization.report import BlockReport, Solved
from optq.quantization.runner import BlockRunner
from optq.scheme import LayerScheme

WIDTH = 64
SCHEME = LayerScheme(bits=2, group_size=32, symmetric=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x):
        return (x + self.down(torch.tanh(self.up(x))),)


@pytest.fixture
def setting():
    """A block solved without looking at any data, and what it should return."""
    torch.manual_seed(0)
    block = Block()
    block.up.weight.data *= 8
    block.down.weight.data *= 20
    inputs = torch.randn(12, 2, 40, 6) @ torch.randn(6, WIDTH) / 2 + 0.2 * torch.randn(12, 2, 40, WIDTH)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 30:] = 0
    with torch.no_grad():
        examples = [
            Example(call=BlockCall(batch=index, block=0, args=(x,), kwargs={}), target=block(x)[0], mask=mask)
            for index, x in enumerate(inputs)
        ]
        targets = tuple(Target(view=view, scheme=SCHEME) for view in find_linears(block).values())
        report = BlockReport(block="block", targets=targets, log=RunLog(bar=False), device=torch.device("cpu"))
        runner = BlockRunner(block, block, ActivationStore(), report)
        solved = [
            Solved(
                view=target.view,
                quantized=solve(target.view.weight, torch.eye(WIDTH), SCHEME).quantized,
                relative_loss=0.0,
            )
            for target in targets
        ]
        for done in solved:
            done.view.write(done.quantized.decode())
    return runner, solved, examples


def test_held_out_loss_falls_and_the_weights_are_on_the_grid(setting):
    runner, start, examples = setting
    block = runner.forward
    block.up.weight.requires_grad_(False)
    with torch.no_grad():
        reconstructed = reconstruct(runner, start, examples[:10], examples[10:], passes=8)
    assert reconstructed.loss < 0.95 * reconstructed.loss_before
    for one, other in zip(start, reconstructed.solved, strict=True):
        before, after = one.quantized, other.quantized
        assert torch.equal(one.view.weight, after.decode())
        assert not torch.equal(after.codes, before.codes)
        assert not torch.equal(after.scales, before.scales)
        assert torch.equal(after.zeros, before.zeros)
        assert torch.equal(after.scales.half().float(), after.scales)
        assert after.codes.max() <= 3
    assert not block.up.weight.requires_grad
    assert block.down.weight.requires_grad


def test_what_does_not_help_is_not_kept(setting):
    runner, start, examples = setting
    block = runner.forward
    unreachable = [
        Example(call=example.call, target=block(*example.call.args)[0].detach(), mask=None) for example in examples
    ]
    with torch.no_grad():
        reconstructed = reconstruct(runner, start, examples[:10], unreachable[10:], passes=8)
    assert reconstructed.loss == reconstructed.loss_before == 0  # what it already returns cannot be improved on
    assert reconstructed.passes == 2  # gives up after two passes without improvement
    assert all(
        torch.equal(one.quantized.codes, other.quantized.codes)
        for one, other in zip(start, reconstructed.solved, strict=True)
    )
    assert all(torch.equal(one.view.weight, one.quantized.decode()) for one in start)


def test_padding_does_not_count(setting):
    runner, start, examples = setting
    results = []
    for garbage in (0.0, 1e3):
        for done in start:
            done.view.write(done.quantized.decode())
        changed = []
        for example in examples:
            target = example.target.clone()
            target[1, 30:] = garbage
            changed.append(Example(call=example.call, target=target, mask=example.mask))
        with torch.no_grad():
            results.append(reconstruct(runner, start, changed[:10], changed[10:], passes=2))
    assert results[0].loss == results[1].loss


def test_pieces_of_examples_give_the_gradients_and_losses_of_whole_ones(setting):
    runner, solved, examples = setting
    weights = [done.view.parameter for done in solved]
    gradients, losses = [], []
    for parts in (1, 2):
        runner.store.parts = parts
        gradients.append(_gradients(runner, examples[0], weights))
        with torch.no_grad():
            losses.append(_loss_of(runner, examples[0]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2 * float(one.abs().max()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
