# SPDX-License-Identifier: Apache-2.0
"""Quantize a tiny model with whatever optq is installed: `make dist` calls it, and a test, with their wheels."""

import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig

import optq

config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, dtype="float32"
)
with tempfile.TemporaryDirectory() as folder:
    dense, out = Path(folder, "dense"), Path(folder, "out")
    AutoModelForCausalLM.from_config(config).save_pretrained(dense)
    rows = [{"input_ids": list(range(start, start + 32))} for start in range(8)]
    optq.quantize(dense, {"bits": 4, "group_size": 32, "effort": "fast", "dataset": rows}, output_dir=out)
    assert not optq.inspect(out, verify=True).contradictions
    assert type(AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj) is optq.QuantLinear
(command,) = entry_points(group="console_scripts", name="optq")
assert command.load().__module__ == "optq.cli"
print(f"optq {optq.__version__} of {Path(optq.__file__).parent} works", file=sys.stderr)
