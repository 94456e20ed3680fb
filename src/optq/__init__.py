# SPDX-License-Identifier: Apache-2.0
"""optq: GPTQ quantization inside `from_pretrained`. What is not named here is private.

Importing optq registers its quantizer with transformers and loads nothing else; the names below are loaded when they
are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._autoload import register as register
from ._autoload import unregister as unregister
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import kernels as kernels
    from .api.card import card as card
    from .api.check import check as check
    from .api.convert import convert as convert
    from .api.evaluate import bench as bench
    from .api.evaluate import compare as compare
    from .api.evaluate import evaluate as evaluate
    from .api.export_onnx import export_onnx as export_onnx
    from .api.inspect import inspect as inspect
    from .api.kernel_choices import kernel_choices as kernel_choices
    from .api.plan import plan as plan
    from .api.push import push as push
    from .api.quantize import quantize as quantize
    from .config.gptq import GPTQConfig as GPTQConfig
    from .errors import OptqError as OptqError
    from .evaluation import perplexity as perplexity
    from .layers import QuantLinear as QuantLinear

_HOMES = {
    "GPTQConfig": "optq.config.gptq",
    "OptqError": "optq.errors",
    "QuantLinear": "optq.layers",
    "bench": "optq.api.evaluate",
    "card": "optq.api.card",
    "check": "optq.api.check",
    "compare": "optq.api.evaluate",
    "convert": "optq.api.convert",
    "evaluate": "optq.api.evaluate",
    "export_onnx": "optq.api.export_onnx",
    "inspect": "optq.api.inspect",
    "kernel_choices": "optq.api.kernel_choices",
    "perplexity": "optq.evaluation",
    "plan": "optq.api.plan",
    "push": "optq.api.push",
    "quantize": "optq.api.quantize",
}

__all__ = [
    "GPTQConfig",
    "OptqError",
    "QuantLinear",
    "bench",
    "card",
    "check",
    "compare",
    "convert",
    "evaluate",
    "export_onnx",
    "inspect",
    "kernel_choices",
    "kernels",
    "perplexity",
    "plan",
    "push",
    "quantize",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("optq.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'optq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register()
