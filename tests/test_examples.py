# SPDX-License-Identifier: Apache-2.0
"""docs/examples.md on a tiny model, in this process: its commands and scripts, but for vLLM and several processes."""

import io
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from optq import cli
from optq.api.inspect import inspect

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
ELSEWHERE = ("vllm", "curl", "torchrun")
MODEL = "models/SmolLM2-135M-Instruct"
SMALLER = {
    "--num-samples 16": "--num-samples 4",
    "--seq-len 256": "--seq-len 64",
    "--target-size-gib 0.17": "--target-size-gib 0.00007",
}
QUICK = {
    "chat.py": "--samples 4 --max-new-tokens 8",
    "domain.py": "--samples 4 --tokens 256",
    "finetune.py": "--batch-size 1",
}


def lines() -> list[str]:
    """All commands of the page, in their order."""
    return [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]


def test_every_script_is_on_the_page():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"python examples/(\w+\.py)", PAGE)) == scripts - {"demo.py"}  # that is `make demo`


@pytest.mark.long
def test_the_commands_run_one_after_the_other(tiny_llama, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / MODEL)
    shutil.copytree(saved, tmp_path / "old")
    (chats,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "chats.jsonl").write_text(chats * 4, encoding="utf-8")
    for line in lines():
        for there, here in SMALLER.items():
            line = line.replace(there, here)
        program, *arguments = shlex.split(line)
        if program == "python" and arguments[0] != "examples/smollm2.py":
            script = ROOT / arguments[0]
            monkeypatch.setattr("sys.argv", [*arguments, *QUICK[script.name].split()])
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd you?\n"))
            runpy.run_path(str(script), run_name="__main__")
        elif program == "optimum-cli":
            verb = "quantize" if arguments[0] == "export" else arguments[1]
            assert cli.main([verb, *arguments[2:]]) == 0, line
        else:
            assert program in ELSEWHERE or arguments == ["examples/smollm2.py", "models"], line
    shown = capsys.readouterr().out
    assert len(re.findall(r"domain/\S+: KL divergence \d", shown)) == 3
    assert re.search(r"loss on rows held out: [\d.]+ before", shown)
    assert (tmp_path / "finetuned/adapter/adapter_config.json").exists()
    assert (tmp_path / "budget/report/report.html").exists()
    assert inspect(tmp_path / "served-4bit").bits_per_weight < 5
    assert "quantization_config" not in (tmp_path / "old-dense/config.json").read_text()
