# SPDX-License-Identifier: Apache-2.0
"""The whole path on a real trained model, in fresh processes: what the demo does, with less calibration data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.minutes
def test_a_real_model_is_quantized_saved_reloaded_and_talks(tmp_path):
    pytest.importorskip("gguf", reason="reading the model's GGUF file needs the package gguf")
    import smollm2

    folder = smollm2.fetch()
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--model", str(folder)]
    subprocess.run([*command, "--output", str(tmp_path / "out"), "--samples", "8"], check=True)
    measured = {}
    for name, model in (("before", folder), ("after", tmp_path / "out")):
        output = subprocess.run([*command, "--measure", str(model)], check=True, capture_output=True, text=True).stdout
        measured[name] = json.loads(output)
    before, after = measured["before"], measured["after"]
    assert "Paris" in before["answer"]
    assert "Paris" in after["answer"]
    assert after["weights_mb"] < 0.45 * before["weights_mb"]
    assert before["perplexity"] < after["perplexity"] < 1.35 * before["perplexity"]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["meta"]["calibration"]["tokens"] == 8 * 512
