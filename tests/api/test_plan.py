# SPDX-License-Identifier: Apache-2.0
"""`optq.plan`: what a run will take and give, said before it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import optq
from optq import GPTQConfig
from optq.api import plan as plan_module
from optq.errors import ConfigError
from optq.quantization.cost_estimate import Duration

GIB = 2**30


@pytest.fixture
def without_weights(tiny_llama, tmp_path):
    """Only the model's config and tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def untimed(monkeypatch):
    """Measuring how fast this machine is takes longer than all the rest."""
    monkeypatch.setattr("optq.api.plan._duration", lambda *arguments: Duration(seconds={}))


SETTINGS = [{}, {"bits": 2, "sym": False}, {"bits": 3, "lm_head": True}, {"dynamic": {"-:.*o_proj": {}}}]


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_says_what_the_checkpoint_will_be(tiny_llama, without_weights, token_rows, tmp_path, settings):
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, **settings})
    found = optq.plan(without_weights, config)
    output = optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    written = sum(tensor.nbytes for path in output.glob("*.safetensors") for tensor in load_file(path).values())
    assert found.blocks == 2
    assert sum(found.linears.values()) == 14 - len(found.skipped) + bool(settings.get("lm_head"))
    assert found.tokens == 15 * 48  # one row is held out
    assert found.checkpoint_gib * GIB == pytest.approx(written)
    assert found.dense_gib * GIB == pytest.approx((tiny_llama / "model.safetensors").stat().st_size, rel=0.05)
    assert "result:" in str(found)


@pytest.mark.usefixtures("untimed")
def test_memory_grows_with_the_data_and_not_with_depth(without_weights, token_rows):
    few, many = (
        optq.plan(without_weights, GPTQConfig(bits=4, group_size=32, dataset=rows, quality_gate="off"))
        for rows in (token_rows[:4], token_rows[:8])
    )
    assert many.memory_gib["activations"] == 2 * few.memory_gib["activations"]
    assert many.memory_gib["one block"] == few.memory_gib["one block"]
    assert few.fits and not few.advice


def test_what_does_not_fit_comes_with_advice(without_weights, token_rows, monkeypatch):
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: 1000)
    found = optq.plan(without_weights, GPTQConfig(bits=4, group_size=32, dataset=token_rows))
    assert not found.fits
    assert "does not fit; try" in str(found)


def test_the_time_is_estimated_where_it_fits(without_weights, token_rows, monkeypatch):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    found = optq.plan(without_weights, config)
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert str(found).count("time: about ") == 1
    assert {"forwards", "Hessians", "solving"} < found.seconds.keys()
    assert not found.uncounted
    unknown = optq.plan(without_weights, GPTQConfig(bits=4, group_size=32, model_seqlen=32))
    assert "besides: what the model writes" in str(unknown)
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: 1000)
    found = optq.plan(without_weights, config)
    assert not found.seconds
    assert "time:" not in str(found)


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "about 3 s"), (119, "about 119 s"), (250, "about 4 min"), (90_000, "about 25 h")]
)
def test_times_are_rounded(seconds, words):
    assert plan_module._rounded(seconds) == words


@pytest.mark.usefixtures("untimed")
def test_what_vllm_will_refuse_is_said(without_weights, token_rows):
    def reasons(parts=1, **settings):
        config = GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": token_rows, **settings})
        return " ".join(optq.plan(without_weights, config, tensor_parallel=parts).refused["vllm"])

    assert reasons() == ""
    assert reasons(bits=3) == "all linears: 3 bits; use 4 or 8"
    assert "asymmetric" in reasons(sym=False)
    assert "model.layers.*.mlp.down_proj: 96 inputs in 2 parts are no multiples of 32" in reasons(parts=2)
    assert "self_attn.o_proj: 64 inputs in 4 parts are no multiples of 32" in reasons(parts=4)


def test_what_cannot_work_is_refused_as_by_the_run(without_weights, token_rows):
    with pytest.raises(ConfigError, match="group_size 100"):
        optq.plan(without_weights, GPTQConfig(bits=4, group_size=100, dataset=token_rows))


@pytest.mark.usefixtures("untimed")
def test_the_dtype_counts(without_weights, token_rows):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    whole, half = (optq.plan(without_weights, config, dtype=dtype) for dtype in (torch.float32, "bfloat16"))
    assert half.dense_gib == whole.dense_gib / 2


@pytest.mark.parametrize(
    "target", [{"target_bits_per_weight": 1}, {"target_size_gib": 1e-9}, {"target_size_gib": 1e-5, "lm_head": True}]
)
def test_a_budget_that_no_scheme_fits_is_refused_before_the_work(
    tiny_llama, without_weights, token_rows, tmp_path, monkeypatch, target
):
    monkeypatch.setattr("optq.hf.quantizing.allocate", None)
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, **target)
    for call in (
        lambda: optq.plan(without_weights, config),
        lambda: optq.quantize(tiny_llama, config, output_dir=tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=r"target_\w+=1.*smallest allowed schemes need 2\.\d+"):
            call()


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("target", [{"target_bits_per_weight": 3.5}, {"target_bits_per_weight": 30.0}])
def test_a_budget_is_what_the_plan_says_and_what_the_checkpoint_has(tiny_llama, token_rows, tmp_path, target):
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows, **target)
    planned = optq.plan(tiny_llama, config).bits_per_weight
    folder = optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    assert planned - 0.1 < optq.inspect(folder).bits_per_weight <= planned <= target["target_bits_per_weight"]
