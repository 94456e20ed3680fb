# SPDX-License-Identifier: Apache-2.0
"""What each piece of the method is worth: one setting changed at a time, at 4, 3 and 2 bits.

Smaller than quality.py, so that many settings can be compared: calibration on the first 24 windows of 512 tokens of
WikiText-2's validation text, evaluation on the first 12 windows of its test text. Differences of the perplexity below
0.3 and of the divergence below 3 % are noise: the order of float additions alone moves them by as much.

    python benchmarks/tries.py --data FOLDER [--only PATTERN …] [--missing]
"""

import argparse
import json
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import quality
import record

MODEL = replace(quality.SMOLLM2, calibration=24, evaluation=12)
RESULT = "tries-smollm2"

GRIDS: dict[str, dict[str, Any]] = {
    "4-bit g64 sym": {"bits": 4, "group_size": 64},
    "3-bit g64 sym": {"bits": 3, "group_size": 64},
    "2-bit g64 asym": {"bits": 2, "group_size": 64, "sym": False},
    "4-bit g32 sym": {"bits": 4, "group_size": 32},
    "3-bit g32 sym": {"bits": 3, "group_size": 32},
}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "min–max grid": {"grid": "minmax"},
    "left to right": {"static_groups": False},
    "group-aware order": {"act_group_aware": True},
    "desc_act": {"desc_act": True},
    "no propagation": {"propagation": 0.0},
    "propagation 0.75": {"propagation": 0.75},
    "propagation 1": {"propagation": 1.0},
    "no refinement": {"refinement": 0},
    "1 round of refinement": {"refinement": 1},
    "2 rounds of refinement": {"refinement": 2},
    "4 rounds of refinement": {"refinement": 4},
    "damping 0.03": {"damp_percent": 0.03},
    "damping 0.3": {"damp_percent": 0.3},
    "not sequential": {"true_sequential": False},
    "polish": {"polish": 4},
    "effort fast": {"effort": "fast"},
}


def rows() -> dict[str, dict[str, Any]]:
    return {f"{grid}: {change}": {**GRIDS[grid], **CHANGES[change]} for grid in GRIDS for change in CHANGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--missing", action="store_true", help="only rows that have no figures yet")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = quality.model_folder()
    output = quality.ROOT / ".cache/tries"
    output.mkdir(parents=True, exist_ok=True)
    if arguments.row:
        from transformers import AutoTokenizer

        checkpoint = output / arguments.row.replace(" ", "_").replace(":", "")
        calibration = output / "calibration.json"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = quality.calibration_rows(tokenizer, arguments.data / "wikitext2-valid.txt", MODEL)
        calibration.write_text(json.dumps(ids))
        figures = quality.quantize_ours(MODEL, folder, calibration, checkpoint, rows()[arguments.row])
        print(json.dumps({**quality.evaluate(MODEL, folder, checkpoint, None, arguments.data), **figures}))
        return
    results: dict[str, Any] = record.read(RESULT)
    for name in rows():
        if not any(fnmatch(name, pattern) for pattern in arguments.only) or (arguments.missing and name in results):
            continue
        found = quality.last_json([sys.executable, __file__, "--data", str(arguments.data), "--row", name])
        if found is None:
            print(f"FAILED: {name}", flush=True)
            continue
        # Others may have written in the meantime: several runs share the work.
        results = record.read(RESULT)
        results[name] = {**found, "measured_at": record.measured_at()}
        print(name, found, flush=True)
        settings = {
            "model": MODEL.title,
            "calibration": f"{MODEL.calibration} x {MODEL.window} tokens, WikiText-2 validation, consecutive",
            "evaluation": f"{MODEL.evaluation} x {MODEL.window} tokens, WikiText-2 test, from the start",
            "grids": GRIDS,
            "changes": CHANGES,
        }
        record.write(RESULT, settings, {key: results[key] for key in rows() if key in results}, quiet=True)


if __name__ == "__main__":
    main()
