# SPDX-License-Identifier: Apache-2.0
"""Which architectures of transformers can be quantized: a tiny random model of every type, from config to reload.

Each type's config class is shrunk by what its fields are called, a random model is made of it, saved, quantized to 4
bits in groups of 32 while it is loaded, saved, and loaded again. Checked are: all linears of the blocks are quantized
but those with a stated reason; outputs are finite and those of the dequantized weights; what is loaded again gives
bit-identical outputs; tensors have the original's names. The models read random tokens; and random images or sound if
they cannot do without, or are there for speech.

    python benchmarks/coverage.py                    # all types of all mappings, about ten minutes on one core
    python benchmarks/coverage.py --only llama t5    # some; the others keep what they had
"""

import argparse
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import record

RESULT = "coverage"
MAPPINGS = {
    "causal language models": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder and decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked language models": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "images and text, the language model": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
SECONDS = 120  # per type
SEED, VOCABULARY, ROWS, LENGTH = 0, 160, 8, 48
HIDDEN, INNER, HEADS, HEAD_DIM, LAYERS, EXPERTS = 64, 96, 4, 16, 2, 4
IMAGE, PATCH, MELS, FRAMES, SAMPLES = 32, 8, 16, 64, 4000

RULES: tuple[tuple[str, int], ...] = (
    (r"rotary_dim$", 8),
    (r"num_feat_extract_layers$", 7),
    (r"mamba_(n|num)_heads", 8),
    (r"head_?dim|head_size|d_kv|kv_channels|d_head|dim_head|qkv_dim", HEAD_DIM),
    (r"experts_per_tok|top_?k$|num_selected|moe_k$|experts_top_k|topk$|num_experts_per", 2),
    (r"topk_group|n_group$|num_expert_group", 1),
    (r"shared_experts?$|zero_expert_num|first_k_dense|moe_layer_start|num_dense_layers|num_nextn", 1),
    (r"experts?$|num_local_experts", EXPERTS),
    (r"layers?$|depths?$|n_layer|num_blocks|num_hidden_groups", LAYERS),
    (r"(key_value|kv)_?(num_)?heads|num_kv|multi_query_group_num|n_head_kv|kv_n_heads|num_key_value", 2),
    (r"heads?$|n_head|num_heads|attention_heads", HEADS),
    (r"rope_head_dim|nope_head_dim|v_head_dim", HEAD_DIM),
    (r"lora_rank|_rank$|lora_dim|lora_r$", 32),
    (r"intermediate|ffn|d_ff|n_inner|mlp_dim|inner_dim|feed_forward|ff_dim|expert_dim|mlp_hidden", INNER),
    (r"hidden_size|d_model|d_latents|n_embd|^dim$|embed_dim|width|embedding_size|hidden_dim|d_embed|model_dim|out_hidden|"
     r"lru_width|projection_dim|output_dim|emb_dim|word_embed_proj_dim|attention_hidden", HIDDEN),
    (r"vocab_size|vocabulary|vocab_file_size", VOCABULARY),
    (r"sliding_window|window_size|attention_window|local_window|chunk_size|block_size", 32),
    (r"max_(source_|target_)?position|n_positions|max_.*length|seq_length|n_ctx|context_length|max_seq|max_sequence",
     128),
    (r"state_size|d_state|ssm_state", 16),
    (r"image_size", IMAGE),
    (r"patch_size", PATCH),
    (r"num_mel_bins|feature_size|num_channels_mel|input_feat_per_channel", MELS),
)  # fmt: skip
"""What a field's name says about its value; the first match counts."""


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"text_config": {"rope_parameters": ROPE | {"mrope_section": list(sections)}}}


COMPASS = {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}}
QWEN4 = {
    "text_config": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 32,
        "indexer_compress_ratio": 8,
    }
}
CODED_IMAGES = {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}, "vq_config": {"base_channels": 32}}
DOTS3 = {
    **dict.fromkeys(("num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"), HEADS),
    **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 32),
    **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), HEAD_DIM),
}

