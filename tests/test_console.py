# SPDX-License-Identifier: Apache-2.0
"""A run from Python shows what it does where nobody has configured logging, and only there."""

import json
import logging
import subprocess
import sys

CALLS = """
import logging, sys
import transformers
from transformers import AutoModelForCausalLM
from optq import GPTQConfig

def quantize(title):
    print(f"\\0{title}\\0", end="", file=sys.stderr, flush=True)
    rows = [{"input_ids": list(range(4 + start, 52 + start))} for start in range(16)]
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=rows)
    AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)

quantize("as it is")
left = logging.getLogger("optq")
assert not left.handlers and left.level == logging.NOTSET
transformers.logging.set_verbosity_error()
quantize("errors only")
transformers.logging.set_verbosity_warning()
logging.basicConfig(level=logging.WARNING)
quantize("configured")
"""


def test_a_run_from_python_ends_with_a_summary_unless_logging_is_configured(tiny_llama):
    done = subprocess.run([sys.executable, "-c", CALLS, str(tiny_llama)], capture_output=True, text=True, check=True)
    _, *parts = done.stderr.split("\0")
    said = dict(zip(parts[::2], parts[1::2], strict=True))
    lines = said["as it is"].splitlines()
    (summary,) = [line for line in lines if line.startswith("Quantized ")]
    assert "14 linears of 2 blocks; 4.62 bits per weight, 0.00 GiB; mean relative loss" in summary
    assert "(perplexity " in summary and "Log: model.hf_quantizer.log.events" in summary
    assert len([line for line in lines if line.startswith("model.layers.")]) == 2
    assert any(line.startswith("The checkpoint is finished: transformers with optq") for line in lines)
    assert "Quantized" not in said["errors only"] and "optq" not in said["errors only"]
    assert "Quantized" not in said["configured"]
    assert "WARNING:optq.hf.quantizing:Weak calibration data" in said["configured"]


def test_the_log_is_named_where_there_is_one(tiny_llama, token_rows, tmp_path, caplog):
    import optq

    caplog.set_level(logging.INFO)
    config = {"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, "quality_gate": "off"}
    folder = optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    (summary,) = [message for message in caplog.messages if message.startswith("Quantized ")]
    assert summary.endswith(f"not compared with the original. Log: {folder / 'quantization_log.jsonl'}")
    assert json.loads((folder / "quantization_log.jsonl").read_text().splitlines()[0])["event"] == "started"
