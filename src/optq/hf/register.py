# SPDX-License-Identifier: Apache-2.0
"""Take the place of transformers' own GPTQ quantizer.

`register_quantizer("gptq")` refuses names that are taken, so the tables are assigned; they are read at call time,
which covers transformers' own `GPTQConfig` and checkpoints from the Hub as well. A model that says itself how it is
quantized never reaches them when it is to be quantized with GPTQ, so we also stand where transformers compares both.
"""

import copy
from functools import wraps
from typing import TYPE_CHECKING, Any

import transformers
from transformers.quantizers import auto

from optq.config.gptq import GPTQConfig
from optq.errors import ModelError

if TYPE_CHECKING:
    from .quantizer import OptqHfQuantizer


def make_quantizer(quantization_config: Any, **kwargs: Any) -> "OptqHfQuantizer":
    """Stands in for the class in transformers' table, which only calls it.

    Registration happens while transformers is still importing itself; the class needs parts that come later.
    """
    from .quantizer import OptqHfQuantizer

    return OptqHfQuantizer(quantization_config, **kwargs)


def merged(stated: Any, asked: transformers.GPTQConfig) -> GPTQConfig | None:
    """What is to be done with a model that is quantized already, and is to be quantized with GPTQ.

    None if it is a GPTQ checkpoint, and all that is asked is how to load it.

    Raises:
        ModelError: it cannot be quantized again.
    """
    from optq.compat.call import name_told

    from .bases import method_of, why_no_base

    if method_of(stated) == "gptq" and getattr(asked, "dataset", None) is None:
        return None
    if reason := why_no_base(stated, name_told()):
        as_it_is = " To load it as it is, leave out dataset=." if method_of(stated) == "gptq" else ""
        raise ModelError(reason + as_it_is)
    config = copy.copy(GPTQConfig.from_stock(asked))
    config.base = stated if isinstance(stated, dict) else stated.to_dict()
    return config


def register() -> None:
    """Idempotent."""
    auto.AUTO_QUANTIZER_MAPPING["gptq"] = make_quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig
    merge = auto.AutoHfQuantizer.merge_quantization_configs.__func__
    if hasattr(merge, "optq_wraps"):
        return

    @wraps(merge)
    def merge_quantization_configs(cls: type[Any], stated: Any, asked: Any) -> Any:
        found = merged(stated, asked) if isinstance(asked, transformers.GPTQConfig) else None
        return merge(cls, stated, asked) if found is None else found

    merge_quantization_configs.optq_wraps = True  # type: ignore[attr-defined]  # others may wrap it as well
    auto.AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)
    make = auto.AutoHfQuantizer.from_config

    @wraps(make)
    def from_config(config: Any, **kwargs: Any) -> Any:
        # What a file says is an object by now: a dict is what a caller has written, where a slip is an error.
        is_ours = isinstance(config, dict) and config.get("quant_method") == "gptq"
        return make(GPTQConfig.from_stock(config) if is_ours else config, **kwargs)

    auto.AutoHfQuantizer.from_config = staticmethod(from_config)
    supports = auto.AutoHfQuantizer.supports_quant_method

    @wraps(supports)
    def supports_quant_method(stated: Any) -> Any:
        from .bases import check_says_something

        check_says_something(stated)  # here transformers fails at it, whatever is asked for
        return supports(stated)

    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)
