# SPDX-License-Identifier: Apache-2.0
"""Quantizing the output head on request."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from conftest import VOCABULARY
from optq import GPTQConfig, QuantLinear
from optq.errors import CheckpointError, ConfigError
from optq.events import Quality, to_dict


@pytest.fixture
def tied(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def quantize(folder, token_rows, **settings):
    config = GPTQConfig(**{"bits": 8, "group_size": 32, "dataset": token_rows, "lm_head": True, **settings})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("effort", ["fast", "max"])
def test_an_untied_head_is_quantized(tiny_llama, token_rows, probe_ids, tmp_path, effort):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = quantize(tiny_llama, token_rows, effort=effort)
    assert isinstance(model.lm_head, QuantLinear)
    (quality,) = [to_dict(event) for event in model.hf_quantizer.log.events if isinstance(event, Quality)]
    assert quality["perplexity_ratio"] == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        expected, found = original(probe_ids).logits, model(probe_ids).logits
        assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(probe_ids).logits, found)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["lm_head"] is True


def test_a_tied_head_is_untied_and_it_is_said(tied, token_rows, probe_ids, tmp_path, caplog):
    model = quantize(tied, token_rows)
    assert "untied" in caplog.text
    embedding = AutoModelForCausalLM.from_pretrained(tied).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.lm_head, QuantLinear)
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    with torch.no_grad():
        assert torch.equal(loaded(probe_ids).logits, model(probe_ids).logits)


def test_without_asking_the_head_stays(tied, token_rows):
    model = quantize(tied, token_rows, lm_head=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_model_without_a_head_is_refused(tied, token_rows):
    config = GPTQConfig(bits=8, group_size=32, dataset=token_rows, lm_head=True)
    with pytest.raises(ConfigError, match="no linear output head"):
        AutoModel.from_pretrained(tied, quantization_config=config)


@pytest.fixture(scope="module")
def packed_head(tiny_llama, token_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed-head")
    quantize(tiny_llama, token_rows, bits=4, effort="fast").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "task",
    [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification],
)
def test_a_packed_head_is_left_out_for_another_task_as_a_dense_one_is(packed_head, probe_ids, tmp_path, task):
    whole = AutoModelForCausalLM.from_pretrained(packed_head)
    model = task.from_pretrained(packed_head)
    with torch.no_grad():
        assert torch.equal(model.base_model(probe_ids)[0], whole.model(probe_ids)[0])
        model.save_pretrained(tmp_path)
        again = task.from_pretrained(tmp_path)
        assert torch.equal(again(probe_ids)[0], model(probe_ids)[0])
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["lm_head"] is False
    assert whole.config.quantization_config.lm_head is True
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(names) == 14
    assert "lm_head" not in names


def test_a_base_models_checkpoint_gets_a_new_head(packed_head, probe_ids, tmp_path):
    base = AutoModel.from_pretrained(packed_head)
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.model(probe_ids)[0], base(probe_ids)[0])


def test_what_a_class_says_to_leave_out_may_be_packed(packed_head, tmp_path, monkeypatch):
    """Such as the layers that predict several tokens at once."""
    files = renamed_in(packed_head, tmp_path, "model.layers.1.mlp", "model.layers.2.mlp")
    with pytest.raises(
        CheckpointError, match=r"3 quantized tensors .* model\.layers\.2\.mlp\.down_proj, belong to no"
    ):
        AutoModelForCausalLM.from_pretrained(files)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    both = load_file(files / "model.safetensors") | load_file(packed_head / "model.safetensors")
    save_file(both, files / "model.safetensors", {"format": "pt"})
    assert AutoModelForCausalLM.from_pretrained(files).model.layers[0].mlp.up_proj.bits == 4


@pytest.mark.parametrize("task", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize(("old", "new"), [("model.layers", "transformer.h"), ("model.layers.1", "model.layers.7")])
def test_a_checkpoint_of_another_architecture_is_still_refused(packed_head, tmp_path, task, old, new):
    files = renamed_in(packed_head, tmp_path, old, new)
    with pytest.raises(CheckpointError, match="made for another architecture"):
        task.from_pretrained(files)


def renamed_in(folder, copy, old, new):
    shutil.copytree(folder, copy / "renamed")
    file = copy / "renamed/model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    return copy / "renamed"
