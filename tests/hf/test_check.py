# SPDX-License-Identifier: Apache-2.0
"""What servers refuse, known before quantizing and after."""

import re

import pytest

import optq
from optq import GPTQConfig
from optq.errors import ConfigError
from optq.scheme import LayerScheme
from optq.serving import READERS, Linear, refusals


def linear(name="model.layers.0.mlp.up_proj", **scheme):
    return Linear(name=name, out_features=256, in_features=128, scheme=LayerScheme(**scheme))


@pytest.mark.parametrize(
    ("settings", "server", "words"),
    [
        ({}, "vllm", ()),
        ({"bits": 3}, "vllm", ("3 bits; use 4 or 8",)),
        ({"bits": 3}, "gptqmodel", ()),
        ({"bits": 2, "sym": False}, "sglang", ()),
        ({"sym": False}, "gptqmodel", ("use format='gptq_v2'",)),
        ({"sym": False, "format": "gptq_v2"}, "gptqmodel", ()),
        ({"group_size": 96}, "gptqmodel", ("group_size=96; use 16, 32",)),
        ({"sym": False}, "vllm", ("asymmetric",)),
        ({"desc_act": True}, "vllm", ("desc_act",)),
        ({"bits": 8}, "vllm", ()),
        ({"bits": 8}, "vllm-cpu", ("8 bits; its CPU kernel has 4",)),
        ({"dynamic": {"-:.*q_proj": {}}}, "vllm", ("fuses q_proj, k_proj, v_proj.*q_proj not, k_proj 4-bit",)),
        ({"dynamic": {".*up_proj": {"bits": 8}}}, "vllm", ("gate_proj 4-bit, up_proj 8-bit",)),
        ({"dynamic": {".*up_proj": {"bits": 8}}}, "transformers", ()),
        ({"dynamic": {"-:.*mlp": {}}}, "vllm", ()),
    ],
)
def test_before_and_after_quantizing_the_answer_is_the_same(tiny_llama, token_rows, tmp_path, settings, server, words):
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows[:4], **settings})
    before = optq.check(tiny_llama, config, server=server)
    assert len(before) >= len(words) and bool(before) == bool(words)
    for reason in words:
        assert any(re.search(reason, found) for found in before), before
    folder = optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    assert optq.check(folder, server=server) == before


def test_no_data_is_needed_to_check_a_config(tiny_llama):
    assert optq.check(tiny_llama, GPTQConfig(bits=4, group_size=32, dataset="no/such/file.txt")) == ()


def test_parts_of_a_split_model_count(tiny_llama):
    found = optq.check(tiny_llama, GPTQConfig(bits=4, group_size=32), tensor_parallel=2)
    assert any("outputs in 2 parts" in reason for reason in found)


def test_experts_have_no_kernel_on_cpus():
    experts = [linear("model.layers.0.mlp.experts.3.up_proj", group_size=32)]
    assert refusals("vllm", experts) == ()
    assert "mixtures of experts" in refusals("vllm-cpu", experts)[0]


def test_linears_that_no_server_fuses_may_differ():
    several = [linear("a.0.mlp.up_proj", group_size=32), linear("a.0.mlp.down_proj", bits=8, group_size=32)]
    assert refusals("vllm", several) == ()


def test_an_unknown_server_and_a_dense_model_are_refused(tiny_llama):
    allowed = ", ".join(READERS)
    with pytest.raises(ConfigError, match=f"server='tgi' was asked for; allowed are {allowed}"):
        optq.check(tiny_llama, server="tgi")
    with pytest.raises(ConfigError, match=r"is not quantized. Pass config="):
        optq.check(tiny_llama)


def test_gptqmodel_reads_asymmetric_grids_of_its_own_in_either_format():
    own = Linear(
        name="a.0.up_proj",
        out_features=64,
        in_features=64,
        scheme=LayerScheme(group_size=32, symmetric=False),
        by_gptqmodel=True,
    )
    assert refusals("gptqmodel", [own]) == ()
    assert GPTQConfig(bits=4, meta={"quantizer": ["gptqmodel:7.6.0"]}).by_gptqmodel
    assert not GPTQConfig(bits=4, meta={"quantizer": "optq:0.1"}).by_gptqmodel
