# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import torch

from optq.memory import peak_gib, release_free_memory


def test_peak_follows_an_allocation():
    before = peak_gib("cpu")
    block = torch.ones(int(before * 2**30) // 4 + 50_000_000)  # more than everything so far
    assert peak_gib("cpu") > before + 0.15
    assert block.sum() > 0


def test_a_child_process_does_not_inherit_the_peak_of_its_parent():
    code = "import torch; from optq.memory import peak_gib; print(peak_gib('cpu'))"
    block = torch.ones(500_000_000)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(child.stdout) < 1.5 < peak_gib("cpu")
    assert block.sum() > 0


def test_releasing_memory_is_harmless():
    block = torch.ones(1000)
    release_free_memory()
    assert block.sum() == 1000
