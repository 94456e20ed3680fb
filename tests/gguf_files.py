# SPDX-License-Identifier: Apache-2.0
"""Tiny GGUF files, written with llama.cpp's own package for it."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, block, inside = module.split(".", 3)
        return f"blk.{block}.{NAMES[inside]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def with_halves_interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """The order of a head's rows that llama.cpp's rotary embedding wants of llama."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kind: str,
    *,
    kinds: dict[str, str] | None = None,
    without: str | None = None,
    extra: str | None = None,
) -> Path:
    """A llama, qwen2 or qwen3 as a GGUF file: matrices of type `kind`, or as `kinds` says by their names in it.

    `without` names a tensor to leave out, `extra` one to add.
    """
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"t{index}" for index in range(3, config.vocab_size))])
    writer.add_token_merges(["t 1", "t1 1"])  # two: before 5.18, transformers reads a single one as text
    for special, index in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{special}_token_id")(index)
    for name, tensor in model.state_dict().items():
        stored, values = stored_name(name), tensor.numpy().astype(np.float32)
        if stored == without or (stored == "output.weight" and config.tie_word_embeddings):
            continue
        if architecture == "llama" and ("attn_q" in stored or "attn_k" in stored):
            heads = config.num_attention_heads if "attn_q" in stored else config.num_key_value_heads
            values = with_halves_interleaved(values, heads)
        own = (kinds or {}).get(stored, kind) if tensor.ndim == 2 else "F32"
        type_ = gguf.GGMLQuantizationType[own]
        writer.add_tensor(stored, quantize(values, type_), raw_dtype=type_)
    if extra is not None:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def on_zeroed_grid(model: PreTrainedModel) -> PreTrainedModel:
    """Every 32 weights on a grid of 16 steps that has a zero and float16 bounds, so that Q4_1 stores them exactly."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            codes = torch.randint(0, 16, parameter.shape, generator=generator).unflatten(1, (-1, 32))
            codes[..., 0], codes[..., 1] = 0, 15
            zeros = torch.randint(0, 16, (*codes.shape[:2], 1), generator=generator)
            steps = 2.0 ** torch.randint(-6, -3, zeros.shape, generator=generator)
            parameter.data = ((codes - zeros) * steps).flatten(1)
    return model
