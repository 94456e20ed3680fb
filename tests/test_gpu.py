# SPDX-License-Identifier: Apache-2.0
"""What only an accelerator can show: blocks visit it, the result lives where `device_map` says, kernels are exact."""

import itertools
from dataclasses import replace

import psutil
import pytest
import torch
from test_fused_experts import KINDS, inputs, mixture
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from optq import GPTQConfig, QuantLinear
from optq.checkpoint import PackedWeight, pack, unpack_codes
from optq.gptq import columns, round_to_nearest, solve
from optq.kernels import choose_kernel, tilings, tune
from optq.quantization.activations import _SideStream
from optq.quantization.coroutines import Coroutine
from optq.scheme import LayerScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def quantize(folder, rows, **arguments):
    config = GPTQConfig(bits=4, group_size=32, dataset=rows)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)


def test_what_waits_in_pinned_memory_changes_nothing(tiny_llama, token_rows, monkeypatch):
    copied, finish = [], _SideStream.finish
    monkeypatch.setattr(_SideStream, "finish", lambda side, *one: (copied.append(one), finish(side, *one))[1])
    found = []
    for settings in ({}, {"activation_memory": {0: 0}}):
        assert not copied
        config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, batch_size=2, **settings)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        found.append(model.state_dict())
    assert copied
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])


def devices(model):
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize(("device_map", "home"), [(None, "cpu"), ("cuda", "cuda"), ("auto", "cuda")])
def test_the_gpu_quantizes_and_the_device_map_places_the_result(tiny_llama, token_rows, device_map, home):
    torch.cuda.reset_peak_memory_stats()
    model = quantize(tiny_llama, token_rows, device_map=device_map)
    assert model.hf_quantizer.log.events[0].device.startswith("cuda")
    assert torch.cuda.max_memory_allocated() > 0
    assert devices(model) == {home}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_on_the_gpu_are_close_to_those_on_the_cpu(tiny_llama, token_rows, probe_ids, dtype, tmp_path):
    quantize(tiny_llama, token_rows, dtype=dtype).save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cuda")
    with torch.no_grad():
        expected, found = exact(probe_ids).logits, model(probe_ids.cuda()).logits.float().cpu()
    tolerance = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_layer_follows_the_model_from_device_to_device(tiny_llama, token_rows, probe_ids):
    model = quantize(tiny_llama, token_rows)
    with torch.no_grad():
        before = model(probe_ids).logits
        model.to("cuda")
        model(probe_ids.cuda())
        model.to("cpu")
        assert torch.equal(model(probe_ids).logits, before)
    assert {layer.qweight.device.type for layer in model.modules() if isinstance(layer, QuantLinear)} == {"cpu"}


def packed_weight(bits, group_size, symmetric, act_order="static", shape=(1024, 1536)):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(*shape, generator=generator) / 10
    scheme = LayerScheme(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    if act_order == "desc_act":
        energies = torch.rand(shape[1], generator=generator) + 0.1
        return pack(solve(weight, torch.diag(energies), scheme).quantized)
    return pack(round_to_nearest(weight, scheme))


def on_gpu(packed):
    tensors = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in vars(packed).items()
    }
    return PackedWeight(**tensors)


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, "static"), (False, "static"), (False, "desc_act")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_triton_error_is_at_most_twice_torchs(bits, group_size, symmetric, act_order, dtype):
    packed = on_gpu(packed_weight(bits, group_size, symmetric, act_order))
    kernel = choose_kernel(packed, dtype)
    assert kernel.name == "triton"
    prepared, dense = kernel.prepare(packed), packed.columns(0, packed.out_features)
    assert torch.equal(kernel.unpack(prepared, 0, packed.out_features), unpack_codes(packed.qweight, bits))
    for rows in (1, 3, 16, 20, 33, 64, 100, 257, 1025):
        x = torch.randn(rows, packed.in_features, device="cuda", dtype=dtype)
        exact = x.double() @ dense.double()
        found = kernel.matmul(x, prepared)
        assert relative_error(found, exact) <= 2 * relative_error(x @ dense.to(dtype), exact), rows
        assert torch.equal(kernel.matmul(x, prepared), found), "two runs differ"


