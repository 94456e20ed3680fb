# SPDX-License-Identifier: Apache-2.0
"""Are the defaults tuned to one model? The same comparison on a model of another family, trained here.

A GPT-2 (learned positions, LayerNorm, biases, Conv1D layers, tanh-GELU) of 5 million parameters that reads bytes is
trained for some minutes on WikiText-2's validation text without its last tenth. It is calibrated on that text, and on
text of another kind (the help topics that come with Python), and judged on WikiText-2's test text.

    python benchmarks/second_family.py --data FOLDER [--steps 600]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quality
import record

WINDOW, ROWS, HELD_OUT_WINDOWS, SEED = 256, 96, 80, 0
HIDDEN, LAYERS, BATCH = 256, 6, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "plain GPTQ": {"effort": "fast", "grid": "minmax", "refinement": 0},
    "fast": {"effort": "fast"},
    "default": {},
    "max": {"effort": "max"},
}
GRIDS: dict[str, dict[str, Any]] = {
    "4-bit g64 sym": {"bits": 4, "group_size": 64},
    "3-bit g64 sym": {"bits": 3, "group_size": 64},
    "2-bit g64 asym": {"bits": 2, "group_size": 64, "sym": False},
}


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def train(ids: Tensor, steps: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=WINDOW,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        starts = torch.randint(ids.numel() - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM

    from optq import GPTQConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    text = bytes_of((arguments.data / "wikitext2-valid.txt").read_text(encoding="utf-8"))
    test = bytes_of((arguments.data / "wikitext2-test.txt").read_text(encoding="utf-8"))
    windows = test[: HELD_OUT_WINDOWS * WINDOW].view(-1, WINDOW)
    folder = quality.ROOT / ".cache" / f"second-family-{arguments.steps}"
    if not (folder / "config.json").exists():
        train(text[: text.numel() * 9 // 10], arguments.steps).save_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder)
    calibrations = {"WikiText-2": text, "Python's help topics": bytes_of("\n\n".join(topics.values()))}
    results: dict[str, Any] = {"original": quality.judge(original, original, windows)}
    for grid_name, grid in GRIDS.items():
        rounded = AutoModelForCausalLM.from_pretrained(folder)
        quality.round_to_nearest_everywhere(rounded, grid)
        results[f"{grid_name}, round to nearest"] = quality.judge(rounded, original, windows)
        for source, ids in calibrations.items():
            rows = [{"input_ids": row.tolist()} for row in ids[: ROWS * WINDOW].view(-1, WINDOW)]
            for name, settings in SETTINGS.items():
                config = GPTQConfig(**grid, **settings, dataset=rows, seed=SEED)
                cpu = time.process_time()
                model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
                seconds = round(time.process_time() - cpu, 1)
                row = quality.judge(model.dequantize(), original, windows)
                results[f"{grid_name}, optq {name}, {source}"] = {**row, "cpu_seconds": seconds}
                print(grid_name, name, source, row, seconds, flush=True)
    described = {
        "model": f"GPT-2, {LAYERS} layers of {HIDDEN}, bytes, trained here for {arguments.steps} steps",
        "calibration": f"{ROWS} x {WINDOW} bytes",
        "evaluation": f"{HELD_OUT_WINDOWS} x {WINDOW} bytes, WikiText-2 test, from the start",
        "seed": SEED,
    }
    record.write("second-family", described, results, quiet=True)


if __name__ == "__main__":
    main()
