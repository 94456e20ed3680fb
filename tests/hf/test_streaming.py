# SPDX-License-Identifier: Apache-2.0
"""Blocks are read when their turn comes, and nothing else changes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconH1Config, GPT2Config, GPTJConfig, GPTNeoConfig, Phi3Config

from optq import GPTQConfig, QuantLinear
from optq.errors import CheckpointError, ModelError
from optq.hf import quantizing
from optq.hf.streaming import StreamedBlocks, why_not_streamed
from optq.model import find_blocks

SIZES = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SIZES),
    "gptj": GPTJConfig(n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8, **SIZES),
    "gpt_neo": GPTNeoConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=64,
        **SIZES,
    ),
    "phi3": Phi3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pad_token_id=0,
        **SIZES,
    ),
}


def quantize(folder, rows, **settings):
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": rows, **settings})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def mappings():
    """How many safetensors files are mapped into memory; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_text().count(".safetensors") if maps.exists() else 0


@pytest.fixture
def reads(monkeypatch):
    """What `StreamedBlocks.read` was asked for, with what it did."""
    seen = {}
    read = StreamedBlocks.read

    def watched(self, name):
        before = mappings()
        read(self, name)
        assert mappings() <= before, "a file stays mapped, and what is read of it in memory"
        if name not in self._blocks:
            return
        block = self._model.get_submodule(name)
        tensors = dict([*block.named_parameters(), *block.named_buffers()])
        seen[name] = {key: tensor.clone() for key, tensor in tensors.items()}
        dense = [other for other in self._blocks if any(p.numel() and not p.is_meta for p in linears(self, other))]
        assert dense == [name], "other blocks' linears are in memory"

    def linears(self, name):
        return [m.weight for m in self._blocks[name].modules() if hasattr(m, "weight") and m.weight.ndim == 2]

    monkeypatch.setattr(StreamedBlocks, "read", watched)
    return seen


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_what_is_read_is_what_from_pretrained_reads(kind, token_rows, tmp_path, reads):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(tmp_path, max_shard_size="50KB")
    model = quantize(tmp_path, token_rows)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(reads) == 2
    for name, tensors in reads.items():
        block = dense.get_submodule(name)
        expected = dict([*block.named_parameters(), *block.named_buffers()])
        assert list(tensors) == list(expected)
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), (name, key)
    assert not any(module.training for module in model.modules())
    assert not any(tensor.is_meta for name, tensor in model.named_parameters() if not name.endswith("qweight"))


@pytest.mark.parametrize("settings", [{}, {"bits": 3, "target_bits_per_weight": 4.5}, {"lm_head": True}])
def test_the_bytes_are_those_of_a_model_read_whole(tiny_llama, token_rows, tmp_path, monkeypatch, settings, reads):
    quantize(tiny_llama, token_rows, **settings).save_pretrained(tmp_path / "streamed")
    assert reads
    monkeypatch.setattr(quantizing, "why_not_streamed", lambda *arguments: "asked for")
    quantize(tiny_llama, token_rows, **settings).save_pretrained(tmp_path / "whole")
    streamed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)


def test_a_model_that_initialises_its_blocks_from_outside_is_read_whole():
    config = FalconH1Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_chunk_size=32,
    )
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(other) for other in (config, *CONFIGS.values())]
    reasons = [why_not_streamed(model, find_blocks(model), ["model.safetensors"]) for model in models]
    assert reasons[0] == "model.layers.0.mamba.mup_vector is initialised from outside of its block"
    assert reasons[1:] == [None] * len(CONFIGS)


def test_an_incomplete_checkpoint_is_named(tiny_llama, token_rows, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        quantize(tmp_path, token_rows)


def test_weights_that_are_not_finite_are_found_when_they_are_read(tiny_llama, token_rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"up_proj has weights that are not finite"):
        quantize(tmp_path, token_rows)


def test_other_files_than_safetensors_are_read_whole(tiny_llama, token_rows, tmp_path, caplog, reads):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with caplog.at_level("INFO", logger="optq"):
        found = quantize(tmp_path, token_rows)
    assert "read into memory: pytorch_model.bin is no safetensors file" in caplog.text
    assert not reads
    assert sum(isinstance(module, QuantLinear) for module in found.modules()) == 14


def test_nothing_is_said_about_tensors_that_are_left_for_later(tiny_llama, token_rows, caplog):
    quantize(tiny_llama, token_rows)
    assert "UNEXPECTED" not in caplog.text
    assert json.dumps(caplog.messages).count("unexpected") == 0
