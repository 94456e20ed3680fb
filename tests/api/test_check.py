# SPDX-License-Identifier: Apache-2.0
"""What servers refuse, known before quantizing and after."""

import re
from dataclasses import replace

import pytest

import optq
from optq import GPTQConfig
from optq.errors import ConfigError
from optq.readers import READERS, Linear, refusals
from optq.scheme import LayerScheme


def linear(name="model.layers.0.mlp.up_proj", **scheme):
    return Linear(name=name, out_features=256, in_features=128, scheme=LayerScheme(**scheme))


@pytest.mark.parametrize(
    ("settings", "server", "words"),
    [
        ({}, "vllm", ()),
        ({"bits": 3}, "vllm", ("3 bits; use 4 or 8",)),
        ({"bits": 3, "sym": False, "desc_act": True, "dynamic": {"-:.*q_proj": {}}}, "vllm+optq", ()),
        ({"bits": 3}, "gptqmodel", ()),
        ({"bits": 2, "sym": False}, "sglang", ("2 bits; use 4 or 8",)),
        ({"desc_act": True}, "transformers", ()),
        ({"desc_act": True, "group_size": -1}, "vllm", ()),
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


@pytest.mark.parametrize("reader", ["vllm", "sglang", "vllm-cpu"])
def test_all_reasons_are_told_at_once_and_each_once(tiny_llama, reader):
    config = GPTQConfig(bits=3, group_size=16, sym=False, desc_act=True)
    reasons = optq.check(tiny_llama, config, server=reader)
    wanted = ["3 bits; use 4 or 8", "asymmetric grids; use sym=True", "group_size=16; use 128, 64, 32 or -1"]
    ordered = ["desc_act=True; leave it False: columns are still solved in activation order"] * (reader != "sglang")
    assert sorted(reasons) == sorted(f"all linears: {reason}" for reason in [*wanted, *ordered])


def test_a_group_size_that_divides_is_named():
    (reason,) = refusals("vllm", [replace(linear(), in_features=192)])
    assert reason == "model.layers.*.mlp.up_proj: group_size=128, which does not divide 192; use 64 or 32 or -1"


@pytest.mark.parametrize(("names", "more"), [("abcdef", "3 more kinds"), ("abcd", "1 more kind")])
def test_of_many_kinds_some_are_named(names, more):
    several = [linear(f"model.layers.0.{name}_proj", bits=3, group_size=32) for name in names]
    others = [linear("model.layers.0.g_proj", group_size=32)]
    (reason,) = refusals("vllm", [*several, *others])
    first = ", ".join(f"model.layers.*.{name}_proj" for name in "abc")
    assert reason.startswith(f"{first} and {more}: ")


def test_no_data_is_needed_to_check_a_config(tiny_llama):
    assert optq.check(tiny_llama, GPTQConfig(bits=4, group_size=32, dataset="no/such/file.txt")) == ()


def test_parts_of_a_split_model_count(tiny_llama):
    found = optq.check(tiny_llama, GPTQConfig(bits=4, group_size=32), tensor_parallel=4)
    assert any("64 inputs in 4 parts are no multiples of 32" in reason for reason in found)


def experts(hidden=256, width=192, **scheme):
    scheme = LayerScheme(**{"group_size": 32, **scheme})
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return [
        Linear(name=f"model.layers.0.mlp.experts.{i}.{name}", out_features=out, in_features=columns, scheme=scheme)
        for i in range(2)
        for name, (out, columns) in shapes.items()
    ]


def test_experts_have_no_kernel_on_cpus():
    assert refusals("vllm", experts()) == ()
    assert "mixtures of experts" in refusals("vllm-cpu", experts())[0]


@pytest.mark.parametrize(
    ("reader", "found", "parts", "words"),
    [
        ("vllm", experts(group_size=64), 1, None),
        ("vllm", experts(group_size=64), 2, None),  # 96 features cut groups of 64, which it halves
        ("vllm", experts(), 4, "192 features inside in 4 parts, which are no multiples of 32"),
        ("vllm", experts(hidden=192), 1, None),
        ("vllm", experts(hidden=192, group_size=-1), 1, "experts 192 wide without groups"),
        ("vllm", experts(group_size=-1), 4, None),
        ("vllm", experts(group_size=-1), 48, "in 48 parts, which are no multiples of 8"),
        ("sglang", experts(), 1, None),
        ("sglang", experts(), 2, "192 features inside in 2 parts, no multiples of 64"),
        ("sglang", experts(hidden=192), 1, "experts 192 wide, which is no multiple of 128"),
    ],
)
def test_experts_have_rules_of_their_own(reader, found, parts, words):
    reasons = refusals(reader, found, parts)
    assert bool(reasons) == bool(words)
    assert words is None or words in reasons[0]


def test_all_experts_of_a_layer_need_one_scheme():
    first, *others = experts()
    mixed = [replace(first, scheme=LayerScheme(bits=8, group_size=32)), *others]
    (reason,) = refusals("vllm", mixed)
    assert re.search(
        r"layers.\*.mlp.experts: it fuses .*quantized differently: gate_proj 8-bit, .*gate_proj 4-bit", reason
    )
    assert "gate_proj not" in refusals("vllm", others, dense=[first.name])[0]
    assert refusals("transformers", mixed) == ()


@pytest.mark.parametrize(("reader", "fits", "wide"), [("sglang", (32, 16, 16), 32), ("vllm-cpu", (16, 8, 8), 16)])
def test_what_a_server_fuses_is_as_wide_as_all_of_it(reader, fits, wide):
    def attention(*outputs):
        return [
            replace(linear(f"a.0.{name}", group_size=32), out_features=out)
            for name, out in zip(("q_proj", "k_proj", "v_proj"), outputs, strict=True)
        ]

    assert refusals(reader, attention(*fits)) == ()
    assert f"{3 * wide} outputs with what is fused to it" in refusals(reader, attention(wide, wide, wide))[0]


def test_versions_differ_where_their_sources_do():
    ordered = [linear(group_size=32, act_order="desc_act")]
    narrow = [replace(ordered[0], in_features=96)]
    assert refusals("vllm", ordered, version="0.29.1") == ()
    assert "desc_act=True with 96 inputs" in refusals("vllm", narrow, version="0.29")[0]
    assert "leave it False" in refusals("vllm", ordered, version="0.30.0")[0]
    assert "leave it False" in refusals("vllm", ordered)[0]
    known = [linear(group_size=32)]
    assert refusals("vllm", known, version="0.29") == refusals("vllm", known) == ()


@pytest.mark.parametrize("version", ["0.19.1", "0.3", "1", "newest"])
def test_versions_of_which_nothing_is_known_are_refused(tiny_llama, version):
    message = f"version='{version}' of vllm was asked for; what it refuses is known of 0.30, 0.31"
    with pytest.raises(ConfigError, match=message):
        optq.check(tiny_llama, GPTQConfig(bits=4), server="vllm", version=version)


def test_linears_that_no_server_fuses_may_differ():
    several = [linear("a.0.mlp.up_proj", group_size=32), linear("a.0.mlp.down_proj", bits=8, group_size=32)]
    assert refusals("vllm", several) == ()


def test_an_unknown_server_and_a_dense_model_are_refused(tiny_llama):
    allowed = re.escape(", ".join(READERS))
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


def test_processes_that_share_heads_of_keys_are_as_one_head_each():
    """vLLM gives two processes the same head where there are fewer heads than processes."""
    scheme = LayerScheme(bits=3, group_size=32)
    key = Linear(name="k_proj", out_features=64, in_features=256, scheme=scheme, split="colwise", head_width=32)
    assert refusals("vllm+optq", [key], 4) == ()
    assert "in 3 parts" in refusals("vllm+optq", [key], 3)[0]
    assert "2 heads" in refusals("transformers", [key], 4)[0] or "in 4 parts" in refusals("transformers", [key], 4)[0]
