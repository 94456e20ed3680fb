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


def modules_of_vllm():
    return [name for name in sys.modules if name.split(".")[0] == "vllm" or name == "optq.vllm.config"]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Write a package called vllm, which is all that there is of it while the test runs."""

    def of(body=""):
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delattr(optq.vllm, "config", raising=False)

    before = {name: sys.modules.pop(name) for name in modules_of_vllm()}
    yield of
    for name in modules_of_vllm():
        del sys.modules[name]
    sys.modules.update(before)


def test_another_interface_is_named_and_vllm_starts_without_it(planted, caplog):
    planted("__version__ = '9.9'")
    with caplog.at_level(logging.ERROR):
        optq.vllm.register()
    (record,) = caplog.records
    assert "another interface than optq knows" in record.message
    assert "No module named 'vllm._custom_ops'" in record.message
    assert "goes on without it" in record.message


@pytest.mark.parametrize(("value", "registers"), [("0", False), ("false", False), ("1", True)])
def test_a_variable_switches_it_off(value, registers, planted, monkeypatch, caplog):
    planted()
    monkeypatch.setenv(optq.vllm.SWITCH, value)
    optq.vllm.register()
    assert bool(caplog.records) is registers  # it would complain about this vLLM
