# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture make two products, not two or three each: one of all first linears, one of all last ones.

Where the kernel can, the codes of all experts of a layer move into one memory, of which each linear has a view; its
tensors and names stay as they were. With no expert called by itself, nothing has to know on the host which of them
have tokens. Hooks and adapters of an expert's linear would not run then, so every call looks for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from optq.kernels import CHANGING, Kernel, as_in_no_mode, autocast_dtype, grouped_gemm

from .fused_projections import FusedProjections, FusedWeights

GLOBAL_HOOKS: tuple[Mapping[Any, Any], ...] = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
)


class Counterparts(FusedWeights):
    """The linears with the same place in every expert of a mixture, in the order of the experts.

    Each is a `QuantLinear`, or `FusedProjections`.
    """

    _bias: Tensor | None = None  # (experts, out)

    def wants(self, kernel: Kernel) -> bool:
        return kernel.grouped_gemm is not None

    def are_for(self, dtype: torch.dtype) -> bool:
        """Whether the linears are joined, and the grouped product multiplies activations of `dtype`."""
        held = self.held
        return held is not None and dtype in held.products

    def become_for(self, dtype: torch.dtype) -> None:
        """Note that every member multiplies activations of `dtype` by the kernel of the joined weight."""
        with CHANGING:
            held = self.held
            if held is None:
                return
            with as_in_no_mode(held.device):
                bias = self.bias
            self._bias = None if bias is None else bias.view(len(self._members), -1)
            self.held = replace(held, products={**held.products, dtype: held.kernel})

    def product(self, x: Tensor, starts: Tensor, experts: Tensor) -> Tensor:
        """Multiply rows that are sorted by expert, each by its expert's weight, and add the biases.

        Args:
            x: (rows, in).
            starts: (experts + 1,) int32; see `optq.kernels.grouped_gemm`.
            experts: (rows,) integers, the expert of each row; numbers beyond the last expert stand for none.
        Returns:
            (rows, out) in x's dtype.
        """
        held = self.held
        assert held is not None
        output = grouped_gemm(x, starts, held.kernel, held.prepared)
        if self._bias is None:
            return output
        return output + self._bias.to(output.dtype)[experts.clamp(max=len(self._members) - 1)]


class FusedExperts:
    """The packed linears of a mixture's experts, multiplied at once.

    Args:
        experts: the modules that hold the linears.
        firsts: names of the linears that read the tokens (gate and up), in the order in which they are called.
        last: name of the linear that reads their gated outputs (down).
        passed: modules that the inputs pass on their way to the linears.
    """

    def __init__(
        self, experts: Sequence[nn.Module], firsts: Sequence[str], last: str, passed: Sequence[nn.Module] = ()
    ) -> None:
        self._experts, self._names, self._passed = tuple(experts), (*firsts, last), tuple(passed)
        self._layers: list[Any] = [getattr(expert, name) for expert in experts for name in self._names]
        self._first = Counterparts(
            [
                FusedProjections(linears) if len(linears) > 1 else linears[0]
                for linears in ([getattr(expert, name) for name in firsts] for expert in experts)
            ]
        )
        self._last = Counterparts([getattr(expert, last) for expert in experts])
        self._watched: tuple[list[Mapping[Any, Any]], ...] | None = None

    @property
    def are_fused(self) -> bool:
        return self._first.are_fused and self._last.are_fused

    def why_not(self, rows: int, *tensors: Tensor) -> str | None:
        """Why `rows` rows must be multiplied expert by expert, or None.

        Args:
            tensors: the input (..., in), and other tensors that may require a gradient.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "gradients are wanted"
        x = tensors[0]
        dtype = autocast_dtype(x) or x.dtype
        reason: str | None = self._why_not_now(x.device, dtype)
        if reason is not None:
            return reason
        held = self._last.held
        assert held is not None
        assert held.kernel.grouped_gemm is not None
        return held.kernel.grouped_gemm.why_not(rows, len(self._experts), dtype)

    def first(self, x: Tensor, starts: Tensor, experts: Tensor) -> list[Tensor]:
        """x (rows, in), sorted by expert -> (rows, out) of each first linear; see `Counterparts.product`."""
        output = self._product(self._first, x, starts, experts)
        sizes = [layer.out_features for layer in self._layers[: len(self._names) - 1]]
        return list(output.split(sizes, -1))

    def last(self, x: Tensor, starts: Tensor, experts: Tensor) -> Tensor:
        """x (rows, in), sorted by expert -> (rows, out) of the last linear; arguments as of `first`."""
        return self._product(self._last, x, starts, experts)

    @staticmethod
    def _product(linears: Counterparts, x: Tensor, starts: Tensor, experts: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        if dtype is None:
            return linears.product(x, starts, experts)
        with torch.autocast(x.device.type, enabled=False):
            return linears.product(x.to(dtype), starts, experts)

    # A graph is made for the modules as they are at that time, as torch does it with hooks.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _why_not_now(self, device: torch.device, dtype: torch.dtype) -> str | None:
        first = self._layers[0]
        held = first.held
        if held is not None and dtype in held.products and held.products[dtype].grouped_gemm is None:
            return f"the kernel {held.kernel.name} has no product for several experts"
        if first.scales.device != device:  # as for a replica of the model, such as nn.DataParallel makes
            return f"the linears are on {first.scales.device}, the input is on {device}"
        if reason := self._why_called():
            return reason
        both = (self._first, self._last)
        if all(linears.are_for(dtype) for linears in both):
            return None
        for layer in self._layers:
            product = layer.held_for(dtype).products[dtype]
            if product.grouped_gemm is None:
                return f"the kernel {product.name} has no product for several experts"
        if not self.are_fused:
            return "the experts differ in bits, groups or order of columns"
        for linears in both:
            linears.become_for(dtype)
        return None

    def _why_called(self) -> str | None:
        """Why an expert's linears must be called as modules, or None. Takes some 50 microseconds for 128 experts."""
        if self._watched is None:
            modules = (*self._layers, *self._passed)
            hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in modules]
            self._watched = (
                [expert._modules for expert in self._experts],
                [*chain(*hooks), *GLOBAL_HOOKS],
                [vars(module) for module in modules],
            )
        children, hooks_of_all, attributes = self._watched
        if [linears.get(name) for linears in children for name in self._names] != self._layers:
            return "a linear of an expert has been replaced"
        if any(hooks_of_all):
            return "there are hooks"
        if any("forward" in own for own in attributes):
            return "the forward of a linear has been replaced"
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watched": None}  # the attributes of other modules than a copy's
