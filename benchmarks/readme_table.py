# SPDX-License-Identifier: Apache-2.0
"""Write the README's results table from the JSON of the benchmarks: `python benchmarks/readme_table.py [--check]`."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- results: made by benchmarks/readme_table.py from benchmarks/results/*.json; do not edit by hand -->"
WIDTH = 119
END = "<!-- end of results -->"


def table() -> str:
    accuracy = _read("accuracy-smollm2")
    decode = _read("decode-cpu-smollm2")
    settings, environment = accuracy["settings"], accuracy["environment"]
    caption = (
        f"SmolLM2-135M-Instruct, calibrated on {settings['calibration']}; perplexity on {settings['evaluation']}, in "
        f"float32; {environment['cores']} CPU cores, torch {environment['torch']}, transformers "
        f"{environment['transformers']}."
    )
    lines = [
        textwrap.fill(caption, WIDTH),
        "",
        "| weights | perplexity | CPU-seconds | peak MB |",
        "|---|---|---|---|",
    ]
    for name, row in accuracy["results"].items():
        seconds, memory = row.get("cpu_seconds", ""), row.get("peak_rss_mb", "")
        lines.append(f"| {name} | {row['perplexity']:.2f} | {seconds} | {memory} |")
    results = decode["results"]
    speed = (
        "`generate` at batch 1 with the 4-bit model and bfloat16 activations: "
        f"{results['ratio_to_bfloat16']:.2f}× the "
        f"speed of the bfloat16 original and {results['ratio_to_float32']:.2f}× that of the float32 one "
        f"({decode['environment']['device']})."
    )
    lines += ["", textwrap.fill(speed, WIDTH)]
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return content


def updated(readme: str) -> str:
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if updated(readme) == readme else "README.md is not what benchmarks/readme_table.py would write.")
    path.write_text(updated(readme), encoding="utf-8")


if __name__ == "__main__":
    main()
