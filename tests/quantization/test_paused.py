# SPDX-License-Identifier: Apache-2.0
"""Forwards that wait inside a block."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import waiting_forwards
from optq.model import LinearView, Stage
from optq.quantization.paused import PausedForwards


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, skip=False):
        x = self.first(x)
        return x if skip else self.second(x.relu())


def stages(block):
    views = [LinearView(name=name, module=getattr(block, name)) for name in ("first", "second")]
    return [Stage(views=(view,), calls=1, rows=1) for view in views]


def test_a_forward_sees_the_weights_that_were_written_while_it_waited():
    block, x = Block(), torch.randn(3, 4)
    first, second = stages(block)
    with torch.no_grad(), PausedForwards([[first], [second]]) as paused:
        paused.start(7, lambda: block(x))
        assert 7 in paused
        assert len(paused) == 1
        assert paused.inputs_of(7, [first])[first][0] is x
        block.first.weight.zero_()
        expected = block.first(x).relu()
        assert torch.equal(paused.inputs_of(7, [second])[second][0], expected)
        block.second.weight.mul_(2)
        assert torch.equal(paused.output_of(7), block(x))
        assert 7 not in paused


def test_others_may_run_the_block_meanwhile():
    block, x = Block(), torch.randn(3, 4)
    with torch.no_grad(), PausedForwards([[stage] for stage in stages(block)]) as paused:
        paused.start(0, lambda: block(x))
        paused.start(1, lambda: block(-x))
        expected = block(-x)
        assert torch.equal(paused.output_of(1), expected)


def test_a_stage_that_is_not_reached_has_no_input():
    block, x = Block(), torch.randn(3, 4)
    first, second = stages(block)
    with torch.no_grad(), PausedForwards([[first], [second]]) as paused:
        paused.start(0, lambda: block(x, skip=True))
        assert paused.inputs_of(0, [second]) == {}
        assert torch.equal(paused.output_of(0), block.first(x))


def test_leaving_ends_the_forwards_and_removes_the_hooks():
    block = Block()

    def fail():
        raise ValueError("in the block")

    with (
        pytest.raises(ValueError, match="in the block"),
        PausedForwards([[stage] for stage in stages(block)]) as paused,
    ):
        paused.start(0, lambda: block(torch.randn(1, 4)))
        paused.start(1, fail)
    assert not waiting_forwards()
    assert not block.first._forward_pre_hooks


def test_the_residual_stream_is_seen_with_the_inputs_of_its_stage():
    block, x = Block(), torch.randn(3, 4)
    first, second = stages(block)
    second = replace(second, residual=block.first)
    with torch.no_grad(), PausedForwards([[first], [second]]) as paused:
        paused.start(0, lambda: block(x))
        paused.start(1, lambda: block(-x))
        assert paused.inputs_of(0, [first])[first][1] is None
        assert torch.equal(paused.inputs_of(1, [second])[second][1], -x)
        assert torch.equal(paused.inputs_of(0, [second])[second][1], x)
