# SPDX-License-Identifier: Apache-2.0
"""Every use of transformers that is internal to it or differs between versions 5.17 and 5.23, but for `parallel`."""

import copy
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import offload_state_dict
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils import logging as transformers_logging

from optq.errors import CalibrationError, ConfigError

from .call import PLACEMENT, told, where_for

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def renamed(tensors: dict[str, Value], model: Any) -> dict[str, Value]:
    """Rename a packed checkpoint's tensors to their names in the model."""
    # They have no name in the model yet, so a linear's are renamed as its weight would be; but nothing is fused.
    weights = {key: f"{key.rpartition('.')[0]}.weight" for key in tensors}
    names = names_in_model(set(weights.values()), model, fused=False)
    return {
        f"{names[weights[key]].removesuffix('.weight')}.{key.rpartition('.')[2]}": value
        for key, value in tensors.items()
    }


def left_out(names: Iterable[str], model: Any, on_disk: Iterable[str]) -> set[str]:
    """Which modules a checkpoint may have although the model has not, packed as well as dense.

    Those are what lies outside of the base model, such as the head of another task, and what the class itself lists.

    Args:
        names: as they would be in the model.
        on_disk: the names of the checkpoint's tensors.
    """
    listed = model._keys_to_ignore_on_load_unexpected or ()
    inside = f"{model.base_model_prefix}."
    of_base = {
        key[len(inside) : -len(".qweight")] for key in on_disk if re.match(rf"{re.escape(inside)}.*\.qweight$", key)
    }

    def may_be(name: str) -> bool:
        if any(re.search(pattern, f"{name}.weight") for pattern in listed):
            return True
        # With nothing packed under the base model's name, it was saved as a base model, or is of another architecture.
        return bool(of_base) and not name.startswith(inside) and (model.base_model is not model or name not in of_base)

    return {name for name in names if may_be(name)}


DEQUANTIZED_METHODS = ("fp8", "mxfp8", "mxfp4")
"""The values of quant_method that transformers can dequantize while it reads a checkpoint, and optq has it do so."""


def can_dequantize(method: str) -> bool:
    return method in DEQUANTIZED_METHODS and method in AUTO_QUANTIZATION_CONFIG_MAPPING


def dequantizer(stated: dict[str, Any]) -> Any:
    """transformers' own quantizer for a checkpoint with this quantization_config, told to dequantize it."""
    config = AutoQuantizationConfig.from_dict({**stated, "dequantize": True})
    base = AutoHfQuantizer.from_config(config, pre_quantized=True)
    convert = base.update_weight_conversions

    def update_weight_conversions(*arguments: Any, **settings: Any) -> list[Any]:
        conversions: list[Any] = convert(*arguments, **settings)
        for entry in conversions:
            if isinstance(entry, WeightConverter):
                entry.operations = [_with_whole_blocks(operation) for operation in entry.operations]
        return conversions

    base.update_weight_conversions = update_weight_conversions
    return base


