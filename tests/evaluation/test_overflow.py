# SPDX-License-Identifier: Apache-2.0
"""A model in float16 that only float32 can run is not called good."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.errors import ModelError, QualityError

LARGE = 1e5  # more than float16 holds


@pytest.fixture(scope="module")
def overflowing(tiny_llama, tmp_path_factory):
    """The tiny llama, with weights that float16 holds and products that it does not, in the second block's MLP."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp"
    tensors[f"{prefix}.up_proj.weight"] *= 2e4
    tensors[f"{prefix}.down_proj.weight"] /= 2e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def config(token_rows):
    def make(**settings):
        return GPTQConfig(**{"bits": 8, "group_size": 32, "effort": "fast", "dataset": token_rows, **settings})

    return make


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator runs the model in float16")
def test_an_overflow_in_the_models_own_dtype_makes_the_gate_red(overflowing, config, caplog):
    model = AutoModelForCausalLM.from_pretrained(overflowing, quantization_config=config(), dtype=torch.float16)
    assert model.hf_quantizer.quality.finite  # in float32
    assert model.hf_quantizer.quality.overflows.startswith("model.layers.1.mlp")
    assert "the model's own dtype cannot hold" in caplog.text
    with pytest.raises(QualityError, match=r"model\.layers\.1\.mlp.*dtype=torch\.bfloat16"):
        AutoModelForCausalLM.from_pretrained(
            overflowing, quantization_config=config(quality_gate="raise"), dtype=torch.float16
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dtype_with_room_is_not_accused(overflowing, config, caplog, dtype):
    model = AutoModelForCausalLM.from_pretrained(overflowing, quantization_config=config(), dtype=dtype)
    assert model.hf_quantizer.quality.overflows is None
    assert "cannot hold" not in caplog.text


def test_an_ordinary_model_in_float16_is_not_accused(tiny_llama, config):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config(), dtype=torch.float16)
    assert model.hf_quantizer.quality.overflows is None


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_a_scale_that_overflows_names_its_layer(tiny_llama, config, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"][0, 0] = LARGE * 300
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}: A group's scale is .* above float16's largest"):
        optq.quantize(folder, config(), output_dir=tmp_path / "out")
