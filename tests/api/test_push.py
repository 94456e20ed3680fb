# SPDX-License-Identifier: Apache-2.0
"""Push to a Hub on loopback, and load from it as everybody does: in a process that knows nothing of the folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

import optq
from hub_server import Repository, serve, talk_to
from optq import GPTQConfig
from optq.errors import CheckpointError, HubError, ReportError

# huggingface_hub hands files to httpx in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    """An empty one, to which this process talks."""
    with serve() as hub:
        talk_to(hub, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "good-token")
        yield hub


@pytest.fixture(scope="module")
def made(tiny_llama, token_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tiny-4bit"
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    return optq.quantize(tiny_llama, config, output_dir=folder)


@pytest.fixture
def checkpoint(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "tiny-4bit")


def elsewhere(hub, tmp_path, *command, **changes):
    """Run Python in a new process with an empty cache, to which `hub` is the Hub."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        **changes,
    }
    return subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True
    )


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LOAD = """
import sys
import torch  # first, and nothing of optq: tests/hf/test_autoload.py has the other orders
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("user/tiny-4bit", revision="main")
torch.save(model(torch.load(ids)).logits, logits)
assert type(model.model.layers[0].mlp.up_proj).__module__ == "optq.layers.linear"
import optq
assert sum(optq.inspect("user/tiny-4bit").linears.values()) == 14
print(AutoTokenizer.from_pretrained("user/tiny-4bit").chat_template)
"""


@pytest.mark.slow
def test_what_was_pushed_is_what_is_loaded_elsewhere(hub, made, probe_ids, tmp_path, tiny_llama):
    before = bytes_in(made)
    assert optq.push(made, "user/tiny-4bit") == f"{hub.url}/user/tiny-4bit"
    assert bytes_in(made) == before

    torch.save(probe_ids, tmp_path / "ids.pt")
    ended = elsewhere(hub, tmp_path, "-c", LOAD, tmp_path / "ids.pt", tmp_path / "logits.pt")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == (tiny_llama / "chat_template.jinja").read_text().strip()
    expected = AutoModelForCausalLM.from_pretrained(made)(probe_ids).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_everything_goes_along_but_what_is_of_this_machine(hub, checkpoint):
    for name in ("modeling_own.py", "LICENSE", ".hidden.json", "notes.bin"):
        (checkpoint / name).write_text("something")
    shutil.copytree(checkpoint, checkpoint / "report")
    optq.push(checkpoint, "user/tiny-4bit")
    pushed = set(hub.repositories["user/tiny-4bit"].files)
    left = {".hidden.json", "notes.bin", "quantization_log.jsonl", "report"}
    assert pushed == {path.name for path in checkpoint.iterdir()} - left
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "modeling_own.py", "LICENSE"} < pushed


def test_the_card_is_made_for_the_name_on_the_hub(hub, checkpoint):
    optq.push(checkpoint, "user/another")
    assert hub.repositories["user/another"].files["README.md"].decode() == optq.card(
        checkpoint, repo_id="user/another"
    )


def test_an_edited_card_is_uploaded_as_it_is(hub, checkpoint, caplog):
    caplog.set_level("INFO", logger="optq")
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    optq.push(checkpoint, "user/tiny-4bit")
    assert hub.repositories["user/tiny-4bit"].files["README.md"] == (checkpoint / "README.md").read_bytes()
    assert "README.md is uploaded as it is" in caplog.text


def test_another_checkpoint_takes_the_place_of_the_first_and_both_can_be_loaded(hub, checkpoint, tmp_path):
    optq.push(checkpoint, "user/tiny-4bit")
    first = hub.repositories["user/tiny-4bit"].head
    dense = optq.convert(checkpoint, output_dir=tmp_path / "dense", to="dense")
    for shard in dense.glob("*.safetensors"):
        shard.rename(shard.with_name(f"new-{shard.name}"))
    index = dense / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"new-model-'))
    (dense / "README.md").write_text("Dense.")
    optq.push(dense, "user/tiny-4bit")
    files = hub.repositories["user/tiny-4bit"].files
    assert {name for name in files if name.endswith(".safetensors")} == {path.name for path in dense.glob("new-*")}

    assert optq.inspect("user/tiny-4bit", cache_dir=tmp_path).config is None
    assert optq.inspect("user/tiny-4bit", revision=first, cache_dir=tmp_path).config.bits == 4
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        optq.inspect("user/tiny-4bit", revision="v2", cache_dir=tmp_path)


