# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CTRLConfig,
    FalconConfig,
    GPT2Config,
    LlavaConfig,
    OPTConfig,
    T5Config,
)

from conftest import tiny_llama_config
from optq.errors import ModelError
from optq.model import find_blocks, find_linears


def test_blocks_are_found_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_llama_config())
    blocks = find_blocks(model)
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    linears = find_linears(blocks["model.layers.0"], "model.layers.0")
    assert [name.rpartition(".")[2] for name in linears] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2), "transformer.h"),
        (
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                word_embed_proj_dim=32,
            ),
            "model.decoder.layers",
        ),
    ],
)
def test_other_architectures(config, path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert list(find_blocks(model)) == [f"{path}.0", f"{path}.1"]


def test_a_linear_is_seen_as_out_by_in_whatever_stores_it():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    )
    view = find_linears(model)["transformer.h.0.attn.c_attn"]
    assert view.shape == (96, 32)
    x = torch.randn(3, 32)
    torch.testing.assert_close(view.module(x), x @ view.weight.T + view.bias)
    values = torch.randn(96, 32)
    view.write(values)
    assert torch.equal(view.weight, values)
    assert view.module.weight.shape == (32, 96)


def test_a_list_can_be_named_and_a_wrong_name_shows_what_there_is():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_llama_config())
    assert len(find_blocks(model, "model.layers")) == 2
    with pytest.raises(ModelError, match=r"'model\.blocks'.*model\.layers \(2\)"):
        find_blocks(model, "model.blocks")


def test_blocks_that_transformers_does_not_mark_are_found_by_their_size():
    config = CTRLConfig(vocab_size=64, n_embd=32, dff=64, n_layer=2, n_head=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert list(find_blocks(model)) == ["transformer.h.0", "transformer.h.1"]


def test_the_encoder_comes_before_the_decoder():
    config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_decoder_layers=3, num_heads=2)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    assert list(find_blocks(model)) == [
        *(f"encoder.block.{index}" for index in range(2)),
        *(f"decoder.block.{index}" for index in range(3)),
    ]


def test_the_language_model_is_meant_however_large_the_vision_tower_is():
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **vision},
        text_config=tiny_llama_config().to_dict(),
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert list(find_blocks(model)) == ["model.language_model.layers.0", "model.language_model.layers.1"]
    (vision_list,) = {
        name.rpartition(".")[0] for name, _ in model.named_modules() if "vision" in name and name.endswith(".layers.5")
    }
    assert len(find_blocks(model, vision_list)) == 6


def test_subclasses_of_linear_count_if_they_compute_the_same():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        )
    assert len(find_linears(find_blocks(model)["transformer.h.1"])) == 4

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Low(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.down = nn.Linear(sizes[0], 2)

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    layers = nn.ModuleDict(
        {
            "doubled": Doubled(4, 4),
            "low": Low(4, 4),
            "same": Same(4, 6),
            "bare": Same(4, 6, bias=False),
        }
    )
    assert list(find_linears(layers)) == ["low.down", "same", "bare"]


def test_models_without_blocks_or_with_two_equal_stacks_are_refused():
    with pytest.raises(ModelError, match="Sequential has no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))

    class Twins(nn.Module):
        _no_split_modules = ("Linear",)

        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList([nn.Linear(4, 4)])
            self.right = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(ModelError, match="left, right"):
        find_blocks(Twins())
