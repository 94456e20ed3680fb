# SPDX-License-Identifier: Apache-2.0
"""What config.json says of a checkpoint is true, what would not be is said, and `inspect` finds what is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from conftest import rewritten, save_tiny_tokenizer, tiny_llama_config
from optq import GPTQConfig, QuantLinear
from optq.errors import ConfigError


@pytest.fixture
def quantize(tiny_llama, token_rows, tmp_path):
    """quantize(**settings) -> the model, and the folder that it was saved to."""

    def make(source=tiny_llama, **settings):
        config = GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, **settings})
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        model.save_pretrained(tmp_path / "saved")
        return model, tmp_path / "saved"

    return make


def label_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_a_rule_that_excludes_the_head_leaves_it_tied(quantize, caplog):
    model, folder = quantize(lm_head=True, dynamic={"-:lm_head": {}})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert label_of(folder)["lm_head"] is False
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head=True was asked for, but lm_head stays as it is" in caplog.text
    assert optq.inspect(folder).contradictions == ()


def test_a_list_of_modules_in_blocks_says_nothing_of_the_head(quantize):
    model, folder = quantize(lm_head=True, modules_in_block_to_quantize=["mlp.down_proj"])
    assert isinstance(model.lm_head, QuantLinear)
    assert label_of(folder)["lm_head"] is True
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert optq.inspect(folder).contradictions == ()


def test_a_vocabulary_that_does_not_pack_leaves_the_head_as_it_is(tmp_path, token_rows, caplog):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config(vocab_size=130)).save_pretrained(tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows, lm_head=True)
    folder = optq.quantize(tmp_path / "model", config, output_dir=tmp_path / "out")
    label = label_of(folder)
    assert label["lm_head"] is False
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert "config.json will say lm_head=false: out_features 130" in caplog.text
    assert optq.inspect(folder).contradictions == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dynamic": {"+:.*dwn_proj": {"bits": 8}}}, "no linear layer, so it has no effect. Near it: down_proj"),
        ({"dynamic": {r"-:model\.layers\.[789]\..*": {}}}, "matches no linear layer"),
        ({"dynamic": {"+:lm_head": {"bits": 8}}}, "'+:lm_head' matches only the output head, which stays as it is"),
        ({"modules_in_block_to_quantize": ["mlp.up_proj", "mlp.gat_proj"]}, "'mlp.gat_proj' is the name of no linear"),
        ({"modules_in_block_to_quantize": [["mlp.up_proj"], ["lm_head"]]}, "asked for with lm_head=True"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(tiny_llama, token_rows, caplog, settings, said):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, **settings)
    optq.check(tiny_llama, config)
    assert said in caplog.text


def test_what_has_an_effect_is_not_said(tiny_llama, token_rows, caplog):
    rules = {"-:lm_head": {}, "-:.*o_proj": {}, "+:.*down_proj": {"bits": 8, "damp_percent": 0.2}}
    modules = [["self_attn.q_proj", "self_attn.o_proj"], ["mlp.down_proj"]]
    optq.check(tiny_llama, GPTQConfig(bits=4, group_size=32, dynamic=rules, modules_in_block_to_quantize=modules))
    assert "no linear" not in caplog.text


def test_if_nothing_at_all_is_left_the_names_are_in_the_error(tiny_llama, token_rows):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, modules_in_block_to_quantize=["mlp.dwn_proj"])
    with pytest.raises(ConfigError, match=r"No linear layer is left.*'mlp.dwn_proj'.*Near it: mlp.down_proj"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


def test_a_name_in_the_place_of_a_list_of_names_is_refused():
    with pytest.raises(ConfigError, match="it is a list of names inside a block"):
        GPTQConfig(bits=4, modules_in_block_to_quantize="mlp.down_proj")


def test_groups_in_activation_order_stay_labelled_under_a_budget(quantize):
    settings = {"target_bits_per_weight": 5.0, "dynamic": {"+:.*down_proj": {"desc_act": True}}}
    model, folder = quantize(**settings)
    assert model.config.quantization_config.scheme_for("model.layers.1.mlp.down_proj").act_order == "desc_act"
    assert not torch.equal(model.model.layers[1].mlp.down_proj.g_idx, torch.arange(96) // 32)
    assert optq.inspect(folder).contradictions == ()


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"desc_act": True, "act_group_aware": True}, {"act_group_aware": False, "static_groups": False}),
        ({"static_groups": False, "act_group_aware": True}, {"act_group_aware": False, "static_groups": False}),
        ({"act_group_aware": True}, {"act_group_aware": True, "static_groups": True}),
        ({"damp_percent": None}, {"damp_percent": 0.1}),  # the default was used
    ],
)
def test_labels_say_what_was_done_not_what_was_asked(quantize, settings, label):
    _, folder = quantize(modules_in_block_to_quantize=["mlp.up_proj"], **settings)
    assert label_of(folder) | label == label_of(folder)


@pytest.fixture(scope="module")
def with_head(tiny_llama, token_rows, tmp_path_factory):
    """A checkpoint whose head and up_proj are packed. Not to be changed."""
    folder = tmp_path_factory.mktemp("with-head")
    config = GPTQConfig(
        **{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, "lm_head": True},
        modules_in_block_to_quantize=["mlp.up_proj"],
    )
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ({"lm_head": False}, "lm_head is packed, but config.json says lm_head=false"),
        ({"bits": 8}, "config.json says 8 bits, but the tensors hold 4"),
        ({"group_size": 16}, "group_size 16, which makes 4 groups"),
        ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, "up_proj is packed, but config.json excludes it"),
        ({"dynamic": {"-:.*1.mlp.up_proj": {}}}, "model.layers.1.mlp.up_proj is packed, but config.json excludes it"),
    ],
)
def test_inspect_finds_labels_that_the_tensors_contradict(with_head, tmp_path, label, said):
    folder = tmp_path / "copy"
    shutil.copytree(with_head, folder)
    with rewritten(folder / "config.json") as config:
        config["quantization_config"] |= label
    assert any(said in contradiction for contradiction in optq.inspect(folder).contradictions)
    assert any(said in contradiction for contradiction in optq.check(folder))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("lm_head", "says lm_head=true, but the output head is not packed"),
        (
            "model.layers.1.mlp.up_proj",
            "up_proj is not packed, but config.json does not exclude it",
        ),
    ],
)
def test_inspect_finds_packed_linears_that_are_not_there(with_head, tmp_path, module, said):
    folder = tmp_path / "copy"
    shutil.copytree(with_head, folder)
    held = load_file(folder / "model.safetensors")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del held[f"{module}.{part}"]
    save_file(
        {**held, f"{module}.weight": torch.ones(96, 64)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert any(said in contradiction for contradiction in optq.inspect(folder).contradictions)
