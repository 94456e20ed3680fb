# SPDX-License-Identifier: Apache-2.0
"""The row of another package: in words where it cannot run, in the interpreter where it can."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_kernels import packed_weight

from conftest import triton_on_cpus
from optq.errors import KernelError
from optq.kernels import BACKENDS, KERNELS, choose_kernel, explain, gemlite_gpu


def test_it_is_in_the_table_and_never_chosen_unasked(monkeypatch):
    triton_on_cpus(monkeypatch)
    packed = packed_weight(4, 64, True)
    assert "gemlite" not in BACKENDS["auto"]
    monkeypatch.setattr(gemlite_gpu, "find_spec", lambda name: None)
    assert "pip install gemlite" in explain(packed, torch.float16)["gemlite"]
    with pytest.raises(KernelError, match="pip install gemlite"):
        choose_kernel(packed, torch.float16, "gemlite")
    monkeypatch.undo()
    assert "the layer is on cpu" in explain(packed, torch.float16)["gemlite"]


@pytest.mark.parametrize(
    ("packed", "dtype", "reason"),
    [
        (packed_weight(3, 64, True), torch.float16, "these have 3"),
        (packed_weight(4, 64, True), torch.float32, "activations"),
        (packed_weight(4, 64, True, out=48), torch.float16, "outputs"),
        (packed_weight(4, 16, True), torch.float16, "columns"),
        (packed_weight(4, 128, True), torch.float16, "same width"),  # 192 columns
        (packed_weight(8, -1, True), torch.bfloat16, None),
    ],
)
def test_refuses_shapes_in_words(packed, dtype, reason, monkeypatch):
    triton_on_cpus(monkeypatch)
    monkeypatch.setattr(gemlite_gpu, "find_spec", lambda name: "a package")
    monkeypatch.setattr(gemlite_gpu, "_why_wrong", lambda *arguments: None)
    found = KERNELS["gemlite"].why_not(packed, dtype)
    assert found is None if reason is None else reason in found


@pytest.mark.long
@pytest.mark.skipif(find_spec("gemlite") is None or torch.cuda.is_available(), reason="wants gemlite, and no GPU")
def test_it_gets_what_it_wants():
    script = Path(__file__).with_name("gemlite_interpreted.py")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