def test_a_private_one_is_only_its_owners(hub, checkpoint, tmp_path):
    optq.push(checkpoint, "user/secret", private=True)
    assert hub.repositories["user/secret"].private
    assert optq.inspect("user/secret", cache_dir=tmp_path / "mine").config.bits == 4
    with pytest.raises(OSError, match=r"(?s)401.*Invalid username or password"):
        optq.inspect("user/secret", token="wrong", cache_dir=tmp_path / "theirs")


def test_what_is_public_is_not_taken_for_private(hub, checkpoint):
    hub.repositories["user/open"] = Repository()
    with pytest.raises(HubError, match="user/open exists and is public"):
        optq.push(checkpoint, "user/open", private=True)
    assert not hub.repositories["user/open"].files


def test_a_wrong_token_uploads_nothing(hub, checkpoint):
    with pytest.raises(HubError, match=r"answered 401: Invalid username or password\. Log in with `hf auth login`"):
        optq.push(checkpoint, "user/tiny-4bit", private=True, token="wrong")
    assert not hub.repositories
    assert not hub.large


def test_a_repository_of_someone_else_is_refused_although_it_can_be_read(hub, checkpoint):
    hub.repositories["org/open"] = Repository()
    with pytest.raises(HubError, match=r"answered 403: You may not write to org/open\. Use a token that may write"):
        optq.push(checkpoint, "org/open")
    with pytest.raises(HubError, match=r"answered 403: You may not create org/new"):
        optq.push(checkpoint, "org/new")
    assert not hub.large


def test_a_gated_one_says_where_to_ask(hub, checkpoint, tmp_path):
    hub.repositories["org/gated"] = Repository(gated=True)
    with pytest.raises(
        HubError, match=r"answered 403: Access to model org/gated is restricted.*ask for access on its page"
    ):
        optq.push(checkpoint, "org/gated")
    with pytest.raises(OSError, match="gated repo"):
        optq.inspect("org/gated", cache_dir=tmp_path)


