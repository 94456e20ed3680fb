# SPDX-License-Identifier: Apache-2.0
"""A run that dies goes on where it was, and ends with the same bytes."""

import errno
import json
import os
import re
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
from optq.files import output as files
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
        pytest.param({"target_bits_per_weight": 4.5}, 1, marks=pytest.mark.long),
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
    with pytest.raises(OutputError, match=r"attention was 'sdpa' and is 'eager'"):
        optq.quantize(source, config(token_rows), output_dir=output, attn_implementation="eager")
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
        *(("record-00000.json", how) for how in ("bit", "empty", "binary", "missing")),
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
    assert events(output)[-1]["event"] == "written"
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
        del description["checksum"]
        description[key] = value
        run = description["checksum"] = journal.digest_of_json(description)
    for record in (output / api.PARTIAL).glob(journal.RECORDS):
        with rewritten(record) as stated:
            del stated["checksum"]
            stated["run"] = run
            stated["checksum"] = journal.digest_of_json(stated)


def test_changed_weights_of_a_finished_block_are_named(source, token_rows, tmp_path, output, monkeypatch):
    """In files that are too large to be compared as a whole."""
    other = changed(source, tmp_path / "other", "model.layers.1.mlp.up_proj.weight")
    monkeypatch.setattr(journal, "_identity", lambda file: "the same")
    redescribe(output, "model files", {"model.safetensors": "the same"})
    with pytest.raises(OutputError, match=r"other weights: in model\.layers\.1, mlp\.up_proj\.weight was"):
        optq.quantize(other, config(token_rows, **FAST), output_dir=output)


def test_a_journal_of_an_earlier_version_is_refused_by_name(source, token_rows, output):
    redescribe(output, "journal", 1)
    with pytest.raises(OutputError, match="earlier version of optq: journal was 1 and is 3"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)
    with rewritten(output / api.PARTIAL / journal.DESCRIPTION) as description:  # that had no checksum
        del description["checksum"]
    with pytest.raises(OutputError, match="earlier version of optq: journal was 1 and is 3"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)


@pytest.mark.parametrize("key", ["source", "run", "file", "checksum"])
@pytest.mark.parametrize("how", ["key", "value", "null"])
def test_a_record_that_is_damaged_but_still_json_goes_unused(output, key, how):
    record = output / api.PARTIAL / "record-00000.json"
    with rewritten(record) as stated:
        value = stated.pop(key)
        other = {name: digest[::-1] for name, digest in value.items()} if key == "source" else value[::-1]
        stated |= {"key": {key[::-1]: value}, "value": {key: other}, "null": {key: None}}[how]
    assert journal.read_checked(record) is None
    assert journal.read_checked(record.with_name("record-00001.json")) is not None  # negative control


def test_a_record_that_is_damaged_costs_its_block_only(source, whole, token_rows, output):
    with rewritten(output / api.PARTIAL / "record-00000.json") as stated:
        stated["run"] = stated["run"][::-1]
    assert weights(optq.quantize(source, config(token_rows, **FAST), output_dir=output)) == weights(whole(**FAST))
    assert [event["event"] for event in events(output)].count("restored") == 2


