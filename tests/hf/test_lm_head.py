# SPDX-License-Identifier: Apache-2.0
"""Quantizing the output head on request."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import VOCABULARY
from optq import GPTQConfig, QuantLinear
from optq.errors import ConfigError


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
    (quality,) = [event for event in model.hf_quantizer.log.events if event["event"] == "quality"]
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
    from transformers import AutoModel

    config = GPTQConfig(bits=8, group_size=32, dataset=token_rows, lm_head=True)
    with pytest.raises(ConfigError, match="no linear output head"):
        AutoModel.from_pretrained(tied, quantization_config=config)
