# SPDX-License-Identifier: Apache-2.0
"""A linear of vLLM whose weight stays packed.

Which outputs and inputs a process has of a checkpoint's linear is for vLLM to say: its own loader is given numbers in
the place of a weight, and what it puts where tells which of them it takes. So attention heads that are kept by several
processes, linears that are fused on disk and padded vocabularies are as with dense weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from optq.config.gptq import GPTQConfig

from .weights import PARTS, ArrivingWeight

Loader = Callable[..., Any]

DIMENSIONS = {
    "qweight": {"input_dim": 0, "output_dim": 1},
    "qzeros": {"output_dim": 1},
    "scales": {"output_dim": 1},
    "weight": {"input_dim": 1, "output_dim": 0},
}
"""For models that rearrange what they read before the loader gets it."""


class PackedLinearMethod(LinearMethodBase):
    """vLLM's quantization method for one linear.

    Args:
        name: the linear's.
        stated: how the checkpoint is quantized.
    """

    def __init__(self, name: str, stated: GPTQConfig) -> None:
        self.name, self.stated = name, stated

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty parameter for every tensor that the checkpoint may have; which it has is not known yet."""
        loader = extra_weight_attrs["weight_loader"]
        outputs = sum(output_partition_sizes)
        arriving = ArrivingWeight(
            self.name,
            outputs=outputs,
            all_inputs=input_size,
            inputs=_inputs_of(loader, input_size_per_partition, input_size),
            zero_format=self.stated.zero_format,
            group_sizes=group_sizes_of(self.stated),
            device=torch.get_default_device(),
            dtype=params_dtype,
            padded=isinstance(layer, VocabParallelEmbedding),
        )
        for part in PARTS:
            dtype = {"scales": torch.float16, "weight": params_dtype}.get(part, torch.int32)
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            taking = partial(_take, arriving, layer, part, loader, outputs)
            set_weight_attrs(parameter, {"weight_loader": taking, **DIMENSIONS.get(part, {})})
            layer.register_parameter(part, parameter)
        layer.optq_arriving = arriving

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose a kernel, and let it lay out the codes."""
        arriving = layer.__dict__.pop("optq_arriving", None)
        if arriving is None:  # it has been called before
            return
        product = arriving.product()
        for part in PARTS:
            delattr(layer, part)
        layer.optq_product = product
        # vLLM looks at a layer's qweight or weight for its device.
        first = product.parts[0] if product.parts else None
        name = "weight" if first is not None and first.prepared is None else "qweight"
        tensor = torch.empty(0, dtype=torch.int32, device=arriving.device) if first is None else first.tensor
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype; bias (out,) or None. Sizes are those of this process."""
        output: Tensor = layer.optq_product(x)
        return output if bias is None else output + bias


def group_sizes_of(stated: GPTQConfig) -> tuple[int, ...]:
    """List the group sizes that linears may have."""
    return tuple({scheme.group_size for scheme in stated.all_schemes()})


def _take(
    arriving: ArrivingWeight,
    layer: Any,
    part: str,
    loader: Loader,
    outputs: int,
    _: Any,
    tensor: Tensor,
    *which: Any,
    **named: Any,
) -> None:
    """vLLM's call for a tensor that it has read; what follows the tensor says which of the fused linears it is of."""
    # Some models exchange the loader of the weight, which then says where outputs go.
    of_weight = layer.weight.weight_loader
    asked = loader if isinstance(of_weight, partial) and of_weight.func is _take else of_weight

    def origins(count: int) -> Tensor:
        return _asked(asked, (outputs, 1), count, 0, *which, **named)[:, 0]

    arriving.take(part, tensor, (*which, *named.values()), origins)


def _inputs_of(loader: Loader, own: int, count: int) -> slice:
    if own == count:
        return slice(0, count)
    first = int(_asked(loader, (1, own), count, 1)[0, 0])
    return slice(first, first + own)


def _asked(loader: Loader, shape: tuple[int, int], count: int, dimension: int, *which: Any, **named: Any) -> Tensor:
    """Which of `count` rows or columns of a weight vLLM's loader puts where; -1 where it puts none."""
    probe = nn.Parameter(torch.zeros(shape, dtype=torch.int64, device="cpu"), requires_grad=False)
    setattr(probe, "input_dim" if dimension else "output_dim", dimension)
    numbers = torch.arange(1, count + 1, device="cpu").unsqueeze(1 - dimension)
    loader(probe, numbers, *which, **named)
    return probe.data - 1
