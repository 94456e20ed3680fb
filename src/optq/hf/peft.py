# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed layers, for PEFT.

PEFT has a table of its methods, read whenever an adapter is made or loaded. In it, this subclass of its `LoraModel`
takes the place of LoRA's: all the same for every other layer, and `PackedLoraLinear` for a `QuantLinear`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, _maybe_include_all_linear_layers
from peft.utils import PeftType
from torch import Tensor, nn

from optq.errors import AdapterError
from optq.layers import QuantLinear
from optq.model import FUSED, Expert, Experts

from .parallel import ParallelLinear

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""The values of init_lora_weights that do not look at the weight."""


@contextmanager
def dense_weight(layer: nn.Module) -> Iterator[None]:
    """Let `layer.weight` be the dequantized weight for a moment, for what only reads it."""
    if not isinstance(layer, QuantLinear):
        yield
        return
    placeholder = layer.weight
    layer.weight = layer.dense(placeholder.dtype).weight.detach()
    try:
        yield
    finally:
        layer.weight = placeholder


class PackedDora(DoraLinearVariant):
    """DoRA, which wants the norms of the dense weight's rows in every forward."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        with dense_weight(module.get_base_layer()):
            DoraLinearVariant.init(module, adapter_name, **kwargs)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        with dense_weight(module.get_base_layer()):
            output: Tensor = DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
        return output


class PackedLoraLinear(lora.Linear):
    """y = QuantLinear(x) + scaling · B A x. Once the model is dequantized, PEFT's own layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = False  # whatever was quantized, also a Conv1D, is (out, in) now
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """Those that leave the weight alone; PEFT refuses all others by name."""
        return {(): None, ("use_dora",): PackedDora}

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        start = config.init_lora_weights
        if start not in STARTS and isinstance(self.get_base_layer(), QuantLinear):
            raise AdapterError(
                f"init_lora_weights={start!r} starts from the weight of the layer, which is packed. Choose one of "
                f"{', '.join(map(repr, STARTS))}, or call model.dequantize() before adding the adapter."
            )
        if config.use_qalora:
            raise AdapterError(
                "use_qalora=True: QA-LoRA is not supported. Leave it out: plain LoRA, or use_dora=True."
            )
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.get_base_layer(), QuantLinear):
            raise merging_refused()
        super().merge(*args, **kwargs)


class LoraModel(lora.LoraModel):
    """PEFT's, with packed layers among those that it knows."""

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        if not isinstance(target, QuantLinear):
            return lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if isinstance(target, ParallelLinear) and target.part is not None:
            raise AdapterError(
                f"{target.name} is split over {target.part.size} processes, and adapters are not split. Load the "
                "model without a tensor-parallel plan."
            )
        if not hasattr(lora.LoraLayer, "lora_variants"):
            raise AdapterError(
                f"LoRA on layers that optq quantized needs PEFT 0.20 or newer, but {peft.__version__} is installed: "
                "pip install --upgrade peft."
            )
        return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(parent, Expert):
            raise experts_refused(child_name)
        if isinstance(new_module, PackedLoraLinear):
            # Made on the right device. PEFT would send the adapter to where qweight is: to meta, once a kernel has it.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Count packed layers among "all-linear"."""
        config = super()._prepare_adapter_config(peft_config, model_config)
        # PEFT has renamed an expert's linears to the tensors that transformers fuses them into.
        fused = sorted(name for name in config.target_parameters or () if name.rpartition(".")[2] in FUSED)
        if fused and any(isinstance(module, Experts) for module in self.model.modules()):
            raise experts_refused(*fused)
        wanted = config.target_modules
        if isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            config = _maybe_include_all_linear_layers(config, self.model)
            config.target_modules |= {
                name
                for name, module in self.model.named_modules()
                if isinstance(module, QuantLinear)
                and not name.endswith(".base_layer")  # has an adapter, and is counted as such by PEFT
                and module is not self.model.get_output_embeddings()  # left out by PEFT's definition
            }
        return config

    def _check_merge_allowed(self) -> None:
        if any(isinstance(module, QuantLinear) for module in self.model.modules()):
            raise merging_refused()
        super()._check_merge_allowed()


def experts_refused(*targets: str) -> AdapterError:
    return AdapterError(
        f"{', '.join(targets)}: experts are packed one by one and take no adapters. Name other linears in "
        "target_modules, such as q_proj, k_proj, v_proj, o_proj."
    )


def merging_refused() -> AdapterError:
    return AdapterError(
        "An adapter cannot be merged into packed weights: their grid cannot hold the sum. Call model.dequantize() and "
        "then merge, which is exact; to have fewer bits again, save the result and quantize it."
    )


def register() -> None:
    """Idempotent."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
