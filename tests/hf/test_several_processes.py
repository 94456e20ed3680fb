# SPDX-License-Identifier: Apache-2.0
"""Several processes share a run, as torchrun starts them."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

import optq
import optq.distributed
from conftest import forked_ranks, tiny_llama_config, two_ranks
from optq import GPTQConfig
from optq.checkpoint import unpack_codes
from optq.errors import OptqError, RankError

pytestmark = pytest.mark.slow

BLOCKS = 6  # of the run that is killed
SETTINGS = {
    "default": {"bits": 4, "group_size": 32, "batch_size": 2},
    "max": {"bits": 3, "group_size": 32, "batch_size": 2, "effort": "max", "sym": False},
    "budget": {"bits": 4, "target_bits_per_weight": 4.5, "group_size": 32, "batch_size": 2},
    "mixtral": {"bits": 4, "group_size": 32, "batch_size": 2, "effort": "fast"},
    "written": {"bits": 4, "group_size": 32, "effort": "fast", "num_samples": 8, "model_seqlen": 24, "batch_size": 2},
}
"""Runs by name, each with its model and data beside it; what is not "mixtral" quantizes the tiny llama."""

SCRIPT = """
import json, os, sys
import optq
from optq import GPTQConfig
from optq.errors import OptqError

for source, output, settings in json.loads(sys.argv[1]):
    changes = settings.pop("only_in_process_1", {})
    settings |= changes if os.environ["RANK"] == "1" else {}
    try:
        optq.quantize(source, GPTQConfig(**settings), output_dir=output)
    except OptqError as error:
        print(f"<{os.environ['RANK']}: {type(error).__name__}: {error}>", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: getattr(tiny_llama_config(), name) for name in names}
    torch.manual_seed(0)
    config = MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=5, dtype="float32")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def script_in(folder):
    (folder / "script.py").write_text(SCRIPT)
    return folder / "script.py"


