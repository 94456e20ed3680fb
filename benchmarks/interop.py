# SPDX-License-Identifier: Apache-2.0
"""Who reads our checkpoints: real readers, each in its own environment, against what `optq.check` says they will do.

Small random models, and SmolLM2-135M-Instruct at 4 bits, are quantized in every way that the format has. Every reader
computes the log-probabilities of the same tokens; they are compared with those of the dequantized model in float32.

    python benchmarks/interop.py [--only PATTERN …] [--readers NAME …]

Environments that are missing are made in .cache/peers. The script fails if a reader did otherwise than was predicted.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import quality
import record
from environments import environment_of

ROOT = Path(__file__).resolve().parent.parent
RESULT = "interop"
READERS = {"transformers": None, "gptqmodel": "gptqmodel", "vllm-cpu": "vllm", "vllm+optq": "vllm"}
"""As in `optq.readers.READERS`, with the environment's name; None: this one."""

LARGEST_MEAN = {"transformers": 1e-4, "gptqmodel": 0.1, "vllm-cpu": 0.05, "vllm+optq": 0.05}
"""Mean difference of a token's log-probability, nats: float32 here; bfloat16 and float16 there."""

IN_FLOAT32 = "vllm+optq in float32"
"""A second reading by the plugin, which tells rounding from error: in float16 a token may go to another expert."""

SAMPLES, LENGTH, SEED = 16, 128, 0

CHUNK = 64
"""Tokens that vLLM computes at once: so few that packed weights are multiplied as in decoding, not dequantized."""

