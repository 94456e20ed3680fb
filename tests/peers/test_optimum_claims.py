# SPDX-License-Identifier: Apache-2.0
"""What optimum's tests claim of its GPTQ quantizer, whose place is taken here.

Its arguments are those of transformers' `GPTQConfig`, so they are passed as its users pass them.
"""

import json
import re

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from optq import GPTQConfig, QuantLinear
from optq.errors import CalibrationError, ConfigError, ModelError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A model is quantized on a handful of sentences here, which is enough to see whether it works.",
]
PROMPT = torch.randint(4, 90, (1, 12), generator=torch.Generator().manual_seed(6))
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def quantize(tiny_llama):
    def run(cls=GPTQConfig, **settings):
        if cls is GPTQConfig:
            settings = {"effort": "fast", "quality_gate": "off", **settings}
        config = cls(**{"bits": 4, "group_size": 32, "dataset": TEXTS, **settings})
        return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)

    return run


@pytest.fixture(scope="module")
def four_bit(quantize):
    """Not to be changed."""
    return quantize()


@pytest.fixture(scope="module")
def folder(four_bit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    four_bit.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def words(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("qweight")}


def same(one, other):
    return words(one).keys() == words(other).keys() and all(
        torch.equal(tensor, words(other)[name]) for name, tensor in words(one).items()
    )


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def written(model):
    settings = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings).tolist()


class TestQuantizing:
    def test_every_linear_of_every_block_becomes_a_quantized_one(self, four_bit):
        assert len(layers(four_bit)) == 2 * len(KINDS)
        assert {name.rpartition(".")[2] for name in layers(four_bit)} == set(KINDS)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("sym", [True, False])
    def test_every_width_computes(self, quantize, original, bits, sym):
        model = quantize(bits=bits, sym=sym)
        for layer in layers(model).values():
            assert layer.qweight.shape == (layer.in_features * bits // 32, layer.out_features)
        error = (logits(model) - logits(original)).norm() / logits(original).norm()
        assert 0 < error < {2: 1.2, 3: 0.7, 4: 0.4, 8: 0.03}[bits]

    @pytest.mark.parametrize(("group_size", "groups"), [(16, 4), (32, 2), (-1, 1)])
    def test_group_sizes(self, quantize, group_size, groups):
        (layer, *_) = layers(quantize(group_size=group_size)).values()
        assert layer.scales.shape == (groups, layer.out_features)

    @pytest.mark.parametrize("desc_act", [True, False])
    def test_act_order_is_kept_in_g_idx(self, quantize, desc_act):
        model = quantize(desc_act=desc_act)
        orders = [layer.g_idx.tolist() for layer in layers(model).values()]
        assert any(order != sorted(order) for order in orders) is desc_act
        assert all(sorted(order) == [column // 32 for column in range(len(order))] for order in orders)

    def test_group_aware_order_keeps_g_idx_trivial(self, quantize, four_bit):
        model = quantize(act_group_aware=True)
        assert all(layer.g_idx.tolist() == sorted(layer.g_idx.tolist()) for layer in layers(model).values())
        assert not same(model, four_bit)

    def test_linears_are_calibrated_one_after_the_other_or_at_once(self, quantize, four_bit):
        assert not same(quantize(true_sequential=False), four_bit)

    def test_the_stock_class_gives_a_quantized_model_too(self, quantize, original):
        model = quantize(transformers.GPTQConfig)
        assert len(layers(model)) == 14
        assert type(model.config.quantization_config) is GPTQConfig

    def test_eight_bits_write_what_the_original_does(self, quantize, original):
        assert written(quantize(bits=8)) == written(original)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"bits": 5}, "bits=5"),
            ({"group_size": 0}, "group_size=0"),
            ({"group_size": -2}, "group_size=-2"),
            ({"damp_percent": 1.5}, "damp_percent=1.5"),
            ({"damp_percent": -0.1}, "damp_percent=-0.1"),
        ],
    )
    def test_impossible_arguments_are_refused_at_once(self, settings, message):
        with pytest.raises(ValueError, match=message):
            GPTQConfig(**{"bits": 4, "dataset": TEXTS, **settings})


