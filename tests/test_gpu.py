# SPDX-License-Identifier: Apache-2.0
"""What only an accelerator can show: blocks visit it, the result lives where `device_map` says, kernels are exact."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optq import GPTQConfig, QuantLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def quantize(folder, rows, **arguments):
    config = GPTQConfig(bits=4, group_size=32, dataset=rows)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)


def devices(model):
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize(("device_map", "home"), [(None, "cpu"), ("cuda", "cuda"), ("auto", "cuda")])
def test_the_gpu_quantizes_and_the_device_map_places_the_result(tiny_llama, token_rows, device_map, home):
    torch.cuda.reset_peak_memory_stats()
    model = quantize(tiny_llama, token_rows, device_map=device_map)
    assert model.hf_quantizer.log.events[0]["device"].startswith("cuda")
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
