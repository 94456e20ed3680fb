# SPDX-License-Identifier: Apache-2.0
"""Quantizing models of the usual sizes on a GPU: seconds by part beside what arithmetic allows, and peak memory.

A model of random weights is written to disk, block by block, and quantized by `optq.quantize` in a process of its own.
Of large models a few blocks are enough: the time is linear in them, and the table says what all would take.

The bound of a part is its arithmetic at the speed of plain products, which are measured in the same process: 16-bit
ones for forwards, TF32 ones for Hessians, float32 ones for solving.

    python benchmarks/large.py                              # on a GPU: 8B whole, 70B and 30B-A3B in part
    python benchmarks/large.py --only "8B in part"          # some minutes on a GPU
    python benchmarks/large.py --only "tiny*"               # anywhere, to try the script

Rows are written to benchmarks/results/large-DEVICE.json as they are done.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import duration
import record
from peaks import operations_per_second, settle

SEED = 0
DENSE = {"type": "llama", "experts": 0, "chosen": 0}
MIXTURE = {"type": "qwen3_moe", "chosen": 8}
LLAMA_8B = {**DENSE, "hidden": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "of": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**DENSE, "hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2, "blocks": 4, "of": 4},
    "tiny mixture": {
        **MIXTURE,
        "hidden": 256,
        "inner": 128,
        "heads": 4,
        "kv_heads": 2,
        "experts": 8,
        "blocks": 2,
        "of": 2,
    },
    "8B": {**LLAMA_8B, "blocks": 32},
    "8B in part": {**LLAMA_8B, "blocks": 4},
    "70B": {**DENSE, "hidden": 8192, "inner": 28672, "heads": 64, "kv_heads": 8, "blocks": 4, "of": 80},
    "30B-A3B": {
        **MIXTURE,
        "hidden": 2048,
        "inner": 768,
        "heads": 32,
        "kv_heads": 4,
        "experts": 128,
        "blocks": 2,
        "of": 48,
    },
}
FEW, MANY = (8, 64), (128, 2048)  # samples, and tokens of each
PATTERN = 1 << 24  # random numbers, repeated


def config_of(shape: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    settings = {
        "vocab_size": 32000,
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["blocks"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": 128 if shape["hidden"] >= 2048 else 64,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    if shape["experts"]:
        settings |= {
            "num_experts": shape["experts"],
            "num_experts_per_tok": shape["chosen"],
            "moe_intermediate_size": shape["inner"],
        }
    return CONFIG_MAPPING[shape["type"]](**settings)


def write_model(shape: dict[str, Any], folder: Path) -> None:
    """Random weights, a file per block, so that no more than one is in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    config.architectures = [type(AutoModelForCausalLM.from_config(config_of({**shape, "blocks": 1}))).__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    pattern = (0.02 * torch.randn(PATTERN, generator=torch.Generator().manual_seed(SEED))).bfloat16()
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(name.split(".")[2] if ".layers." in name else "outside", {})[name] = tensor.shape
    index: dict[str, str] = {}
    for number, (part, shapes) in enumerate(parts.items(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {}
        for name, size in shapes.items():
            values = pattern.repeat(-(-size.numel() // PATTERN))[: size.numel()].view(size)
            tensors[name] = torch.ones(size, dtype=torch.bfloat16) if "norm" in name else values.clone()
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        print(f"wrote {part}", end=" ", file=sys.stderr, flush=True)
    sizes = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(sizes))


def bounds(log: list[dict[str, Any]], tokens: int, streams: int, scheme: Any, device: Any) -> dict[str, float]:
    """Seconds by part if everything ran as fast as plain products do."""
    import torch

    from optq.gptq.cost import work_of

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    forward, hessian, solving = (  # multiplications per second
        operations_per_second(device.type, dtype) / 2,
        operations_per_second(device.type, torch.float32, tf32=True) / 2,
        operations_per_second(device.type, torch.float32) / 2,
    )
    found = {"forwards": 0.0, "Hessians": 0.0, "solving": 0.0}
    inputs: set[tuple[Any, ...]] = set()
    for event in log:
        if event["event"] != "linear":
            continue
        (rows, columns), expert = event["shape"], event["family"] is not None
        found["forwards"] += rows * columns * event["tokens"] * streams / forward
        work = work_of(rows, columns, scheme, drift=not expert, device=device)
        found["solving"] += work.products / solving
        linear = event["linear"].rpartition(".")[2]
        stage = next((group for group in ("qkv", "gate_proj up_proj") if linear[:-5] in group), linear)
        if (place := (event["linear"].rpartition(".")[0], stage)) not in inputs:
            inputs.add(place)
            found["solving"] += work.cubes / solving
            by_outputs = rows <= columns  # as weight_of_drift has it for o and down
            drift = (2 * rows / columns if by_outputs else 1) if streams > 1 and not expert else 0
            found["Hessians"] += event["tokens"] * columns**2 * (0.5 + drift) / hessian
    return found


def in_this_process(shape: dict[str, Any], data: tuple[int, int], source: str, output: str) -> dict[str, Any]:
    import torch

    import optq
    from optq.device.placement import execution_device
    from optq.scheme import LayerScheme

    device = execution_device()
    rows = torch.randint(0, 32000, data, generator=torch.Generator().manual_seed(SEED)).tolist()
    config = optq.GPTQConfig(bits=4, group_size=128, dataset=[{"input_ids": row} for row in rows])
    spent = duration.watched(before_and_after=lambda: settle(device))
    started = time.perf_counter()
    optq.quantize(source, config, output_dir=output)
    whole = time.perf_counter() - started
    log = [json.loads(line) for line in Path(output, "quantization_log.jsonl").read_text().splitlines()]
    (finished,) = (event for event in log if event["event"] == "finished")
    blocks = [event["seconds"] for event in log if event["event"] == "block"]
    parts = {**spent, "forwards": finished["seconds"] - sum(spent.values())}
    ours = optq.GPTQConfig(bits=4, group_size=128).scheme_for("model.layers.0.mlp.down_proj")
    scheme = ours or LayerScheme()
    return {
        "seconds": round(whole, 1),
        "by_part": {part: round(seconds, 2) for part, seconds in parts.items()},
        "bound_by_part": {
            part: round(seconds, 2) for part, seconds in bounds(log, data[0] * data[1], 2, scheme, device).items()
        },
        "block_seconds": blocks,
        "seconds_of_all_blocks": round(whole - sum(blocks) + sum(blocks) / len(blocks) * shape["of"], 1),
        "peak_gib": finished["peak_gib"],
        "solving_seconds_per_block": round(parts.get("solving", 0.0) / len(blocks), 2),
    }


def main() -> None:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["8B", "70B", "30B-A3B"], metavar="PATTERN")
    parser.add_argument("--case", nargs=3, metavar=("SHAPE", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, source, output = arguments.case
        print(json.dumps(in_this_process(SHAPES[name], FEW if name.startswith("tiny") else MANY, source, output)))
        return
    result = "large-" + (torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu")
    results = record.read(result)
    for name, shape in SHAPES.items():
        if not any(fnmatch(name, pattern) for pattern in arguments.only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source, output = Path(scratch, "source"), Path(scratch, "out")
            source.mkdir()
            write_model(shape, source)
            command = [sys.executable, __file__, "--case", name, str(source), str(output)]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = {**json.loads(ran.stdout.splitlines()[-1]), "measured_at": record.measured_at()}
        print(name, json.dumps(results[name], indent=1), flush=True)
        settings = {"shapes": SHAPES, "samples_and_tokens": MANY, "bits": 4, "seed": SEED}
        record.write(result, settings, results, quiet=True)


if __name__ == "__main__":
    main()
