# SPDX-License-Identifier: Apache-2.0
"""The tokenizer comes from where the model comes from, and is asked for in the same words."""

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import optq
from conftest import save_tiny_tokenizer, tiny_llama_config
from hub_server import Repository, serve, talk_to
from optq import GPTQConfig
from optq.compat import call as origin
from optq.errors import CalibrationError, ConfigError

TEXTS = [f"text number {index} of a few" for index in range(4)]
TOLD = {"token": "secret", "cache_dir": "elsewhere", "local_files_only": True, "trust_remote_code": False}


@pytest.fixture(scope="module")
def nested(tiny_llama, tmp_path_factory):
    """The model and its tokenizer in a subfolder; at the root a tokenizer that would give every character one id."""
    root = tmp_path_factory.mktemp("nested")
    shutil.copytree(tiny_llama, root / "inner")
    wrong = save_tiny_tokenizer(root)
    wrong.chat_template = None
    text = (root / "tokenizer.json").read_text()
    (root / "tokenizer.json").write_text(text.replace('"Regex": "."', '"Regex": ".*"'))
    return root


@pytest.fixture
def asked(monkeypatch):
    """What tokenizers were asked for with."""
    calls, load = [], AutoTokenizer.from_pretrained

    def from_pretrained(source, **kwargs):
        calls.append((source, kwargs))
        return load(source, **{key: kwargs[key] for key in ("subfolder",) if key in kwargs})

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    return calls


def config(**changes):
    return GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": TEXTS, **changes})


def info(model):
    return model.config.quantization_config.meta["calibration"]


def test_a_subfolders_model_is_calibrated_with_the_subfolders_tokenizer(nested, tiny_llama, tmp_path):
    expected = info(AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config()))
    assert expected["tokens"] == sum(map(len, TEXTS))
    found = AutoModelForCausalLM.from_pretrained(nested, subfolder="inner", quantization_config=config())
    assert info(found) == expected
    assert optq.plan(nested, config(), subfolder="inner").tokens == expected["tokens"]
    with pytest.raises(CalibrationError):  # negative control: the one at the root makes one token of a text
        AutoModelForCausalLM.from_pretrained(nested / "inner", quantization_config=config(tokenizer=str(nested)))


def test_a_subfolders_model_is_judged_with_the_subfolders_tokenizer(nested):
    settings = {"dataset": ["a longer text to be judged on"], "window": 8, "dtype": torch.float32, "device": "cpu"}
    found = optq.evaluate(nested / "inner", **settings)
    assert optq.evaluate(nested, subfolder="inner", **settings).perplexities == found.perplexities


def test_whatever_was_said_of_the_models_place_holds_for_the_tokenizer(nested, asked):
    where = {**TOLD, "subfolder": "inner", "revision": "v1"}
    AutoModelForCausalLM.from_pretrained(nested, quantization_config=config(), **where)
    (((source, told)),) = asked
    assert Path(source) == nested
    assert {**where, **told} == where
    assert told.keys() >= TOLD.keys() | {"subfolder"}


def test_of_another_place_only_what_is_not_about_the_models_own(nested, tiny_llama, asked):
    where = {**TOLD, "subfolder": "inner"}
    AutoModelForCausalLM.from_pretrained(nested, quantization_config=config(tokenizer=str(tiny_llama)), **where)
    assert asked == [(str(tiny_llama), TOLD)]


def test_plan_and_evaluate_pass_on_what_they_were_told(nested, asked):
    optq.plan(nested, config(), subfolder="inner", **TOLD)
    optq.evaluate(
        nested,
        dataset=["a longer text to be judged on"],
        window=8,
        device="cpu",
        subfolder="inner",
        local_files_only=True,
    )
    assert [kwargs for _, kwargs in asked] == [
        {**TOLD, "subfolder": "inner"},
        {"local_files_only": True, "subfolder": "inner"},
    ]


