# SPDX-License-Identifier: Apache-2.0
"""`fit`: what a server needs besides the quantized weights, and what it leaves them."""

import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import optq
from optq import GPTQConfig
from optq.compat.cache import _tensors_in, cache_bytes
from optq.config.sizes import bytes_of
from optq.errors import ConfigError, ModelError
from optq.quantization.cost_estimate import Duration
from optq.runs.budget import SPARE

GIB, TOKENS = 2**30, 48
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED = {**SIZES, "sliding_window": 16, "head_dim": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
STATES = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURES = {
    "grouped heads": LlamaConfig(**SIZES),
    "positions that depend on the length": LlamaConfig(
        **SIZES, max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "positions by two tables": Phi3Config(
        **SIZES,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    ),
    "learned positions": GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "windows in every other layer": Gemma3TextConfig(
        **WINDOWED, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "windows everywhere, and experts": MixtralConfig(**SIZES, sliding_window=16, num_local_experts=4),
    "experts in a loop": MixtralConfig(**SIZES, num_local_experts=4, experts_implementation="eager"),
    "latents": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, **MIXTURE, **LATENT, n_routed_experts=4, n_group=1, topk_group=1
    ),
    "states in three of four layers": Qwen3NextConfig(**SIZES, **MIXTURE, **STATES, num_experts=4),
    "nothing but states": MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8),
    "a text model inside": Gemma3Config(text_config=WINDOWED, vision_config=VISION, image_token_index=100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_is_as_large_as_the_one_that_the_model_fills(architecture, dtype):
    config = ARCHITECTURES[architecture]
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config).to(dtype).eval()
    with torch.no_grad():
        output = model(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=True)
    cache = output.past_key_values if "past_key_values" in output else output.cache_params
    held = {id(tensor): tensor for layer in cache.layers for tensor in _tensors_in(vars(layer).values())}
    assert cache_bytes(model, TOKENS) == sum(tensor.nbytes for tensor in held.values()) > 0
    with torch.no_grad():
        again = model(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=True)
    assert torch.equal(again.logits, output.logits)  # nothing of the model has changed


def test_a_longer_text_takes_more_where_all_of_it_is_kept():
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(ARCHITECTURES["grouped heads"]).to(torch.bfloat16)
    assert (
        cache_bytes(llama, 8192) == 8192 * 4 * 2 * 2 * 16 * 2
    )  # tokens, layers, keys and values, heads, width, bytes
    assert cache_bytes(llama, 1) == cache_bytes(llama, 8192) / 8192


def test_a_model_that_keeps_states_alone_is_not_run_through_a_long_text():
    with torch.device("meta"):
        mamba = AutoModelForCausalLM.from_config(ARCHITECTURES["nothing but states"])
    read = []
    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: read.append(given[0].shape[1]) if isinstance(module, torch.nn.Embedding) else None
    ):
        assert cache_bytes(mamba, 2**40) == cache_bytes(mamba, 1) > 0
    assert max(read) == 64


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BertForMaskedLM, BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
        (T5ForConditionalGeneration, T5Config(vocab_size=128, d_model=32, num_layers=1, num_heads=2)),
    ],
)
def test_a_model_without_a_cache_of_its_own_is_named(kind, config):
    with torch.device("meta"):
        model = kind(config)
    with pytest.raises(ModelError, match=f"{kind.__name__} (returns no cache|also keeps what its encoder)"):
        cache_bytes(model, TOKENS)


@pytest.fixture
def planned(tiny_llama, token_rows, monkeypatch):
    monkeypatch.setattr("optq.api.plan._duration", lambda *arguments: Duration(seconds={}))

    def plan(fit, **settings):
        return optq.plan(tiny_llama, GPTQConfig(bits=4, group_size=32, dataset=token_rows, fit=fit, **settings))

    return plan


def test_all_that_a_server_holds_takes_the_memory_that_was_asked_for(planned):
    fit = 230_000
    found = planned(fit)
    cache = next(gib for part, gib in found.serving_gib.items() if "256 tokens, in float32" in part)
    assert cache * GIB == 256 * 2 * 2 * 2 * 16 * 4
    assert sum(found.serving_gib.values()) * GIB == pytest.approx(fit)
    assert 2.8 < found.bits_per_weight < 8  # neither the least nor the most
    assert (found.checkpoint_gib + cache) * GIB == pytest.approx((1 - SPARE) * fit, abs=16)
    assert not found.original_fits and "original" not in str(found)
    assert planned(fit, context_length=128).bits_per_weight > found.bits_per_weight
    assert f"in serving: {fit / GIB:.2f} GiB" in str(found)


def test_where_the_original_fits_it_is_said(planned):
    found = planned("1GiB")
    assert found.original_fits and "the original model fits as well" in str(found)
    assert found.bits_per_weight == pytest.approx(8 + 24 / 32)


def test_a_memory_in_which_nothing_fits_is_refused_with_one_that_does(planned):
    with pytest.raises(ConfigError, match=r"fit='100kB' was asked for, .* cache of one text of 256 tokens") as refused:
        planned("100kB")
    enough = re.search(r"fit='(\d+)MiB' has room for all", str(refused.value))[1]
    assert planned(f"{enough}MiB").fits
    with pytest.raises(ConfigError, match="was asked for"):
        planned(bytes_of("100kB") * 2)
