# SPDX-License-Identifier: Apache-2.0
"""What more calibration text buys: the divergence from the original against the number of calibration tokens.

4 bits, groups of 64, windows of 512 tokens of WikiText-2's validation text: consecutive from its start, or, "spread",
every sixth; a sixteenth of them is held out for the quality gate, as always. Judged on three texts, so that what is
fitted to the calibration text only shows: on windows of the calibration itself, on other windows of the validation
text, and on its test text. "no propagation" tells how much of that comes from making up for earlier layers' errors.

    python benchmarks/tokens.py --data FOLDER [--only PATTERN …] [--missing]
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import quality
import record

RESULT, WINDOW, GRID = "tokens", 512, {"bits": 4, "group_size": 64}
OTHER, JUDGED = 420, 10  # the first of the validation text's windows that no row is calibrated on; how many are judged


@dataclass(frozen=True, kw_only=True)
class Row:
    """So many windows, every `apart`-th of the text, and settings besides the grid."""

    windows: int
    apart: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = {
    **{f"{count} windows": Row(windows=count) for count in (16, 32, 64, 128, 192)},
    "64 windows, spread": Row(windows=64, apart=OTHER // 64),
    "64 windows, no propagation": Row(windows=64, settings={"propagation": 0.0}),
}


def measure(row: Row, data: Path) -> dict[str, Any]:
    """In this process: quantize, and judge on all texts."""
    from transformers import AutoTokenizer

    model, folder = quality.SMOLLM2, quality.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    validation, test = (data / f"wikitext2-{part}.txt" for part in ("valid", "test"))
    calibrated = quality.windows_of(tokenizer, validation, WINDOW, row.windows * row.apart)[:: row.apart]
    texts = {
        "calibration": calibrated[:: max(1, len(calibrated) // JUDGED)][:JUDGED],
        "other": quality.windows_of(tokenizer, validation, WINDOW, JUDGED, OTHER),
        "test": quality.windows_of(tokenizer, test, WINDOW, JUDGED),
    }
    with tempfile.TemporaryDirectory() as scratch:
        calibration, checkpoint = Path(scratch, "calibration.json"), Path(scratch, "checkpoint")
        calibration.write_text(json.dumps(calibrated.tolist()))
        figures = quality.quantize_ours(model, folder, calibration, checkpoint, {**GRID, **row.settings})
        original, changed = model.load(folder), quality.loaded(model, folder, checkpoint)
    divergences = {name: quality.judge(changed, original, windows)["divergence"] for name, windows in texts.items()}
    return {"tokens": calibrated.numel(), "divergence": divergences, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--missing", action="store_true", help="only rows that have no figures of this src/ yet")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(ROWS[arguments.row], arguments.data)))
        return
    for name in ROWS:
        results = record.read(RESULT)
        known = arguments.missing and results.get(name, {}).get("measured_at", {}).get("with") == record.source()
        if known or not any(fnmatch(name, pattern) for pattern in arguments.only):
            continue
        found = quality.last_json([sys.executable, __file__, "--data", str(arguments.data), "--row", name])
        if found is None:
            print(f"FAILED: {name}", flush=True)
            continue
        results = record.read(RESULT)  # others may have written in the meantime
        results[name] = {**found, "measured_at": {**record.measured_at(), "with": record.source()}}
        print(name, found, flush=True)
        settings = {
            "model": quality.SMOLLM2.title,
            "grid": GRID,
            "windows": f"{WINDOW} tokens",
            "evaluation": f"{JUDGED} windows of each text; of the validation text those from number {OTHER} on",
        }
        record.write(RESULT, settings, {key: results[key] for key in ROWS if key in results}, quiet=True)


if __name__ == "__main__":
    main()
