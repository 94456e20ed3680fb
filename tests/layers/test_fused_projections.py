# SPDX-License-Identifier: Apache-2.0
"""Linears of one input: one product for all, and nothing else that anybody could tell."""

import copy
import io

import pytest
import torch
from test_linear import in_threads
from torch import nn
from transformers import AutoModelForCausalLM

from optq.checkpoint import pack
from optq.gptq import round_to_nearest, solve
from optq.kernels import cpu
from optq.layers import QuantLinear, fuse_projections
from optq.layers.fused_projections import MOST_MISSES, MOST_TOKENS, SAME_INPUT
from optq.scheme import LayerScheme

IN, OUTS = 128, (128, 64, 96)
SCHEMES = {
    "cpu_int4": LayerScheme(bits=4, group_size=32),
    "cpu_int4, 3 bits": LayerScheme(bits=3, group_size=64, symmetric=False),
    "cpu_int4, desc_act": LayerScheme(bits=4, group_size=32, act_order="desc_act"),
    "cpu_int4_twice": LayerScheme(bits=8, group_size=64),
    "cpu_int8": LayerScheme(bits=8, group_size=-1),
}


class Attention(nn.Module):
    def __init__(self, scheme, outs=OUTS):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        energies = torch.diag(torch.rand(IN, generator=generator) + 0.1)
        for name, out in zip(("q_proj", "k_proj", "v_proj"), outs, strict=True):
            weight = torch.randn(out, IN, generator=generator) / 10
            desc_act = scheme.act_order == "desc_act"
            quantized = solve(weight, energies, scheme).quantized if desc_act else round_to_nearest(weight, scheme)
            self.add_module(name, QuantLinear(pack(quantized), bias=torch.randn(out, generator=generator)))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return [self.q_proj(x), self.k_proj(memory), self.v_proj(memory)]


def prepared(module, *, joined):
    if joined:
        fuse_projections(module)
    for layer in module.children():
        layer.prepare(torch.bfloat16)
    return module


@pytest.fixture
def alone():
    return prepared(Attention(SCHEMES["cpu_int4"]), joined=False)


@pytest.fixture
def joined():
    module = prepared(Attention(SCHEMES["cpu_int4"]), joined=True)
    assert module.q_proj.fused.are_fused
    return module


@pytest.fixture
def products(monkeypatch):
    """The outputs of every int4 product that is made."""
    made, product = [], cpu.int4_product

    def counted(rows, codes, pairs):
        made.append(codes.shape[0])
        return product(rows, codes, pairs)

    monkeypatch.setattr(cpu, "int4_product", counted)
    return made


@pytest.fixture
def x():
    return torch.randn(1, 3, IN, generator=torch.Generator().manual_seed(1)).bfloat16()


def same(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_and_tensors_are_those_of_linears_that_multiply_alone(name, x):
    alone = prepared(Attention(SCHEMES[name]), joined=False)
    joined = prepared(Attention(SCHEMES[name]), joined=True)
    assert joined.k_proj.kernel_name == name.partition(",")[0]
    assert joined.q_proj.fused.are_fused
    with torch.no_grad():
        for rows in (x, x[:, :1], torch.randn(MOST_TOKENS + 1, IN).bfloat16()):
            assert same(joined(rows), alone(rows))
            assert all(output.is_contiguous() for output in joined(rows))
    written, expected = joined.state_dict(), alone.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) and written[key].is_contiguous() for key in expected)
    assert len({tensor.untyped_storage().data_ptr() for tensor in written.values()}) == len(written)


def test_one_product_is_made_for_all_and_one_memory_holds_their_codes(joined, alone, x, products):
    with torch.no_grad():
        joined(x)
        assert products == [sum(OUTS)]
        alone(x)
    assert products == [sum(OUTS), *OUTS]
    codes = [layer.held.prepared.codes for layer in joined.children()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in codes}) == 1
    assert codes[0].untyped_storage().nbytes() == sum(tensor.nbytes for tensor in codes)


