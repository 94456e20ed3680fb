# SPDX-License-Identifier: Apache-2.0
"""Accuracy, time and memory of our checkpoints beside those of other tools, on the same models, tokens and judge.

Calibration: 64 windows of 512 tokens of WikiText-2's validation text; seed s takes the s-th stretch of so many, so
no two have a token in common. Evaluation: windows of its test text, in float32 with the weights that the checkpoint
stands for. Models that predict the next token: perplexity, KL divergence from the original, and how often both think
the same token most likely. Models that embed: cosine of the embeddings (means over the tokens) with the original's,
and how many of a text's ten nearest among the other texts are the original's. Every row quantizes in a process of its
own, whose CPU time (all threads) and peak memory are measured. How much is read of each model: real_models.py.

    python benchmarks/quality.py --data FOLDER              # with wikitext2-valid.txt and wikitext2-test.txt
    python benchmarks/quality.py --data FOLDER --model gemma3-270m --seeds 0 1 2
    python benchmarks/quality.py --data FOLDER --tools peers     # the other tools: each gets a virtual environment of
                                                                 # its own below .cache/peers (1.5 GB each)
    python benchmarks/quality.py --data FOLDER --only "3-bit*"   # some rows; the others keep what they had

Rows are written to benchmarks/results/quality-MODEL.json as they are done: each seed's figures, mean and range. The
seeds of a row are all measured with the same: with another src/, or another version of the tool, it starts afresh. A
tool that cannot be installed or fails is reported and leaves its row without figures.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import record
from environments import PACKAGES, environment_of
from real_models import MODELS, ROOT, Model

SMOLLM2 = MODELS["smollm2"]
OURS = ("original", "nearest", "optq")
UNCALIBRATED = ("original", "nearest")
JUDGED = ("perplexity", "divergence", "agreement", "cosine", "neighbours")
NEAREST = 10


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
        plain = {"effort": "fast", "grid": "minmax", "refinement": 0}
        efforts = {"plain GPTQ": plain, "fast": {"effort": "fast"}, "default": {}, "max": {"effort": "max"}}
        for effort, settings in efforts.items():
            found[f"{name}, optq {effort}"] = {"tool": "optq", **grid, **settings}
        found[f"{name}, GPTQModel"] = {"tool": "gptqmodel", **grid}
        found[f"{name}, GPTQModel + GPTAQ"] = {"tool": "gptqmodel", **grid, "gptaq": True}
        found[f"{name}, GPTQModel + FOEM"] = {"tool": "gptqmodel", **grid, "foem": True}
        found[f"{name}, llm-compressor"] = {"tool": "llmcompressor", **grid}
        found[f"{name}, AutoRound"] = {"tool": "autoround", **grid, "iters": 200}
        found[f"{name}, AutoRound light"] = {"tool": "autoround", **grid, "iters": 50}
        if grid["bits"] < 4:  # with 1000 steps it is what AutoRound recommends: 6 CPU-hours
            for recipe, steps in (("AutoRound + alg_ext", 200), ("AutoRound light + alg_ext", 50)):
                found[f"{name}, {recipe}"] = {"tool": "autoround", **grid, "iters": steps, "alg_ext": True}
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


def windows_of(tokenizer: Any, text: Path, length: int, count: int, first: int = 0) -> Any:
    """`count` windows of a text from the one numbered `first`: (count, length) int64.

    Each begins and ends with the special tokens that the tokenizer puts around a text.

    Raises:
        ValueError: the text is too short.
    """
    import torch

    around = tokenizer("").input_ids
    opening, closing = around[:1], around[1:]
    content = length - len(around)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    if len(ids) < (first + count) * content:
        raise ValueError(
            f"{text.name} has {len(ids)} tokens, and windows {first} … {first + count - 1} of {content} need "
            f"{(first + count) * content}. Ask for fewer seeds or windows."
        )
    starts = range(first * content, (first + count) * content, content)
    return torch.tensor([[*opening, *ids[start : start + content], *closing] for start in starts])


def calibration_rows(tokenizer: Any, text: Path, model: Model = SMOLLM2, seed: int = 0) -> list[list[int]]:
    count = model.calibration
    rows: list[list[int]] = windows_of(tokenizer, text, model.window, count, seed * count).tolist()
    return rows


def model_folder() -> str:
    return str(SMOLLM2.fetch())


def quantize_ours(
    model: Model, folder: str, calibration: Path, output: Path, settings: dict[str, Any], seed: int = 0
) -> dict[str, Any]:
    """In this process: quantize with optq and save."""
    import time

    from optq import GPTQConfig
    from optq.device.memory import peak_gib

    dataset = [{"input_ids": row} for row in json.loads(calibration.read_text())]
    config = GPTQConfig(**settings, dataset=dataset, seed=seed)
    wall, cpu = time.monotonic(), time.process_time()
    quantized = model.load(folder, quantization_config=config)
    figures = {
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "peak_rss_mb": round((peak_gib("cpu") or 0) * 2**30 / 1e6),
    }
    quantized.save_pretrained(output)
    if quantized.hf_quantizer.quality is not None:
        figures["gate"] = quantized.hf_quantizer.quality.facts()
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


def judge_embeddings(model: Any, original: Any, windows: Any) -> dict[str, float]:
    """Mean cosine of the embeddings of `windows` (count, tokens) with the original's, and the share of its neighbours.

    An embedding is the mean of the last hidden states; neighbours are the NEAREST other windows by cosine.
    """
    import torch
    from torch.nn.functional import normalize

    def embed(embedding: Any) -> Any:
        parts = [embedding(part).last_hidden_state.mean(1) for part in windows.split(32)]
        return normalize(torch.cat(parts), dim=-1)

    with torch.no_grad():
        both = embed(original), embed(model)
    near = [(found @ found.T).fill_diagonal_(-torch.inf).topk(NEAREST).indices for found in both]
    shared = (near[0][:, :, None] == near[1][:, None]).any(-1)
    return {
        "cosine": round(float((both[0] * both[1]).sum(-1).mean()), 6),
        "neighbours": round(float(shared.float().mean()), 4),
    }


def loaded(model: Model, folder: str, checkpoint: Path | None, nearest: dict[str, Any] | None = None) -> Any:
    """A dense model: a checkpoint, the original rounded to nearest, or the original itself."""
    from safetensors.torch import load_file

    if checkpoint is not None and not (checkpoint / "dense.safetensors").exists():
        return model.load(checkpoint).dequantize()
    found = model.load(folder)
    if checkpoint is not None:
        unknown = found.load_state_dict(load_file(checkpoint / "dense.safetensors"), strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{checkpoint} has tensors that {folder} has not: {', '.join(unknown[:3])} …")
    if nearest is not None:
        round_to_nearest_everywhere(found, nearest)
    return found


def evaluate(
    model: Model, folder: str, checkpoint: Path | None, nearest: dict[str, Any] | None, data: Path
) -> dict[str, Any]:
    """In this process: judge a checkpoint, the original rounded to nearest, or the original itself."""
    from transformers import AutoTokenizer

    original, changed = model.load(folder), loaded(model, folder, checkpoint, nearest)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = windows_of(tokenizer, data / "wikitext2-test.txt", model.window, model.evaluation)
    if model.embeds:
        return judge_embeddings(changed, original, windows)
    return judge(changed, original, windows, model.compared)


def made_with(tool: str) -> str:
    """What decides a row's figures besides its settings: our sources, or the other tool's version."""
    return record.source() if tool in OURS else PACKAGES[tool][0]


def calibration_file(name: str, data: Path, seed: int) -> Path:
    """Where the rows of token ids of that seed lie, which are written there."""
    from transformers import AutoTokenizer

    model = MODELS[name]
    file = ROOT / f".cache/quality/{name}/{seed}/calibration.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model.fetch())
    file.write_text(json.dumps(calibration_rows(tokenizer, data / "wikitext2-valid.txt", model, seed)))
    return file


def this_script(name: str, data: Path, seed: int) -> list[str]:
    here = [sys.executable, str(Path(__file__).resolve()), "--data", str(data.resolve())]
    return [*here, "--model", name, "--seeds", str(seed)]


def checkpoint_of(name: str, row_name: str, data: Path, calibration: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of a row and what it took to make; None if its tool failed.

    It is made beside `calibration`, unless it is there already, made with the same settings, tool and tokens.
    """
    row = rows()[row_name]
    settings = {key: value for key, value in row.items() if key != "tool"}
    checkpoint = calibration.parent / row_name.replace(" ", "_").replace(",", "")
    digest = hashlib.sha256(calibration.read_bytes()).hexdigest()
    made = {"with": made_with(row["tool"]), "settings": settings, "calibration": digest}
    done = checkpoint / "figures.json"
    if done.exists() and "uncommitted" not in made["with"]:
        known = json.loads(done.read_text())
        if known["made"] == made:
            return checkpoint, known["figures"]
    output = [str(calibration), str(checkpoint), json.dumps(settings)]
    if row["tool"] == "optq":
        command = [*this_script(name, data, int(calibration.parent.name)), "--quantize", *output]
    else:
        python = environment_of(row["tool"])
        if python is None:
            return None
        worker = str(ROOT / "benchmarks/peers/worker.py")
        command = [str(python), worker, row["tool"], str(MODELS[name].fetch()), *output]
    done.unlink(missing_ok=True)
    figures = last_json(command, folder=calibration.parent)  # some tools write logs where they are started
    if figures is None:
        print(f"FAILED: {row_name}", flush=True)
        return None
    done.write_text(json.dumps({"made": made, "figures": figures}))
    return checkpoint, figures


