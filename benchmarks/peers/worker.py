# SPDX-License-Identifier: Apache-2.0
"""Quantize one model with another tool, in that tool's own environment. Run by quality.py, never by hand.

    python worker.py TOOL MODEL CALIBRATION.json OUTPUT SETTINGS_JSON

CALIBRATION.json is a list of lists of token ids of equal length. OUTPUT becomes a GPTQ checkpoint folder (GPTQModel,
AutoRound) or a folder with `dense.safetensors`, the weights on their grid (llm-compressor). The last line on stdout is
JSON with the time and memory of quantizing, models loaded before and saved after.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


def gptqmodel(model: str, rows: list[list[int]], output: str, settings: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    extras: dict[str, Any] = {}
    if settings.get("gptaq"):
        extras["gptaq"] = GPTAQConfig()
    if settings.get("foem"):
        extras["foem"] = FOEMConfig()
    if settings.get("mse"):
        extras["mse"] = settings["mse"]
    config = QuantizeConfig(
        device="cpu", bits=settings["bits"], group_size=settings["group_size"], sym=settings["sym"], **extras
    )
    quantizing = GPTQModel.load(model, config, dtype=torch.float32)
    examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    with measured():
        quantizing.quantize(examples, batch_size=8)
    quantizing.save(output)


def auto_round(model: str, rows: list[list[int]], output: str, settings: dict[str, Any]) -> None:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    dense = load(model)
    with measured():
        rounding = AutoRound(
            dense,
            AutoTokenizer.from_pretrained(model),
            bits=settings["bits"],
            group_size=settings["group_size"],
            sym=settings["sym"],
            iters=settings["iters"],
            enable_alg_ext=settings.get("alg_ext", False),
            dataset=[torch.tensor([row]) for row in rows],
            nsamples=len(rows),
            seqlen=len(rows[0]),
            device_map="cpu",
        )
        rounding.quantize()
    rounding.save_quantized(output, format="auto_gptq")


def llmcompressor(model: str, rows: list[list[int]], output: str, settings: dict[str, Any]) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import save_file

    dense = load(model)
    weights = QuantizationArgs(
        num_bits=settings["bits"], group_size=settings["group_size"], symmetric=settings["sym"], strategy="group"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    examples = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    with measured():
        oneshot(
            model=dense,
            dataset=examples,
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
            max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows),
        )
    tensors = {
        f"{name}.weight": module.weight.contiguous()
        for name, module in dense.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    Path(output).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(output, "dense.safetensors")))


def load(model: str) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    embeds = AutoConfig.from_pretrained(model).architectures[0].endswith("Model")
    return (AutoModel if embeds else AutoModelForCausalLM).from_pretrained(model, dtype=torch.float32)


class measured:  # noqa: N801
    """Prints the CPU-seconds, wall-seconds and the peak memory of its body."""

    def __enter__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def __exit__(self, *error: object) -> None:
        figures = {
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
            "wall_seconds": round(time.monotonic() - self.wall, 1),
        }
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                figures["peak_rss_mb"] = round(int(line.split()[1]) * 1024 / 1e6)
        FIGURES.update(figures)


FIGURES: dict[str, float] = {}
TOOLS = {"gptqmodel": gptqmodel, "autoround": auto_round, "llmcompressor": llmcompressor}

if __name__ == "__main__":
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own count fails on machines with two cores
    tool, model_folder, calibration, output_folder, wanted = sys.argv[1:]
    torch.manual_seed(0)
    TOOLS[tool](model_folder, json.loads(Path(calibration).read_text()), output_folder, json.loads(wanted))
    print("\n" + json.dumps(FIGURES))
