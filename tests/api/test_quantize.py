# SPDX-License-Identifier: Apache-2.0
"""`optq.quantize`: a finished folder, or no model at all."""

import json
import os
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import optq
from optq import GPTQConfig
from optq.api import quantize as api
from optq.errors import ConfigError, OutputError, ReportError
from optq.files.ownership import LOCK, OWNER
from optq.files.source import copy_companions


@pytest.fixture
def source(tiny_llama, tmp_path):
    """A model folder with everything that may lie beside the weights."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": 2})
    )
    (folder / "modeling_custom.py").write_text("# custom code\n")
    (folder / "LICENSE").write_text("free\n")
    (folder / "README.md").write_text("the original's model card\n")
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    (folder / ".hidden.json").write_text("{}")
    return folder


@pytest.fixture
def config(token_rows):
    return GPTQConfig(bits=4, group_size=32, dataset=token_rows)


def test_writes_a_folder_that_loads_with_all_that_belongs_to_it(source, config, tmp_path, probe_ids):
    output = optq.quantize(source, config, output_dir=tmp_path / "out")
    assert {path.name for path in output.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "modeling_custom.py",
        "LICENSE",
        "README.md",  # not the original's
        "quantization_log.jsonl",
    }
    assert "quantized with GPTQ" in (output / "README.md").read_text()
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_custom.py"):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(output)
    same = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    with torch.no_grad():
        assert torch.equal(model(probe_ids).logits, same(probe_ids).logits)
    assert AutoTokenizer.from_pretrained(output).chat_template


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_not_followed_out_of_the_models_folder(source, tmp_path, caplog):
    (tmp_path / "id_rsa").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (source / "NOTICE.txt").symlink_to("LICENSE")
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "to").mkdir()
    (tmp_path / "to/generation_config.json").write_text("secret")  # of save_pretrained
    copy_companions(source, tmp_path / "to")
    assert "notes.txt is not copied" in caplog.text
    assert not (tmp_path / "to/notes.txt").exists()
    assert not (tmp_path / "to/generation_config.json").exists()
    assert (tmp_path / "to/NOTICE.txt").read_text() == "free\n"


def test_the_caches_links_to_its_own_contents_are_followed(source, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    (tmp_path / "to").mkdir()
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "4567").write_text("terms")
    (snapshot / "LICENSE").symlink_to("../../blobs/4567")
    copy_companions(snapshot, tmp_path / "to")
    assert (tmp_path / "to/LICENSE").read_text() == "terms"


def test_the_events_lie_beside_the_weights(source, config, tmp_path):
    output = optq.quantize(source, config, output_dir=tmp_path / "out")
    *events, last = [json.loads(line) for line in (output / api.LOG_NAME).read_text().splitlines()]
    assert last["event"] == "written"
    assert last["files"].keys() == {path.name for path in output.iterdir()} - {"README.md", api.LOG_NAME}
    events = [event["event"] for event in events]
    assert events == ["started", *["linear"] * 7, "block", *["linear"] * 7, "block", "quality", "finished", "gate"]
    assert config.log_file is None


def test_a_failure_leaves_no_model_behind_and_the_same_call_can_be_repeated(source, config, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def full_disk(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(api, "copy_companions", full_disk)
        with pytest.raises(OSError, match="No space left"):
            optq.quantize(source, config, output_dir=output)
    assert {path.name for path in output.iterdir()} == {api.LOG_NAME, api.PARTIAL}
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(output)
    optq.quantize(source, config, output_dir=output)
    assert (output / "config.json").exists()


def test_a_crash_while_files_get_their_names_leaves_no_config(source, config, tmp_path, monkeypatch):
    output, moved = tmp_path / "out", []

    def crash(old, new):
        if old.name == "model.safetensors" and new.parent == output:
            raise KeyboardInterrupt
        moved.append(old.name)
        original(old, new)

    original = api.os.replace
    monkeypatch.setattr(api.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        optq.quantize(source, config, output_dir=output)
    assert moved
    assert not (output / "config.json").exists()
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"bits was 4 and is 8"):
        optq.quantize(source, GPTQConfig(bits=8, group_size=32, dataset=config.dataset), output_dir=output)
    optq.quantize(source, config, output_dir=output)
    assert AutoModelForCausalLM.from_pretrained(output)
    assert not (output / api.PARTIAL).exists()


@pytest.mark.slow
def test_every_moment_at_the_end_can_be_gone_on_from(source, config, tmp_path, monkeypatch):
    """Between any two files that get their names, or are removed."""
    config.effort = "fast"
    complete, whole = tmp_path / "complete", optq.quantize(source, config, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(api, "reveal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optq.quantize(source, config, output_dir=complete)
    moments = 0
    while True:
        output = shutil.copytree(complete, tmp_path / str(moments))
        with monkeypatch.context() as patch:
            left = iter(range(moments))
            for name in ("replace", "unlink", "rmdir"):
                patch.setattr(os, name, partial(unless_spent, left, getattr(os, name)))
            try:
                optq.quantize(source, config, output_dir=output)
                break
            except KeyboardInterrupt:
                moments += 1
        assert optq.quantize(source, config, output_dir=output) == output, moments
        assert names(output) == names(whole), moments
    assert moments > 20


def interrupt(*arguments):
    raise KeyboardInterrupt


def unless_spent(left, call, *arguments, **settings):
    if next(left, None) is None:
        raise KeyboardInterrupt
    return call(*arguments, **settings)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_with_something_else_in_it_is_refused_untouched(source, config, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("three years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt\. Name a folder"):
        optq.quantize(source, config, output_dir=output)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="is a file"):
        optq.quantize(source, config, output_dir=output / "thesis.txt")


def test_files_of_another_size_are_refused_with_how_they_are_made(tmp_path):
    with pytest.raises(
        ConfigError, match=r"max_shard_size='2GB' was asked for; .*save_pretrained\(\.\.\., max_shard_size"
    ):
        optq.quantize("x", {"bits": 4}, output_dir=tmp_path / "out", max_shard_size="2GB")
    assert not (tmp_path / "out").exists()


def test_a_config_that_cannot_work_writes_nothing(source, token_rows, tmp_path):
    config = GPTQConfig(bits=4, group_size=100, dataset=token_rows)
    with pytest.raises(ConfigError, match="group_size 100"):
        optq.quantize(source, config, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_block_is_a_shard_and_the_tensors_are_those_of_save_pretrained(source, config, tmp_path):
    output = optq.quantize(source, config, output_dir=tmp_path / "out")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert {path.name for path in output.glob("*.safetensors")} == set(index["weight_map"].values())
    assert len(list(output.glob("*.safetensors"))) == 3
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / "saved")
    expected = load_file(tmp_path / "saved/model.safetensors")
    found = {key: tensor for path in output.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


SAME = {"bits": 4, "group_size": 32, "effort": "fast"}


def test_a_finished_folder_of_the_same_run_is_returned_and_of_another_refused(source, token_rows, tmp_path):
    config = GPTQConfig(**SAME, dataset=token_rows)
    output = optq.quantize(source, config, output_dir=tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert optq.quantize(source, config, output_dir=output) == output
    others = {
        "settings.bits was 4 and is 8": (source, GPTQConfig(**SAME | {"bits": 8}, dataset=token_rows), {}),
        "calibration was": (source, GPTQConfig(**SAME, dataset=token_rows[1:]), {}),
        "dtype was 'torch.float32' and is 'torch.bfloat16'": (source, config, {"dtype": torch.bfloat16}),
    }
    for said, (model, settings, kwargs) in others.items():
        with pytest.raises(OutputError, match=f"another run: .*{said}"):
            optq.quantize(model, settings, output_dir=output, **kwargs)
    other = AutoModelForCausalLM.from_pretrained(source)
    other.save_pretrained(tmp_path / "other", max_shard_size="50KB")
    shutil.copy(source / "tokenizer.json", tmp_path / "other")
    with pytest.raises(OutputError, match=r"model files\."):
        optq.quantize(tmp_path / "other", config, output_dir=output)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    for left in (LOCK, OWNER):  # by a call that was killed at its very end
        (output / left).write_text("")
        assert optq.quantize(source, config, output_dir=output) == output
        assert {path.name for path in output.iterdir()} == before.keys()


def test_a_finished_folder_on_text_of_the_models_own_is_returned_as_well(source, tmp_path):
    config = GPTQConfig(**SAME, num_samples=2, model_seqlen=64)
    output = optq.quantize(source, config, output_dir=tmp_path / "out")
    assert optq.quantize(source, config, output_dir=output) == output
    with pytest.raises(OutputError, match=r"settings\.num_samples was 2 and is 3"):
        optq.quantize(source, GPTQConfig(**SAME, num_samples=3, model_seqlen=64), output_dir=output)


def test_a_card_that_the_disk_did_not_let_be_made_is_made_by_the_same_call(source, token_rows, tmp_path, monkeypatch):
    config, output = GPTQConfig(**SAME, dataset=token_rows), tmp_path / "out"

    def card(folder):
        raise ReportError("the log cannot be read") from PermissionError("no permission")

    with monkeypatch.context() as patch:
        patch.setattr(api, "card", card)
        with pytest.raises(OutputError, match="its model card could not be made: the log cannot be read"):
            optq.quantize(source, config, output_dir=output)
    assert not (output / "README.md").exists()
    assert (optq.quantize(source, config, output_dir=output) / "README.md").exists()