def measure(name: str, row_name: str, data: Path, calibration: Path) -> dict[str, Any] | None:
    """One row with one seed; None if its tool failed."""
    row = rows()[row_name]
    checkpoint, figures, nearest = Path(), {}, None
    if row["tool"] not in UNCALIBRATED:
        made = checkpoint_of(name, row_name, data, calibration)
        if made is None:
            return None
        checkpoint, figures = made
    elif row["tool"] == "nearest":
        nearest = {key: value for key, value in row.items() if key != "tool"}
    here = this_script(name, data, int(calibration.parent.name))
    judged = last_json([*here, "--evaluate", str(checkpoint), json.dumps(nearest)])
    if judged is None:
        return None
    return {**judged, **figures, "measured_at": {**record.measured_at(), "with": made_with(row["tool"])}}


def with_seed(row: dict[str, Any] | None, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """A row with the figures of one more seed; seeds that were measured with something else are dropped."""
    with_what = found["measured_at"]["with"]
    before = {} if row is None else row["seeds"]
    kept = {key: value for key, value in before.items() if value["measured_at"]["with"] == with_what}
    seeds = dict(sorted({**kept, str(seed): found}.items()))
    by_figure = {figure: [each[figure] for each in seeds.values()] for figure in JUDGED if figure in found}
    return {
        "mean": {figure: round(statistics.fmean(values), 6) for figure, values in by_figure.items()},
        "range": {figure: [min(values), max(values)] for figure, values in by_figure.items()},
        "seeds": seeds,
    }


def last_json(command: list[str], folder: Path | None = None) -> dict[str, Any] | None:
    """Run a command, in `folder` if given; the JSON of its last line, or None if it failed."""
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=folder)
    if finished.returncode:
        return None
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def write(name: str, results: dict[str, Any]) -> None:
    model = MODELS[name]
    described = {row_name: row for row_name, row in rows().items() if row_name in results}
    settings = {
        "model": model.title,
        "note": model.note,
        "calibration": f"{model.calibration} x {model.window} tokens, WikiText-2 validation, consecutive",
        "seeds": "seed s takes the s-th such stretch",
        "evaluation": f"{model.evaluation} x {model.window} tokens, WikiText-2 test, from the start",
        "compared_windows": model.compared,
        "rows": described,
    }
    record.write(f"quality-{name}", settings, {row_name: results[row_name] for row_name in described}, quiet=True)