@pytest.mark.parametrize("act_order", ["static", "desc_act"])
def test_the_gradient_on_the_gpu_is_that_of_the_dense_layer(act_order):
    packed = on_gpu(packed_weight(4, 128, True, act_order))
    layer = QuantLinear(packed)
    x = torch.randn(4, packed.in_features, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    dense = packed.columns(0, packed.out_features)
    expected = 2 * (x.detach() @ dense) @ dense.T
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_a_captured_graph_replays_the_kernel(rows):
    packed = on_gpu(packed_weight(4, 128, True))
    kernel = choose_kernel(packed, torch.float16)
    prepared = kernel.prepare(packed)
    x = torch.randn(rows, packed.in_features, device="cuda").half()
    kernel.matmul(x, prepared)  # Triton compiles at the first call, which a graph must not see
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernel.matmul(x, prepared)
    x.normal_()
    graph.replay()
    assert torch.equal(output, kernel.matmul(x, prepared))


def test_a_graph_may_be_captured_for_a_number_of_rows_that_was_never_multiplied():
    """What was compiled for one number is there for all of a tiling: nothing is compiled while a graph is made."""
    packed = on_gpu(packed_weight(4, 128, True, shape=(1040, 4096 + 32)))
    kernel = choose_kernel(packed, torch.float16)
    prepared, x = kernel.prepare(packed), torch.randn(7, packed.in_features, device="cuda").half()
    kernel.matmul(x[:2].contiguous(), prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernel.matmul(x, prepared)
    graph.replay()
    assert torch.equal(output, kernel.matmul(x, prepared))


def test_waiting_forwards_add_no_thread_and_so_no_handles_or_workspaces(tiny_llama, token_rows, monkeypatch):
    most, wait = [], Coroutine.wait
    monkeypatch.setattr(Coroutine, "wait", lambda each: (most.append(psutil.Process().num_threads()), wait(each))[1])
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows * 8, batch_size=1)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert len(most) > 256  # as many forwards of two models
    assert max(most) <= most[0] + 16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (128, True), (-1, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_experts_at_once_err_at_most_twice_as_much_as_torch(bits, group_size, symmetric, dtype):
    one = on_gpu(packed_weight(bits, group_size, symmetric))
    orders = [torch.randperm(one.out_features, device="cuda") for _ in range(20)]
    packed = [replace(one, qweight=one.qweight[:, order].contiguous()) for order in orders]
    kernel = choose_kernel(one, dtype)
    whole = kernel.joint.of([kernel.prepare(each) for each in packed])
    for counts in ([1] * 8 + [0] * 12, [0, 70, 1, 0] * 5, [0] * 19 + [300], [65] * 20, [129] * 20):
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda")
        x = torch.randn(sum(counts) + 3, one.in_features, device="cuda", dtype=dtype)
        found = kernel.grouped_gemm.matmul(x, starts, whole)
        dense = [each.columns(0, each.out_features) for each in packed]
        own = x[:-3].split(counts)
        exact = torch.cat([part.double() @ weight.double() for part, weight in zip(own, dense, strict=True)])
        torchs_own = torch.cat([part @ weight.to(dtype) for part, weight in zip(own, dense, strict=True)])
        assert relative_error(found[:-3], exact) <= 2 * relative_error(torchs_own, exact), counts
        assert torch.equal(kernel.grouped_gemm.matmul(x, starts, whole)[:-3], found[:-3]), "two runs differ"


@pytest.mark.parametrize("name", KINDS)
def test_experts_wait_for_nothing_and_a_captured_graph_follows_the_routing(name):
    alone, joined = (mixture(KINDS[name], joined=joined, device="cuda") for joined in (False, True))
    arguments = [tensor.cuda() for tensor in inputs(8)]
    with torch.no_grad():
        joined(*arguments)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            joined(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = joined(*arguments)
        for chosen in ([[0, 1]] * 8, [[4, 2]] * 4 + [[2, 3]] * 4):
            arguments[0].normal_()
            arguments[1].copy_(torch.tensor(chosen))
            graph.replay()
            assert torch.equal(output, joined(*arguments))
            torch.testing.assert_close(output, alone(*arguments), rtol=4e-3, atol=4e-3)


def test_generate_compiles_a_mixture_of_experts(token_rows, probe_ids, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(vocab_size=128, num_experts=8, num_experts_per_tok=2, pad_token_id=0, **sizes, **heads)
    )
    original.save_pretrained(tmp_path / "original")
    quantize(tmp_path / "original", token_rows).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16, device_map="cuda")
    assert model.hf_quantizer.is_compileable
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(probe_ids[:1].cuda(), **arguments)
    found = model.generate(probe_ids[:1].cuda(), **arguments, cache_implementation="static")
    assert torch.equal(found, expected)


def test_generate_compiles_for_a_static_cache(tiny_llama, token_rows, probe_ids, tmp_path):
    quantize(tiny_llama, token_rows).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cuda")
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(probe_ids[:1].cuda(), **arguments)
    found = model.generate(probe_ids[:1].cuda(), **arguments, cache_implementation="static")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("bits", "act_order"), [(4, "static"), (3, "desc_act"), (2, "none"), (8, "group_aware")])
def test_the_fused_loops_of_the_solver_choose_the_codes_of_single_operations(bits, act_order, monkeypatch):
    assert columns.why_not_fused(torch.device("cuda")) is None
    x = torch.randn(4096, 1000, device="cuda") @ (torch.eye(1000) + torch.randn(1000, 1000) / 50).cuda()
    hessian, weight = x.T @ x / 4096, torch.randn(777, 1000, device="cuda")
    scheme = LayerScheme(bits=bits, group_size=128, symmetric=bits > 2, act_order=act_order, refinement=1)
    fused = solve(weight, hessian, scheme)
    assert torch.equal(solve(weight, hessian, scheme).quantized.codes, fused.quantized.codes), "two runs differ"
    monkeypatch.setattr(columns, "why_not_fused", lambda device: "for comparison")
    single = solve(weight, hessian, scheme)
    assert (fused.quantized.codes != single.quantized.codes).float().mean() < 1e-2
    torch.testing.assert_close(fused.loss.sum(), single.loss.sum(), rtol=1e-3, atol=0)


def test_tuning_keeps_the_results_and_remembers_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTQ_CACHE", str(tmp_path))
    tilings.tuned.cache_clear()
    layer = QuantLinear(on_gpu(packed_weight(4, 128, True)))
    x = torch.randn(3, 1536, device="cuda").half()
    before = layer(x)
    (gains,) = tune(layer).values()
    assert all(gain <= 1 for gain in gains.values())
    assert (tmp_path / "optq" / "tilings.json").exists()
    assert relative_error(layer(x), before.double()) < 1e-2
    tilings.tuned.cache_clear()
