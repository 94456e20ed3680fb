# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer of vLLM, whose weights stay packed."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from optq.config.gptq import GPTQConfig

from .linear import group_sizes_of
from .mixture import Activation, ArrivingExperts
from .weights import PARTS

NAMES = tuple(f"{place}_{part}" for place in ("w13", "w2") for part in (*PARTS, "bias"))
"""What vLLM calls the tensors of all experts: of gate and up, w13; of down, w2."""


class PackedExpertsMethod(FusedMoEMethodBase):
    """vLLM's quantization method for the experts of a layer.

    Args:
        moe: how vLLM divides them.
        stated: how the checkpoint is quantized.
    Raises:
        ValueError: adapters are wanted, or gate and up alternate.
    """

    def __init__(self, moe: Any, stated: GPTQConfig) -> None:
        super().__init__(moe)
        self.stated = stated
        if getattr(moe, "is_lora_enabled", False):
            raise ValueError("LoRA was asked for (--enable-lora); with optq's experts it cannot be had. Leave it out.")
        if getattr(moe.activation, "value", None) == "swigluoai":
            raise ValueError("Experts whose gate and up alternate (activation swigluoai) are not served by optq.")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty parameter for every tensor that the checkpoint may have; which it has is not known yet."""
        arriving = ArrivingExperts(
            layer.layer_name,
            experts=num_experts,
            hidden=hidden_size,
            inside=intermediate_size_per_partition,
            rank=self.moe.tp_rank,
            ranks=self.moe.tp_size,
            gated=self.moe.is_act_and_mul,
            zero_format=self.stated.zero_format,
            group_sizes=group_sizes_of(self.stated),
            device=torch.get_default_device(),
            dtype=params_dtype,
        )
        for name in NAMES:
            parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            part = name.partition("_")[2]
            set_weight_attrs(parameter, {"weight_loader": _Loader(layer, arriving, part)})
            layer.register_parameter(name, parameter)
        layer.optq_arriving = arriving

    def process_weights_after_loading(self, layer: Any) -> None:
        arriving = layer.__dict__.pop("optq_arriving", None)
        if arriving is None:
            return
        layer.optq_experts = arriving.experts(_activation_of(layer))
        for name in NAMES:
            delattr(layer, name)
        codes = layer.optq_experts.products[1][0].parts[0].tensor
        layer.register_parameter("w2_qweight", nn.Parameter(codes, requires_grad=False))  # shows vLLM the device

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """The weighted sum of the experts' outputs, (tokens, hidden); shared experts are vLLM's to call."""
        chosen = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        output: Tensor = layer.optq_experts(x, chosen, topk_weights)
        return output


def _activation_of(layer: Any) -> Activation:
    activation = layer.activation
    limits = FusedMoEQuantConfig.make(
        gemm1_alpha=layer.swiglu_alpha, gemm1_beta=layer.swiglu_beta, gemm1_clamp_limit=layer.swiglu_limit
    )
    config = ApplyMoEActivationConfig.from_configs(layer.moe_config, limits)

    def activate(x: Tensor) -> Tensor:
        inside = x.shape[-1] // 2 if activation.is_gated else x.shape[-1]
        output = x.new_empty(*x.shape[:-1], inside)
        apply_moe_activation(activation, output, x.contiguous(), activation_config=config)
        return output

    return activate


class _Loader:
    """vLLM's call for a tensor that it has read."""

    supports_moe_loading = True

    def __init__(self, layer: Any, arriving: ArrivingExperts, part: str) -> None:
        self.layer, self.arriving, self.part = layer, arriving, part

    def __call__(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Whether this process has the expert."""
        own = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if own != -1:
            self.arriving.take(self.part, loaded_weight, own, shard_id)
        return own != -1 if return_success else None