def test_linears_with_different_inputs_multiply_alone_and_soon_all_do(joined, alone, x, products):
    memory = x + 1
    with torch.no_grad():
        for _ in range(MOST_MISSES + 2):
            assert same(joined(x, memory), alone(x, memory))
        assert not joined.q_proj.fused.are_fused
        products.clear()
        assert same(joined(x), alone(x))
    assert products == [*OUTS, *OUTS]


def test_an_input_that_was_written_to_meanwhile_is_another_one(joined, alone, x):
    with torch.no_grad():
        before = joined.q_proj(x)
        x.add_(1)
        assert torch.equal(joined.k_proj(x), alone.k_proj(x))
        assert not torch.equal(joined.q_proj(x), before)


def test_an_input_of_the_same_values_but_another_tensor_is_another_one(joined, x, products):
    with torch.no_grad():
        joined.q_proj(x)
        joined.k_proj(x.clone())
    assert products == [sum(OUTS), OUTS[1]]


def test_the_order_of_calls_does_not_matter(joined, alone, x):
    with torch.no_grad():
        for name in ("v_proj", "q_proj", "k_proj", "v_proj", "v_proj", "k_proj", "q_proj"):
            assert torch.equal(getattr(joined, name)(x), getattr(alone, name)(x))


def test_with_gradients_in_inference_mode_and_for_many_tokens_each_multiplies_alone(joined, alone, x, products):
    wanted = x.clone().requires_grad_()
    sum(output.float().sum() for output in joined(wanted)).backward()
    reference = x.clone().requires_grad_()
    sum(output.float().sum() for output in alone(reference)).backward()
    assert torch.equal(wanted.grad, reference.grad)
    with torch.inference_mode():
        joined(x.clone())
    with torch.no_grad():
        joined(torch.randn(MOST_TOKENS + 1, IN).bfloat16())
    assert set(products) == set(OUTS)


@pytest.mark.slow
def test_a_graph_has_a_product_for_each(joined, alone, x):
    with torch.no_grad():
        assert same(torch.compile(joined, fullgraph=True, backend="eager")(x), alone(x))


