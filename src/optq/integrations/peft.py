# SPDX-License-Identifier: Apache-2.0
"""Adapters on packed layers, for PEFT.

PEFT has a table of its methods, read whenever an adapter is made or loaded. In it, subclasses take the places of
those that replace linears: all the same for every other layer. To a method that only multiplies by a weight, a packed
layer is shown as a dense one, so that its own adapter is made, which then gets the packed layer to call. LoRA's is
`PackedLoraLinear`, which has more to say. All other methods are refused by name.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import adaption_prompt, lora, mixed, xlora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from torch import Tensor, nn

from optq.errors import AdapterError
from optq.layers import QuantLinear
from optq.model import FUSED, Expert, Experts

from .tensor_parallel import ParallelLinear

ONLY_MULTIPLY = (
    "LORA",
    "ADALORA",
    "OFT",
    "BOFT",
    "IA3",
    "LOHA",
    "LOKR",
    "VERA",
    "MISS",
    "ROAD",
    "FOURIERFT",
    "RANDLORA",
    "VBLORA",
    "BEFT",
    "C3A",
    "GRALORA",
    "LILY",
    "UNILORA",
    "WAVEFT",
    "PVERA",
    "POLY",
)
"""PEFT's names of methods that neither read nor change the weight, as far as they have been tried."""

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""The values of init_lora_weights that do not look at the weight."""


class Dequantized:
    """A LoRA layer as PEFT's DoRA code sees it: with a dense base layer, while the packed one is left as it is."""

    def __init__(self, module: Any) -> None:
        base = module.get_base_layer()
        if isinstance(base, QuantLinear):
            base = SimpleNamespace(weight=base.dense(base.weight.dtype).weight.detach(), bias=base.bias)
            base.parameters = tuple
        vars(self).update(_module=module, _base=base)

    def get_base_layer(self) -> Any:
        return self._base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


class PackedDora(DoraLinearVariant):
    """DoRA (arXiv:2402.09353) on a packed layer: every forward dequantizes the weight for the norms of its rows."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(Dequantized(module), adapter_name, **kwargs)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """x (..., in), result (..., out), the output without DoRA -> (..., out), the output with DoRA."""
        output: Tensor = DoraLinearVariant.forward(Dequantized(module), active_adapter, x, result, **kwargs)
        return output


class PackedLoraLinear(lora.Linear):
    """LoRA on a packed layer: y = QuantLinear(x) + scaling · B A x; on a dequantized one, PEFT's own layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = False  # whatever was quantized, also a Conv1D, is (out, in) now
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """The variants that need no change of the packed weight; PEFT refuses all others by name."""
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


BEHIND = "_optq_packed"
"""The attribute by which a dense linear is known as the stand-in of a packed layer."""


def stand_in_of(packed: QuantLinear) -> nn.Linear:
    """An `nn.Linear` with a packed layer's shape, bias, dtype and device, and a weight without memory, for PEFT."""
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(packed.weight, requires_grad=False)
    bias = packed.bias
    if bias is not None:  # a parameter, the same for both, where adapters train it
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    vars(linear)[BEHIND] = packed  # and no child
    return linear.train(packed.training)


def packed_behind(module: Any) -> QuantLinear | None:
    return module if isinstance(module, QuantLinear) else vars(module).get(BEHIND)


@contextmanager
def shown_as_linears(model: nn.Module) -> Iterator[None]:
    """Show PEFT every packed layer of a model as an `nn.Linear`, for the duration of a context.

    Afterwards each packed layer is where PEFT has put its stand-in.
    """
    stand_ins: dict[QuantLinear, nn.Linear] = {}

    def exchange(other: Any) -> None:
        for parent in list(model.modules()):
            if isinstance(parent, Expert):
                continue
            for name, child in parent._modules.items():
                if isinstance(child, QuantLinear | nn.Linear):
                    parent._modules[name] = other(child)

    def dense(child: Any) -> Any:
        if not isinstance(child, QuantLinear):
            return child
        if child not in stand_ins:
            stand_ins[child] = stand_in_of(child)
        return stand_ins[child]

    exchange(dense)
    try:
        yield
    finally:
        exchange(lambda child: packed_behind(child) or child)


