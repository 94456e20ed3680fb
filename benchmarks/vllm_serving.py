# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU with optq's plugin: perplexity beside transformers', speed and loading beside vLLM's own kernel.

    python benchmarks/vllm_serving.py --data FOLDER         # with wikitext2-valid.txt and wikitext2-test.txt

SmolLM2-135M-Instruct in 2, 3, 4 and 8 bits, groups of 64, effort "fast". Perplexity is that of WikiText-2's test
text, from the start, in windows; transformers computes in float32 with the same packed weights, vLLM in float16.
Decoding: engines that stay loaded, each in its process, take turns; what is compared is the ratio of neighbours in
time. Loading: processes that do nothing else take turns; the figure is what vllm.LLM takes, eagerly, from the call to
the first request. So few threads and so small a model say little about a GPU: see docs/kernels.md for the kernels.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import record
from environments import environment_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

RESULT = "vllm-cpu"
BITS = (2, 3, 4, 8)
WINDOWS, WINDOW, SEED = 12, 512, 0
NEW_TOKENS, ROUNDS = 64, 9
ENGINES = {"vLLM, 4 bits": (4, None), "optq, 4 bits": (4, "optq"), "optq, 3 bits": (3, "optq")}
"""Name -> bits of the checkpoint, and what `--quantization` says."""

SERVER = """
import json, os, sys, time
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_TARGET_DEVICE": "cpu", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
def main():
    answers, settings = os.fdopen(os.dup(1), "w"), json.loads(sys.argv[1])
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams
    start = time.perf_counter()
    engine = LLM(dtype="float16", max_model_len=1024, seed=0, skip_tokenizer_init=True, max_num_seqs=8, **settings)
    print("ready", time.perf_counter() - start, file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        wanted = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **asked["sampling"])
        start = time.perf_counter()
        found = engine.generate([{"prompt_token_ids": row} for row in asked["ids"]], wanted, use_tqdm=False)
        seconds = time.perf_counter() - start
        logs = [[one.prompt_logprobs[at][row[at]].logprob for at in range(1, len(row))] if one.prompt_logprobs else []
            for row, one in zip(asked["ids"], found)]
        print(json.dumps({"seconds": seconds, "logs": logs}), file=answers, flush=True)
if __name__ == "__main__":
    main()
"""


class Engine:
    """A model in vLLM, in a process of its own."""

    def __init__(self, python: Path, script: Path, folder: Path, log: Path, **settings: Any) -> None:
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(python), str(script), json.dumps({"model": str(folder), **settings})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        ready, _, seconds = self.process.stdout.readline().partition(" ")
        if ready != "ready":
            raise RuntimeError(log.read_text()[-2000:])
        self.seconds = float(seconds)

    def ask(self, ids: list[list[int]], **sampling: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"ids": ids, "sampling": sampling}), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    python = environment_of("vllm")
    if python is None:
        sys.exit(1)
    asked = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    version = subprocess.run([python, "-c", asked], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch, "server.py")
        script.write_text(SERVER)
        folders = {bits: quantized(bits, Path(scratch, str(bits)), arguments.data) for bits in BITS}
        results = {
            "load": loading(python, script, folders, Path(scratch)),
            "decode": decoding(python, script, folders, Path(scratch)),
            "perplexity": perplexities(python, script, folders, arguments.data, Path(scratch)),
        }
    settings = {
        "model": "SmolLM2-135M-Instruct (of a Q4_1 GGUF)",
        "vllm": version,
        "group_size": 64,
        "effort": "fast",
        "windows": [WINDOWS, WINDOW],
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "seed": SEED,
    }
    record.write(RESULT, settings, results)