def _with_whole_blocks(operation: Any) -> Any:
    """The same, but fp8 weights are filled up to whole blocks while they are dequantized.

    transformers tells the blocks' size by dividing the weight's by the number of scales. So a last block that is
    narrower, as of DeepSeek-V3's keys and values, makes it fail, or take wrong scales.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    if type(operation) is not Fp8Dequantize:
        return operation

    class WholeBlocks(Fp8Dequantize):
        def _dequantize_one(
            self, quantized: torch.Tensor, scales: torch.Tensor, *arguments: Any, **settings: Any
        ) -> torch.Tensor:
            def dequantized(codes: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = super(WholeBlocks, self)._dequantize_one(codes, scales, *arguments, **settings)
                return found

            block = self.hf_quantizer.quantization_config.weight_block_size
            if not block or not quantized.is_floating_point() or quantized.ndim != 2 or scales.ndim != 2:
                return dequantized(quantized)
            rows, columns = quantized.shape
            whole = [-(-size // of_block) * of_block for size, of_block in zip((rows, columns), block, strict=True)]
            scaled = [count * of_block for count, of_block in zip(scales.shape, block, strict=True)]
            if whole == [rows, columns] or scaled != whole:  # there is nothing to fill up, or another grid of scales
                return dequantized(quantized)
            filled = torch.nn.functional.pad(quantized.float(), (0, whole[1] - columns, 0, whole[0] - rows))
            return dequantized(filled)[:rows, :columns].contiguous()

    return WholeBlocks(operation.hf_quantizer)


def asked_dtypes(model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """The dtype that each floating point parameter gets as `from_pretrained` reads a dense checkpoint, by name.

    Args:
        model: before its weights are read, unless `dtype` tells what was asked for.
    """
    plan = model._get_dtype_plan(dtype or model.dtype)

    def planned(name: str, otherwise: torch.dtype) -> torch.dtype:
        return next((kept for key, kept in plan.items() if re.search(key.replace("*", ".*"), name)), otherwise)

    found = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return {name: planned(name, dtype or stated) for name, stated in found.items() if stated.is_floating_point}


def cast(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters these dtypes: what transformers dequantizes is read in that of the file, and of mxfp4 bfloat16.

    Args:
        dtypes: by name; parameters that are not there any more, or not read yet, stay as they are.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))


def forget_dequantizing(model: Any) -> None:
    """Have saving write what was dequantized as the ordinary model that it is now, not quantize it back."""

    def key(entry: Any) -> tuple[Any, ...]:
        return type(entry), tuple(entry._original_target_patterns), entry.scope_prefix

    applied = {key(entry) for entry in model._weight_conversions or ()}
    model._weight_conversions = [entry for entry in get_model_conversion_mapping(model) if key(entry) in applied]


def names_in_model(keys: Iterable[str], model: Any, base: Any = None, *, fused: bool = True) -> dict[str, str]:
    """Names in the model of tensors of a dense checkpoint; of those that become one, its name if `fused`.

    Args:
        base: the `dequantizer` of a checkpoint that is not dense.
    """
    conversions = get_model_conversion_mapping(model, None, base)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if fused and isinstance(entry, WeightConverter)]
    state = model.state_dict()
    return {key: rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0] for key in keys}


def expert_names(model: Any, fused: str) -> list[str]:
    """Names of the linears gate, up and down of one expert in checkpoints, for the fused module of this name.

    Where experts are fused on disk as well, they have the names that are usual elsewhere.
    """
    merged = [entry for entry in get_model_conversion_mapping(model) if _merges_experts(entry)]

    def sources(parameter: str) -> list[str]:
        for entry in merged:
            if any(re.search(rf"{target}$", f"{fused}.{parameter}") for target in entry.target_patterns):
                return [source.removesuffix(".weight").rpartition(".")[2] for source in entry.source_patterns]
        return []

    gate_and_up, up, down = sources("gate_up_proj"), sources("up_proj"), sources("down_proj")
    if len(gate_and_up) != 2:
        gate_and_up = ["gate_proj", *(up or ["up_proj"])]
    return [*gate_and_up, *(down or ["down_proj"])]


def without_fusing_experts(conversions: list[Any]) -> list[Any]:
    """Conversions for a model whose experts are split as they are on disk."""
    return [entry for entry in conversions if not _merges_experts(entry)]


def keep_unconverted(model: Any, linears: Iterable[str]) -> None:
    """Have saving leave these linears, which are going to be packed, as they are in the model."""
    if getattr(model, "_weight_conversions", None):
        model._weight_conversions = without_converting(model._weight_conversions, linears) or None


def without_converting(conversions: list[Any], linears: Iterable[str]) -> list[Any]:
    """Conversions that leave these linears as they are in the model: packed weights can only be renamed.

    Where such a linear is a part of a larger tensor in the original checkpoint, or holds several of its tensors, there
    is no way back to that form.
    """
    weights = [f"{name}.weight" for name in linears]

    def touches(entry: Any) -> bool:
        back = entry.reverse_transform()
        return any(rename_source_key(weight, [], [back], reverse=True)[1] is not None for weight in weights)

    return [entry for entry in conversions if not (isinstance(entry, WeightConverter) and touches(entry))]


def _merges_experts(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and any(
        isinstance(operation, MergeModulelist) for operation in entry.operations
    )


def named_as_on_disk(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a model's tensors, of any shape (...), back to the names and form of the checkpoint it came from."""
    named: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return named


