# SPDX-License-Identifier: Apache-2.0
"""Quantizing a model that is in memory already: the steps of `from_pretrained` after its weights have been read."""

import copy
from typing import Any

import transformers
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedConfig, PreTrainedModel

from optq.compat import transformers as compat
from optq.errors import ModelError
from optq.torch_state import default_torch_state

from .quantizer import OptqHfQuantizer


@default_torch_state()
def quantize_in_memory(model: PreTrainedModel, config: transformers.GPTQConfig | dict[str, Any]) -> PreTrainedModel:
    """Replace the linears of a loaded model by packed ones, as `from_pretrained(quantization_config=config)` does.

    Args:
        model: its weights on the CPU or on accelerators, in the dtype that it will be used in. Changed in place: its
            weights are gone afterwards.
    Returns:
        The same object.
    Raises:
        ModelError: it is quantized already, has adapters, or some of its weights are offloaded.
        ConfigError, CalibrationError, SolveError: as `optq.quantize`.
    If it fails before the first block is solved, the model is as it was; after that, finished blocks stay quantized.
    """
    refuse_unless_whole(model)
    quantizer = OptqHfQuantizer(config, pre_quantized=False)
    _own_config(model)
    device_map = getattr(model, "hf_device_map", None)
    quantizer.validate_environment(device_map=device_map)
    marks = {name: getattr(model, name, None) for name in ("is_quantized", "quantization_method")}
    stated = getattr(model.config, "quantization_config", None)
    try:
        quantizer.preprocess_model(model, checkpoint_files=[])
        if device_map is not None:  # the hooks that move activations between devices would get into the way
            remove_hook_from_submodules(model)
        quantizer.postprocess_model(model)
    except BaseException:
        for name, value in marks.items():
            setattr(model, name, value)
        model.config.quantization_config = stated
        if stated is None:
            del model.config.quantization_config
        if device_map is not None:
            compat.dispatch(model, compat.Placement(device_map=device_map), quantizer)
        raise
    model.hf_quantizer = quantizer
    return model


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a config of its own, parts of it included: others may be made of the same objects."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            module.config = copy.deepcopy(config, copies)


def refuse_unless_whole(model: Any) -> None:
    """Raise ModelError, with what to do instead, for an object that cannot be quantized as it is."""
    if reason := _why_not(model):
        raise ModelError(f"optq.quantize was given a {type(model).__name__} that {reason}")


def _why_not(model: Any) -> str | None:
    if not isinstance(model, PreTrainedModel):
        inside = getattr(model, "get_base_model", None)
        if inside is not None:
            return "has adapters of PEFT. Pass model.merge_and_unload(), or quantize its base model by id or folder."
        return "is no model of transformers. Pass a PreTrainedModel, a model's id on the Hub, or its folder."
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        named = f" ({getattr(method, 'value', method)})" if method is not None else ""
        return f"is quantized already{named}. Pass the original model, or call model.dequantize() first."
    if getattr(model, "_hf_peft_config_loaded", False):
        return "has adapters of PEFT. Merge them into the weights, or delete_adapter() them, first."
    offloaded = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if offloaded is not None:
        return (
            f"has no weights in memory, such as {offloaded}: they are offloaded or were never loaded. Pass its id or "
            "folder instead: then every block is read when its turn comes."
        )
    return None
