# SPDX-License-Identifier: Apache-2.0
"""The commands as optimum-cli finds them, in processes of their own."""

import fcntl
import json
import os
import pty
import resource
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import forked
from optq.cli import main

OPTIMUM = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"


IN_TURN = """
import json, sys
from optimum.commands.optimum_cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["optimum-cli", *arguments]
    try:
        code = main() or 0
    except SystemExit as ended:
        code = ended.code
    for stream in (sys.stdout, sys.stderr):
        print(f"\\0{code}\\0", end="", file=stream, flush=True)
"""


def optimum_cli(*arguments):
    return subprocess.run([sys.executable, "-c", OPTIMUM, *map(str, arguments)], capture_output=True, text=True)


def test_the_commands_are_found():
    assert "gptq" in optimum_cli("--help").stdout
    shown = optimum_cli("gptq", "--help").stdout
    assert all(name in shown for name in ("plan", "inspect", "evaluate", "compare", "bench", "kernels"))
    assert "--group-size" in optimum_cli("export", "gptq", "--help").stdout


@pytest.mark.long
def test_json_is_all_that_is_printed_and_errors_reach_the_shell_with_their_exit_codes(tiny_llama, tmp_path):
    calls = [["gptq", "inspect", str(tiny_llama), "--json"], ["gptq", "inspect", str(tmp_path / "nowhere")]]
    ended = subprocess.run(  # one process: it takes seconds to import what they need
        [sys.executable, "-c", IN_TURN, json.dumps(calls)], capture_output=True, text=True, check=True
    )
    found, code, nothing, wrong, _ = ended.stdout.split("\0")
    assert (code, wrong) == ("0", "3")
    assert json.loads(found)["bits_per_weight"] == 32
    assert nothing == ""
    assert ended.stderr.split("\0")[2].startswith("error: ")


@pytest.mark.slow
def test_quiet_shows_no_bar_on_a_terminal(tiny_llama, tmp_path):
    def shown(folder, *options):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 25, 100, 0, 0))
        (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 9)
        settings = ["--model", tiny_llama, "--dataset", tmp_path / "text.txt", "--group-size", 32, "--effort", "fast"]
        command = list(map(str, ["quantize", tmp_path / folder, *settings, *options]))

        environment = {key: value for key, value in os.environ.items() if "PROGRESS_BARS" not in key}

        def quantize():
            os.dup2(theirs, 2)
            if "--quiet" in options:  # which counts before anything is imported
                os.execve(sys.executable, [sys.executable, "-m", "optq", *command], environment)
            sys.stderr = os.fdopen(2, "w")
            main(command)
            sys.stderr.flush()

        process = forked(quantize)
        os.close(theirs)
        found = b""
        with suppress(OSError):  # the terminal is closed
            while part := os.read(ours, 4096):
                found += part
        os.close(ours)
        os.waitpid(process, 0)
        assert (tmp_path / folder / "config.json").exists(), found
        return found

    assert b"Quantizing: 100%" in shown("loud", "--no-sym")
    assert b"%|" not in shown("quiet", "--no-sym", "--quiet")


def test_help_needs_no_torch():
    code = "import sys; from optq.cli import main\ntry: main(['quantize', '--help'])\nexcept SystemExit: pass\n"
    check = f"{code}loaded = {{'torch', 'transformers', 'rich'}} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


@pytest.mark.slow
def test_help_takes_no_longer_than_optimums_own():
    def cpu_seconds(*arguments):
        def spent():
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processes, however busy the machine is
            return usage.ru_utime + usage.ru_stime

        before = spent()
        assert optimum_cli(*arguments).returncode == 0
        return spent() - before

    runs = [(cpu_seconds("export", "gptq", "--help"), cpu_seconds("--help")) for _ in range(4)]
    assert min(ours for ours, _ in runs) <= 1.5 * min(theirs for _, theirs in runs)


def test_nothing_of_ours_makes_optimum_a_package():
    """An __init__.py there would hide optimum's own modules."""
    register = Path(find_spec("optimum.commands.register.register_optq").origin)
    assert not list(register.parents[2].glob("__init__.py"))
    assert not list(register.parents[1].glob("__init__.py"))
    assert not list(register.parent.glob("__init__.py"))


def test_python_m_optq_is_the_same():
    """As far as the parser; tests/cli/test_cli.py calls the rest in its own process."""
    shown = subprocess.run(
        [sys.executable, "-m", "optq", "inspect", "--help"], capture_output=True, text=True, check=True
    ).stdout
    theirs = optimum_cli("gptq", "inspect", "--help").stdout
    shown = shown.replace("python -m optq inspect", "optimum-cli gptq inspect")  # in the examples
    assert shown.partition("\n\n")[2] == theirs.partition("\n\n")[2] != ""


@pytest.mark.parametrize("arguments", [["export", "gptq"], ["gptq", "evaluate"], ["gptq", "bench", "x", "--new", "y"]])
def test_missing_arguments_are_told_by_the_parser(arguments):
    ended = optimum_cli(*arguments)
    assert ended.returncode == 2
    assert "usage:" in ended.stderr
