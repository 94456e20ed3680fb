# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as AutoGPTQ left them. Where optq is not imported: tests/hf/test_autoload.py."""

import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import optq
from conftest import rewritten
from optq import GPTQConfig, QuantLinear
from optq.errors import CheckpointError, ConfigError
from optq.files.legacy import UNPICKLE, unusual_name

STATED = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": "somewhere/else",
    "model_file_base_name": "gptq_model-4bit-32g",
    "quant_method": "gptq",
}


@pytest.fixture(scope="module")
def today(tiny_llama, token_rows, tmp_path_factory):
    """A checkpoint as optq writes it."""
    folder = tmp_path_factory.mktemp("today") / "model"
    return optq.quantize(tiny_llama, GPTQConfig(bits=4, group_size=32, dataset=token_rows), output_dir=folder)


@pytest.fixture
def old(today, tmp_path):
    """The same in files as AutoGPTQ wrote them."""
    folder = tmp_path / "old-GPTQ"
    shutil.copytree(today, folder)
    with rewritten(folder / "config.json") as config:
        del config["quantization_config"]
    (folder / "quantize_config.json").write_text(json.dumps(STATED))
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "gptq_model-4bit-32g.safetensors")  # without the metadata that transformers writes
    return folder


def logits_of(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits


def restate(folder, **changes):
    stated = {key: value for key, value in {**STATED, **changes}.items() if value is not ...}
    (folder / "quantize_config.json").write_text(json.dumps(stated))


def test_it_loads_as_it_is(old, today):
    assert torch.equal(logits_of(old), logits_of(today))


@pytest.mark.parametrize("name", ["model.safetensors", "llama.compat.no-act-order.safetensors"])
def test_other_names_of_the_weights(old, today, name):
    (old / "gptq_model-4bit-32g.safetensors").rename(old / name)
    restate(old, model_file_base_name=..., quant_method=...)
    assert torch.equal(logits_of(old), logits_of(today))


def test_several_files_with_an_index_of_an_old_name(old, today):
    tensors = load_file(old / "gptq_model-4bit-32g.safetensors")
    names = [f"gptq_model-4bit-32g-0000{part}-of-00002.safetensors" for part in (1, 2)]
    parts = {name: names["layers.1" in name] for name in tensors}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if parts[name] == file}, old / file)
    (old / "gptq_model-4bit-32g.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": parts}
    (old / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits_of(old), logits_of(today))
    assert optq.inspect(old).config.bits == 4


def test_a_config_that_states_it_with_weights_of_an_old_name(old, today):
    (old / "quantize_config.json").unlink()
    with rewritten(old / "config.json") as config:
        config["quantization_config"] = STATED
    assert torch.equal(logits_of(old), logits_of(today))


def test_the_commands_read_it(old, today, tmp_path):
    found, expected = optq.inspect(old), optq.inspect(today)
    assert found.linears.keys() == {(*kind[:3], next(iter(found.linears))[3]) for kind in expected.linears}
    assert not found.contradictions
    modern = optq.convert(old, output_dir=tmp_path / "modern", to="gptq")
    assert torch.equal(logits_of(modern), logits_of(today))
    written = json.loads((modern / "config.json").read_text())
    assert written["quantization_config"]["group_size"] == 32
    assert "transformers_weights" not in written
    assert not {"model_file_base_name", "model_name_or_path"} & written["quantization_config"].keys()
    assert not (modern / "quantize_config.json").exists()


def test_saved_again_it_is_a_checkpoint_of_today(old, today, tmp_path):
    AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").exists()
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(today))


def test_files_that_may_both_be_meant_are_refused(old):
    (old / "gptq_model-4bit-32g.safetensors").rename(old / "a.safetensors")
    shutil.copy(old / "a.safetensors", old / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors, but a.safetensors, b.safetensors.*transformers_w"
    ):
        AutoConfig.from_pretrained(old)
    with rewritten(old / "config.json") as config:
        config["transformers_weights"] = "b.safetensors"
    logits_of(old)


def test_pickled_weights_are_refused(old):
    (old / "gptq_model-4bit-32g.safetensors").unlink()
    torch.save({}, old / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"only .safetensors files are read.*can run its code.*use_safetensors=F"
    ):
        AutoModelForCausalLM.from_pretrained(old)


