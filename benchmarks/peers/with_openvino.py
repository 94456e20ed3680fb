# SPDX-License-Identifier: Apache-2.0
"""The logits of an ONNX model in OpenVINO on a CPU, in its own environment. Run by onnx_export.py, never by hand.

    python with_openvino.py MODEL.onnx IDS.npy LOGITS.npy MODE THREADS

IDS.npy: (windows, length) int64; LOGITS.npy: (windows, length, vocabulary) float32. MODE is "accuracy" or "default".
"""

import sys

import numpy as np
import openvino


def main(model: str, ids: str, logits: str, mode: str, threads: str) -> None:
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": int(threads)})
    compiled = core.compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"} if mode == "accuracy" else {})
    found = []
    for window in np.load(ids):
        tokens = window[None]
        answer = compiled({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0]
        if answer.shape[:2] != tokens.shape:
            sys.exit(f"logits of shape {answer.shape} for tokens of shape {tokens.shape}")
        found.append(answer.copy())
    np.save(logits, np.concatenate(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
