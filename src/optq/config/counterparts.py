# SPDX-License-Identifier: Apache-2.0
"""Names that are no fields: what other tools' settings are called here, and the nearest name to a typing error.

Collected from AutoGPTQ, GPTQModel 7, optimum's GPTQQuantizer, transformers' GPTQConfig since 4.32, AutoAWQ, AutoRound,
llm-compressor, the scripts of the GPTQ paper and Qwen's.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches

CALLED = {
    **dict.fromkeys(("w_bit", "wbits", "wbit", "num_bits", "weight_bits", "nbits"), "bits"),
    **dict.fromkeys(("q_group_size", "groupsize"), "group_size"),
    **dict.fromkeys(("percdamp", "dampening_frac", "damp"), "damp_percent: a fraction, as there"),
    **dict.fromkeys(("act_order", "actorder"), "desc_act: by default columns are solved in that order anyway"),
    **dict.fromkeys(("symmetric", "is_sym"), "sym"),
    "zero_point": "sym: zero_point=True is sym=False",
    **dict.fromkeys(("calib_data", "calibration", "calibration_dataset", "examples", "data", "data_path"), "dataset"),
    **dict.fromkeys(("nsamples", "n_samples", "max_calib_samples", "num_calibration_samples"), "num_samples"),
    **dict.fromkeys(("seqlen", "seq_len", "max_len", "max_length", "max_calib_seq_len"), "model_seqlen"),
    **dict.fromkeys(("max_seq_length", "max_seq_len"), "model_seqlen"),
    **dict.fromkeys(("calibration_concat_size", "calibration_dataset_concat_size"), "packing: with model_seqlen"),
    **dict.fromkeys(
        ("cache_examples_on_gpu", "calibration_enable_gpu_cache", "low_gpu_mem_usage", "v2_memory_device"),
        "activation_memory: such as {0: '8GiB'}, so much of the GPU; the rest waits in memory or on disk",
    ),
    **dict.fromkeys(
        ("modules_to_not_convert", "modules_to_not_quantize", "ignore", "ignored_layers", "exclude_modules"),
        "dynamic: {'-:.*o_proj': {}} leaves such layers dense",
    ),
    **dict.fromkeys(("layer_config", "config_groups"), "dynamic: {'+:.*down_proj': {'bits': 8}}"),
    **dict.fromkeys(("inside_layer_modules", "targets"), "modules_in_block_to_quantize"),
    **dict.fromkeys(("to_quant_block_names", "sequential_targets", "layers_block_name"), "block_name_to_quantize"),
    **dict.fromkeys(("sequential", "sequential_update"), "true_sequential"),
    **dict.fromkeys(("mse", "enable_minmax_tuning", "apply_clip"), "grid: 'weighted', the default, searches grids"),
    **dict.fromkeys(("gptaq", "v2", "v2_alpha", "foem"), "propagation: part of effort='default'"),
    **dict.fromkeys(("iters", "epochs"), "polish: part of effort='max'"),
    "quantize_lm_head": "lm_head",
    "batch": "batch_size",
    "calibration_data_device": "device: where blocks are solved",
    "method": "quant_method",
    "logger_board": "log_file",
    **dict.fromkeys(("target_bits", "avg_bits"), "target_bits_per_weight"),
    "max_model_len": "context_length: with fit; how long calibration texts are is model_seqlen",
}
"""Another tool's name -> ours, and what to know about it."""

_KERNELS = "each layer takes the fastest kernel that its device has, and optq.kernels.explain says which and why"
_OF_ITSELF = "optq does so by itself where it is needed"
_MEMORY = "optq.quantize(..., output_dir=...) keeps one block in memory"
_LOADING = "it is an argument of from_pretrained and of optq.quantize, not of the config"
_SHARDS = (
    "every finished block is a file of its own, from which an interrupted run goes on. For files of another size load "
    "the finished folder with from_pretrained, and write it with save_pretrained(..., max_shard_size=...)"
)
_ANOTHER = "it belongs to another method of quantization"

NO_FIELD = {
    **dict.fromkeys(("max_shard_size", "shard_size"), _SHARDS),
    **dict.fromkeys(
        (
            *("use_cuda_fp16", "use_exllama", "disable_exllama", "disable_exllamav2", "exllama_config", "use_triton"),
            *("use_tritonv2", "use_marlin", "use_qigen", "warmup_triton", "autotune_warmup_after_quantized", "kernel"),
            *("inject_fused_attention", "inject_fused_mlp", "fuse_layers", "fused", "is_marlin_format", "pack_impl"),
        ),
        _KERNELS,
    ),
    **dict.fromkeys(
        (
            *("damp_auto_increment", "calibration_data_min_length", "calibration_sort", "buffered_fwd", "fail_safe"),
            *("failsafe", "auto_gc", "gc_mode", "parallel_packing", "hessian_chunk_size", "block_size", "blocksize"),
            *("auto_forward_data_parallelism", "wait_for_submodule_finalizers", "trainable", "export_compatible"),
        ),
        _OF_ITSELF,
    ),
    **dict.fromkeys(
        (
            *("offload_to_disk", "offload_to_disk_path", "offload_hessians", "max_chunk_memory", "low_cpu_mem_usage"),
            *("n_parallel_calib_samples", "vram_strategy"),
        ),
        _MEMORY,
    ),
    **dict.fromkeys(
        (
            *(
                "device_map",
                "max_memory",
                "dtype",
                "torch_dtype",
                "trust_remote_code",
                "revision",
                "token",
                "cache_dir",
            ),
            *("output_dir", "use_safetensors", "model_basename", "subfolder", "model", "model_name_or_path"),
        ),
        _LOADING,
    ),
    **dict.fromkeys(
        (
            *("version", "duo_scaling", "rotation", "adapter", "mock_quantization", "smooth", "lr", "minmax_lr"),
            *("load_in_4bit", "load_in_8bit", "act_bits", "smoothing_strength", "enable_quanted_input"),
        ),
        _ANOTHER,
    ),
}
"""Another tool's name -> why there is no such field."""


def why_unknown(
    name: str, known: Iterable[str], what: str = "field", shown: Callable[[str], str] = lambda name: name
) -> str:
    """Advice on a name that is none of `known`: the counterpart of another tool's setting, or the nearest name.

    Args:
        what, shown: of the place where the name was given: what names are there, and how they are written.
    """
    plain, names = name.lower().strip("-").replace("-", "_"), list(known)
    if plain in CALLED:
        ours, _, note = CALLED[plain].partition(": ")
        if ours in names:
            return f"this is another tool's name. Here it is {shown(ours)}{f': {note}' * bool(note)}."
    if plain in NO_FIELD:
        return f"this is another tool's name, and has no counterpart here: {NO_FIELD[plain]}. Leave it out."
    near = [plain] if plain in names else get_close_matches(plain, names, n=1, cutoff=0.6)
    if near:
        return f"there is no such {what}. Did you mean {shown(near[0])}?"
    return f"there is no such {what}; there are {', '.join(map(shown, names))}."