class PackedTuner(BaseTuner):
    """A mixin for PEFT's tuners: support for packed layers that every method needs."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._refuse(model, config)  # before methods look at the layers
        with self.shown(model):
            super()._pre_injection_hook(model, config, adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._refuse(model, config)  # also of a further adapter
        take_biases(model, getattr(config, "bias", "none"))
        with self.shown(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _refuse(self, model: nn.Module, config: Any) -> None:
        """Raises AdapterError before anything is done if some of it cannot be."""
        refuse_to_train(model, *(getattr(config, "modules_to_save", None) or ()), *tokens_of(config))
        refuse_parameters(model, *(getattr(config, "target_parameters", None) or ()))
        wanted = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))
        targets = wanted.target_modules
        every = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and (every or self._check_target_module_exists(wanted, name)):
                parent, _, last = name.rpartition(".")
                owner = model.get_submodule(parent)
                if not (every and isinstance(owner, Expert)):  # among dense ones, experts are no linears either
                    refuse_to_adapt(layer, wanted, owner, last)

    @staticmethod
    def shown(model: nn.Module) -> Any:
        return shown_as_linears(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        packed = packed_behind(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
        if packed is not None:
            refuse_to_adapt(packed, peft_config, parent, target_name)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        if any(isinstance(module, QuantLinear) for module in self.model.modules()):
            raise merging_refused()
        super()._check_merge_allowed()


def refuse_to_adapt(layer: QuantLinear, config: Any, parent: nn.Module, name: str) -> None:
    """Raises AdapterError if a method of PEFT cannot adapt a packed layer, `name` in `parent`."""
    if isinstance(parent, Expert):
        raise experts_refused(name)
    if isinstance(layer, ParallelLinear) and layer.part is not None:
        raise AdapterError(
            f"{layer.name} is split over {layer.part.size} processes, and adapters are not split. Load the model "
            "without a tensor-parallel plan."
        )
    method = getattr(config.peft_type, "value", config.peft_type)
    if method not in ONLY_MULTIPLY:
        raise AdapterError(
            f"{method} computes with the weight of a layer, or is not known to leave it alone; this one is packed. "
            f"Choose one of {', '.join(ONLY_MULTIPLY)}, or call model.dequantize() before adding the adapter."
        )
    if method == "MISS" and config.init_weights == "bat":
        raise AdapterError(
            "MISS with init_weights='bat' computes with the weight of a layer, and this one is packed. Choose True, "
            "False or 'mini', or call model.dequantize() before adding the adapter."
        )


def refuse_to_train(model: nn.Module, *names: str) -> None:
    """Raises AdapterError if modules of these names, as of `modules_to_save`, hold packed weights."""
    for name, module in model.named_modules():
        asked = next((wanted for wanted in names if name.endswith(wanted)), None)
        if asked is not None and any(isinstance(inner, QuantLinear) for inner in module.modules()):
            raise AdapterError(
                f"modules_to_save or trainable_token_indices names {asked!r}, but {name} is packed, and a packed "
                "weight is not trained. Name it in target_modules instead, which trains an adapter beside it, or call "
                "model.dequantize() before adding the adapter."
            )


def refuse_parameters(model: nn.Module, *names: str) -> None:
    """Raises AdapterError if one of these names, as of `target_parameters`, is the weight of a packed layer."""
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        asked = next((wanted for wanted in names if weight == wanted or weight.endswith(f".{wanted}")), None)
        if asked is not None and isinstance(module, QuantLinear):
            raise AdapterError(
                f"target_parameters names {asked!r}, but {name} is packed and has no such parameter. Name the layer "
                "in target_modules, which trains an adapter beside it, or call model.dequantize() before adding the "
                "adapter."
            )


def tokens_of(config: Any) -> Collection[str]:
    """The modules of which single rows are to be trained."""
    indices = getattr(config, "trainable_token_indices", None)
    return indices.keys() if isinstance(indices, dict) else ()


def take_biases(model: nn.Module, which: str) -> None:
    """Make parameters of packed layers' biases where a method is to train them: "all", or those of what it adapts.

    Raises:
        AdapterError: "all" would count those of experts, which are multiplied with what all their biases were.
    """
    if which == "none":
        return
    for parent in list(model.modules()):
        for layer in parent.children():
            if isinstance(layer, QuantLinear) and layer.bias is not None:
                if not isinstance(parent, Expert):
                    layer.take_bias()
                elif which == "all":
                    raise AdapterError(
                        "bias='all' counts the biases of experts, which are packed one by one and multiplied at once. "
                        "Choose 'none', or train those of adapted layers only, for LoRA with bias='lora_only'."
                    )


class LoraModel(PackedTuner, lora.LoraModel):
    """PEFT's LoRA tuner, with packed layers among the linears that it adapts."""

    @staticmethod
    def shown(model: nn.Module) -> Any:
        return nullcontext()

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        if not isinstance(target, QuantLinear):
            return lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if not hasattr(lora.LoraLayer, "lora_variants"):
            raise AdapterError(
                f"LoRA on layers that optq quantized needs PEFT 0.20 or newer, but {peft.__version__} is installed: "
                "pip install --upgrade peft."
            )
        return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
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
                and not isinstance(self.model.get_submodule(name.rpartition(".")[0]), Expert)
            }
        return config


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


class MixedModel(PackedTuner, mixed.MixedModel):
    """PEFT's tuner for adapters of several methods at once; it refuses packed layers."""

    @staticmethod
    def shown(model: nn.Module) -> Any:
        return nullcontext()

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, QuantLinear):
            raise AdapterError(
                "mixed=True: adapters of several methods at once are not supported on packed layers. Leave it out, or "
                "call model.dequantize() before adding the adapters."
            )
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)


class AdaptionPromptModel(adaption_prompt.AdaptionPromptModel):
    """PEFT's tuner for adaption prompts; it reads a parameter of the attention whose linears it calls."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        with shown_as_linears(self.model):
            super().add_adapter(*args, **kwargs)


class XLoraModel(xlora.XLoraModel):
    """PEFT's X-LoRA tuner; it makes LoRA layers of its own."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            raise AdapterError(
                "XLORA makes its adapters beside dense weights only. Load them one by one with LoRA, or call "
                "model.dequantize() before."
            )
        super().__init__(model, *args, **kwargs)


OURS: dict[str, type] = {"LORA": LoraModel, "XLORA": XLoraModel, "ADAPTION_PROMPT": AdaptionPromptModel}


def packed_tuners() -> dict[Any, type]:
    """By method of PEFT, the class that supports packed layers; made at the first call."""
    for method, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if method.value not in OURS and isinstance(tuner, type) and issubclass(tuner, BaseTuner):
            ours = type(tuner.__name__, (PackedTuner, tuner), {"__module__": __name__})
            OURS[method.value] = globals()[tuner.__name__] = ours  # where pickle looks
    return {method: OURS[method.value] for method in PEFT_TYPE_TO_TUNER_MAPPING if method.value in OURS}