def load_tensors(model: Any, tensors: dict[str, Any], base: Any = None) -> None:
    """Read slices of a checkpoint into the model, as `from_pretrained` does: renamed, converted, cast, on the CPU.

    Args:
        base: the `dequantizer` of a checkpoint that is not dense.
    """
    applied = model._weight_conversions  # what saving has to undo; the slices are a part of the checkpoint only
    settings = LoadStateDictConfig(
        device_map={"": "cpu"},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=get_model_conversion_mapping(model, None, base),
        hf_quantizer=base,
    )
    empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    asked = {name: dtype for name, dtype in asked_dtypes(model).items() if name in empty}
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        convert_and_load_state_dict_in_model(model, tensors, settings)
    finally:
        model._weight_conversions = applied
        if shown:
            transformers_logging.enable_progress_bar()
    if base is not None:
        cast(model, asked)


def initialise_buffers(model: Any, name: str) -> None:
    """Give a block's buffers that are in no checkpoint their values, as `from_pretrained` does after reading."""
    block = model.get_submodule(name)
    for module in block.modules():
        hollow = {name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name in hollow & module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        # What was read is marked, so that it is not initialised again.
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        module._is_hf_initialized = all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
    owner = _model_around(model, name)
    with torch.no_grad(), guard_torch_init_functions():
        block.apply(lambda module: owner._initialize_weights(module, owner.is_custom_code()))


def foreign_buffer(model: Any, name: str) -> str | None:
    """A buffer of a block that is in no checkpoint and that the block's own modules do not initialise, if any.

    Args:
        model: on the meta device.
        name: the block's.
    """
    owner = _model_around(model, name)
    for path, module in model.get_submodule(name).named_modules(prefix=name):
        before = {buffer: (id(tensor), tensor._version) for buffer, tensor in _unsaved_buffers(module).items()}
        if before:
            with torch.device("cpu"), torch.no_grad(), guard_torch_init_functions():
                owner._init_weights(module)
        for buffer, tensor in _unsaved_buffers(module).items():
            if before[buffer] == (id(tensor), tensor._version):
                return f"{path}.{buffer}"
    return None


def _unsaved_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    buffers = dict(module.named_buffers(recurse=False))
    return {name: buffers[name] for name in module._non_persistent_buffers_set & buffers.keys()}


def _model_around(model: Any, name: str) -> Any:
    """The innermost model of transformers that a module belongs to: a part of a larger model may be one itself."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def load_tokenizer(tokenizer: Any, model: str, where: Mapping[str, Any]) -> Any:
    """The tokenizer itself, or the one of a model id or folder, by default the model's own.

    Args:
        tokenizer: as `check_tokenizer` takes it.
        model: the model's id or folder.
        where: arguments of `from_pretrained` with which the model is found: subfolder, revision, token, …
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return _tokenizer_of(tokenizer)
    from transformers import AutoTokenizer

    source = str(tokenizer or model)
    told = where_for(source, model, where)
    try:
        return AutoTokenizer.from_pretrained(source, **told)
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        folder = f", subfolder {told['subfolder']!r}" if told.get("subfolder") else ""
        raise CalibrationError(
            f"The calibration data is text, but no tokenizer could be loaded from {source!r}{folder}: "
            f"{str(error).rstrip('.')}. "
            "Pass tokenizer= with an object, a model id or a folder, or pass token ids."
        ) from error


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is neither None, a model id or folder, a tokenizer, nor a processor with one.

    Raises:
        ConfigError: it is something else.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        _tokenizer_of(tokenizer)


def _tokenizer_of(given: Any) -> Any:
    """A tokenizer, or that of a processor, whose chat template is its own."""
    tokenizer = getattr(given, "tokenizer", given)
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        hint = ""
        if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
            hint = " Wrap it: PreTrainedTokenizerFast(tokenizer_object=...)."
        raise ConfigError(
            f"tokenizer= is a {type(given).__name__}; it may be a model id, a folder, a tokenizer of transformers, or "
            f"a processor that has one.{hint}"
        )
    template = getattr(given, "chat_template", None)
    if tokenizer is not given and template and not getattr(tokenizer, "chat_template", None):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def untie_head(model: Any) -> None:
    """Give the output head a weight of its own if it shares the input embedding's, and say so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    tied: dict[str, str] = model.all_tied_weights_keys
    model.all_tied_weights_keys = {
        name: source for name, source in tied.items() if model.get_submodule(name.rpartition(".")[0]) is not head
    }
    logger.warning(
        "lm_head=True: the output head shares its weight with the input embedding. It is untied and quantized, and "
        "the embedding stays as it is, so the checkpoint holds both and is larger than with lm_head=False."
    )


def make_generation_config_savable(model: Any) -> None:
    """Turn sampling on where a generation config sets its parameters; transformers refuses to save it otherwise.

    Refusing would come after all the work was done. The parameters show that sampling was meant.
    """
    generation_config = getattr(model, "generation_config", None)
    if generation_config is None:
        return
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        logger.warning(
            "The model's generation config sets sampling parameters without do_sample; it is set to True. %s", error
        )
        generation_config.do_sample = True


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The arguments of `from_pretrained` that say where a model is placed."""

    device_map: Any = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | os.PathLike[str] | None = None
    offload_buffers: bool = False


def asked_placement(device_map: Any) -> Placement:
    """The placement that the running `from_pretrained` was asked for; its quantizer is told `device_map` only."""
    return Placement(device_map=device_map, **told(PLACEMENT))


def _disjoint(model: Any, placement: dict[str, Any]) -> dict[str, Any]:
    """The same, but no module is inside of another one that is named.

    Else accelerate hangs two hooks on modules, and transformers finds neither when it saves what is offloaded.
    """
    modules, found = dict(model.named_modules()), dict(placement)
    waiting = list(placement)
    for name in waiting:  # it grows
        prefix, module = f"{name}." if name else "", modules.get(name)
        if module is None or not any(key != name and key.startswith(prefix) for key in found):
            continue
        if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            device = found.pop(name)
            inside = {prefix + child: device for child, _ in module.named_children()}
            waiting += [child for child in inside if child not in found]
            found = {**inside, **found}
    return found


def automatic_map(model: Any, asked: Placement, quantizer: Any) -> Any:
    """The device_map that transformers will make of one such as "auto"; any other is returned as it is.

    Raises:
        ConfigError: max_memory holds sizes that are none.
    """
    if not isinstance(asked.device_map, str):
        return asked.device_map
    from transformers.integrations.accelerate import _get_device_map

    try:
        return dict(_get_device_map(model, asked.device_map, asked.max_memory, quantizer))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"device_map={asked.device_map!r} with max_memory={asked.max_memory!r} places nothing: {error}"
        ) from error


def dispatch(model: Any, asked: Placement, quantizer: Any) -> None:
    """Place a model that is on the CPU; if that fails, it is there again.

    Raises:
        OSError, RuntimeError, ValueError: of torch or accelerate.
    """
    if asked.device_map is None:
        return
    from transformers.integrations.accelerate import _get_device_map, accelerate_dispatch

    try:
        placement = _disjoint(model, _get_device_map(model, asked.device_map, asked.max_memory, quantizer))
        devices = set(placement.values())
        if len(devices) == 1 and "disk" not in devices:
            model.to(devices.pop())
        else:
            if asked.offload_folder is not None:
                disk = tuple(f"{name}." if name else "" for name, device in placement.items() if device == "disk")
                state = model.state_dict()
                # Without this, accelerate takes what an earlier model has left in the folder for this one's.
                offload_state_dict(asked.offload_folder, {key: state[key] for key in state if key.startswith(disk)})
            accelerate_dispatch(model, quantizer, placement, asked.offload_folder, None, asked.offload_buffers)
    except (OSError, RuntimeError, ValueError):
        remove_hook_from_submodules(model)
        model.__dict__.pop("to", None)  # accelerate's, which refuses to move what is offloaded
        model.to("cpu")
        raise
    model.hf_device_map = placement
