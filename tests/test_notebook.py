# SPDX-License-Identifier: Apache-2.0
"""A run in a real notebook kernel."""

import sys

import pytest

nbclient = pytest.importorskip("nbclient", reason="running a notebook needs the packages nbclient and ipykernel")
nbformat = pytest.importorskip("nbformat", reason="running a notebook needs the package nbformat")
pytest.importorskip("ipykernel", reason="running a notebook needs the package ipykernel")

CELL = """
from transformers import AutoModelForCausalLM
from optq import GPTQConfig

rows = [{{"input_ids": list(range(4 + start, 52 + start))}} for start in range(16)]
config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=rows)
model = AutoModelForCausalLM.from_pretrained({!r}, quantization_config=config)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the kernel's and its client's own
def test_a_cell_shows_the_bar_and_the_summary(tiny_llama, tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)  # a command sets it, for what it starts
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    monkeypatch.setattr(AsyncKernelManager, "kernel_spec", KernelSpec(argv=command, language="python"))
    cell = nbformat.v4.new_code_cell(CELL.format(str(tiny_llama)))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    written = "".join(output.get("text", "") for output in cell.outputs)
    shown = " ".join(str(output.get("data", "")) for output in cell.outputs)
    assert "Quantized 14 linears of 2 blocks" in written
    assert "Quantizing: " in written + shown  # as text, or as a widget where ipywidgets is installed
