# SPDX-License-Identifier: Apache-2.0
"""The whole path on a real trained model: the quick start's own commands, as a stranger types them, and their result.

Nothing there knows how optq works inside; every step is a process of its own. It takes minutes, so the commands get
the model's first blocks only, and less text than the page asks for: CPUs without instructions for bfloat16 multiply in
it at a seventh of their speed. What the whole model says with packed blocks at its start and end is another test.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import rewritten
from optq import GPTQConfig, QuantLinear

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples/demo.py"
LIMIT = 150  # seconds, on two cores
BLOCKS = 2  # of 30
EMBEDDINGS = 49152 * 576 * 4 / 2**30  # GiB, which are not packed
SMALLER = {"num-samples": (16, 8), "seq-len": (256, 64), "tokens": (1024, 128), "window": (256, 64)}
"""Options of the page -> their values there and here."""

TEXTS = [topics[name] for name in sorted(topics)[:16]]
FEW = {"num_samples": 8, "model_seqlen": 64}

pytestmark = pytest.mark.minutes


@dataclass(frozen=True, kw_only=True)
class QuickStart:
    """What the commands of the page have left and shown."""

    original: Path
    folder: Path
    shown: str
    seconds: float
    alone: bool


@pytest.fixture(scope="module")
def whole_model() -> Path:
    pytest.importorskip("gguf", reason="reading the model's GGUF file needs the package gguf")
    import smollm2

    return smollm2.fetch()


def cut(model: Path, folder: Path) -> None:
    """Write its first blocks, with its embeddings, norm and tokenizer."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    kept = {
        name: tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if not (block := re.match(r"model\.layers\.(\d+)\.", name)) or int(block[1]) < BLOCKS
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with rewritten(folder / "config.json") as config:
        config["num_hidden_layers"] = BLOCKS


@pytest.fixture(scope="module")
def quick_start(whole_model: Path, tmp_path_factory: pytest.TempPathFactory) -> QuickStart:
    place = tmp_path_factory.mktemp("quick-start")
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for option, (there, here) in SMALLER.items():
        assert commands.count(f"--{option} {there} ") == 1
        commands = commands.replace(f"--{option} {there} ", f"--{option} {here} ")
    # What is there need not be fetched again.
    original = place / "models" / whole_model.name
    cut(whole_model, original)
    shutil.copytree(ROOT / "examples", place / "examples")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    alone = "PYTEST_XDIST_WORKER" not in os.environ and (os.cpu_count() or 1) >= 2
    if alone:
        environment.pop("OMP_NUM_THREADS", None)
    started, shown = time.monotonic(), ""
    for command in commands.strip().splitlines():
        ended = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        shown += ended.stdout
    return QuickStart(
        original=original,
        folder=place / "SmolLM2-4bit",
        shown=shown,
        seconds=time.monotonic() - started,
        alone=alone,
    )


def row_of(model: str, shown: str) -> list[float]:
    """Bits per weight, GiB, and perplexity by two protocols, as `compare` has printed them."""
    (row,) = re.findall(rf"^ +{re.escape(model)} +((?:[\d.]+ +){{4}})", shown, re.MULTILINE)
    return [float(cell) for cell in row.split()]


def test_the_commands_of_the_quick_start_work(quick_start):
    assert "SmolLM2-4bit is finished" in quick_start.shown
    assert "the original" in quick_start.shown
    assert re.search(r"SmolLM2-4bit .* (as good as the original|good|usable)\s*$", quick_start.shown, re.MULTILINE)
    assert (quick_start.folder / "README.md").exists()
    assert quick_start.seconds < LIMIT or not quick_start.alone


def test_the_result_is_small_and_close_to_the_original_and_what_both_answer_is_shown(quick_start):
    (_, size, *before), (bits, packed_size, *after) = (
        row_of(model, quick_start.shown) for model in ("models/SmolLM2-135M-Instruct", "SmolLM2-4bit")
    )
    assert bits < 4.5
    assert packed_size - EMBEDDINGS < 0.25 * (size - EMBEDDINGS)
    assert all(0.9 * one < other < 1.35 * one for one, other in zip(before, after, strict=True))
    answers = quick_start.shown.partition("'The capital of France is'")[2].splitlines()[1:3]
    assert [answer.split(":")[0].strip() for answer in answers] == ["models/SmolLM2-135M-Instruct", "SmolLM2-4bit"]
    assert all(len(answer.partition(":")[2]) > 10 for answer in answers)


@pytest.mark.long
def test_the_whole_model_still_talks_with_its_first_and_last_blocks_in_4_bits(whole_model, tmp_path):
    ends = {rf"-:model\.layers\.{block}\..*": {} for block in range(2, 28)}
    config = GPTQConfig(bits=4, group_size=64, effort="fast", dataset=TEXTS, dynamic=ends, **FEW)
    model = AutoModelForCausalLM.from_pretrained(whole_model, quantization_config=config, dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 4 * 7
    tokenizer = AutoTokenizer.from_pretrained(whole_model)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    found = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(found[0, prompt.shape[1] :]).strip().startswith("Paris")


def test_the_card_and_config_say_what_it_was_calibrated_on(quick_start):
    config = json.loads((quick_start.folder / "config.json").read_text())["quantization_config"]
    stated = config["meta"]["calibration"]
    samples, length = (SMALLER[option][1] for option in ("num-samples", "seq-len"))
    assert stated["tokens"] + stated["held_out"] * length == samples * length


@pytest.mark.long
def test_the_demo_quantizes_saves_and_compares_in_new_processes(tiny_llama, tmp_path):
    """What it does with the real model, with a tiny one: `make demo` itself takes minutes."""
    command = [sys.executable, str(DEMO), "--model", str(tiny_llama), "--output", str(tmp_path / "out")]
    shown = subprocess.run(
        [*command, "--group-size", "32", "--samples", "4"], check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"perplexity, held-out text +\d", shown)
    assert re.search(r"weights, MB +\d", shown)
    assert (tmp_path / "out/config.json").exists()
