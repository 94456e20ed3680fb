# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls when it starts, where there is no vLLM, or one that nobody has seen."""

import logging
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import optq.vllm

PLUGIN = "vllm.general_plugins"


def test_vllm_finds_it():
    (found,) = entry_points(group=PLUGIN, name="optq")
    assert found.load() is optq.vllm.register


def test_nothing_of_it_is_imported_by_others():
    code = (
        "import sys, optq; assert not any(name.split('.')[0] == 'vllm' or name == 'optq.vllm' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def planted(folder, monkeypatch, body=""):
    package = folder / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name == "optq.vllm.config"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(optq.vllm, "config", raising=False)


def test_another_interface_is_named_and_vllm_starts_without_it(tmp_path, monkeypatch, caplog):
    planted(tmp_path, monkeypatch, "__version__ = '9.9'")
    with caplog.at_level(logging.ERROR):
        optq.vllm.register()
    (record,) = caplog.records
    assert "another interface than optq knows" in record.message
    assert "vllm.logger" in record.message
    assert "goes on without it" in record.message


@pytest.mark.parametrize(("value", "registers"), [("0", False), ("1", True)])
def test_a_variable_switches_it_off(value, registers, tmp_path, monkeypatch, caplog):
    planted(tmp_path, monkeypatch)
    monkeypatch.setenv(optq.vllm.SWITCH, value)
    optq.vllm.register()
    assert bool(caplog.records) is registers  # it would complain about this vLLM