def started(folder, *runs):
    """torchrun with two processes that do the runs together, each a source, an output folder and settings."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script_in(folder)]
    return subprocess.Popen([*command, json.dumps(runs, default=str)], stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model whose run takes long enough to be killed in."""
    folder = tmp_path_factory.mktemp("deep")
    AutoModelForCausalLM.from_config(tiny_llama_config(num_hidden_layers=BLOCKS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lost(deep, token_rows, tmp_path_factory):
    """A run of which one process was killed, as arguments of `started`; and what became of it, the exit status."""
    folder = tmp_path_factory.mktemp("lost")
    settings = {**SETTINGS["default"], "dataset": token_rows, "batch_size": 1}
    run = started(folder, (deep, folder / "out", settings))
    while not list((folder / "out").rglob("block-00003.safetensors")):
        assert run.poll() is None
        time.sleep(0.01)
    second = next(pid for pid in workers_of(run.pid) if b"RANK=1\0" in environment_of(pid))
    os.kill(second, signal.SIGKILL)
    ended = run.wait(timeout=60)
    return (deep, folder / "out", settings), ended, (folder / "out/config.json").exists()


@pytest.fixture(scope="module")
def by_two(tiny_llama, mixtral, deep, lost, token_rows, tmp_path_factory):
    """All runs that two processes do to their end, and those that they refuse: their folder, runs, and words."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for name, settings in SETTINGS.items():
        data = {} if name == "written" else {"dataset": token_rows}
        runs.append((mixtral if name == "mixtral" else tiny_llama, folder / name, {**settings, **data}))
    settings, refused = {**SETTINGS["default"], "dataset": token_rows}, folder / "refused"
    others = [
        (deep, folder / "deep", {**settings, "batch_size": 1}),
        lost[0],
        (tiny_llama, refused / "different", {**settings, "only_in_process_1": {"bits": 8}}),
        (tiny_llama, refused / "few", {**settings, "batch_size": 16}),
        (tiny_llama, refused, settings),
    ]
    two_ranks(script_in(folder), json.dumps([*runs, *others], default=str), said=folder / "stderr")
    return folder, runs, (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def both(by_two):
    """Every run, by one process and by two: its name -> two folders."""
    _, runs, said = by_two
    assert said.count("Error: ") == 3 * 2, said  # what is refused, by each
    for source, output, settings in runs:
        optq.quantize(source, GPTQConfig(**settings), output_dir=output.with_suffix(".alone"))
    return {output.name: (output.with_suffix(".alone"), output) for _, output, _ in runs}


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def events(folder, kind):
    log = [json.loads(line) for line in (folder / "quantization_log.jsonl").read_text().splitlines()]
    return [event for event in log if event["event"] == kind]


def codes_that_differ(one, other, prefix, bits):
    """The share of the codes below `prefix`."""
    pairs = [
        (unpack_codes(tensor, bits), unpack_codes(other[name], bits))
        for name, tensor in one.items()
        if name.startswith(prefix) and name.endswith("qweight")
    ]
    return sum(int((x != y).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


@pytest.mark.parametrize("name", ["default", "mixtral", "written"])
def test_two_processes_find_the_codes_of_one(both, name):
    alone, together = map(tensors_of, both[name])
    assert alone.keys() == together.keys()
    # float32 sums in another order: a code that flips in the first block changes the inputs of all that follow.
    assert codes_that_differ(alone, together, "model.layers.0.", 4) < 0.002
    assert codes_that_differ(alone, together, "model.layers.1.", 4) < 0.1


@pytest.mark.parametrize("name", SETTINGS)
def test_they_count_every_token_and_every_linear_once(both, name):
    alone, together = (events(folder, "linear") for folder in both[name])
    assert [(event["linear"], event["shape"], event["tokens"]) for event in together] == [
        (event["linear"], event["shape"], event["tokens"]) for event in alone
    ]
    for event, other in zip(together, alone, strict=True):
        if event["block"] == "model.layers.0":
            assert event["relative_loss"] == pytest.approx(other["relative_loss"], rel=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_they_are_as_good(both, name):
    alone, together = (events(folder, "quality")[0] for folder in both[name])
    assert together["tokens"] == alone["tokens"]
    assert together["divergence"] == pytest.approx(alone["divergence"], rel=0.3)
    assert AutoModelForCausalLM.from_pretrained(both[name][1]).hf_quantizer.pre_quantized


def test_bits_are_shared_out_as_by_one_process(both):
    alone, together = (json.loads((folder / "config.json").read_text()) for folder in both["budget"])
    assert alone["quantization_config"]["dynamic"] == together["quantization_config"]["dynamic"]


def test_what_the_model_writes_is_the_same(both):
    alone, together = (json.loads((folder / "config.json").read_text()) for folder in both["written"])
    assert (
        alone["quantization_config"]["meta"]["calibration"] == together["quantization_config"]["meta"]["calibration"]
    )


def test_processes_that_were_asked_for_different_things_are_refused(by_two):
    folder, _, said = by_two
    assert said.count("settings.bits is 4 in the first and 8 in the other") == 2
    assert said.count("2 processes share the run, but the calibration data makes only 1 micro-batch") == 2
    assert said.count("OutputError") == said.count("is not empty: it holds few") == 2
    assert [file.name for file in (folder / "refused/few").iterdir()] == ["quantization_log.jsonl"]


def test_a_lost_process_ends_the_others_and_the_run_goes_on(lost, by_two):
    (_, output, _), status, was_finished = lost
    assert status != 0
    assert not was_finished
    assert 4 <= len(events(output, "restored")) < BLOCKS
    whole, out = tensors_of(by_two[0] / "deep"), tensors_of(output)
    assert all(torch.equal(tensor, out[name]) for name, tensor in whole.items())


def workers_of(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def environment_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as stream:
        return stream.read()


def test_a_process_that_quantizes_alone_among_several_ends(tiny_llama, tmp_path, monkeypatch):
    """Started as torchrun starts the first of two, of which the other never comes."""
    monkeypatch.setattr(optq.distributed, "MEETING", datetime.timedelta(seconds=1))

    def first():
        if os.environ["RANK"] == "0":
            with pytest.raises(RankError) as refused:
                optq.quantize(tiny_llama, GPTQConfig(bits=4, dataset=[]), output_dir=tmp_path / "out")
            print(refused.value, file=sys.stderr)

    forked_ranks(first, 2, tmp_path / "stderr")
    said = (tmp_path / "stderr").read_text()
    assert "2 processes were started together, but only 1 of them came to quantize within 0:00:01" in said
    assert not (tmp_path / "out").exists()


def test_a_process_that_expects_others_says_what_to_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RankError, match="WORLD_SIZE=2 says that this is one of several processes"):
        optq.distributed.join()
    assert issubclass(RankError, OptqError)


def test_more_processes_than_accelerators_are_refused_before_they_meet(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"LOCAL_RANK=2 .* 2 accelerators.*nproc-per-node=2"):
        optq.distributed.join()
    assert not chosen
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert optq.distributed._own_accelerator() == 1
