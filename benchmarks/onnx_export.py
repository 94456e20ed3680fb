# SPDX-License-Identifier: Apache-2.0
"""`optq.export_onnx` in onnxruntime on a CPU, beside the checkpoint itself in transformers, both in float32.

The largest difference of any logit, the perplexity of both on WikiText-2's test text, and the sizes of the files.

    python benchmarks/onnx_export.py --data FOLDER [CHECKPOINT …]

FOLDER holds wikitext2-test.txt. By default: the checkpoints of SmolLM2-135M-Instruct that quality.py left.
"""

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quality
import record

WINDOW, WINDOWS = 512, 4
RESULT = "onnx"
MADE = quality.ROOT / ".cache/quality"
CHECKPOINTS = [MADE / f"{name}_optq_default" for name in ("4-bit_g64_sym", "4-bit_g32_sym", "2-bit_g64_asym")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=CHECKPOINTS)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quality.model_folder())
    ids = quality.token_ids(tokenizer, arguments.data / "wikitext2-test.txt").reshape(-1)
    windows = ids[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)
    settings = {
        "evaluation": f"the first {WINDOWS} windows of {WINDOW} tokens of WikiText-2's test text",
        "versions": {package: version(package) for package in ("onnx", "onnxscript", "onnxruntime")},
    }
    results = record.read(RESULT)
    for checkpoint in arguments.checkpoints:
        with tempfile.TemporaryDirectory() as scratch:
            results[checkpoint.name] = measured(checkpoint, Path(scratch), windows)
        record.write(RESULT, settings, results)


def measured(checkpoint: Path, scratch: Path, windows: Any) -> dict[str, Any]:
    import onnxruntime
    import torch
    from transformers import AutoModelForCausalLM

    import optq
    from optq.evaluation import Comparer

    folder = optq.export_onnx(checkpoint, output_dir=scratch / "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    comparer, largest = Comparer(), 0.0
    for window in windows.split(1):
        ones = torch.ones_like(window)
        with torch.no_grad():
            ours = model(input_ids=window).logits
        (theirs,) = session.run(None, {"input_ids": window.numpy(), "attention_mask": ones.numpy()})
        found = torch.from_numpy(theirs)
        largest = max(largest, float((ours - found).abs().max()))
        comparer.add(ours[:, :-1], found[:, :-1], window[:, 1:])
    comparison = comparer.result()
    return {
        "largest_difference": largest,
        "perplexity": comparison.original_perplexity,
        "onnxruntime_perplexity": comparison.perplexity,
        "same_top_token": comparison.agreement,
        "checkpoint_mb": megabytes(checkpoint.glob("*.safetensors")),
        "onnx_mb": megabytes(folder.glob("model.onnx*")),
        "measured_at": record.measured_at(),
    }


def megabytes(files: Any) -> float:
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


if __name__ == "__main__":
    main()