def pickle_weights(folder, parts=1):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    file_of = {name: f"pytorch_model-{i % parts}.bin" for i, name in enumerate(tensors)}
    for part in set(file_of.values()):
        torch.save({name: tensors[name] for name in tensors if file_of[name] == part}, folder / part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_are_read_where_that_is_asked_for(old, today, tmp_path, parts):
    pickle_weights(old, parts)
    assert torch.equal(logits_of(old, use_safetensors=False), logits_of(today))
    AutoModelForCausalLM.from_pretrained(old, use_safetensors=False).save_pretrained(tmp_path / "new")
    assert torch.equal(logits_of(tmp_path / "new"), logits_of(today))
    assert UNPICKLE not in (tmp_path / "new/config.json").read_text()


def test_no_file_can_ask_for_pickled_weights_itself(old):
    pickle_weights(old)
    with rewritten(old / "config.json") as config:
        config[UNPICKLE] = True
    with pytest.raises(CheckpointError, match=r"use_safetensors=False"):
        AutoModelForCausalLM.from_pretrained(old)


def test_of_pickled_weights_nothing_but_tensors_is_read(old, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    (old / "gptq_model-4bit-32g.safetensors").unlink()
    torch.save({"a.qweight": Trap()}, old / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        AutoModelForCausalLM.from_pretrained(old, use_safetensors=False)
    with pytest.raises(CheckpointError, match="weights_only stays True"):
        AutoModelForCausalLM.from_pretrained(old, use_safetensors=False, weights_only=False)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("changes", [{"is_marlin_format": True}, {"checkpoint_format": "marlin"}])
def test_the_order_of_a_gpu_kernel_is_refused_by_name(old, changes):
    restate(old, **changes)
    with pytest.raises(ConfigError, match=r"'marlin' is a GPU kernel's own order"):
        AutoModelForCausalLM.from_pretrained(old)


def test_a_config_that_states_nothing_by_name_counts_as_none(old, today):
    with rewritten(old / "config.json") as config:
        config["quantization_config"] = None
    assert torch.equal(logits_of(old), logits_of(today))


def test_another_method_is_left_alone(old):
    restate(old, quant_method="awq")
    assert not hasattr(AutoConfig.from_pretrained(old), "quantization_config")


def test_a_dense_model_is_left_alone(tiny_llama):
    config = AutoConfig.from_pretrained(tiny_llama)
    assert not hasattr(config, "quantization_config")
    assert not hasattr(config, "transformers_weights")


def test_settings_that_say_nothing_have_their_defaults(old, today):
    restate(old, damp_percent=None, checkpoint_format=None, group_size=32, some_key_of_a_fork=[1, 2])
    assert torch.equal(logits_of(old), logits_of(today))


def test_names_of_a_file_base_outside_the_folder_are_not_followed():
    assert unusual_name(["a.safetensors"], {"model_file_base_name": "../../secret"}) == "a.safetensors"


@pytest.mark.parametrize(("format", "warned"), [("gptq", False), ("gptq_v2", True)])
def test_zeros_that_contradict_the_label_are_said_when_loading(old, caplog, format, warned):
    restate(old, checkpoint_format=format)
    logits_of(old)
    assert ("every stored zero is 7" in caplog.text) == warned
    assert caplog.text.count("off by one step") == 7 * warned  # once for each kind of linear


def test_settings_that_are_left_beside_a_dense_model_make_it_no_quantized_one(tiny_llama, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny_llama, folder)
    (folder / "quantize_config.json").write_text(json.dumps(STATED))
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")


@pytest.mark.parametrize("text", ["{", "[1]", "null", ""])
def test_settings_that_cannot_be_read_are_ignored_aloud(text, tiny_llama, tmp_path, caplog):
    folder = tmp_path / "dense"
    shutil.copytree(tiny_llama, folder)
    (folder / "quantize_config.json").write_text(text)
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    assert "quantize_config.json is ignored" in caplog.text


def test_vllm_reads_such_folders_by_its_own_rules(old, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    assert not hasattr(AutoConfig.from_pretrained(old), "quantization_config")
