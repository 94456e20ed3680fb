# SPDX-License-Identifier: Apache-2.0
import copy
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optq import GPTQConfig
from optq.checkpoint import pack
from optq.gptq import round_to_nearest
from optq.kernels import KERNELS
from optq.layers import QuantLinear
from optq.layers import linear as layers
from optq.scheme import LayerScheme


@pytest.fixture
def layer() -> QuantLinear:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) / 10
    return QuantLinear(pack(round_to_nearest(weight, LayerScheme(group_size=32))), bias=torch.arange(32.0))


def test_is_the_dense_layer_with_rounded_weights(layer):
    x = torch.randn(2, 5, 64)
    dense = layer.dense(torch.float32)
    assert isinstance(dense, nn.Linear)
    torch.testing.assert_close(layer(x), dense(x))
    assert layer.kernel_name == "reference"
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.kernel_name == "cpu_int4"


def test_the_words_on_disk_are_not_kept_beside_the_kernels_codes(layer):
    words = layer.qweight.clone()
    layer.prepare(torch.bfloat16)
    assert layer.qweight.device.type == "meta"
    assert torch.equal(layer.packed().qweight, words)
    assert torch.equal(layer.state_dict()["qweight"], words)
    held = layer.held.prepared.codes.numel() * layer.held.prepared.codes.element_size()
    assert held == words.numel() * 4
    assert sum(buffer.nbytes for buffer in layer.buffers()) == sum(
        tensor.nbytes for tensor in layer.state_dict().values()
    )
    layer.prepare(torch.float32)
    assert torch.equal(layer.qweight, words)
    layer.prepare(torch.bfloat16)
    assert torch.equal(dict(layer.named_buffers(recurse=False))["qweight"], words)  # who asks is about to move it


def test_new_tensors_can_be_loaded_into_a_prepared_layer(layer):
    x = torch.randn(1, 64).bfloat16()
    layer(x)
    changed = {**layer.state_dict(), "qweight": ~layer.packed().qweight}
    layer.load_state_dict(changed)
    assert torch.equal(layer.qweight, changed["qweight"])
    torch.testing.assert_close(layer(x), layer.dense(torch.bfloat16)(x), rtol=2e-2, atol=2e-2)


def test_saves_the_tensors_of_the_format_and_nothing_else(layer):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(before) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    layer(torch.randn(1, 64).bfloat16())
    assert set(layer.state_dict()) == set(before)
    assert all(torch.equal(layer.state_dict()[name], before[name]) for name in before)
    assert not list(layer.parameters())


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casting_a_model_does_not_round_the_scales(layer, cast):
    scales = layer.scales.clone()
    model = cast(nn.Sequential(layer, nn.Linear(32, 4)))
    assert model[1].weight.dtype != torch.float32
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, scales)


def test_moving_to_where_it_is_and_casting_keep_what_was_derived(layer):
    layer.prepare(torch.bfloat16)
    held = layer.held
    for apply in (nn.Module.cpu, nn.Module.float, nn.Module.bfloat16, lambda module: module.to("cpu", torch.float16)):
        apply(layer)
        assert layer.held is held
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.float16, torch.float16)


@pytest.mark.parametrize("move", [lambda layer: layer.to_empty(device="cpu"), nn.Module.share_memory])
def test_a_move_makes_the_kernel_be_chosen_again(layer, move):
    words = layer.qweight.clone()
    layer.prepare(torch.bfloat16)
    move(layer)
    assert layer.kernel_name is None
    assert layer.qweight.is_shared() == (move is nn.Module.share_memory)
    layer.load_state_dict({**layer.state_dict(), "qweight": words})
    layer.g_idx = torch.arange(64, dtype=torch.int32) // 32
    layer(torch.randn(1, 64).bfloat16())
    assert layer.kernel_name == "cpu_int4"


def test_buffers_that_are_moved_one_by_one_are_followed(layer):
    """As accelerate does it; "meta" stands for another device."""
    words, scales = layer.qweight.clone(), layer.scales
    layer.prepare(torch.bfloat16)
    layer.held = replace(layer.held, device=torch.device("meta"))
    for dtype, kernel in ((torch.float32, "reference"), (torch.bfloat16, "cpu_int4")):
        layer(torch.randn(1, 64).to(dtype))
        assert (layer.kernel_name, layer.held.device.type) == (kernel, "cpu")
        assert torch.equal(layer.packed().qweight, words)
        assert torch.equal(layer.scales, scales)