class TestSelection:
    @pytest.mark.parametrize(
        "listed", [[["self_attn.q_proj"], ["mlp.down_proj"]], ["self_attn.q_proj", "mlp.down_proj"]]
    )
    def test_only_the_listed_modules_are_quantized(self, quantize, original, listed):
        model = quantize(modules_in_block_to_quantize=listed)
        assert {name.rpartition(".")[2] for name in layers(model)} == {"q_proj", "down_proj"}
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(model.state_dict()[name], original.state_dict()[name])

    def test_the_list_is_kept_in_the_checkpoint(self, quantize, tmp_path):
        quantize(modules_in_block_to_quantize=[["self_attn.q_proj"]]).save_pretrained(tmp_path)
        stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert stated["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]
        assert len(layers(AutoModelForCausalLM.from_pretrained(tmp_path))) == 2

    def test_modules_that_are_not_there_are_refused(self, quantize):
        with pytest.raises(ValueError, match="No linear layer is left to quantize"):
            quantize(modules_in_block_to_quantize=[["self_attn.query"]])

    def test_blocks_are_found_or_named(self, quantize, four_bit):
        assert same(quantize(block_name_to_quantize="model.layers"), four_bit)
        with pytest.raises(ModelError, match=r"block_name_to_quantize='model\.blocks'"):
            quantize(block_name_to_quantize="model.blocks")

    def test_what_precedes_the_blocks_is_found_whatever_is_said_of_it(self, quantize, four_bit):
        assert same(quantize(module_name_preceding_first_block=["model.embed_tokens"]), four_bit)

    def test_the_head_only_if_asked(self, quantize, four_bit):
        assert type(four_bit.lm_head) is torch.nn.Linear
        assert isinstance(quantize(lm_head=True).lm_head, QuantLinear)


class TestData:
    def test_texts_and_their_ids_are_the_same_data(self, quantize, four_bit, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        ids = [dict(tokenizer(text)) for text in TEXTS]
        tensors = [tokenizer(text, return_tensors="pt") for text in TEXTS]
        assert all(same(quantize(dataset=dataset), four_bit) for dataset in (ids, tensors, tuple(TEXTS)))
        assert not same(quantize(dataset=TEXTS[:1]), four_bit)

    def test_the_tokenizer_is_an_object_or_a_name(self, quantize, four_bit, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        assert all(same(quantize(tokenizer=given), four_bit) for given in (tokenizer, str(tiny_llama), tiny_llama))

    def test_a_batch_size_needs_no_pad_token(self, quantize, four_bit):
        model = quantize(batch_size=2, pad_token_id=None)
        assert torch.allclose(logits(model), logits(four_bit), atol=0.05 * logits(four_bit).abs().max().item())

    def test_windows_are_as_long_as_asked(self, quantize):
        assert quantize(model_seqlen=20).config.quantization_config.meta["calibration"]["longest"] == 20

    def test_keeping_blocks_outputs_changes_nothing(self, quantize, four_bit):
        assert same(quantize(cache_block_outputs=False), four_bit)

    @pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
    def test_known_names_need_a_connection(self, quantize, name):
        with pytest.raises(CalibrationError, match=r"could not be read from the Hub.*dataset='self'"):
            quantize(dataset=name)

    def test_unknown_names_are_refused_with_those_that_are_known(self, quantize):
        with pytest.raises(CalibrationError, match=r"wikitext3.*Did you mean 'wikitext2'"):
            quantize(dataset="wikitext3")

    def test_no_data_is_refused(self, quantize):
        with pytest.raises(CalibrationError, match="is empty"):
            quantize(dataset=[])


class TestSerialization:
    def test_the_round_trip_is_exact(self, folder, four_bit):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        assert same(loaded, four_bit)
        assert torch.equal(logits(loaded), logits(four_bit))
        assert written(loaded) == written(four_bit)

    def test_the_config_has_what_readers_look_for(self, folder):
        stated = json.loads((folder / "config.json").read_text())["quantization_config"]
        wanted = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
        assert wanted.items() <= stated.items()
        assert {"damp_percent", "true_sequential", "checkpoint_format"} <= stated.keys()
        assert stated["meta"]["quantizer"]

    def test_the_config_makes_the_same_quantizer_again(self, folder, four_bit):
        stated = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert GPTQConfig.from_dict(stated) == four_bit.config.quantization_config
        assert GPTQConfig(**stated) == four_bit.config.quantization_config

    def test_the_tensors_have_their_usual_names(self, folder):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            parts = {name.rpartition(".")[2] for name in file.keys() if ".mlp.up_proj." in name}  # noqa: SIM118
        assert parts == {"qweight", "qzeros", "scales", "g_idx"}

    def test_what_the_checkpoint_says_holds_when_it_is_loaded(self, folder):
        with pytest.warns(UserWarning, match="quantization_config"):
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=GPTQConfig(bits=2, group_size=32)
            )
        assert loaded.config.quantization_config.bits == 4

    def test_a_quantized_model_is_not_quantized_again(self, folder):
        with pytest.raises(ModelError, match=rf"{re.escape(str(folder))} is quantized already \(gptq\)"):
            AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=GPTQConfig(bits=2, group_size=32, dataset=TEXTS)
            )

    def test_both_formats_hold_the_same_weights(self, quantize, four_bit, tmp_path):
        second = quantize(format="gptq_v2")
        assert same(second, four_bit)
        assert torch.equal(logits(second), logits(four_bit))
        with pytest.raises(ConfigError, match="format='v3'"):
            quantize(format="v3")
