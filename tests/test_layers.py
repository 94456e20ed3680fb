# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optq import GPTQConfig
from optq.checkpoint import pack
from optq.gptq import round_to_nearest
from optq.layers import QuantLinear
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
    assert torch.equal(layer.packed.qweight, words)
    assert torch.equal(layer.state_dict()["qweight"], words)
    held = layer._prepared.codes.numel() * layer._prepared.codes.element_size()
    assert held == words.numel() * 4
    layer.prepare(torch.float32)
    assert torch.equal(layer.qweight, words)


def test_new_tensors_can_be_loaded_into_a_prepared_layer(layer):
    x = torch.randn(1, 64).bfloat16()
    layer(x)
    changed = {**layer.state_dict(), "qweight": ~layer.packed.qweight}
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


def test_moving_makes_the_kernel_be_chosen_again(layer):
    layer.prepare(torch.float32)
    layer.to("cpu", torch.bfloat16)
    assert layer.kernel_name is None
    layer(torch.randn(1, 64).bfloat16())
    assert layer.kernel_name == "cpu_int4"


def test_copies_are_independent(layer):
    layer(torch.randn(1, 64))
    twin = copy.deepcopy(layer)
    twin.load_state_dict({**twin.state_dict(), "qweight": torch.zeros_like(twin.qweight)})
    x = torch.randn(1, 64)
    assert not torch.equal(twin(x), layer(x))


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
