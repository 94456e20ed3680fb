# SPDX-License-Identifier: Apache-2.0
"""Tuning a finished block by gradient."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optq.gptq import solve
from optq.model import find_linears
from optq.quantization.block_reconstruction import Example, _gradients, _loss_of, reconstruct
from optq.quantization.coroutines import BlockCall
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
        views = list(find_linears(block).values())
        originals = [view.weight.clone() for view in views]
        start = [solve(view.weight, torch.eye(WIDTH), SCHEME).quantized for view in views]
        for view, quantized in zip(views, start, strict=True):
            view.write(quantized.decode())
    return block, views, (originals, start), examples


def run_of(block):
    return lambda call: block(*call.args, **call.kwargs)


def test_held_out_loss_falls_and_the_weights_are_on_the_grid(setting):
    block, views, (originals, start), examples = setting
    block.up.weight.requires_grad_(False)
    with torch.no_grad():
        reconstructed = reconstruct(views, originals, start, run_of(block), examples[:10], examples[10:], passes=8)
    assert reconstructed.loss < 0.95 * reconstructed.loss_before
    for view, before, after in zip(views, start, reconstructed.quantized, strict=True):
        assert torch.equal(view.weight, after.decode())
        assert not torch.equal(after.codes, before.codes)
        assert not torch.equal(after.scales, before.scales)
        assert torch.equal(after.zeros, before.zeros)
        assert torch.equal(after.scales.half().float(), after.scales)
        assert after.codes.max() <= 3
    assert not block.up.weight.requires_grad
    assert block.down.weight.requires_grad


def test_what_does_not_help_is_not_kept(setting):
    block, views, (originals, start), examples = setting
    unreachable = [
        Example(call=example.call, target=block(*example.call.args)[0].detach(), mask=None) for example in examples
    ]
    with torch.no_grad():
        reconstructed = reconstruct(views, originals, start, run_of(block), examples[:10], unreachable[10:], passes=8)
    assert reconstructed.loss == reconstructed.loss_before == 0  # what it already returns cannot be improved on
    assert reconstructed.passes == 2  # gives up after two passes without improvement
    assert all(
        torch.equal(before.codes, after.codes) for before, after in zip(start, reconstructed.quantized, strict=True)
    )
    assert all(torch.equal(view.weight, after.decode()) for view, after in zip(views, start, strict=True))


def test_padding_does_not_count(setting):
    block, views, (originals, start), examples = setting
    results = []
    for garbage in (0.0, 1e3):
        for view, quantized in zip(views, start, strict=True):
            view.write(quantized.decode())
        changed = []
        for example in examples:
            target = example.target.clone()
            target[1, 30:] = garbage
            changed.append(Example(call=example.call, target=target, mask=example.mask))
        with torch.no_grad():
            results.append(reconstruct(views, originals, start, run_of(block), changed[:10], changed[10:], passes=2))
    assert results[0].loss == results[1].loss


def test_pieces_of_examples_give_the_gradients_and_losses_of_whole_ones(setting):
    block, views, _, examples = setting

    def pieces(example):
        return [
            Example(
                call=BlockCall(batch=0, block=0, args=(example.call.args[0][at : at + 1],), kwargs={}),
                target=example.target[at : at + 1],
                mask=example.mask[at : at + 1],
            )
            for at in range(2)
        ]

    weights = [view.parameter for view in views]
    whole, parts = (
        _gradients(run_of(block), examples[0], how, weights) for how in (lambda example: [example], pieces)
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2 * float(one.abs().max()))
    with torch.no_grad():
        losses = [_loss_of(run_of(block), examples[0], how) for how in (lambda example: [example], pieces)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
