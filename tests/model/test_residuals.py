# SPDX-License-Identifier: Apache-2.0
"""What the output of a linear is added to, found by value in models of several families."""

import pytest
import torch
import transformers
from torch import nn

from optq import GPTQConfig, QuantLinear, quantize
from optq.model import LinearView, find_blocks, find_linears, observe_stages, watching_sums

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MLP = {**SIZES, "intermediate_size": 96}
HEADS = {**MLP, "num_key_value_heads": 2, "head_dim": 16}

FAMILIES = {
    "Llama": (MLP, {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}),
    "Qwen3": (HEADS, {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}),
    "GPT2": (
        {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4},
        {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
    ),
    "OPT": (
        {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
        {"out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    ),
    "Bloom": (SIZES, {"attention.dense": "input_layernorm", "dense_4h_to_h": "post_attention_layernorm"}),
    "Gemma3": (HEADS, {}),  # a norm lies between a linear and the sum
    "Granite": ({**MLP, "residual_multiplier": 0.22}, {}),  # a factor does
    "GPTNeoX": (MLP, {}),  # attention and MLP are added up first
}


def model_of(family):
    settings, _ = FAMILIES[family]
    if family == "Gemma3":
        config = transformers.Gemma3TextConfig(**settings)
    else:
        config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def residuals(model, block, views, run):
    """The names of residual streams' modules by those of linears, as one forward of `block` shows them."""
    forward, names = block.forward, {module: name for name, module in block.named_modules()}
    with torch.no_grad(), watching_sums(block, [view.module for view in views]) as sums:

        def watched(*args, **kwargs):
            output = forward(*args, **kwargs)
            sums.ended(output)
            return output

        block.forward = watched
        stages = observe_stages(views, run)
    found = {stage.views[0].name: sums.residual_of(stage) for stage in stages}
    return {name: names[module] for name, module in found.items() if module is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_output_is_added_to_is_found(family):
    model = model_of(family)
    block = next(iter(find_blocks(model).values()))
    views = list(find_linears(block).values())
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    found = residuals(model, block, views, lambda: model(ids))
    _, expected = FAMILIES[family]
    assert len(found) == len(expected)
    for (linear, module), (end, residual) in zip(found.items(), expected.items(), strict=True):
        assert linear.endswith(end)
        assert module.endswith(residual)


class Summing(nn.Module):
    """A block whose linear's output is added to what a module was called with."""

    def __init__(self, times=1, scale=1.0):
        super().__init__()
        self.norm, self.linear, self.times, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), times, scale

    def forward(self, x):
        for _ in range(self.times):
            x = x + self.scale * self.linear(self.norm(x))
        return x


@pytest.mark.parametrize(("times", "scale", "expected"), [(1, 1.0, {"linear": "norm"}), (2, 1.0, {}), (1, 0.5, {})])
def test_a_sum_is_one_of_a_single_call_and_without_a_factor(times, scale, expected):
    block, x = Summing(times, scale), torch.randn(2, 5, 8)
    views = [LinearView(name="linear", module=block.linear)]
    assert residuals(block, block, views, lambda: block(x)) == expected


def test_a_linear_that_returns_zeros_is_added_to_nothing():
    block, x = Summing(), torch.randn(2, 5, 8)
    nn.init.zeros_(block.linear.weight)
    nn.init.zeros_(block.linear.bias)
    assert residuals(block, block, [LinearView(name="linear", module=block.linear)], lambda: block(x)) == {}


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bloom"])
def test_samples_that_run_together_are_no_hindrance(family):
    """BLOOM's blocks are given a tensor with an entry per sample and head, which cannot be cut by samples."""
    rows = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
    config = GPTQConfig(bits=4, group_size=32, dataset=[{"input_ids": row} for row in rows], batch_size=4)
    quantized = quantize(model_of(family), config)
    assert any(isinstance(module, QuantLinear) for module in quantized.modules())


def test_of_several_forwards_the_first_is_watched():
    """Where memory is short, a micro-batch runs in parts: what is found must not depend on it."""
    block, x = Summing(), torch.randn(2, 5, 8)
    views = [LinearView(name="linear", module=block.linear)]
    assert residuals(block, block, views, lambda: [block(part) for part in x.split(1)]) == {"linear": "norm"}
