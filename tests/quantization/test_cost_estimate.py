# SPDX-License-Identifier: Apache-2.0
"""The estimate of the time counts what a run really does: with units of work for seconds, both must agree."""

from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

import optq
from conftest import VOCABULARY
from optq import GPTQConfig
from optq.gptq import Drift, Hessian, SolvingWork, work_of
from optq.quantization import bit_allocation as allocation
from optq.quantization import block, stage_solver
from optq.quantization import cost_estimate as duration

WEIGHTS = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # of a block of the tiny llama
NOTHING = SolvingWork(products=1e-15, updates=0, elements=0, cubes=0, fits=0, steps=0)


@pytest.fixture
def counted(monkeypatch):
    """What is done from now on: multiplications in linears and for Hessians, and what is solved."""
    found = {"forwards": 0, "hessians": 0, "solved": [], "searched": []}
    forward, solve, solve_quickly = nn.Linear.forward, stage_solver.solve, allocation.solve

    def counting_forward(linear, x):
        if linear.out_features != VOCABULARY:  # the head is compared with, and no block
            found["forwards"] += x.numel() * linear.out_features
        return forward(linear, x)

    def adding(kind):
        add = kind.add

        def counting(self, *inputs):
            tokens = inputs[0].reshape(-1, self.features).shape[0]
            weight = getattr(self, "_weight", None)
            found["hessians"] += tokens * (self.features**2 if weight is None else 2 * weight.numel())
            add(self, *inputs)

        return counting

    def counting_solve(weight, hessian, scheme, *, drift=None, name="", **others):
        found["solved"].append((*weight.shape, scheme, drift is not None))
        return solve(weight, hessian, scheme, drift=drift, name=name, **others)

    def counting_search(weight, hessian, scheme, *, name=""):
        found["searched"].append((*weight.shape, scheme, False))
        return solve_quickly(weight, hessian, scheme, name=name)

    monkeypatch.setattr(nn.Linear, "forward", counting_forward)
    monkeypatch.setattr(Hessian, "add", adding(Hessian))
    monkeypatch.setattr(Drift, "add", adding(Drift))
    monkeypatch.setattr(stage_solver, "solve", counting_solve)
    monkeypatch.setattr(allocation, "solve", counting_search)
    monkeypatch.setattr(block, "reconstruct", unreconstructed)
    return found


def unreconstructed(runner, solved, examples, held_out, passes, ranks):
    """Polishing is counted apart."""
    return optq.quantization.block_reconstruction.Reconstruction(solved=solved, loss_before=1.0, loss=1.0, passes=0)


def estimated(monkeypatch, model, config, longest=1e12, **units):
    """The plan, where a forward takes a second, whatever else takes what `units` say, and the rest nothing."""
    nothing = {"hessian": 0, "drift": 0, "packing": 0, "disk": 0}
    speed = duration._Speed(**{"solving": NOTHING, **nothing, **units}, device=torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(duration, "_speed", lambda *_: speed)
        patch.setattr(duration, "LONGEST_FORWARD", longest)
        patch.setattr(duration, "_comparing", lambda *_: 0.0)
        patch.setattr(duration, "seconds_of", lambda *_: 1.0)
        return optq.plan(model, config).seconds


SETTINGS = [
    {"effort": "fast"},
    {},
    {"effort": "max"},
    {"true_sequential": False},
    {"lm_head": True},
    {"dynamic": {"+:.*(k|down)_proj": {"bits": 8}}},
    {"quality_gate": "off"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_counted_is_what_is_done(tiny_llama, token_rows, tmp_path, monkeypatch, counted, settings):
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": token_rows, "batch_size": 1, **settings})
    forwards = estimated(monkeypatch, tiny_llama, config)[duration.FORWARDS]
    hessians = estimated(monkeypatch, tiny_llama, config, hessian=1, drift=1)[duration.HESSIANS]
    one_of_each = SolvingWork(**dict.fromkeys(asdict(NOTHING), 1))
    solving = estimated(monkeypatch, tiny_llama, config, solving=one_of_each)[duration.SOLVING]
    counted.update(forwards=0, hessians=0)
    counted["solved"].clear()
    optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    assert hessians == counted["hessians"]
    solved = [
        work_of(rows, columns, scheme, drift=drift).times(one_of_each)
        for rows, columns, scheme, drift in counted["solved"]
    ]
    assert solving == pytest.approx(sum(solved), rel=1e-9)
    # Of 15 micro-batches, each block takes one more to find its stages.
    assert forwards * 48 * WEIGHTS == pytest.approx(counted["forwards"], rel=0.1)


def test_the_search_of_the_best_bits_is_counted(tiny_llama, token_rows, tmp_path, monkeypatch, counted):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, batch_size=1, target_bits_per_weight=4.5)
    one_of_each = SolvingWork(**dict.fromkeys(asdict(NOTHING), 1))
    found = estimated(monkeypatch, tiny_llama, config, solving=one_of_each)[duration.SEARCHING]
    forwards = estimated(monkeypatch, tiny_llama, config)[duration.SEARCHING]
    optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    searched = [
        work_of(*shape, scheme, drift=drift).times(one_of_each) for *shape, scheme, drift in counted["searched"]
    ]
    assert found - forwards == pytest.approx(sum(searched))


def test_polishing_is_counted_at_its_most(tiny_llama, token_rows, monkeypatch):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, batch_size=1, effort="max")
    found = estimated(monkeypatch, tiny_llama, config)[duration.RECONSTRUCTING]
    # Two blocks, three passes, 15 steps and a judgement each; and a beginning, which here takes no longer than that.
    assert found == 2 * 3 * (15 + 1)


def test_a_polish_that_takes_too_long_to_be_tried_is_not_counted(tiny_llama, token_rows, monkeypatch):
    monkeypatch.setattr(duration, "LONGEST_FORWARD", 1e-15)
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, batch_size=1, effort="max")
    found = optq.plan(tiny_llama, config)
    assert duration.RECONSTRUCTING not in found.seconds
    assert "besides: block reconstruction, as one step" in str(found)


def test_blocks_that_are_called_several_times_are(monkeypatch, tmp_path, counted):
    """ALBERT's."""
    torch.manual_seed(0)
    shapes = {"vocab_size": 100, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 96}
    model = AlbertForMaskedLM(AlbertConfig(**shapes, num_hidden_layers=3, num_attention_heads=2))
    model.save_pretrained(tmp_path / "albert")
    rows = [{"input_ids": torch.randint(0, 100, (32,)).tolist()} for _ in range(12)]
    config = GPTQConfig(bits=4, group_size=32, dataset=rows, batch_size=1, quality_gate="off")
    hessians = estimated(monkeypatch, tmp_path / "albert", config, hessian=1, drift=1)[duration.HESSIANS]
    counted.update(hessians=0)
    optq.quantize(tmp_path / "albert", config, output_dir=tmp_path / "out")
    assert hessians == counted["hessians"]


def test_few_tokens_stand_for_all_of_them(tiny_llama, token_rows, monkeypatch):
    """A block that is too large for whole micro-batches is run on a part of one."""
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, batch_size=1, quality_gate="off")
    whole = estimated(monkeypatch, tiny_llama, config, hessian=1)
    part = estimated(monkeypatch, tiny_llama, config, longest=24.5 * WEIGHTS * NOTHING.products, hessian=1)
    assert part[duration.HESSIANS] == whole[duration.HESSIANS]
    assert part[duration.FORWARDS] == pytest.approx(2 * whole[duration.FORWARDS], rel=0.1)  # a second for 24, not 48
