# SPDX-License-Identifier: Apache-2.0
"""The tiny models that travel on the fake device."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlavaConfig,
    Qwen3MoeConfig,
    T5Config,
)

from optq import GPTQConfig

VOCABULARY = 128
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGE = 3
"""The token in whose 16 places an image stands."""

SMALL: dict[str, Any] = {
    **SHARED,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

CONFIGS: dict[str, Any] = {
    "small llama": lambda: LlamaConfig(**SMALL),
    "llama": lambda: LlamaConfig(**SHARED),
    "mixture": lambda: Qwen3MoeConfig(
        **SHARED, moe_intermediate_size=32, head_dim=16, num_experts=4, num_experts_per_tok=2
    ),
    "encoder-decoder": lambda: T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0
    ),
    "vision": lambda: LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **VISION},
        text_config={"model_type": "llama", **SHARED},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    ),
}
KINDS: dict[str, Any] = {"encoder-decoder": AutoModelForSeq2SeqLM, "vision": AutoModelForImageTextToText}
DECODERS = ("llama", "small llama", "mixture")


def kind_of(name: str) -> Any:
    return KINDS.get(name, AutoModelForCausalLM)


def quantized(
    name: str, dense: Path, effort: str, *, dtype: torch.dtype, device_map: Any = None, **settings: Any
) -> Any:
    """The model of `dense`, quantized while it loads."""
    if "activation_memory" in settings:  # keys of JSON are text
        limits = settings["activation_memory"].items()
        settings["activation_memory"] = {int(key) if key.isdigit() else key: size for key, size in limits}
    config = GPTQConfig(
        **{"bits": 4, "group_size": 32, "batch_size": 2, **settings},
        dataset=rows(name),
        effort=effort,
        quality_gate="off",
    )
    where = {} if device_map is None else {"device_map": device_map}
    return kind_of(name).from_pretrained(dense, quantization_config=config, dtype=dtype, **where)


def digest(folder: Path) -> str:
    """Of a checkpoint's tensors."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def digest_of(model: Any) -> str:
    """Of a model's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def create(name: str, folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    kind_of(name).from_config(CONFIGS[name]()).to(dtype).save_pretrained(folder)
    return folder


def _ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(4, 100, (count, 24), generator=torch.Generator().manual_seed(seed))


def _seen(count: int, seed: int) -> dict[str, torch.Tensor]:
    image = torch.full((count, 16), IMAGE)
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": torch.cat((image, _ids(count, seed)), 1), "pixel_values": pixels}


def rows(name: str) -> list[dict[str, Any]]:
    """Calibration samples."""
    if name == "vision":
        every = _seen(8, 1)
        return [{key: value[at : at + 1] for key, value in every.items()} for at in range(8)]
    return [{"input_ids": row.tolist()} for row in _ids(8, 1)]


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Of one call."""
    if name == "vision":
        return _seen(2, 2)
    ids = _ids(1, 2)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if name == "encoder-decoder" else {"input_ids": ids}
