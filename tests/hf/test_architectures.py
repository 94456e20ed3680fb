# SPDX-License-Identifier: Apache-2.0
"""The sample of benchmarks/coverage.py that is run every time: the most used types, and the odd ones."""

import runpy
from pathlib import Path

import pytest

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
