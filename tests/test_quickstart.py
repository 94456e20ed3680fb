# SPDX-License-Identifier: Apache-2.0
"""The quick start's own commands, as a stranger types them."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 600  # seconds, on two cores


@pytest.mark.minutes
def test_the_commands_of_the_quick_start_work(tmp_path):
    pytest.importorskip("gguf", reason="reading the model's GGUF file needs the package gguf")
    import smollm2

    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    # What the tests have fetched already need not be fetched again.
    (tmp_path / "models").symlink_to(smollm2.fetch().parent)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    alone = "PYTEST_XDIST_WORKER" not in os.environ and (os.cpu_count() or 1) >= 2
    if alone:
        environment.pop("OMP_NUM_THREADS", None)
    started, shown = time.monotonic(), ""
    for command in commands.strip().splitlines():
        ended = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        shown += ended.stdout
    seconds = time.monotonic() - started
    assert "SmolLM2-4bit is finished" in shown
    assert "the original" in shown
    assert re.search(r"SmolLM2-4bit .* (as good as the original|good|usable)\s*$", shown, re.MULTILINE)
    assert "Paris" in shown
    assert (tmp_path / "SmolLM2-4bit/README.md").exists()
    assert seconds < LIMIT or not alone
