# SPDX-License-Identifier: Apache-2.0
"""What is shipped, and that nothing is fetched."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import optq

ROOT = Path(__file__).resolve().parent.parent

WATCH = """
import json, socket, sys
from pathlib import Path

attempts = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        attempts.append(f"{event} {arguments}")
        raise OSError("the network is not reachable")

sys.addaudithook(watch)
"""
JOURNEY = """
dense, out, again = map(Path, sys.argv[1:])

from transformers import AutoModelForCausalLM, AutoTokenizer

import optq

rows = [{"input_ids": list(range(4 + start, 52 + start))} for start in range(16)]
config = optq.GPTQConfig(bits=4, group_size=32, dataset=rows, quality_gate="off")
optq.plan(dense, config)
optq.quantize(dense, config, output_dir=out)
model = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out)
tokens = model.generate(**tokenizer("a text", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert tokens.shape[1] > 4
assert not optq.inspect(out, verify=True).contradictions
optq.convert(out, output_dir=again, to="compressed-tensors")
"""
ASKING = """
try:
    socket.create_connection(("hub.invalid", 443))
except OSError:
    pass
"""


def attempts_of(script, folder, *arguments):
    """The attempts of a script to reach the network, with nothing that says that one is offline."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    environment["HF_HOME"] = str(folder / "cache")  # what is cached need not be asked for
    command = [sys.executable, "-c", f"{WATCH}{script}\nprint(json.dumps(attempts))", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_model_on_disk_is_quantized_and_used_without_asking_the_network(tiny_llama, tmp_path):
    assert attempts_of(JOURNEY, tmp_path, tiny_llama, tmp_path / "out", tmp_path / "again") == []


def test_attempts_are_seen(tmp_path):
    """Negative control."""
    assert len(attempts_of(ASKING, tmp_path)) == 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist, and the wheel that is built from what it holds, with what is installed: (sdist, wheel)."""
    (needed,) = re.findall(r'^requires = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    setuptools = Requirement(needed)
    if find_spec("setuptools") is None or version("setuptools") not in setuptools.specifier:
        pytest.skip(f"{setuptools} is not installed, and building without it would download it")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("these sources are no git repository, so what belongs to them is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())

    def build(kind, where):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    build("sdist", source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    build("wheel", next((folder / "unpacked").iterdir()))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(built):
    return built[1]


@pytest.mark.slow
def test_the_sdist_is_named_after_the_version_and_has_what_a_packager_needs(built):
    sdist, _ = built
    assert sdist.name == f"optq-{optq.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "src/optq/version.py", "src/optq/py.typed"} <= names


@pytest.mark.long
def test_the_wheel_works_where_only_it_is_installed(wheel, tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path,
        wheel,
    ]
    subprocess.run(list(map(str, install)), check=True, capture_output=True)
    script = ROOT / "tests/installed.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"optq {optq.__version__} of {tmp_path / 'optq'} works" in done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(path.relative_to(ROOT / "src"))
        for kind in ("*.py", "*.html", "py.typed")
        for path in (ROOT / "src").rglob(kind)
        if "egg-info" not in str(path)
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == sources
    information = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert information == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert (
        "Root-Is-Purelib: true" in zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/WHEEL"))).decode()
    )