def test_what_one_call_was_told_is_forgotten_with_it(nested, tiny_llama):
    with pytest.raises(OSError, match="no file named"):
        transformers.LlamaForCausalLM.from_pretrained(nested, config=tiny_llama_config(), subfolder="nowhere")
    assert origin.where_told() == {}
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config())


def test_a_subfolder_without_a_tokenizer_is_named(nested, tmp_path):
    shutil.copytree(nested, tmp_path / "copy")
    for file in (tmp_path / "copy/inner").glob("*token*"):
        file.unlink()
    with pytest.raises(
        CalibrationError, match=r"(?s)no tokenizer could be loaded from .*subfolder 'inner'.*Pass tokenizer="
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy", subfolder="inner", quantization_config=config())


class TestKinds:
    """`tokenizer=` takes a name, a path, a tokenizer, or a processor."""

    def test_a_path(self, tiny_llama):
        assert optq.plan(tiny_llama, config(tokenizer=Path(tiny_llama))).tokens == sum(map(len, TEXTS))

    def test_a_processor_has_one_and_its_own_chat_template(self, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.chat_template = None
        processor = SimpleNamespace(tokenizer=tokenizer, chat_template="{{ messages[0]['content'] }}")
        chats = [[{"role": "user", "content": "hello"}]]
        assert optq.plan(tiny_llama, config(tokenizer=processor, dataset=chats)).tokens == 5
        assert tokenizer.chat_template is None  # left as it was

    @pytest.mark.parametrize("wrong", [5, b"path", object(), ["a"], transformers.CLIPImageProcessor])
    def test_nothing_else(self, tiny_llama, wrong):
        with pytest.raises(
            ConfigError,
            match=r"tokenizer.*(it is a tokenizer, the id of a model or a folder|it may be a model id, a folder)",
        ):
            optq.plan(tiny_llama, config(tokenizer=wrong, dataset=[{"input_ids": [1, 2, 3]}]))

    def test_a_tokenizer_of_the_library_below_is_told_what_to_become(self, tiny_llama):
        backend = AutoTokenizer.from_pretrained(tiny_llama).backend_tokenizer
        with pytest.raises(ConfigError, match="PreTrainedTokenizerFast"):
            optq.plan(tiny_llama, config(tokenizer=backend))


def test_from_pretrained_stays_what_it_was():
    """It is wrapped once, keeps its name and signature, and a class's method can be pickled."""
    optq.register()
    method = transformers.PreTrainedModel.from_pretrained
    assert not hasattr(method.__wrapped__, "__wrapped__")
    assert method.__name__ == "from_pretrained"
    assert pickle.loads(pickle.dumps(transformers.LlamaForCausalLM.from_pretrained)) == (
        transformers.LlamaForCausalLM.from_pretrained
    )


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_private_repositorys_tokenizer_is_fetched_at_the_same_commit_with_the_same_token(
    nested, tmp_path, monkeypatch
):
    """The newest commit has the wrong tokenizer in the subfolder, and the token is known to the call only."""
    with serve() as hub:
        talk_to(hub, monkeypatch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        files = {str(path.relative_to(nested)): path.read_bytes() for path in nested.rglob("*") if path.is_file()}
        later = {**files, "inner/tokenizer.json": files["tokenizer.json"]}
        hub.repositories["user/tiny"] = Repository(private=True, trees={"1" * 40: files, "2" * 40: later})
        where = {"subfolder": "inner", "revision": "1" * 40, "token": "good-token", "cache_dir": str(tmp_path)}
        model = AutoModelForCausalLM.from_pretrained("user/tiny", quantization_config=config(), **where)
        assert info(model)["tokens"] == sum(map(len, TEXTS))
        assert optq.plan("user/tiny", config(), **where).tokens == sum(map(len, TEXTS))
        with pytest.raises(CalibrationError):  # negative control: what the newest commit has
            optq.plan("user/tiny", config(), **{**where, "revision": "main"})
