# SPDX-License-Identifier: Apache-2.0
"""A run that dies goes on where it was, and ends with the same bytes."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from conftest import forked, interrupted_after, rewritten, tiny_llama_config
from optq import GPTQConfig
from optq.api import quantize as api
from optq.errors import OutputError
from optq.runs import journal

BLOCKS = 4
FAST = {"effort": "fast"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config(num_hidden_layers=BLOCKS)).save_pretrained(folder)
    return folder


def config(rows, **settings):
    return GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": rows, **settings})


@pytest.fixture(scope="module")
def whole(source, token_rows, tmp_path_factory):
    """whole(settings) -> the folder of a run that nothing interrupted; each is made once."""
    made, parent = {}, tmp_path_factory.mktemp("whole")

    def run(**settings):
        key = repr(settings)
        if key not in made:
            made[key] = optq.quantize(source, config(token_rows, **settings), output_dir=parent / str(len(made)))
        return made[key]

    return run


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def events(folder):
    return [json.loads(line) for line in (folder / api.LOG_NAME).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        *(({}, blocks) for blocks in (1, 3, BLOCKS)),
        ({"effort": "max", "bits": 2, "sym": False}, 3),
        ({"target_bits_per_weight": 4.5}, 1),
    ],
)
def test_a_run_goes_on_and_ends_with_the_same_bytes(
    source, whole, token_rows, tmp_path, monkeypatch, settings, blocks
):
    expected = weights(whole(**settings))
    assert len(expected) == BLOCKS + 1
    output = tmp_path / "out"

    def call():
        return optq.quantize(source, config(token_rows, **settings), output_dir=output)

    interrupted_after(blocks, monkeypatch, call)
    assert not (output / "config.json").exists()
    assert weights(call()) == expected
    found = [event["event"] for event in events(output)]
    assert found.count("restored") == blocks
    assert found.count("block") == BLOCKS - 1  # the last before the end was written, but not reported
    quality = [
        [event for event in events(folder) if event["event"] == "quality"] for folder in (whole(**settings), output)
    ]
    assert quality[0][-1]["divergence"] == quality[1][-1]["divergence"]


def test_the_inputs_of_the_block_that_goes_on_are_those_of_the_first_run(
    source, whole, token_rows, tmp_path, monkeypatch
):
    """Negative control: had the finished blocks been run with their original weights, the bytes would differ."""
    expected = weights(whole())
    output = tmp_path / "out"
    interrupted_after(2, monkeypatch, lambda: optq.quantize(source, config(token_rows), output_dir=output))
    monkeypatch.setattr("optq.quantization.runner.LinearView.write", lambda self, values: None)
    assert weights(optq.quantize(source, config(token_rows), output_dir=output)) != expected


def test_another_run_does_not_go_on_here(source, token_rows, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupted_after(2, monkeypatch, lambda: optq.quantize(source, config(token_rows), output_dir=output))
    before = sorted(path.name for path in (output / api.PARTIAL).iterdir())
    with pytest.raises(OutputError, match=r"2 finished blocks of another run: settings\.bits was 4 and is 8"):
        optq.quantize(source, config(token_rows, bits=8), output_dir=output)
    with pytest.raises(OutputError, match=r"calibration was"):
        optq.quantize(source, config(token_rows[1:]), output_dir=output)
    with pytest.raises(OutputError, match=r"dtype was 'torch.float32' and is 'torch.bfloat16'"):
        optq.quantize(source, config(token_rows), output_dir=output, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "other", max_shard_size="100KB")
    with pytest.raises(OutputError, match=r"model files\.model\.safetensors was"):
        optq.quantize(tmp_path / "other", config(token_rows), output_dir=output)
    assert sorted(path.name for path in (output / api.PARTIAL).iterdir()) == before


def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_space(source, whole, token_rows, tmp_path, monkeypatch):
    output = tmp_path / "out"
    save, files = journal.save_file, []

    def full(tensors, path, metadata):
        files.append(path)
        if len(files) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "save_file", full)
        with pytest.raises(OutputError, match=r"No space left.*same command goes on"):
            optq.quantize(source, config(token_rows), output_dir=output)
    assert len(list((output / api.PARTIAL).glob("block-*"))) == 2
    expected = weights(whole())
    assert weights(optq.quantize(source, config(token_rows), output_dir=output)) == expected


@pytest.fixture(scope="module")
def interrupted(source, token_rows, tmp_path_factory):
    """An output folder with three of four blocks. Not to be changed."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(3, patch, lambda: optq.quantize(source, config(token_rows, **FAST), output_dir=output))
    return output