def test_what_is_copied_cast_or_loaded_again_is_right(joined, alone, x, tmp_path):
    with torch.no_grad():
        expected = alone(x)
        joined.q_proj(x)  # while outputs wait
        copied = copy.deepcopy(joined)
        assert copied.q_proj.fused is not joined.q_proj.fused
        assert same(copied(x), expected)
        file = io.BytesIO()
        torch.save(joined, file)
        file.seek(0)
        assert same(torch.load(file, weights_only=False)(x), expected)
        joined.float()
        assert joined.q_proj.fused.are_fused  # nothing has moved
        joined.load_state_dict(joined.state_dict())
        assert not joined.q_proj.fused.are_fused
        assert same(joined(x), expected)
        assert same(joined(x), expected)
        assert joined.q_proj.fused.are_fused
        changed = {**joined.k_proj.state_dict(), "bias": torch.zeros(OUTS[1])}
        joined.k_proj.load_state_dict(changed)
        alone.k_proj.load_state_dict(changed)
        assert same(joined(x), alone(x))
        alternating = [joined(x.to(dtype))[1].dtype for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    assert alternating == [torch.float32, torch.bfloat16, torch.float32]
    assert joined.q_proj.fused.are_fused


def test_a_replica_multiplies_alone_and_leaves_the_original_as_it_is(joined, alone, x, products):
    replica = joined.q_proj._replicate_for_data_parallel()
    with torch.no_grad():
        assert torch.equal(replica(x), alone.q_proj(x))
        replica.prepare(torch.bfloat16)
        assert joined.q_proj.fused.are_fused
        products.clear()
        assert same(joined(x), alone(x))
    assert products == [sum(OUTS), *OUTS]


def test_outputs_wait_in_the_thread_that_they_were_made_in(joined, alone, x):
    """Also where threads give the same tensor, or each a dtype of its own, or nobody fetches what waits."""
    inputs = [x, x, x.half(), x.float(), x + 1]
    with torch.no_grad():
        expected = [alone(each) for each in inputs]
    found = in_threads([*(lambda each=each: joined(each) for each in inputs), lambda: [joined.q_proj(x)]])
    for outputs, output in zip(found[:-1], expected, strict=True):
        assert all(same(each, output) for each in outputs)
    assert all(torch.equal(each[0], expected[0][0]) for each in found[-1])


def test_a_call_while_the_weights_are_being_joined_gets_its_own_output(alone, x):
    """The others may have been called already, and their threads go on while one copies all weights together."""
    module = Attention(SCHEMES["cpu_int4"])
    found = []
    fuse_projections(module)
    module.q_proj.prepare(torch.bfloat16)
    kernel = module.q_proj.held.kernel
    join = kernel.joint.of

    def slowly(parts):
        found.extend(in_threads([lambda: [module.q_proj(x)]], 1)[0])
        return join(parts)

    object.__setattr__(kernel.joint, "of", slowly)
    try:
        module.k_proj.prepare(torch.bfloat16)
        module.v_proj.prepare(torch.bfloat16)
    finally:
        object.__setattr__(kernel.joint, "of", join)
    with torch.no_grad():
        assert found and torch.equal(found[0][0], alone.q_proj(x))
        assert same(module(x), alone(x))


def test_outputs_that_wait_are_not_those_of_weights_that_were_loaded_meanwhile(joined, alone, x):
    changed = {key: value.clone() for key, value in joined.state_dict().items()}
    changed["k_proj.scales"] *= 2
    with torch.no_grad():
        before = joined.q_proj(x), joined.k_proj.scales.clone()
        in_threads([lambda: [module.load_state_dict(changed) for module in (joined, alone)]], times=1)
        joined.k_proj(x), joined.v_proj(x)
        assert same([*joined(x)], alone(x))
        assert not torch.equal(joined.k_proj.scales, before[1])


def test_weights_that_do_not_fit_together_are_left_alone(x):
    uneven = prepared(Attention(SCHEMES["cpu_int4"], (96, 64, 64)), joined=True)  # 96 outputs are no whole tiles
    assert not uneven.q_proj.fused.are_fused
    mixed = Attention(SCHEMES["cpu_int4"])
    mixed.k_proj = Attention(SCHEMES["cpu_int4, 3 bits"]).k_proj
    other_order = Attention(SCHEMES["cpu_int4, desc_act"])
    other_order.q_proj = Attention(SCHEMES["cpu_int4"]).q_proj
    exact = Attention(SCHEMES["cpu_int4"])
    for module in (mixed, other_order):
        assert not prepared(module, joined=True).q_proj.fused.are_fused
    fuse_projections(exact)
    with torch.no_grad():
        exact(x.float())
    assert exact.q_proj.kernel_name == "reference"
    assert not exact.q_proj.fused.are_fused


def test_a_loaded_model_joins_q_k_v_and_gate_up_and_writes_the_same_text(quantized, probe_ids, tmp_path, monkeypatch):
    quantized.save_pretrained(tmp_path)
    joined = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = joined.model.layers[0]
    assert layer.self_attn.k_proj.fused is layer.self_attn.q_proj.fused
    assert layer.mlp.up_proj.fused is layer.mlp.gate_proj.fused
    assert layer.self_attn.o_proj.fused is None
    monkeypatch.setattr("optq.layers.fused_projections.SAME_INPUT", ())
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert alone.model.layers[0].mlp.up_proj.fused is None
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(joined.generate(probe_ids, **arguments), alone.generate(probe_ids, **arguments))
    files = []
    for name, model in (("joined", joined), ("alone", alone)):
        model.save_pretrained(tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_no_name_is_in_two_families_of_one_parent():
    for names in SAME_INPUT:
        assert len(set(names)) == len(names) > 1
