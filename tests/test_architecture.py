# SPDX-License-Identifier: Apache-2.0
"""The picture of the floors in docs/architecture.md is the one that import-linter checks."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_floors_are_those_that_are_checked():
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (one["layers"] for one in contracts["contracts"] if one["type"] == "layers")
    checked = [set(re.findall(r"optq\.(\w+)", floor)) for floor in layers]
    drawn = PAGE.split("```")[1].strip().splitlines()
    rooms = set().union(*checked)
    floors = [set(re.findall(r"\w+", line if line is drawn[-1] else line[:46])) & rooms for line in drawn]
    assert floors == checked


def test_every_room_and_module_of_the_package_stands_on_a_floor():
    source = ROOT / "src/optq"
    there = {path.stem for path in source.iterdir() if path.is_dir() or path.suffix == ".py"}
    drawn = set(re.findall(r"\w+", PAGE.split("```")[1]))
    assert there - {"__init__", "__pycache__", "_autoload", "py"} <= drawn


def test_the_glossary_is_short():
    glossary = PAGE.split("## Glossary")[1].split("\n## ")[0]
    assert len(glossary.strip().splitlines()) <= 25
