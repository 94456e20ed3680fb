# SPDX-License-Identifier: Apache-2.0
"""Windows end where a model's positions do, and padding decides nothing."""

import logging
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    CTRLConfig,
    CTRLLMHeadModel,
    FNetConfig,
    FNetModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import optq
from conftest import tiny_llama_config
from optq import GPTQConfig
from optq.errors import ConfigError
from optq.positions import positions_of

POSITIONS = 32
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SIZES, "intermediate_size": 96, "max_position_embeddings": POSITIONS}
TWO_LAYERS = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**TWO_LAYERS, **ENDS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=96, max_position_embeddings=POSITIONS, word_embed_proj_dim=64, **ENDS)
    ),
    "roberta": lambda: RobertaForCausalLM(RobertaConfig(**ENCODER, is_decoder=True)),
    "bert": lambda: BertModel(BertConfig(**ENCODER)),
    "convbert": lambda: ConvBertModel(ConvBertConfig(**ENCODER, embedding_size=64)),
    "fnet": lambda: FNetModel(FNetConfig(**ENCODER)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**TWO_LAYERS, rotary_dim=8, **ENDS)),
    "ctrl": lambda: CTRLLMHeadModel(CTRLConfig(**TWO_LAYERS, dff=96)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**ENCODER, **ENDS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    ),
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=96)),
    "llama": lambda: LlamaForCausalLM(tiny_llama_config(max_position_embeddings=POSITIONS)),
}
LENGTHS = (100, 70, 40, 25, 12, 5)
ROWS = [
    {"input_ids": torch.randint(4, 100, (length,), generator=torch.Generator().manual_seed(length))}
    for length in LENGTHS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny random model, by its name; made when it is asked for."""
    parent = tmp_path_factory.mktemp("models")

    def of(name):
        if not (parent / name).exists():
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(parent / name)
        return parent / name

    return of


def quantize(folder, name, **settings):
    config = GPTQConfig(bits=4, group_size=32, effort="fast", **{"dataset": ROWS, **settings})
    return type(MODELS[name]()).from_pretrained(folder(name), quantization_config=config)


def longest(model):
    return model.config.quantization_config.meta["calibration"]["longest"]


@pytest.mark.parametrize(("name", "limit"), [(name, POSITIONS) for name in ("gpt2", "opt", "bert", "gptj", "ctrl")])
def test_a_table_of_positions_ends_somewhere(name, limit):
    assert positions_of(MODELS[name]()) == limit


def test_roberta_counts_positions_from_after_its_padding():
    """Its default windows were two tokens too long."""
    assert positions_of(MODELS["roberta"]()) == POSITIONS - 2


def test_rotary_positions_do_not_end():
    assert positions_of(MODELS["llama"]()) is None


@pytest.mark.parametrize(("name", "limit"), [("gpt2", POSITIONS), ("opt", POSITIONS), ("roberta", POSITIONS - 2)])
def test_longer_windows_are_cut_to_the_positions_and_that_is_said_once(folder, name, limit, caplog):
    with caplog.at_level(logging.INFO, logger="optq"):
        assert longest(quantize(folder, name, model_seqlen=4096)) == limit
    said = [record.message for record in caplog.records if "positions" in record.message]
    assert said == [
        f"model_seqlen=4096: {type(MODELS[name]()).__name__} has {limit} positions, so windows are cut to {limit}."
    ]


def test_windows_that_nobody_asked_for_fit_without_a_word(folder, caplog):
    assert longest(quantize(folder, "roberta")) == POSITIONS - 2
    assert "positions" not in caplog.text


def test_own_text_is_no_longer_than_the_positions(folder):
    assert longest(quantize(folder, "gpt2", dataset="self", num_samples=2, model_seqlen=100)) == POSITIONS


def test_a_model_with_rotary_positions_reads_longer_windows_and_that_is_said(folder, caplog):
    assert longest(quantize(folder, "llama", model_seqlen=64)) == 64
    assert "LlamaForCausalLM was made for 32 tokens at most" in caplog.text


def test_perplexity_reads_no_more_than_there_are_positions(folder, caplog):
    model = AutoModelForCausalLM.from_pretrained(folder("gpt2"))
    ids = ROWS[0]["input_ids"]
    for protocol in ("consecutive", "sliding", "rolling"):
        found = optq.perplexity(model, ids, 1024, protocol=protocol)
        assert found == optq.perplexity(model, ids, POSITIONS, protocol=protocol)
        assert math.isfinite(found.perplexity)
    assert "window=1024: GPT2LMHeadModel has 32 positions" in caplog.text


def test_models_are_compared_on_windows_that_all_of_them_can_read(folder, caplog):
    rows = [{"input_ids": torch.cat([row["input_ids"] for row in ROWS])}]
    settings = {"dataset": rows, "protocols": ("consecutive",), "device": "cpu", "dtype": torch.float32}
    first, second = optq.compare([folder("llama"), folder("gpt2")], window=64, **settings)
    assert list(first.perplexities) == list(second.perplexities) == ["consecutive windows of 32"]
    assert caplog.text.count("windows are cut to 32") == 1


def test_speed_is_measured_on_a_prompt_that_leaves_room_for_what_is_written(folder, caplog):
    (speed,) = optq.bench(folder("gpt2"), batch_sizes=(2,), prompt=100, new=8, runs=1, device="cpu")
    assert (speed.prompt, speed.new) == (POSITIONS - 8, 8)
    assert "A prompt of 100 and 8 new tokens: GPT2LMHeadModel has 32 positions" in caplog.text
    with pytest.raises(ConfigError, match="has positions for 32 in all"):
        optq.bench(folder("gpt2"), prompt=1, new=32, device="cpu")


def test_what_a_model_is_judged_on_is_no_longer_than_its_positions_if_it_writes_it_itself(folder):
    settings = {"dataset": "self", "tokens": 64, "protocols": ("consecutive",), "device": "cpu"}
    (found,) = optq.compare([folder("gpt2")], baseline=folder("gpt2"), **settings)
    assert found.perplexities["consecutive windows of 32"].tokens == 2 * 31


def packed(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("qweight")}


@pytest.mark.parametrize("name", ["llama", "roberta", "bert", "convbert", "mixtral", "xlnet"])
def test_padding_decides_nothing_whatever_its_id(folder, name):
    """ConvBERT convolves over padding whatever the mask says, Mixtral routes it to experts, and XLNet's blocks have
    another order of dimensions than masks: their rows are not padded at all."""
    expected = packed(quantize(folder, name, pad_token_id=None))
    assert expected
    for pad in (-1, 77, 10**6) if name in ("llama", "roberta") else (77,):
        found = packed(quantize(folder, name, pad_token_id=pad))
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), pad


def test_a_model_without_masks_is_given_none(folder):
    found = packed(quantize(folder, "fnet", pad_token_id=5))
    assert all(torch.equal(tensor, found[key]) for key, tensor in packed(quantize(folder, "fnet")).items())