def test_dtypes_in_turns_are_multiplied_by_one_layout_and_as_if_each_were_alone(layer, monkeypatch):
    inputs = [torch.randn(3, 64).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    alone = [copy.deepcopy(layer) for _ in inputs]
    expected = [other(x) for other, x in zip(alone, inputs, strict=True)]
    assert [other.kernel_name for other in alone] == ["reference", "cpu_int4", "cpu_int4", "reference"]
    chosen = []
    choose = layers.choose_kernel
    monkeypatch.setattr(layers, "choose_kernel", lambda *arguments: chosen.append(1) or choose(*arguments))
    for _ in range(3):
        for x, output in zip(inputs, expected, strict=True):
            assert torch.equal(layer(x), output)
    assert layer.kernel_name == "cpu_int4"
    assert len(chosen) <= len(inputs) + 3  # a float32 call came before the codes were laid out, and one after
    wanted = [x.clone().requires_grad_() for x in (inputs[0], inputs[0])]
    for module, x in zip((layer, alone[0]), wanted, strict=True):
        module(x).square().sum().backward()
    assert torch.equal(wanted[0].grad, wanted[1].grad)


def in_threads(calls, times=60):
    """What each of the calls returns, made many times at once; the first error if there is one."""
    found, errors = [[] for _ in calls], []

    def run(call, outputs):
        try:
            with torch.no_grad():
                outputs += [call() for _ in range(times)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(calls, found, strict=True)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    return found


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("moved", [False, True], ids=["while one is laid out", "while one moves it to where it is"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_threads_with_dtypes_of_their_own_get_what_one_after_the_other_would(bits, moved):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits)) / 10
    scheme = LayerScheme(bits=bits, group_size=32)
    layer = QuantLinear(pack(round_to_nearest(weight, scheme)), bias=torch.arange(32.0))
    inputs = [torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(dtype) for dtype in DTYPES]
    expected = [copy.deepcopy(layer)(x) for x in inputs]
    calls = [lambda x=x: (layer.cpu() if moved else layer)(x) for x in inputs]
    for outputs, output in zip(in_threads(calls), expected, strict=True):
        assert all(torch.equal(each, output) for each in outputs)


def test_threads_that_save_while_others_make_the_first_calls_see_the_words_on_disk(layer):
    words = layer.qweight.clone()
    inputs = [torch.randn(2, 64).to(dtype) for dtype in DTYPES]
    saved = in_threads([layer.state_dict, *(lambda x=x: layer(x) for x in inputs)])[0]
    assert all(torch.equal(state["qweight"], words) for state in saved)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad])
def test_what_is_derived_does_not_depend_on_the_mode_of_the_first_call(layer, mode):
    with mode():
        layer(torch.randn(1, 64).bfloat16())
    held = layer.held.prepared
    assert not any(tensor.is_inference() for tensor in (held.codes, held.scales, held.zeros, *held.extras))
    assert torch.equal(held.extras[0], KERNELS["cpu_int4"].prepare(layer.packed()).extras[0])
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None


def test_copies_are_independent(layer):
    layer(torch.randn(1, 64))
    reference = copy.deepcopy(layer)
    reference.load_state_dict({**reference.state_dict(), "qweight": torch.zeros_like(reference.qweight)})
    x = torch.randn(1, 64)
    assert not torch.equal(reference(x), layer(x))


def test_who_computes_with_the_weight_that_is_not_there_gets_nan(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        quantization_config=GPTQConfig(bits=4, group_size=32, dataset=[{"input_ids": list(range(3, 100))}]),
        dtype=torch.float32,
    )
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (
        (64, 96),
        torch.float32,
        torch.device("cpu"),
    )
    assert bool((torch.ones(1, 96) @ layer.weight.T).isnan().all())
    assert "weight" not in layer.state_dict()
    with pytest.raises(RuntimeError):
        layer.weight.div_(2)