def chosen(patterns: list[str], tools: list[str]) -> list[str]:
    """The rows that match one of the patterns, of ours ("optq"), of the other tools ("peers") or of both."""
    return [
        name
        for name, row in rows().items()
        if any(fnmatch(name, pattern) for pattern in patterns)
        and ("optq" if row["tool"] in OURS else "peers") in tools
    ]


def measure_rows(name: str, data: Path, seeds: list[int], wanted: list[str], missing: bool) -> None:
    for seed in seeds:
        calibration = calibration_file(name, data, seed)
        for row_name in wanted:
            tool = rows()[row_name]["tool"]
            seed_measured = 0 if tool in UNCALIBRATED else seed
            before = record.read(f"quality-{name}").get(row_name, {"seeds": {}})["seeds"].get(str(seed_measured))
            known = missing and before is not None and before["measured_at"]["with"] == made_with(tool)
            if known or (tool in UNCALIBRATED and seed != seeds[0]):
                continue
            if (found := measure(name, row_name, data, calibration)) is None:
                continue
            # Others may have written in the meantime: several runs can share the work.
            results = record.read(f"quality-{name}")
            results[row_name] = with_seed(results.get(row_name), seed_measured, found)
            print(row_name, seed, found, flush=True)
            write(name, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="stretches of the calibration text")
    parser.add_argument("--only", nargs="+", default=DEFAULT_ROWS, help="patterns of row names")
    parser.add_argument("--missing", action="store_true", help="only what has no figures of this src/ or version yet")
    parser.add_argument("--tools", nargs="+", choices=("optq", "peers"), default=["optq"])
    parser.add_argument("--quantize", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, folder = MODELS[arguments.model], str(MODELS[arguments.model].fetch())
    if arguments.quantize:
        calibration, output, settings = arguments.quantize
        seed = arguments.seeds[0]
        figures = quantize_ours(model, folder, Path(calibration), Path(output), json.loads(settings), seed)
        print(json.dumps(figures))
    elif arguments.evaluate:
        checkpoint, nearest = arguments.evaluate
        at = Path(checkpoint) if checkpoint != "." else None
        print(json.dumps(evaluate(model, folder, at, json.loads(nearest), arguments.data)))
    else:
        wanted = chosen(arguments.only, arguments.tools)
        measure_rows(arguments.model, arguments.data, arguments.seeds, wanted, arguments.missing)


if __name__ == "__main__":
    main()
