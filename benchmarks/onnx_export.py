# SPDX-License-Identifier: Apache-2.0
"""`optq.export_onnx` in onnxruntime and OpenVINO on a CPU, beside the checkpoint itself in transformers in float32.

The largest difference of any logit, the perplexity of all on WikiText-2's test text, and the sizes of the files.
onnxruntime computes in float32, and so does OpenVINO where it is told to; by default it does not.

    python benchmarks/onnx_export.py --data FOLDER [CHECKPOINT …]

FOLDER holds wikitext2-test.txt. By default: the checkpoints of SmolLM2-135M-Instruct that quality.py left. OpenVINO's
environment is made in .cache/peers if it is missing.
"""

import argparse
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quality
import record
from environments import PACKAGES, environment_of

WINDOW, WINDOWS = 512, 4
RESULT = "onnx"
MADE = quality.ROOT / ".cache/quality/smollm2/0"
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
        "versions": {package: version(package) for package in ("onnx", "onnxscript", "onnxruntime")}
        | {"openvino": PACKAGES["openvino"][0].partition("==")[2]},
    }
    results = record.read(RESULT)
    for checkpoint in arguments.checkpoints:
        with tempfile.TemporaryDirectory() as scratch:
            results[checkpoint.name] = measured(checkpoint, Path(scratch), windows)
        record.write(RESULT, settings, results)


def measured(checkpoint: Path, scratch: Path, windows: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import optq

    folder = optq.export_onnx(checkpoint, output_dir=scratch / "onnx")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        ours = torch.cat([model(input_ids=window).logits for window in windows.split(1)])
    found: dict[str, Any] = {
        "onnxruntime": compared(ours, in_onnxruntime(folder, windows), windows),
        "openvino": compared(ours, in_openvino(folder, windows, "accuracy"), windows),
        "openvino, its defaults": compared(ours, in_openvino(folder, windows, "default"), windows),
    }
    return {
        "runtimes": found,
        "checkpoint_mb": megabytes(checkpoint.glob("*.safetensors")),
        "onnx_mb": megabytes(folder.glob("model.onnx*")),
        "measured_at": record.measured_at(),
    }


def compared(ours: Any, theirs: Any, windows: Any) -> dict[str, Any]:
    """What a runtime's logits are beside ours; if it gave none, what it said."""
    from optq.evaluation import Comparer

    if isinstance(theirs, str):
        return {"said": theirs}
    comparer = Comparer()
    comparer.add(ours[:, :-1], theirs[:, :-1], windows[:, 1:])
    comparison = comparer.result()
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "original_perplexity": comparison.original_perplexity,
        "perplexity": comparison.perplexity,
        "same_top_token": comparison.agreement,
    }


def in_onnxruntime(folder: Path, windows: Any) -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = ({"input_ids": w.numpy(), "attention_mask": torch.ones_like(w).numpy()} for w in windows.split(1))
    return torch.cat([torch.from_numpy(session.run(None, window)[0]) for window in inputs])


def in_openvino(folder: Path, windows: Any, mode: str) -> Any:
    """Its logits, or its last line if it gave none."""
    import numpy
    import torch

    python = environment_of("openvino")
    if python is None:
        return "it cannot be installed here"
    ids, logits = folder.parent / "ids.npy", folder.parent / "logits.npy"
    logits.unlink(missing_ok=True)
    numpy.save(ids, windows.numpy())
    script = Path(__file__).parent / "peers/with_openvino.py"
    command = [python, script, folder / "model.onnx", ids, logits, mode, torch.get_num_threads()]
    ended = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return torch.from_numpy(numpy.load(logits)) if logits.exists() else ended.stdout.strip().splitlines()[-1]


def megabytes(files: Any) -> float:
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


if __name__ == "__main__":
    main()
