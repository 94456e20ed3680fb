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

from .weights import PARTS, ArrivingWeight

Loader = Callable[..., Any]


class PackedLinearMethod(LinearMethodBase):
    """vLLM's quantization method for one linear.

    Args:
        name: the linear's.
        zero_format: how the checkpoint stores zeros.
    """

    def __init__(self, name: str, zero_format: str) -> None:
        self.name, self.zero_format = name, zero_format

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
            zero_format=self.zero_format,
            device=torch.get_default_device(),
            dtype=params_dtype,
            padded=isinstance(layer, VocabParallelEmbedding),
        )
        for part in PARTS:
            dtype = {"scales": torch.float16, "weight": params_dtype}.get(part, torch.int32)
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(_take, arriving, part, loader, outputs)})
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
        first = product.parts[0]
        name = "weight" if first.prepared is None else "qweight"
        layer.register_parameter(name, nn.Parameter(first.tensor, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype; bias (out,) or None. Sizes are those of this process."""
        output: Tensor = layer.optq_product(x)
        return output if bias is None else output + bias


def _take(
    arriving: ArrivingWeight,
    part: str,
    loader: Loader,
    outputs: int,
    _: Any,
    tensor: Tensor,
    *which: Any,
    **named: Any,
) -> None:
    """vLLM's call for a tensor that it has read; what follows the tensor says which of the fused linears it is of."""

    def origins(count: int) -> Tensor:
        return _asked(loader, (outputs, 1), count, 0, *which, **named)[:, 0]

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