def quantized(bits: int, folder: Path, data: Path) -> Path:
    import torch

    import optq
    from smollm2 import fetch

    text = (data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    config = optq.GPTQConfig(
        bits=bits, group_size=64, dataset=[text], num_samples=16, model_seqlen=512, effort="fast", quality_gate="off"
    )
    optq.quantize(fetch(), config, output_dir=folder, dtype=torch.float32)
    return folder


def windows_of(data: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    from smollm2 import fetch

    text = (data / "wikitext2-test.txt").read_text(encoding="utf-8")[: WINDOWS * WINDOW * 8]
    ids = AutoTokenizer.from_pretrained(fetch())(text)["input_ids"]
    return [ids[start : start + WINDOW] for start in range(0, WINDOWS * WINDOW, WINDOW)]


def perplexities(
    python: Path, script: Path, folders: dict[int, Path], data: Path, scratch: Path
) -> dict[str, dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM

    rows, found = windows_of(data), {}
    for bits, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        total = 0.0
        for row in rows:
            ids = torch.tensor([row])
            with torch.no_grad():
                picked = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            total -= float(picked.double().sum())
        count = WINDOWS * (WINDOW - 1)
        # Chunks of 64 tokens: packed weights are multiplied as in decoding, not dequantized.
        engine = Engine(
            python, script, folder, scratch / "log", quantization="optq", enforce_eager=True, max_num_batched_tokens=64
        )
        logs = [value for row in rows for value in engine.ask([row], max_tokens=1, prompt_logprobs=0)["logs"][0]]
        engine.end()
        ours, theirs = math.exp(total / count), math.exp(-sum(logs) / count)
        found[f"{bits} bits"] = {
            "transformers, float32": round(ours, 4),
            "vLLM, float16": round(theirs, 4),
            "ratio": round(theirs / ours, 5),
        }
        print(f"{bits} bits", found[f"{bits} bits"], flush=True)
    return found


def decoding(python: Path, script: Path, folders: dict[int, Path], scratch: Path) -> dict[str, Any]:
    """Seconds of a token for the batch, of engines that take turns, less those of one token."""
    engines = {
        name: Engine(python, script, folders[bits], scratch / f"{bits}-{method}.log", **_method(method))
        for name, (bits, method) in ENGINES.items()
    }
    found: dict[str, Any] = {}
    for batch in (1, 8):
        ids = [[100 + 7 * row + at for at in range(16)] for row in range(batch)]
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for round_ in range(ROUNDS + 1):
            for name, engine in engines.items():
                one = engine.ask(ids, max_tokens=1)["seconds"]
                many = engine.ask(ids, max_tokens=NEW_TOKENS + 1)["seconds"]
                if round_:  # the first one compiles
                    seconds[name].append((many - one) / NEW_TOKENS)
        own = seconds["vLLM, 4 bits"]
        found[f"batch {batch}"] = {
            "milliseconds": {name: round(1000 * median(each), 3) for name, each in seconds.items()},
            "4 bits, speed beside vLLM's own": ratio(own, seconds["optq, 4 bits"]),
            "3 bits, speed beside 4 bits": ratio(seconds["optq, 4 bits"], seconds["optq, 3 bits"]),
        }
        print(f"batch {batch}", found[f"batch {batch}"], flush=True)
    for engine in engines.values():
        engine.end()
    return found


def loading(python: Path, script: Path, folders: dict[int, Path], scratch: Path) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in list(ENGINES)[:2]}
    for _ in range(5):
        for name, each in seconds.items():
            bits, method = ENGINES[name]
            engine = Engine(python, script, folders[bits], scratch / "log", enforce_eager=True, **_method(method))
            each.append(engine.seconds)
            engine.end()
    return {
        "seconds": {name: round(median(each), 3) for name, each in seconds.items()},
        "time beside vLLM's own": ratio(seconds["optq, 4 bits"], seconds["vLLM, 4 bits"]),
    }


def _method(method: str | None) -> dict[str, str]:
    return {} if method is None else {"quantization": method}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Of neighbours in time: the median and the quartiles."""
    each = sorted(a / b for a, b in zip(over, under, strict=True))
    return {
        "median": round(median(each), 3),
        "quartiles": [round(each[len(each) // 4], 3), round(each[3 * len(each) // 4], 3)],
    }


if __name__ == "__main__":
    main()
