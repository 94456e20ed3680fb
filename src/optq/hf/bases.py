# SPDX-License-Identifier: Apache-2.0
"""Models whose own checkpoint is quantized already: which are read as what they stand for, and the way on for others.

Some models are published in no other form than fp8 or mxfp4. transformers knows how to dequantize those while it reads
them, so they are read in that way, block by block like any other.
"""

from collections.abc import Iterable
from typing import Any

from optq.checkpoint import open_whole
from optq.compat import transformers as compat
from optq.config.field import short
from optq.errors import CheckpointError, ModelError
from optq.files.legacy import entry_of
from optq.files.source import nested_quantization, quantization_entry

_CONVERTED = (
    "optq.convert({source!r}, output_dir=..., to='dense') makes an ordinary model of it, which can be quantized"
)
_DEQUANTIZED = (
    "from_pretrained({source!r}).dequantize() may make an ordinary model of it, which save_pretrained() writes and "
    "which can be quantized"
)

WAYS_ON = {"gptq": _CONVERTED, "awq": _CONVERTED, "compressed-tensors": _CONVERTED}
"""By quant_method, what can be done with a model that is not read as a base; `_DEQUANTIZED` for others."""

PACKED_NAMES = ("weight", "qweight", "weight_packed", "qdata")
"""What a tensor with the integers of a quantized weight is called; others may be masks and indices."""


def method_of(stated: Any) -> str:
    """The quant_method of a quantization_config."""
    entry = entry_of(stated)
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    method = entry.get("quant_method", "no known method")
    return str(getattr(method, "value", method))


def why_no_base(stated: Any, source: str) -> str | None:
    """Why a model with this quantization_config is not quantized again, or None."""
    method = method_of(stated)
    if compat.can_dequantize(method):
        return None
    way = WAYS_ON.get(method, _DEQUANTIZED).format(source=source)
    return (
        f"{source} is quantized already ({method}), so it has no weights to quantize; of quantized models, those in "
        f"{', '.join(compat.DEQUANTIZED_METHODS)} are read. Use the model that it was made from: that loses less. "
        f"Otherwise {way}."
    )


def check_dense(files: Iterable[str]) -> None:
    """Refuse safetensors files with quantized tensors, of a model whose config does not say how they are to be read.

    Raises:
        ModelError: the first of them is named.
        CheckpointError: a file is missing or not whole.
    """
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with open_whole(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                dtype = opened.get_slice(name).get_dtype()
                packed = dtype in ("I8", "U8", "I32") and name.rpartition(".")[2] in PACKED_NAMES
                if packed or dtype.startswith(("F4", "F6", "F8")):
                    raise ModelError(
                        f"{name} is stored as {dtype}, so the model is quantized already; but its config.json says "
                        "nothing that could be understood about how. Restore its quantization_config, or use the "
                        "model that it was made from."
                    )


def check_base(model_config: Any, source: str) -> str | None:
    """The quant_method of a model whose stored weights can be dequantized as a base; None for a dense model.

    Raises:
        ModelError: the model is quantized in a way that cannot be dequantized.
    """
    stated = quantization_entry(model_config)
    check_parts(model_config, stated, source)
    if stated is None:
        return None
    check_says_something(stated)
    if reason := why_no_base(stated, source):
        raise ModelError(reason)
    return method_of(stated)


def check_says_something(stated: Any) -> None:
    """Refuse a quantization_config that is there and says nothing.

    Raises:
        ModelError: it is empty.
        CheckpointError: it is no dict, or its quant_method no text.
    """
    if not entry_of(stated):
        raise ModelError(
            "config.json has an empty quantization_config, so nobody can tell whether and how the model is quantized; "
            'it is a dict with "quant_method". Correct it, or remove it if the weights are not quantized.'
        )
    method = entry_of(stated).get("quant_method")
    if method is not None and not isinstance(method, str):
        raise CheckpointError(
            f"config.json has a quantization_config with quant_method={short(method)}, so nobody can tell how the "
            'model is quantized; of a GPTQ checkpoint it is "gptq". Correct it.'
        )
    # Of bitsandbytes, older files say these instead.
    if not any(entry_of(stated).get(key) for key in ("quant_method", "load_in_8bit", "load_in_4bit")):
        raise CheckpointError(
            "config.json has a quantization_config without quant_method, so nobody can tell how the model is "
            'quantized; of a GPTQ checkpoint it is "gptq". Add it.'
        )


def check_parts(model_config: Any, stated: dict[str, Any] | None, source: str) -> None:
    """Refuse a model whose config says of a part, such as vision_config, what it does not say of the whole.

    transformers asks only the whole and its text model, so codes of another part would be read as its weights.

    Args:
        stated: what holds for the whole.
    Raises:
        ModelError: the part is named.
    """
    for part, entry in nested_quantization(model_config).items():
        if entry and (stated is None or method_of(entry) != method_of(stated)):
            raise ModelError(
                f"{source} has {part}.quantization_config ({method_of(entry)}) in its config.json, so this part is "
                "quantized already; only the quantization of the whole model or of its text model is understood. Use "
                f"the model that it was made from; if the weights of {part} are not quantized, remove that entry."
            )
