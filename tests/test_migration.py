# SPDX-License-Identifier: Apache-2.0
"""docs/migration.md: every new call runs as it is written, and every name and option that it mentions exists."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import optq
from optq import GPTQConfig, QuantLinear
from optq.cli import main

PAGE = (Path(__file__).parents[1] / "docs/migration.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
WITH_CODE = [name for name, text in SECTIONS.items() if "```python" in text]
IMPORTS = re.search(r"```python\n(.*?)```", PAGE.split("\n## ")[0], re.DOTALL)


def new_cells() -> Iterator[str]:
    """The right-hand columns of all tables."""
    for text in SECTIONS.values():
        yield from re.findall(r"^\| .* \| (.*) \|$", text, re.MULTILINE)


@pytest.mark.parametrize("section", WITH_CODE)
def test_the_new_calls_run(section, tiny_llama, token_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert IMPORTS is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    given = {
        "examples": token_rows[:4],
        "calibration": token_rows[:4],
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_llama),
    }
    code = IMPORTS[1] + "\n".join(re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL))
    # What is elsewhere, or is none of this machine's, or takes long; the calls stay as they are.
    for shown, here in (("org/model", str(tiny_llama)), ('"c4"', "examples"), ("cuda:0", "cpu"), ("=128", "=32")):
        code = code.replace(shown, here)
    code = code.replace("sym=False)", "sym=False, num_samples=2, model_seqlen=16)")
    names = dict(given)
    exec(code, names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(isinstance(module, QuantLinear) for module in loaded.modules())


def test_the_sections_are_those_that_people_come_from():
    assert {"optimum.gptq", "AutoGPTQ", "GPTQModel", "Qwen's run_gptq.py", "AutoAWQ"} <= set(SECTIONS)


def test_every_field_exists():
    fields = set(inspect.signature(GPTQConfig).parameters)
    loading = {"use_safetensors", "device_map"}
    found = {name for cell in new_cells() for name in re.findall(r"`(\w+)=", cell)}
    assert len(found) > 10
    assert found - fields - loading == {"OPTQ_AUTOTUNE"}


def test_every_function_exists():
    for name in re.findall(r"\boptq\.(\w+)\(", PAGE):
        assert hasattr(optq, name), name


def test_every_option_exists(capsys):
    command = re.findall(r"^optimum-cli export gptq.*", SECTIONS["Qwen's run_gptq.py"], re.MULTILINE)
    mentioned = {flag for cell in (*new_cells(), *command) for flag in re.findall(r"(?<![\w-])--[\w-]+", cell)}
    assert {"--seq-len", "--data-path"} <= mentioned
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert mentioned <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
