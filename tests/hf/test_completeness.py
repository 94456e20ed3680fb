# SPDX-License-Identifier: Apache-2.0
"""A packed checkpoint that lacks tensors: what is surely meant to be there is asked for, and nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

import optq
from optq import GPTQConfig
from optq.errors import CheckpointError

FILE = "model.safetensors"


@pytest.fixture
def copy(saved, tmp_path):
    """A packed llama without its tensor of this name, and with others instead."""

    def without(*names, **instead):
        for file in saved.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = {name: tensor for name, tensor in load_file(saved / FILE).items() if name not in names}
        save_file(tensors | instead, tmp_path / FILE, metadata={"format": "pt"})
        return tmp_path

    return without


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"],
)
def test_what_would_become_random_numbers_is_refused(name, copy):
    with pytest.raises(CheckpointError, match=rf"has no tensor '{name}'.*random numbers"):
        AutoModelForCausalLM.from_pretrained(copy(name))


def test_a_tied_embedding_may_be_there_under_the_heads_name(saved, copy):
    embedding = load_file(saved / FILE)["model.embed_tokens.weight"]
    folder = copy("model.embed_tokens.weight", **{"lm_head.weight": embedding})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.get_input_embeddings().weight.float(), embedding.float())


def test_a_head_of_another_task_is_left_to_be_trained(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert model.score.weight.shape == (3, 64)


def test_a_pooler_is_left_to_be_trained(tmp_path, token_rows):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    AutoModel.from_config(BertConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "dense")
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, effort="fast", quality_gate="off")
    AutoModel.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / FILE
    tensors = {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    assert AutoModel.from_pretrained(tmp_path / "packed").pooler.dense.weight.isfinite().all()


def test_widths_that_are_not_the_models_are_refused(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.\w+ is packed for .* has "):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("model.norm.weight", None, "has no tensor 'model.norm.weight'.*random numbers"),
        ("model.embed_tokens.weight", None, "has no tensor 'model.embed_tokens.weight'.*random numbers"),
        ("model.layers.1.input_layernorm.weight", None, "has no tensor 'model.layers.1.input_layernorm.weight'"),
        ("model.embed_tokens.weight", lambda x: x[:64].clone(), r"embed_tokens.weight in .*has shape \(64, 64\)"),
        (
            "model.layers.1.mlp.down_proj.weight",
            lambda x: x[:, :64].clone(),
            r"down_proj.weight in .*shape \(64, 64\)",
        ),
        ("model.layers.1.mlp.down_proj.weight", lambda x: x > 0, "down_proj.weight in .*is of torch.bool"),
        ("model.layers.1.mlp.down_proj.weight", lambda x: x.to(torch.complex64), "is of torch.complex64"),
    ],
)
def test_a_dense_model_that_is_not_whole_is_not_quantized(tiny_llama, token_rows, tmp_path, name, changed, said):
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tiny_llama / FILE)
    tensor = tensors.pop(name)
    save_file(tensors | ({name: changed(tensor)} if changed else {}), tmp_path / "model" / FILE)
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, effort="fast")
    with pytest.raises(CheckpointError, match=said):
        optq.quantize(tmp_path / "model", config, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("changed", [lambda x: x[0, 0].clone(), lambda x: x[:32].clone(), lambda x: x.to(torch.int8)])
def test_a_dense_linear_that_does_not_fit_is_refused(saved, copy, changed):
    name = "model.layers.0.mlp.up_proj"
    dense = changed(torch.ones(96, 64))
    with pytest.raises(CheckpointError, match=f"{name}.weight in .*has shape"):
        AutoModelForCausalLM.from_pretrained(
            copy(*(f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")), **{f"{name}.weight": dense})
        )