BASE: dict[str, Any] = {"bits": 4, "group_size": 32}
TINY: dict[str, dict[str, Any]] = {
    "2-bit g32 sym": {"bits": 2},
    "3-bit g32 sym": {"bits": 3},
    "4-bit g32 sym": {},
    "8-bit g32 sym": {"bits": 8},
    "4-bit g64 sym": {"group_size": 64},
    "4-bit g128 sym": {"group_size": 128},
    "4-bit, one group per row, sym": {"group_size": -1},
    "4-bit g32 sym, gptq_v2": {"format": "gptq_v2"},
    "4-bit g32 asym": {"sym": False},
    "4-bit g32 asym, gptq_v2": {"sym": False, "format": "gptq_v2"},
    "2-bit g32 asym": {"bits": 2, "sym": False},
    "4-bit g32 sym, desc_act": {"desc_act": True},
    "4-bit g32 sym, MLP not quantized": {"dynamic": {r"-:.*\.mlp\..*": {}}},
    "4-bit g32 sym, down_proj 8-bit": {"dynamic": {r"+:.*\.down_proj": {"bits": 8}}},
    "4-bit g32 sym, up_proj 8-bit": {"dynamic": {r"+:.*\.up_proj": {"bits": 8}}},
    "4-bit g32 sym, q_proj not quantized": {"dynamic": {r"-:.*\.q_proj": {}}},
    "4-bit g32 sym, lm_head": {"lm_head": True},
    "4-bit g96 sym": {"group_size": 96},
}
MIXTURE = {"4-bit g32 sym, mixture of experts": {}}
REAL = {
    "4-bit g32 sym, SmolLM2": {},
    "4-bit g64 sym, SmolLM2": {"group_size": 64},
    "4-bit, one group per row, sym, SmolLM2": {"group_size": -1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of checkpoint names")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS)
    parser.add_argument("--read", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(*arguments.read)
        return
    results: dict[str, Any] = record.read(RESULT)
    versions = {reader: version_of(reader) for reader in arguments.readers}
    surprises = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in {**TINY, **MIXTURE, **REAL}.items():
            if not any(fnmatch(name, pattern) for pattern in arguments.only):
                continue
            folder = made(Path(scratch, "checkpoint"), name, settings)
            for reader in arguments.readers:
                found = tried(reader, folder)
                if found is None:
                    continue
                if reader == "vllm+optq" and found["reads"]:
                    exact = tried(IN_FLOAT32, folder) or {}
                    found["largest_difference_in_float32"] = exact.get("largest_difference")
                measured_at = {**record.measured_at(), "version": versions[reader]}
                results.setdefault(name, {})[reader] = {**found, "measured_at": measured_at}
                print(f"{name} | {reader} | {found}", flush=True)
                if bool(found["predicted"]) is found["reads"] or found.get("largest_difference_in_float32", 0) is None:
                    surprises.append(f"{name}: {reader}")
            record.write(RESULT, settings_of_the_run(), results, quiet=True)
    if surprises:
        sys.exit(f"Not as optq.check predicted: {'; '.join(surprises)}")


def settings_of_the_run() -> dict[str, Any]:
    return {
        "models": "llama of 2 blocks and qwen3_moe of 2 blocks and 4 experts, random; SmolLM2-135M-Instruct",
        "tokens": [2, LENGTH],
        "largest_mean_difference": LARGEST_MEAN,
        "seed": SEED,
    }


def made(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """The checkpoint, with ids.json beside it: tokens, and what the dequantized model makes of them."""
    import torch
    from transformers import AutoModelForCausalLM

    import optq

    shutil.rmtree(folder.parent / "dense", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(SEED)
    data: list[Any]
    if name in REAL:
        pages = sorted((ROOT / "docs").glob("*.md"))
        dense, data = quality.model_folder(), [page.read_text(encoding="utf-8") for page in pages]
    else:
        dense = str(folder.parent / "dense")
        tiny_model(name in MIXTURE).save_pretrained(dense)
        tiny_tokenizer().save_pretrained(dense)  # GPTQModel does not load without
        rows = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator).tolist()
        data = [{"input_ids": row} for row in rows]
    config = optq.GPTQConfig(
        **{**BASE, **settings}, dataset=data, num_samples=SAMPLES, model_seqlen=LENGTH, quality_gate="off", seed=SEED
    )
    optq.quantize(dense, config, output_dir=folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    expected = log_probabilities(model, ids)
    (folder.parent / "ids.json").write_text(json.dumps({"ids": ids.tolist(), "expected": expected}))
    return folder


VOCABULARY = 512


def tiny_model(mixture: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shared, **moe) if mixture else LlamaConfig(**shared))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)  # so that logits differ by more than rounding does
    return model


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"word{number}": number for number in range(VOCABULARY)}, unk_token="word0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="word0", pad_token="word0")


def log_probabilities(model: Any, ids: Any) -> list[list[float]]:
    """Of every token but the first, given those before it."""
    import torch

    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    picked: list[list[float]] = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].tolist()
    return picked


def tried(reader: str, folder: Path) -> dict[str, Any] | None:
    """What a reader makes of a checkpoint, in a process of its own; None if there is no such reader here."""
    import optq

    python = python_of(reader)
    if python is None:
        return None
    output = folder.parent / "found.json"
    output.unlink(missing_ok=True)
    asked = json.loads((folder.parent / "ids.json").read_text())
    command = [python, __file__, "--read", reader, folder, folder.parent / "ids.json", output]
    ended = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    reader = reader.removesuffix(" in float32")
    found: dict[str, Any] = {"predicted": list(optq.check(folder, server=reader))}
    if not output.exists():
        return {**found, "reads": False, "said": complaint(ended.stdout)}
    differences = [
        abs(x - y)
        for row, wanted in zip(json.loads(output.read_text()), asked["expected"], strict=True)
        for x, y in zip(row, wanted, strict=True)
    ]
    mean = sum(differences) / len(differences)
    return {
        **found,
        "reads": mean <= LARGEST_MEAN[reader],
        "largest_difference": round(max(differences), 7),
        "mean_difference": round(mean, 7),
    }


def complaint(output: str) -> str:
    """The last error among what a process printed."""
    lines = [line.removeprefix("[rank0]: ").strip() for line in output.splitlines()]
    begins = [number for number, line in enumerate(lines) if re.match(r"[\w.]+Error: ", line)]
    return " ".join(lines[begins[-1] if begins else -1 :])[:400]


def read(reader: str, folder: str, ids_file: str, output: str) -> None:
    """In the reader's own process."""
    ids = json.loads(Path(ids_file).read_text())["ids"]
    os.environ["OPTQ_VLLM"] = "0" if reader == "vllm-cpu" else "1"
    readers = {"transformers": with_transformers, "gptqmodel": with_gptqmodel, IN_FLOAT32: with_vllm_in_float32}
    found = readers.get(reader, with_vllm)(folder, ids)
    Path(output).write_text(json.dumps(found))


def with_transformers(folder: str, ids: list[list[int]]) -> list[list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    return log_probabilities(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.tensor(ids))


def with_gptqmodel(folder: str, ids: list[list[int]]) -> list[list[float]]:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
    return log_probabilities(model.model, torch.tensor(ids))


def with_vllm_in_float32(folder: str, ids: list[list[int]]) -> list[list[float]]:
    return with_vllm(folder, ids, dtype="float32", quantization="optq")  # vLLM's own rows have no float32


def with_vllm(folder: str, ids: list[list[int]], **settings: str) -> list[list[float]]:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        **{"dtype": "float16", **settings},
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=SEED,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": row} for row in ids], asked, use_tqdm=False)
    return [
        [answer.prompt_logprobs[place][row[place]].logprob for place in range(1, len(row))]
        for row, answer in zip(ids, answers, strict=True)
    ]


def python_of(reader: str) -> Path | None:
    """The reader's Python; its environment is made if need be."""
    tool = READERS[reader.removesuffix(" in float32")]
    if tool is None:
        return Path(sys.executable)
    return environment_of(tool)


def version_of(reader: str) -> str | None:
    package = {"vllm+optq": "vllm-cpu"}.get(reader, reader)
    python = python_of(reader)
    if python is None:
        return None
    asked = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", asked], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