def test_an_upload_that_breaks_off_leaves_nothing_half_and_goes_on_when_called_again(hub, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its five retries
    before = bytes_in(checkpoint)
    hub.breaks_off_at = hashlib.sha256(before["model-00003-of-00003.safetensors"]).hexdigest()
    with pytest.raises(
        HubError, match=r"failed \(.*model-00003-of-00003.*\): \w+Error: .*go on with: optimum-cli gptq"
    ):
        optq.push(checkpoint, "user/tiny-4bit")
    assert hub.repositories["user/tiny-4bit"].files == {}
    assert bytes_in(checkpoint) == before

    hub.breaks_off_at = None
    optq.push(checkpoint, "user/tiny-4bit")
    files = hub.repositories["user/tiny-4bit"].files
    assert all(files[name] == before[name] for name in before if name.endswith(".safetensors"))


def test_a_hub_that_cannot_be_reached_is_told(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"ConnectError.*HF_ENDPOINT.*whole and unchanged"):
        optq.push(checkpoint, "user/tiny-4bit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"OfflineModeIsEnabled: .*HF_HUB_OFFLINE"):
        optq.push(checkpoint, "user/tiny-4bit")


def test_a_name_that_is_none_is_told(hub, checkpoint):
    with pytest.raises(HubError, match=r"HFValidationError: .*a/b/c"):
        optq.push(checkpoint, "a/b/c")


def test_a_bare_name_is_one_of_the_users_own(hub, checkpoint):
    assert optq.push(checkpoint, "tiny-4bit") == f"{hub.url}/user/tiny-4bit"
    assert b"vllm serve user/tiny-4bit" in hub.repositories["user/tiny-4bit"].files["README.md"]


def test_only_a_finished_checkpoint_is_pushed(hub, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere' holds no config\.json, so it is no finished checkpoint"):
        optq.push(tmp_path / "nowhere", "user/tiny-4bit")
    assert not hub.repositories


def test_a_checkpoint_without_a_card_and_a_log_is_told(hub, checkpoint):
    (checkpoint / "README.md").unlink()
    (checkpoint / "quantization_log.jsonl").unlink()
    with pytest.raises(ReportError, match=r"neither a README\.md nor quantization_log\.jsonl"):
        optq.push(checkpoint, "user/tiny-4bit")
    assert not hub.repositories["user/tiny-4bit"].files


# the command line


@pytest.fixture
def export(hub, tiny_llama, tmp_path, capsys):
    """`export gptq` with --push-to-hub, in this process: (exit code, standard output, standard error)."""
    import logging
    import signal

    from optq.cli import main

    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 6)
    logger, before = logging.getLogger("optq"), signal.getsignal(signal.SIGTERM)
    state = logger.level, logger.propagate, logger.handlers

    def call(*arguments):
        settings = ["--model", tiny_llama, "--dataset", text, "--group-size", 32, "--effort", "fast", "--seq-len", 32]
        code = main([*map(str, ["quantize", tmp_path / "out", *settings, *arguments])])
        return code, *capsys.readouterr()

    yield call
    logger.level, logger.propagate, logger.handlers = state
    signal.signal(signal.SIGTERM, before)


def test_an_export_can_be_pushed_at_once(export, hub, tmp_path):
    code, out, _ = export("--push-to-hub", "user/tiny-4bit", "--private", "--json")
    assert code == 0
    assert json.loads(out)["url"] == f"{hub.url}/user/tiny-4bit"
    assert hub.repositories["user/tiny-4bit"].private
    assert "config.json" in hub.repositories["user/tiny-4bit"].files


def test_a_wrong_token_is_found_before_the_work(export, hub, tmp_path, monkeypatch):
    code, _, err = export("--push-to-hub", "user/tiny-4bit", "--token", "wrong")
    assert code == 3
    assert "error: Claiming user/tiny-4bit failed: the Hub answered 401" in err
    assert not (tmp_path / "out").exists()


def test_an_export_whose_upload_fails_names_the_command_that_repeats_it(export, hub, tmp_path, monkeypatch, capsys):
    def gone(*arguments, **settings):
        raise OSError("the network is down")

    with monkeypatch.context() as broken:
        broken.setattr("huggingface_hub.HfApi.create_commit", gone)
        code, _, err = export("--push-to-hub", "user/tiny-4bit")
    assert code == 3
    command = f"push {tmp_path / 'out'} user/tiny-4bit"
    assert f"the network is down. Check the connection and HF_ENDPOINT. {tmp_path / 'out'} is whole" in err
    assert err.endswith(f"go on with: optimum-cli gptq {command}\n")

    from optq.cli import main

    assert main(command.split()) == 0
    assert "user/tiny-4bit holds" in capsys.readouterr().out
    assert "config.json" in hub.repositories["user/tiny-4bit"].files


def test_private_alone_is_refused(export, hub, tmp_path):
    code, _, err = export("--private")
    assert (code, "--push-to-hub USER/NAME" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_claims_nothing(export, hub):
    assert export("--push-to-hub", "user/tiny-4bit", "--dry-run")[0] == 0
    assert not hub.repositories


def test_a_repository_as_autogptq_left_it_is_read_from_its_own_revision_and_from_the_cache(
    hub, made, probe_ids, tmp_path, monkeypatch
):
    files = bytes_in(made)
    config = json.loads(files["config.json"])
    stated = config.pop("quantization_config")
    tensors = {}
    for name in [name for name in files if name.endswith(".safetensors")]:
        tensors |= load(files.pop(name))
    del files["model.safetensors.index.json"]
    files |= {
        "config.json": json.dumps(config).encode(),
        "quantize_config.json": json.dumps({key: stated[key] for key in ("bits", "group_size", "sym")}).encode(),
        "some-model.order.safetensors": save(tensors),
    }
    other = {**files, "quantize_config.json": b'{"bits": 8, "group_size": 64}', "some-model.order.safetensors": b""}
    hub.repositories["user/tiny-GPTQ"] = Repository(trees={"1" * 40: files, "2" * 40: other})
    expected = AutoModelForCausalLM.from_pretrained(made)(probe_ids).logits
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        where = {"revision": "1" * 40, "cache_dir": tmp_path / "cache"}
        model = AutoModelForCausalLM.from_pretrained("user/tiny-GPTQ", **where)
        assert torch.equal(model(probe_ids).logits, expected)
        hub.repositories.clear()  # whatever is read again is read from the cache


def test_a_gguf_file_of_a_repository_is_converted_at_its_revision(hub, tiny_llama, tmp_path):
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    file = write_gguf(model, tmp_path / "tiny.Q4_0.gguf", "Q4_0")
    hub.repositories["user/tiny-GGUF"] = Repository(trees={"1" * 40: {file.name: file.read_bytes()}, "2" * 40: {}})
    settings = {"gguf_file": file.name, "to": "gptq", "cache_dir": tmp_path / "cache"}
    optq.convert("user/tiny-GGUF", **settings, revision="1" * 40, output_dir=tmp_path / "out")
    optq.convert(tmp_path, gguf_file=file.name, output_dir=tmp_path / "from-folder", to="gptq")
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "from-folder")

    with pytest.raises(OSError, match=r"tiny\.Q4_0\.gguf"):
        optq.convert("user/tiny-GGUF", **settings, revision="2" * 40, output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_nothing_outside_of_the_folder_is_uploaded(hub, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "linked")
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "inside.txt").symlink_to("config.json")
    (folder / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=r"links to files outside of it: notes\.txt\. "):
        optq.push(folder, "someone/linked")
