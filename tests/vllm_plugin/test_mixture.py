# SPDX-License-Identifier: Apache-2.0
"""What a server's experts make of the tensors of a checkpoint, against dense experts called one by one."""

import gc
from functools import partial

import pytest
import torch
from test_weights import packed_weight as packed_weight_of

from optq.checkpoint import PackedWeight, part_of
from optq.errors import CheckpointError
from optq.kernels import choose_kernel
from optq.vllm import mixture
from optq.vllm import weights as weights_module
from optq.vllm.mixture import LAYERS, ArrivingExperts

HIDDEN, INSIDE, COUNT = 192, 64, 3


def silu_and_mul(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def up_weight(seed, **settings) -> PackedWeight:
    return packed_weight_of(INSIDE, seed=seed, **settings)


def down_weight(seed, **settings) -> PackedWeight:
    """(INSIDE, HIDDEN): the first inputs of one that is as wide as the tests' others."""
    return part_of(packed_weight_of(HIDDEN, seed=seed, **settings), slice(0, HIDDEN), slice(0, INSIDE))


def experts_of(settings=None, rank=0, ranks=1, bias=False, dtype=torch.float32, gated=True, count=COUNT):
    """The layer, and its experts' dense weights: (gate, up, down), each (in, out)."""
    arriving = ArrivingExperts(
        "model.layers.0.mlp.experts",
        experts=count,
        hidden=HIDDEN,
        inside=INSIDE // ranks,
        rank=rank,
        ranks=ranks,
        gated=gated,
        zero_format="gptq",
        device=torch.device("cpu"),
        dtype=dtype,
    )
    weights, biases = [], []
    generator = torch.Generator().manual_seed(3)
    for expert in range(count):
        made = {}
        for place, which in enumerate(("w1", "w3", "w2") if gated else ("w1", "w2")):
            packed = (down_weight if which == "w2" else up_weight)(10 * expert + place, **(settings or {}))
            for name, tensor in packed.tensors().items():
                arriving.take(name, tensor, expert, which)
            made[which] = packed.columns(0, packed.out_features)
            if bias:
                vector = torch.randn(packed.out_features, generator=generator)
                arriving.take("bias", vector, expert, which)
                biases.append(vector)
        weights.append(made)
    activate = silu_and_mul if gated else torch.nn.functional.silu
    return arriving.experts(activate), weights, biases


def expected_of(x, chosen, routing, weights, biases=()):
    result = torch.zeros(len(x), HIDDEN)
    for token in range(len(x)):
        for expert, share in zip(chosen[token].tolist(), routing[token].tolist(), strict=True):
            if expert < 0:
                continue
            made = weights[expert]
            gate, up, down = biases[3 * expert : 3 * expert + 3] if biases else (0, 0, 0)
            inside = torch.nn.functional.silu(x[token] @ made["w1"] + gate)
            if "w3" in made:
                inside = inside * (x[token] @ made["w3"] + up)
            result[token] += share * (inside @ made["w2"] + down)
    return result


def routed(tokens, choices=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    shares = torch.rand(tokens, COUNT, generator=generator).topk(choices)
    return x, shares.indices.int(), shares.values


@pytest.mark.parametrize("settings", [{}, {"bits": 3, "desc_act": True}, {"bits": 8, "symmetric": False}])
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_give_what_dense_ones_do(settings, tokens):
    layer, weights, _ = experts_of(settings)
    x, chosen, routing = routed(tokens)
    found = layer(x, chosen, routing)
    torch.testing.assert_close(found, expected_of(x, chosen, routing, weights), rtol=1e-3, atol=1e-2)


def test_biases_are_added():
    layer, weights, biases = experts_of(bias=True)
    x, chosen, routing = routed(5)
    torch.testing.assert_close(
        layer(x, chosen, routing), expected_of(x, chosen, routing, weights, biases), rtol=1e-3, atol=1e-2
    )


def test_experts_without_a_gate():
    layer, weights, _ = experts_of(gated=False)
    x, chosen, routing = routed(5)
    torch.testing.assert_close(
        layer(x, chosen, routing), expected_of(x, chosen, routing, weights), rtol=1e-3, atol=1e-2
    )


def test_choices_of_experts_elsewhere_add_nothing():
    layer, weights, _ = experts_of()
    x, chosen, routing = routed(6)
    chosen[chosen == 1] = -1
    chosen[0] = -1
    found = layer(x, chosen, routing)
    torch.testing.assert_close(found, expected_of(x, chosen, routing, weights), rtol=1e-3, atol=1e-2)
    assert bool((found[0] == 0).all())


@pytest.mark.parametrize("bias", [False, True])
def test_processes_that_share_every_expert_sum_to_the_whole(bias):
    x, chosen, routing = routed(4)
    _, weights, biases = experts_of({"bits": 3}, bias=bias)
    total = sum(experts_of({"bits": 3}, rank, 2, bias)[0](x, chosen, routing) for rank in range(2))
    torch.testing.assert_close(total, expected_of(x, chosen, routing, weights, biases), rtol=1e-3, atol=1e-2)


def test_a_graph_holds_one_operator_whatever_the_routing():
    layer, _, _ = experts_of(dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for seed in range(3):
        x, chosen, routing = routed(4, seed=seed)
        found = compiled(x.bfloat16(), chosen, routing)
        assert torch.equal(found, layer(x.bfloat16(), chosen, routing))


@pytest.mark.usefixtures("interpreted_triton")
def test_all_experts_make_two_products_where_a_kernel_can(monkeypatch):
    calls, grouped = [], mixture.grouped_gemm
    monkeypatch.setattr(weights_module, "choose_kernel", partial(choose_kernel, backend="triton"))
    layer, weights, _ = experts_of(dtype=torch.float16)
    monkeypatch.setattr(mixture, "grouped_gemm", lambda *args: calls.append(1) or grouped(*args))
    x, chosen, routing = routed(4)
    chosen[0, 0] = -1
    found = layer(x.half(), chosen, routing)
    assert len(calls) == 2
    expected = expected_of(x, chosen, routing, weights)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    many = routed(400)
    found, expected = layer(many[0].half(), *many[1:]), expected_of(*many, weights)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_layers_of_two_models_with_one_name_are_told_apart():
    first, second = experts_of()[0], experts_of({"bits": 3})[0]
    assert first.key != second.key
    assert LAYERS[first.key] is first
    key = second.key
    del second
    gc.collect()
    assert key not in LAYERS


def test_an_expert_of_another_width_is_refused_by_name():
    layer = ArrivingExperts(
        "layer.experts",
        experts=1,
        hidden=HIDDEN,
        inside=32,
        rank=0,
        ranks=1,
        gated=True,
        zero_format="gptq",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with pytest.raises(CheckpointError, match=r"layer\.experts: an expert has 64 features, not 32"):
        for name, tensor in up_weight(0).tensors().items():
            layer.take(name, tensor, 0, "w1")