FIXES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl"),
        _mrope(2, 3, 3),
    ),
    "glm4v_moe": _mrope(1, 1, 2),
    "ernie4_5_vl_moe": _mrope(3, 3, 2),
    "cosmos3_edge": _mrope(2, 3, 3),
    "cohere_compass": COMPASS,
    "cohere_compass_text": COMPASS,
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "chameleon": CODED_IMAGES,
    "emu3": CODED_IMAGES,
    "ctrl": {"dff": INNER},
    "cpmant": {"dim_ff": INNER},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": INNER}},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "glm5_next": {"text_config": {"index_topk": 16, "index_kpool": 8}},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [1, 1]]},
    "mistral4": {"text_config": {"qk_head_dim": 32, "head_dim": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "muse_spark": {"audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [32, 64], "depths": [1, 1]}},
    "inkling_mm_model": {"vision_config": {"n_layers": 8}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "esmc": {"num_key_value_heads": HEADS, "vocab_size": VOCABULARY},
    "xlstm": {"embedding_dim": HIDDEN},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS, "encoder_config": {"num_key_value_heads": HEADS}},
    "dia": {"decoder_config": {"num_channels": 1}, "delay_pattern": [0]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": HIDDEN}},
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 6400,
        "acoustic_tokenizer_encoder_config": {"num_filters": 2},
        "semantic_tokenizer_encoder_config": {"num_filters": 2},
    },
    "vibevoice": {"audio_config": {"num_filters": 2}, "semantic_model_config": {"num_filters": 2}},
    "speecht5": {"vocab_size": VOCABULARY},
    "voxtral": {"audio_token_id": 4, "audio_config": {"intermediate_size": 4 * HIDDEN}},
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": HEADS},
            "diarization_config": {"audio_config": {"num_key_value_heads": HEADS}},
        },
        "word_timestamp_config": {"num_key_value_heads": HEADS},
    },
    "speech_to_text": {"conv_channels": HIDDEN},
    "blip-2": {"image_token_index": 4},
    "kosmos-2": {"latent_query_num": 8},
    "instructblip": {"image_token_index": 4},
    "instructblipvideo": {"video_token_index": 4, "num_query_tokens": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}}},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 1},
    "mobilebert": {"embedding_size": HIDDEN, "true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN},
    "step3p7": {"text_config": {"sliding_window": 32}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": INNER,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlnet": {"d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "dots3_note_text": DOTS3,
    "longcat_flash": {"qk_head_dim": 32, "head_dim": 16},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
}
"""Fields that the names alone do not get right, by model type, in the form of the composite config if there is one."""


SHAPES: dict[str, tuple[int, ...]] = {
    "pixel_values": (3, IMAGE, IMAGE),
    "input_features": (FRAMES, MELS),
    "input_values": (SAMPLES,),
}
"""One sample of what a forward may take beside text."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "whisper": {"input_features": (MELS, 256)},
    "voxtral": {"input_features": (MELS, 256)},
    "voxtral_realtime": {"input_features": (MELS, 8 * LENGTH)},
    "qwen3_asr": {"input_features": (MELS, 100), "input_features_mask": (100,)},
    "fun_asr_nano": {"input_features": (32, 7 * MELS), "input_features_mask": (32,)},
    "seamless_m4t": {"input_features": (FRAMES, 160)},
    "seamless_m4t_v2": {"input_features": (FRAMES, 160)},
    "granite_speech": {"input_features": (FRAMES, 160)},
    "granite_speech_plus": {"input_features": (FRAMES, 160)},
    "pop2piano": {"input_features": (FRAMES, HIDDEN), "input_ids": None},
    "speech-encoder-decoder": {"input_features": None},
    "vibevoice_asr": {"input_values": (1, 6400)},
    "vibevoice": {"input_values": (1, SAMPLES), "padding_mask": (SAMPLES,)},
    "blip-2": {"decoder_input_ids": None},
    "instructblip": {"qformer_input_ids": (16,), "decoder_input_ids": None},
    "instructblipvideo": {"qformer_input_ids": (16,), "pixel_values": (4, 3, IMAGE, IMAGE), "decoder_input_ids": None},
    "kosmos-2": {"image_embeds_position_mask": [1] * 8 + [0] * (LENGTH - 8)},
    "pix2struct": {"flattened_patches": (FRAMES, 2 + HIDDEN)},
    "udop": {"bbox": (LENGTH, 4), "pixel_values": (3, IMAGE, IMAGE)},
    "idefics": {"pixel_values": (1, 3, IMAGE, IMAGE), "image_attention_mask": (LENGTH, 1)},
    "pi0": {
        "state": (32,),
        "pixel_values": (1, 3, IMAGE, IMAGE),
        "pixel_attention_mask": (1,),
        "noise": (32, 32),
        "timestep": (),
    },
}
"""By model type, other arguments and other shapes; or, as a list, the values; None: left out."""

BLOCKS = {
    "blt": "model.global_transformer.layers",
    "git": "git.encoder.layer",
    "hrm_text": "model.H_module.layers",
    "idefics": "model.layers",
    "pi0": "model.vlm.language_model.layers",
}
"""What `block_name_to_quantize` has to say where several lists of blocks are of the same size."""


def shrunk(config: Any, changes: dict[str, Any] | None = None) -> Any:
    """A tiny config of the same class."""
    from transformers import PretrainedConfig

    fields: dict[str, Any] = {}
    kinds = {
        name: list(dict.fromkeys(value))[:4]
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and value and all(isinstance(entry, str) for entry in value)
        if re.search(r"layer|block|attention_types", name) and name != "architectures"
    }
    layers = max([LAYERS, *map(len, kinds.values())])
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "id2label", "label2id"):
            continue
        if isinstance(value, PretrainedConfig):
            fields[name] = shrunk(value, (changes or {}).get(name))
        elif isinstance(value, bool) or value is None:
            continue
        elif name in kinds:
            fields[name] = (kinds[name] * layers)[:layers]
        elif re.search(r"token_id|_id$|_index$|token_index", name):
            fields[name] = small_id(value)
        elif re.search(r"^(num_hidden_layers|num_layers|n_layers?)$", name):
            fields[name] = layers
        elif isinstance(value, (list, tuple)) and re.search(r"intermediate|ffn_dim", name) and len(value) > layers:
            fields[name] = [INNER] * layers
        elif isinstance(value, int):
            small = next((small for pattern, small in RULES if re.search(pattern, name)), value)
            fields[name] = min(value, small)
    if fields.keys() & {"kv_lora_rank"}:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", HEADS)
    fields |= {
        name: value for name, value in (changes or {}).items() if not isinstance(fields.get(name), PretrainedConfig)
    }
    try:
        return type(config)(**fields)
    except (TypeError, AttributeError, ValueError):  # some take the configs of their parts as dictionaries only
        parts = {name: value.to_dict() for name, value in fields.items() if isinstance(value, PretrainedConfig)}
        return type(config)(**fields | parts)


def small_id(value: Any) -> Any:
    if isinstance(value, list):
        return [small_id(entry) for entry in value]
    return value if not isinstance(value, int) or value < VOCABULARY else value % 8 + VOCABULARY - 10


def checked(model_type: str, class_name: str) -> dict[str, Any]:
    """One row: what was reached, with the reason where it ended."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    row: dict[str, Any] = {"class": class_name}
    folder = Path(tempfile.mkdtemp())
    started = time.monotonic()
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        step = "instantiate"
        model = instantiated(model_type, class_name)
        step = "run"
        generator = torch.Generator().manual_seed(SEED)
        inputs = sample(model, model_type, 2, generator)
        idle = idle_modules(model, inputs)
        model.save_pretrained(folder / "original")
        rows = [sample(model, model_type, 1, generator) for _ in range(ROWS)]
        for fact in steps(type(model), folder, inputs, rows, idle, BLOCKS.get(model_type)):
            row |= fact
            step = row.pop("next")
        row["passed"] = True
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        row |= {"passed": False, "step": step, "reason": f"{type(error).__name__}: {str(error).strip()}"[:300]}
    finally:
        row["seconds"] = round(time.monotonic() - started, 1)
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
    return row


def out_of_time(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds")


def instantiated(model_type: str, class_name: str) -> Any:
    import torch
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    model_class = getattr(transformers, class_name)
    if model_class.config_class is not None and not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class  # the text model of a composite one
    config = config_class()
    fixes = dict(FIXES.get(model_type, {}))
    if not hasattr(config, "text_config"):
        fixes |= fixes.pop("text_config", {})
    if model_type == "reformer":
        fixes["is_decoder"] = "MaskedLM" not in class_name
    config = shrunk(config, fixes)
    torch.manual_seed(SEED)
    model = model_class(config).eval().float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def sample(model: Any, model_type: str, rows: int, generator: Any) -> dict[str, Any]:
    """Random arguments of a forward: tokens, and the images or sound that it insists on or is there for."""
    import torch

    parameters = inspect.signature(model.forward).parameters
    wanted = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    wanted |= {model.main_input_name}
    if type(model).__name__ in speech_classes():
        wanted |= {"input_features", "input_values"}
    tokens = dict.fromkeys(("input_ids", "decoder_input_ids"), (LENGTH,))
    shapes = {name: shape for name, shape in SHAPES.items() if name in wanted} | tokens | ARGUMENTS.get(model_type, {})
    inputs: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name not in parameters or shape is None:
            continue
        if isinstance(shape, list):
            inputs[name] = torch.tensor(shape).expand(rows, -1)
        elif name.endswith("_ids"):
            inputs[name] = torch.randint(12, VOCABULARY - 12, (rows, *shape), generator=generator)
        elif name.endswith("_mask"):
            inputs[name] = torch.ones(rows, *shape, dtype=torch.int64)
        else:
            inputs[name] = torch.rand(rows, *shape, generator=generator)
    for kind in ("image", "audio", "video"):
        put_placeholders(model, kind, inputs)
    return inputs


def put_placeholders(model: Any, kind: str, inputs: dict[str, Any]) -> None:
    """Let the text begin with as many placeholders as the model makes features of an image or a sound."""
    import torch

    config = model.config
    token = getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", None))
    features_of = getattr(getattr(model, "model", model), f"get_{kind}_features", None)
    if token is None or features_of is None:
        return
    parameters = inspect.signature(features_of).parameters
    known = {name: tensor for name, tensor in inputs.items() if name in parameters}
    if not any(tensor.is_floating_point() for tensor in known.values()):
        return
    with torch.no_grad():
        features = features_of(**known, return_dict=True).pooler_output
    count = sum(part[..., 0].numel() for part in features) // len(inputs["input_ids"])
    inputs["input_ids"][:, :count] = token


def speech_classes() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    return set(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values())


def outputs_of(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    parameters = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    torch.manual_seed(SEED)  # some add noise to what they hear
    with torch.no_grad():
        found = model(**inputs, **extra)
    return found.logits if hasattr(found, "logits") else found[0]


def idle_modules(model: Any, inputs: dict[str, Any]) -> set[str]:
    """Linears and experts that a plain forward of the model never calls."""
    from optq.model import find_fused_experts, find_linears

    modules = {name: view.module for name, view in find_linears(model).items()} | find_fused_experts(model)
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in modules.items()
    ]
    outputs = outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    if not bool(outputs.isfinite().all()):
        raise ValueError("the random model's own outputs are not finite")
    return modules.keys() - called


def steps(
    model_class: Any,
    folder: Path,
    inputs: dict[str, Any],
    rows: list[dict[str, Any]],
    idle: set[str],
    blocks: str | None,
) -> Iterator[dict[str, Any]]:
    """The checks, one after the other; an exception ends them. What becomes known, and the `next` step."""
    import torch

    from optq import GPTQConfig, QuantLinear

    yield {"next": "quantize"}
    log = folder / "log.jsonl"
    config = GPTQConfig(
        bits=4,
        group_size=32,
        dataset=rows,
        effort="fast",
        quality_gate="off",
        log_file=str(log),
        batch_size=2,
        block_name_to_quantize=blocks,
    )
    model = model_class.from_pretrained(folder / "original", quantization_config=config, dtype=torch.float32)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    started = next(event for event in events if event["event"] == "started")
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    yield {"next": "all linears", "linears": len(layers), "skipped": started["skipped"]}
    unreached = {event["linear"] for event in events if event["event"] == "unreached"}
    missed = {name for name in unreached if name not in idle and name.rsplit(".", 2)[0] not in idle}
    if missed:
        raise AssertionError(f"{len(missed)} linears were not reached, such as {min(missed)}")
    if len(layers) + len(unreached) != started["linears"]:
        raise AssertionError(f"{len(layers)} of {started['linears']} linears were quantized")
    yield {"next": "outputs", "idle": sorted(unreached)}
    quantized = outputs_of(model, inputs)
    if not bool(quantized.isfinite().all()):
        raise AssertionError("outputs are not finite")
    yield {"next": "save"}
    model.save_pretrained(folder / "quantized")
    yield {"next": "names"}
    before, after = names_in(folder / "original"), names_in(folder / "quantized")
    strange = {dense_name(name) for name in after} - before
    strange = {name for name in strange if not fused_on_disk(name, before)}
    if strange:
        raise AssertionError(f"{len(strange)} tensors have other names than the original's, such as {min(strange)}")
    yield {"next": "reload"}
    reloaded = model_class.from_pretrained(folder / "quantized", dtype=torch.float32)
    if not torch.equal(outputs_of(reloaded, inputs), quantized):
        raise AssertionError("what was loaded again has other outputs")
    yield {"next": "dequantized weights"}
    dense = outputs_of(reloaded.dequantize(), inputs)
    error = float((dense - quantized).abs().max() / dense.abs().max())
    if not error < 1e-3:
        raise AssertionError(f"outputs differ by {error:.1e} from those of the dequantized weights")
    yield {"next": "", "error": error}


def names_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def dense_name(name: str) -> str:
    """What the tensor's linear has in a dense checkpoint."""
    return re.sub(r"\.(qweight|qzeros|scales|g_idx)$", ".weight", name)


def fused_on_disk(name: str, before: set[str]) -> bool:
    """Whether the original has this expert's linear in a tensor with all others."""
    one_by_one = re.compile(r".+\.experts\.\d+\.\w+\.(weight|bias)$")
    return one_by_one.match(name) is not None and not any(map(one_by_one.match, before))


def types() -> Iterator[tuple[str, str, str]]:
    """Mapping, model type, class."""
    from transformers.models.auto import modeling_auto

    for title, attribute in MAPPINGS.items():
        for model_type, classes in getattr(modeling_auto, attribute).items():
            yield title, model_type, classes if isinstance(classes, str) else classes[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of model types")
    parser.add_argument("--failed", action="store_true", help="only those that did not pass before")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = record.read(RESULT)
    wanted = [
        (title, model_type, name)
        for title, model_type, name in types()
        if any(fnmatch(model_type, pattern) for pattern in arguments.only)
        and not (arguments.failed and results.get(title, {}).get(model_type, {}).get("passed"))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = [(entry, pool.submit(checked, entry[1], entry[2])) for entry in wanted]
        for (title, model_type, name), future in futures:
            try:
                row = future.result()
            except Exception as error:
                row = {"class": name, "passed": False, "step": "instantiate", "reason": f"{type(error).__name__}"}
            print(
                f"{'ok  ' if row['passed'] else 'FAIL'} {model_type}: {row.get('step', '')} {row.get('reason', '')}"[
                    :230
                ],
                flush=True,
            )
            results.setdefault(title, {})[model_type] = row
    ordered = {title: {} for title in MAPPINGS}
    for title, model_type, _ in types():
        if model_type in results.get(title, {}):
            ordered[title][model_type] = results[title][model_type]
    settings = {"bits": 4, "group_size": 32, "effort": "fast", "rows": ROWS, "length": LENGTH, "seed": SEED}
    record.write(RESULT, settings, ordered, quiet=True)


if __name__ == "__main__":
    main()
