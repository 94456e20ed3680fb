# SPDX-License-Identifier: Apache-2.0
"""The sample of benchmarks/coverage.py that is run every time: the most used types, and the odd ones."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from optq import GPTQConfig

COVERAGE = Path(__file__).parents[2] / "benchmarks/coverage.py"
CAUSAL = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"),
    *("falcon", "cohere2", "glm4", "olmo2", "starcoder2", "smollm3", "mamba", "jamba", "xlnet", "granitemoeshared"),
)
OTHERS = {
    "encoder and decoder": ("t5", "bart", "switch_transformers"),
    "masked language models": ("bert", "big_bird"),
    "images and text, the language model": ("qwen2_vl", "gemma3", "aya_vision"),
}
SAMPLE = [("causal language models", name) for name in CAUSAL]
SAMPLE += [(title, name) for title, names in OTHERS.items() for name in names]


@pytest.fixture(scope="module")
def coverage(monkeypatch_module):
    monkeypatch_module.syspath_prepend(str(COVERAGE.parent))
    return runpy.run_path(str(COVERAGE))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("title", "model_type"), SAMPLE, ids=[name for _, name in SAMPLE])
def test_a_tiny_model_of_the_type_goes_all_the_way(coverage, title, model_type):
    (class_name,) = (name for found, other, name in coverage["types"]() if (found, other) == (title, model_type))
    row = coverage["checked"](model_type, class_name)
    assert row["passed"], f"{row['step']}: {row['reason']}"
    assert row["linears"] >= 4


def test_the_check_can_fail(coverage, monkeypatch):
    from optq import QuantLinear

    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    row = coverage["checked"]("llama", "LlamaForCausalLM")
    assert not row["passed"]
    assert row["step"] == "dequantized weights"


def test_linears_that_the_original_keeps_in_another_form_are_saved_as_they_are(coverage, tmp_path):
    """Gte's checkpoints have q, k and v in one tensor, and transformers would join packed ones along a wrong side."""
    model = coverage["instantiated"]("gte", "GteForMaskedLM")
    model.save_pretrained(tmp_path / "original")
    assert any("qkv" in name for name in coverage["names_in"](tmp_path / "original"))
    rows = [{"input_ids": list(range(12, 60))}] * 4
    config = GPTQConfig(bits=4, group_size=32, dataset=rows, quality_gate="off")
    quantized = type(model).from_pretrained(tmp_path / "original", quantization_config=config, dtype=torch.float32)
    quantized.save_pretrained(tmp_path / "quantized")
    reloaded = type(model).from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    inputs = torch.arange(12, 44)[None]
    assert torch.equal(coverage["outputs_of"](reloaded, inputs), coverage["outputs_of"](quantized, inputs))
    reloaded.save_pretrained(tmp_path / "again")
    assert coverage["names_in"](tmp_path / "again") == coverage["names_in"](tmp_path / "quantized")


def test_encoder_and_decoder_read_the_same_text(coverage, tmp_path):
    model = coverage["instantiated"]("t5", "T5ForConditionalGeneration")
    model.save_pretrained(tmp_path / "original")
    rows = [{"input_ids": list(range(12, 12 + length))} for length in (48, 20, 48, 30)]  # padded
    log = tmp_path / "log.jsonl"
    config = GPTQConfig(bits=4, group_size=32, dataset=rows, log_file=str(log), batch_size=4)
    quantized = type(model).from_pretrained(tmp_path / "original", quantization_config=config, dtype=torch.float32)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    blocks = [event["block"] for event in events if event["event"] == "block"]
    assert blocks == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert quantized.hf_quantizer.quality.divergence < 0.5
    generated = quantized.generate(torch.arange(12, 30)[None], max_new_tokens=4, decoder_start_token_id=0)
    assert generated.shape[1] <= 5
