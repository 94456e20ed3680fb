# SPDX-License-Identifier: Apache-2.0
"""optq: GPTQ quantization inside `from_pretrained`. What is not named here is private.

Importing optq registers its quantizer with transformers and loads nothing else; the names below are loaded when they
are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._autoload import install as _install
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import kernels as kernels
    from .errors import OptqError as OptqError
    from .evaluation import perplexity as perplexity
    from .hf.api import quantize as quantize
    from .hf.card import card as card
    from .hf.check import check as check
    from .hf.config import GPTQConfig as GPTQConfig
    from .hf.convert import convert as convert
    from .hf.evaluate import bench as bench
    from .hf.evaluate import compare as compare
    from .hf.evaluate import evaluate as evaluate
    from .hf.inspection import inspect as inspect
    from .hf.inspection import kernel_choices as kernel_choices
    from .hf.onnx import export_onnx as export_onnx
    from .hf.outlook import plan as plan
    from .hf.push import push as push
    from .layers import QuantLinear as QuantLinear

_HOMES = {
    "GPTQConfig": "optq.hf.config",
    "OptqError": "optq.errors",
    "QuantLinear": "optq.layers",
    "bench": "optq.hf.evaluate",
    "card": "optq.hf.card",
    "check": "optq.hf.check",
    "compare": "optq.hf.evaluate",
    "convert": "optq.hf.convert",
    "evaluate": "optq.hf.evaluate",
    "export_onnx": "optq.hf.onnx",
    "inspect": "optq.hf.inspection",
    "kernel_choices": "optq.hf.inspection",
    "perplexity": "optq.evaluation",
    "plan": "optq.hf.outlook",
    "push": "optq.hf.push",
    "quantize": "optq.hf.api",
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
]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("optq.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'optq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_install()