def test_a_description_that_is_damaged_before_the_first_block_holds_nobody_up(
    source, token_rows, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(api, "tidy", lambda *arguments: None)
        patch.setattr(journal.Journal, "recorded", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optq.quantize(source, config(token_rows, **FAST), output_dir=output)
    description = output / api.PARTIAL / journal.DESCRIPTION
    description.write_text(description.read_text().replace('"journal"', '"jouroal"'))
    monkeypatch.setattr(journal.Journal, "recorded", interrupt)
    with pytest.raises(KeyboardInterrupt):  # it has begun anew
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)


def interrupt(*arguments, **settings):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def completed(source, interrupted, token_rows, tmp_path_factory):
    """An output folder with all files, which only lack their names. Not to be changed."""
    output = Path(shutil.copytree(interrupted, tmp_path_factory.mktemp("completed") / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "reveal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optq.quantize(source, config(token_rows, **FAST), output_dir=output)
    return output


@pytest.fixture
def complete(completed, tmp_path):
    return Path(shutil.copytree(completed, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("model.layers.0.mlp.up_proj.weight", {}, r"model\.safetensors was"),
        (None, {"rms_norm_eps": 1e-3}, r"model config\.rms_norm_eps was .* is 0\.001"),
        (None, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_theta was .* is 500000"),
        (None, {"hidden_act": "gelu"}, r"hidden_act was .* is 'gelu'"),
        (None, {}, r"calibration was"),
    ],
)
def test_another_model_does_not_get_what_only_lacks_its_names(
    source, token_rows, complete, tmp_path, name, settings, said
):
    other = changed(source, tmp_path / "other", name, **settings)
    rows, before = token_rows if name or settings else token_rows[1:], tree(complete)
    with pytest.raises(OutputError, match=rf"results of another run, which only lack their names: .*{said}"):
        optq.quantize(other, config(rows, **FAST), output_dir=complete, dtype="auto")
    if settings:
        with pytest.raises(OutputError, match=rf"results of another run, which only lack their names: .*{said}"):
            optq.quantize(source, config(rows, **FAST), output_dir=complete, **settings)
    assert tree(complete) == before


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_results_of_another_call_are_refused_by_name(source, token_rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "reveal", interrupt)
        patch.setattr(files, "tidy", interrupt)
        with pytest.raises(KeyboardInterrupt), files.output_folder(tmp_path / "out", "optq.convert") as folder:
            (folder / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds the results of optq\.convert, which only lack their names"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("name", ["complete/model.safetensors", "complete/config.json", "block-00001.safetensors"])
@pytest.mark.parametrize("how", ["bit", "short", "missing"])
def test_what_is_damaged_before_it_has_its_name_is_not_published(complete, name, how):
    assert files.settled(complete, (api.LOG_NAME,), is_own=True) is not None  # negative control
    damage(complete / api.PARTIAL / name, how)
    assert files.settled(complete, (api.LOG_NAME,), is_own=True) is None
    assert not (complete / api.PARTIAL / files.COMPLETE).exists()


def test_what_is_damaged_before_it_has_its_name_is_made_again(source, whole, token_rows, complete, tmp_path):
    damage(complete / api.PARTIAL / "complete/model.safetensors", "bit")
    beside = changed(source, tmp_path / "other", None)  # and what lies beside the weights is another file now
    (beside / "chat_template.jinja").write_text("another")
    assert weights(optq.quantize(beside, config(token_rows, **FAST), output_dir=complete)) == weights(whole(**FAST))
    assert (complete / "chat_template.jinja").read_text() == "another"
    assert [event["event"] for event in events(complete)].count("restored") == 3 + BLOCKS
    (beside / "chat_template.jinja").write_text("a third")
    with pytest.raises(OutputError, match=r"another run: chat_template\.jinja is another one"):
        optq.quantize(beside, config(token_rows, **FAST), output_dir=complete)


def test_only_what_the_run_has_recorded_is_published(source, whole, token_rows, output, caplog):
    shutil.copy(output / api.PARTIAL / "block-00000.safetensors", output / api.PARTIAL / "block-00007.safetensors")
    assert weights(optq.quantize(source, config(token_rows, **FAST), output_dir=output)) == weights(whole(**FAST))
    assert "block-00007.safetensors" in caplog.text
    assert (output / api.PARTIAL / "block-00007.safetensors").exists()
    assert optq.quantize(source, config(token_rows, **FAST), output_dir=output) == output


def test_a_block_of_another_run_is_refused(source, token_rows, output):
    record = output / api.PARTIAL / "record-00000.json"
    found = journal.read_checked(record)
    journal.write_checked(record.with_name("record-00003.json"), found | {"run": "another"})
    shutil.copy(output / api.PARTIAL / "block-00000.safetensors", output / api.PARTIAL / "block-00003.safetensors")
    with pytest.raises(OutputError, match="1 block of another run"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)


@pytest.mark.parametrize("how", ["missing", "short", "bit"])
@pytest.mark.parametrize(
    "name",
    ["model-00002-of-00005.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"],
)
def test_a_finished_folder_that_is_damaged_is_refused_by_name(whole, tmp_path, name, how):
    output = shutil.copytree(whole(**FAST), tmp_path / "out")
    assert api._is_finished(output, lambda run: [], dict)  # negative control
    damage(output / name, "empty" if how == "short" else how)
    with pytest.raises(OutputError, match=rf"{re.escape(name)} is .*finished checkpoint there is damaged"):
        api._is_finished(output, lambda run: [], dict)


def test_a_finished_folder_whose_log_is_cut_short_is_refused(source, whole, token_rows, tmp_path):
    output = shutil.copytree(whole(**FAST), tmp_path / "out")
    (output / api.LOG_NAME).write_bytes((output / api.LOG_NAME).read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"log\.jsonl does not tell which files"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes among files")
@pytest.mark.parametrize(
    "name", [journal.DESCRIPTION, "record-00000.json", "block-00001.safetensors", "../" + api.LOG_NAME]
)
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_is_refused_by_name(source, token_rows, output, tmp_path, name, kind):
    path = output / api.PARTIAL / name
    path.rename(tmp_path / "moved")
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(tmp_path / "moved")
    with pytest.raises(OutputError, match=rf"{path.name} is (no regular file|a link)"):
        optq.quantize(source, config(token_rows, **FAST), output_dir=output)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes among files")
def test_a_finished_folder_with_a_pipe_is_refused(whole, tmp_path):
    output = shutil.copytree(whole(**FAST), tmp_path / "out")
    for name in ("config.json", api.LOG_NAME):
        (output / name).unlink()
        os.mkfifo(output / name)
        with pytest.raises(OutputError, match=name):
            api._is_finished(output, lambda run: [], dict)


def test_a_run_goes_on_wherever_the_process_goes(source, whole, token_rows, tmp_path, monkeypatch):
    write = journal.Journal.write

    def gone(self, name):
        write(self, name)
        monkeypatch.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr(journal.Journal, "write", gone)
    output = optq.quantize(source.name, config(token_rows, **FAST), output_dir=os.path.relpath(tmp_path / "out"))
    assert output == tmp_path / "out"
    assert weights(output) == weights(whole(**FAST))


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
