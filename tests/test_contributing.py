# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's recipes, followed literally: in a copy of the source, each of them adds what it says that it adds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(python|diff)\n# (src/\S+)\n(.*?)```", re.DOTALL)

USED = """
import torch
from optq.cli import main
from optq.gptq import solve
from optq.checkpoint import pack
from optq.formats.table import FORMATS
from optq.kernels import choose_kernel, explain
from optq.scheme import LayerScheme

weight, hessian = torch.randn(64, 64), torch.eye(64) + 0.1
solved = {order: solve(weight, hessian, LayerScheme(bits=4, group_size=32, act_order=order)).quantized
          for order in ("none", "reversed")}
assert not torch.equal(solved["none"].codes, solved["reversed"].codes)

packed = pack(solved["none"])
kernel, x = choose_kernel(packed, torch.float32, "doubled"), torch.randn(3, 64)
torch.testing.assert_close(kernel.matmul(x, kernel.prepare(packed)), x @ solved["none"].decode().T)
assert choose_kernel(packed, torch.float32).name == "reference"  # doubled is chosen by name only

six = solve(weight, hessian, LayerScheme(bits=6, group_size=32)).quantized
assert (six.decode() - weight).norm() < (solved["none"].decode() - weight).norm() / 2
packed = pack(six)
assert [name for name, reason in explain(packed, torch.float32).items() if reason is None] == ["reference"]

assert set(FORMATS["plain"].write(packed, LayerScheme(bits=6), None)) == {"codes", "scales", "zeros"}
assert main(["versions", "torch"]) == 0
"""


def test_every_recipe_works_as_it_is_written(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(blocks) == 9
    for kind, name, text in blocks:
        file = tmp_path / name
        if kind == "python":
            assert not file.exists()
            file.write_text(text, encoding="utf-8")
        else:
            file.write_text(patched(file.read_text(encoding="utf-8"), text, name), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    code = f"import optq; assert optq.__file__.startswith({str(tmp_path)!r})\n{USED}"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("torch ")


def patched(source: str, diff: str, name: str) -> str:
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
        assert source.count(before) == 1, f"CONTRIBUTING.md changes what {name} does not have once:\n{before}"
        source = source.replace(before, after)
    return source


def test_a_recipe_that_no_longer_fits_is_noticed():
    with pytest.raises(AssertionError, match="does not have once"):
        patched("bits = 4\n", "@@\n-bits = 5\n+bits = 6\n", "scheme.py")
