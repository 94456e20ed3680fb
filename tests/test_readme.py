# SPDX-License-Identifier: Apache-2.0
"""The README is short, its table is made from the benchmarks' JSON, and pages say how optq is installed as it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optq import GPTQConfig, QuantLinear
from optq.version import __version__, pip_install

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def test_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_the_tables_are_what_the_benchmarks_measured():
    subprocess.run([sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], check=True)


@pytest.mark.parametrize("page", PAGES)
def test_where_a_quantized_model_is_saved_so_is_its_tokenizer(page):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        if "GPTQConfig(" in block:
            for folder in re.findall(r"model\.save_pretrained\((.*?)\)", block):
                assert re.search(rf"[Tt]okenizer.*\.save_pretrained\({re.escape(folder)}\)", block), f"{page}: {block}"


def test_the_calls_of_the_readme_run(tiny_llama, token_rows, quantized, tmp_path, monkeypatch):
    calls = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "optq.plan(" in block)
    calls = calls.replace('"org/model"', repr(str(tiny_llama)))
    monkeypatch.chdir(tmp_path)
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    layer = next(module for module in quantized.modules() if isinstance(module, QuantLinear))
    exec(calls, {"model": model, "config": config, "layer": layer, "torch": torch})
    assert "quantization_config" in (tmp_path / "out/config.json").read_text()


def test_every_page_installs_optq_as_its_version_says(tmp_path):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from install import COMMAND, PAGES, with_commands
    finally:
        sys.path.pop(0)
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert sum(len(COMMAND.findall(text)) for text in texts) >= 6
    assert texts == [with_commands(text) for text in texts]
    wrong = "`pip install optq` pip install 'optq[onnx]' pip install \"optq[onnx]\" pip install optq-other"
    assert with_commands(wrong) == (
        f"`{pip_install()}` {pip_install('onnx')} {pip_install('onnx')} pip install optq-other"
    )


@pytest.mark.parametrize(("version", "told"), [("0.1.0.dev0", "pip install '.[onnx]'"), ("0.1.0", "'optq[onnx]'")])
def test_a_released_version_is_installed_by_its_name(version, told):
    source = (ROOT / "src/optq/version.py").read_text().replace(f'"{__version__}"', f'"{version}"')
    names: dict[str, object] = {}
    exec(source, names)
    assert told in names["how_to_install"]("onnx")
    assert ("repository" in names["how_to_install"]()) == ("dev" in version)


def test_no_text_of_the_package_says_it_otherwise():
    for file in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"pip install ['\"]?optq", file.read_text(encoding="utf-8")), file


def test_the_quickstart_installs_what_its_commands_need():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    assert "[demo]" in page and "gptq report" in page
    assert set(extras["report"]) <= set(extras["demo"])


@pytest.mark.parametrize("page", PAGES)
def test_names_that_are_linked_to_a_file_are_defined_in_it(page):
    path = ROOT / page
    for name, target in re.findall(r"\[`(\w+)`\]\(([^)#:]+\.py)\)", path.read_text(encoding="utf-8")):
        source = (path.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.*=", source, re.MULTILINE), f"{page}: {name}, {target}"
