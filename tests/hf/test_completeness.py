# SPDX-License-Identifier: Apache-2.0
"""A packed checkpoint that lacks tensors: what is surely meant to be there is asked for, and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

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