@pytest.fixture
def output(interrupted, tmp_path):
    return Path(shutil.copytree(interrupted, tmp_path / "out"))


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "number":
        file.write_text(file.read_text().replace('"bits": 4', '"bits": 5'))
        return
    content[len(content) // 2] ^= 1
    file.write_bytes({"bit": content, "short": content[:-100], "empty": b"", "binary": b"\xff\xfe"}[how])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("block-00001.safetensors", how) for how in ("bit", "short", "empty", "missing")),
        *(("record-00000.json", how) for how in ("empty", "binary", "missing")),
        *((journal.DESCRIPTION, how) for how in ("short", "empty", "binary", "missing", "number")),
    ],
)
def test_what_is_damaged_is_done_again_and_nothing_else(source, whole, token_rows, output, name, how):
    damage(output / api.PARTIAL / name, how)
    assert weights(optq.quantize(source, config(token_rows, **FAST), output_dir=output)) == weights(whole(**FAST))
    redone = 0 if name == journal.DESCRIPTION else 1
    assert [event["event"] for event in events(output)].count("restored") == 3 - redone


def test_blocks_of_another_run_are_not_taken_for_ones_own_without_its_description(source, token_rows, output):
    (output / api.PARTIAL / journal.DESCRIPTION).write_text("{")
    with pytest.raises(OutputError, match=r"3 blocks of another run, and .*run\.json does not tell of which"):
        optq.quantize(source, config(token_rows, **FAST, bits=8), output_dir=output)


def test_a_config_of_somebody_else_does_not_make_a_run_finished(source, token_rows, output):
    (output / "config.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"not empty: it holds config\.json\. Name a folder .* nothing was changed\.$"
    ):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)
    assert len(weights(output / api.PARTIAL)) == 3


def test_half_a_line_of_the_log_is_dropped(source, token_rows, output):
    with (output / api.LOG_NAME).open("a") as log:
        log.write('{"event": "line')
    optq.quantize(source, config(token_rows, **FAST), output_dir=output)
    assert events(output)[-1]["event"] == "gate"
    assert "quantized with GPTQ" in (output / "README.md").read_text()


def changed(source, target, name, **settings):
    """A copy of the model in which one tensor, of the same shape, has another value, or its config other settings."""
    shutil.copytree(source, target)
    if name is not None:
        tensors = load_file(target / "model.safetensors")
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((target / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps(stated))
    return target


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("model.layers.0.mlp.up_proj.weight", {}, r"model\.safetensors was"),
        ("model.norm.weight", {}, r"weights\.model\.norm\.weight was"),
        (None, {"rms_norm_eps": 1e-3}, r"model config\.rms_norm_eps was .* is 0\.001"),
        (None, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_theta was .* is 500000"),
    ],
)
def test_another_model_of_the_same_shape_does_not_go_on(
    source, token_rows, output, tmp_path, monkeypatch, name, settings, said
):
    other = changed(source, tmp_path / "other", name, **settings)
    before = weights(output / api.PARTIAL)
    if name == "model.norm.weight":  # as if the file were too large to be compared as a whole
        monkeypatch.setattr(journal, "_identity", lambda file: "the same")
        redescribe(output, "model files", {"model.safetensors": "the same"})
    with pytest.raises(OutputError, match=said):
        optq.quantize(other, config(token_rows, **FAST), output_dir=output)
    assert weights(output / api.PARTIAL) == before


def redescribe(output, key, value):
    with rewritten(output / api.PARTIAL / journal.DESCRIPTION) as description:
        description[key] = value
        run = journal.digest_of_json(description)
    for record in (output / api.PARTIAL).glob(journal.RECORDS):
        with rewritten(record) as stated:
            stated["run"] = run


def test_changed_weights_of_a_finished_block_are_named(source, token_rows, tmp_path, output, monkeypatch):
    """In files that are too large to be compared as a whole."""
    other = changed(source, tmp_path / "other", "model.layers.1.mlp.up_proj.weight")
    monkeypatch.setattr(journal, "_identity", lambda file: "the same")
    redescribe(output, "model files", {"model.safetensors": "the same"})
    with pytest.raises(OutputError, match=r"other weights: in model\.layers\.1, mlp\.up_proj\.weight was"):
        optq.quantize(other, config(token_rows, **FAST), output_dir=output)


def test_a_journal_of_an_earlier_version_is_refused_by_name(source, token_rows, output):
    redescribe(output, "journal", 1)
    with pytest.raises(OutputError, match="journal was 1 and is 2"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_killed_without_a_chance_to_clean_up_it_goes_on(source, whole, token_rows, tmp_path):
    expected = weights(whole())
    output = tmp_path / "out"
    process = forked(lambda: optq.quantize(source, config(token_rows), output_dir=output))
    file, ended = output / api.PARTIAL / "block-00001.safetensors", 0
    while not file.exists() and not ended:
        time.sleep(0.002)
        ended, _ = os.waitpid(process, os.WNOHANG)
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert not (output / "config.json").exists()
    assert weights(optq.quantize(source, config(token_rows), output_dir=output)) == expected
    assert [event["event"] for event in events(output)].count("restored") >= 2
