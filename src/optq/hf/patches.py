# SPDX-License-Identifier: Apache-2.0
"""All that optq changes in other libraries, in one place. `optq.unregister()` takes it back.

Each function below is called when the module that it is about has been loaded, which may be while transformers is
still importing itself; so what needs more of it is imported when it is first used.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optq.compat.call import NAME, called_with, name_told
from optq.errors import CheckpointError, found_in
from optq.patching import assign, put, wrap


def read_old_folders() -> None:
    """`PreTrainedConfig.get_config_dict` reads what is beside config.json, too (optq.files.legacy)."""
    from transformers.configuration_utils import PreTrainedConfig

    def make(read: Callable[..., Any]) -> Callable[..., Any]:
        def get_config_dict(cls: type[Any], /, source: Any, **kwargs: Any) -> Any:
            from optq.files.legacy import complete_config
            from optq.files.source import json_object

            try:
                config, unused = read(cls, source, **kwargs)
            except (AttributeError, TypeError, RecursionError) as error:
                if (file := Path(source, kwargs.get("subfolder") or "", "config.json")).is_file():
                    json_object(file)  # raises, if it is for this that transformers does not name the file
                if isinstance(error, RecursionError):
                    raise CheckpointError(f"{file} is nested too deeply to be read. Download it again.") from error
                raise
            if "vllm" not in sys.modules:  # which finds quantize_config.json, and weights of any name, by itself
                complete_config(config, str(source), kwargs)
            return config, unused

        return get_config_dict

    wrap(PreTrainedConfig, "get_config_dict", classmethod, make)


def remember_calls() -> None:
    """`PreTrainedModel.from_pretrained` remembers its arguments while it runs (optq.compat.call)."""
    from transformers.modeling_utils import PreTrainedModel

    def make(load: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(cls: type[Any], /, *args: Any, **kwargs: Any) -> Any:
            with called_with({**kwargs, NAME: args[0] if args else kwargs.get(NAME)}):
                return load(cls, *args, **kwargs)

        return from_pretrained

    wrap(PreTrainedModel, "from_pretrained", classmethod, make)


def quantize_with_optq() -> None:
    """Enter our config and quantizer for quant_method "gptq" into transformers' tables.

    `register_quantizer("gptq")` refuses names that are taken, so the tables are assigned; they are read at call time,
    which covers transformers' own `GPTQConfig` and checkpoints from the Hub as well. A model that says itself how it
    is quantized never reaches them when it is to be quantized with GPTQ, so we also stand where both are compared.
    """
    from transformers import GPTQConfig as StockConfig
    from transformers.quantizers import auto

    from optq.config.gptq import GPTQConfig

    put(auto.AUTO_QUANTIZER_MAPPING, "gptq", make_quantizer, "AUTO_QUANTIZER_MAPPING")
    put(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", GPTQConfig, "AUTO_QUANTIZATION_CONFIG_MAPPING")

    def make_merge(merge: Callable[..., Any]) -> Callable[..., Any]:
        def merge_quantization_configs(cls: type[Any], stated: Any, asked: Any) -> Any:
            found = merged(stated, asked) if isinstance(asked, StockConfig) else None
            if found is not None:
                return found
            with found_in(f"{name_told()}/config.json: quantization_config"):
                return merge(cls, stated, asked)

        return merge_quantization_configs

    def make_from_config(make: Callable[..., Any]) -> Callable[..., Any]:
        def from_config(cls: type[Any], /, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
            # What a file says is an object by now: a dict is what a caller has written, where a slip is an error.
            if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "gptq":
                quantization_config = GPTQConfig.from_stock(quantization_config)
            return make(cls, quantization_config, *args, **kwargs)

        return from_config

    def make_supports(supports: Callable[..., Any]) -> Callable[..., Any]:
        def supports_quant_method(stated: Any) -> Any:
            from .bases import check_says_something

            check_says_something(stated)  # here transformers fails at it, whatever is asked for
            return supports(stated)

        return supports_quant_method

    wrap(auto.AutoHfQuantizer, "from_config", classmethod, make_from_config)
    wrap(auto.AutoHfQuantizer, "merge_quantization_configs", classmethod, make_merge)
    wrap(auto.AutoHfQuantizer, "supports_quant_method", staticmethod, make_supports)


def adapt_packed_layers() -> None:
    """Replace PEFT's tuners, in its table of methods, by subclasses that support packed layers."""
    from peft import mixed_model
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from optq.integrations.peft import MixedModel, packed_tuners

    for method, tuner in packed_tuners().items():
        put(PEFT_TYPE_TO_TUNER_MAPPING, method, tuner, "PEFT_TYPE_TO_TUNER_MAPPING")
    assign(mixed_model, "MixedModel", MixedModel)


def make_quantizer(quantization_config: Any, **kwargs: Any) -> Any:
    """An `OptqHfQuantizer`. transformers' table wants what makes one, and the class needs parts that load later."""
    from .quantizer import OptqHfQuantizer

    return OptqHfQuantizer(quantization_config, **kwargs)


def merged(stated: Any, asked: Any) -> Any:
    """The config for a model that is quantized already, and is to be quantized with GPTQ.

    None if it is a GPTQ checkpoint, and all that is asked is how to load it.

    Raises:
        ModelError: it cannot be quantized again.
    """
    from optq.config.gptq import GPTQConfig
    from optq.errors import ModelError

    from .bases import method_of, why_no_base

    if method_of(stated) == "gptq" and getattr(asked, "dataset", None) is None:
        return None
    if reason := why_no_base(stated, name_told()):
        as_it_is = " To load it as it is, leave out dataset=." if method_of(stated) == "gptq" else ""
        raise ModelError(reason + as_it_is)
    config = copy.copy(GPTQConfig.from_stock(asked))
    config.base = stated if isinstance(stated, dict) else stated.to_dict()
    return config


HOSTS: dict[str, tuple[str, Callable[[], None]]] = {
    "transformers.configuration_utils": ("PreTrainedConfig", read_old_folders),
    "transformers.quantizers.auto": ("get_hf_quantizer", quantize_with_optq),
    "transformers.modeling_utils": ("PreTrainedModel", remember_calls),
    "peft.helpers": ("rescale_adapter_scale", adapt_packed_layers),  # by then, all of its methods are there
}
"""A module of another library -> a name that it has once it is loaded, and what we change then."""
