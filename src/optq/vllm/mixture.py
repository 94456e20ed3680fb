# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer as a server holds them: each expert's first linears as one product, and its last one.

Where a kernel has a grouped product, all experts make two products, and nothing asks on the host which of them have
tokens; elsewhere each expert with tokens multiplies by itself. Nothing in here imports a server.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from optq.errors import CheckpointError
from optq.kernels import grouped_gemm

from .weights import ArrivingWeight, Part, Product

FIRSTS, LAST = ("w1", "w3"), "w2"
"""Gate and up, side by side in this order; down."""

LAYERS: "WeakValueDictionary[str, PackedExperts]" = WeakValueDictionary()
"""By name, as graphs call them: which of them have tokens decides what is done, and no graph can hold that."""

Activation = Callable[[Tensor], Tensor]
"""(rows, gate and up side by side) -> (rows, inside)"""


class ArrivingExperts:
    """Collects the tensors of a layer's experts as a server reads them, and makes `PackedExperts` of them.

    Args:
        name: the layer's, for errors.
        experts: number of experts that this process has.
        hidden: features of a token.
        inside: intermediate features of an expert that this process has.
        rank, ranks: this process among those that share every expert.
        gated: there are two first linears, w1 and w3; else only w1.
        zero_format, group_sizes, device, dtype: see `ArrivingWeight`.
    """

    def __init__(
        self,
        name: str,
        *,
        experts: int,
        hidden: int,
        inside: int,
        rank: int,
        ranks: int,
        gated: bool,
        zero_format: str,
        device: torch.device,
        dtype: torch.dtype,
        group_sizes: tuple[int, ...] = (),
    ) -> None:
        self.name, self.hidden, self.inside, self.rank, self.ranks = name, hidden, inside, rank, ranks
        self.device, self.dtype = device, dtype
        self.firsts = FIRSTS if gated else FIRSTS[:1]
        self._biases: dict[tuple[int, str], Tensor] = {}
        shared: dict[str, Any] = {
            "zero_format": zero_format,
            "group_sizes": group_sizes,
            "device": device,
            "dtype": dtype,
        }
        self._up = [
            ArrivingWeight(
                f"{name}.{index}",
                outputs=len(self.firsts) * inside,
                all_inputs=hidden,
                inputs=slice(0, hidden),
                **shared,
            )
            for index in range(experts)
        ]
        self._down = [
            ArrivingWeight(
                f"{name}.{index}",
                outputs=hidden,
                all_inputs=inside * ranks,
                inputs=slice(rank * inside, (rank + 1) * inside),
                **shared,
            )
            for index in range(experts)
        ]

    def take(self, part: str, tensor: Tensor, expert: int, which: str) -> None:
        """Take one tensor of an expert's linear as on disk, not yet split, such as qweight (in · bits / 32, out).

        Args:
            part: a name in `optq.vllm.weights.PARTS`, or "bias", (out,).
            expert: index among those of this process.
            which: "w1", "w2" or "w3".
        Raises:
            CheckpointError: its shape does not fit the layer, or this process's part would cut words.
        """
        if part == "bias":
            self._biases[expert, which] = tensor
        elif which == LAST:
            self._down[expert].take(part, tensor, which, lambda count: torch.arange(count, device="cpu"))
        else:
            self._up[expert].take(part, tensor, which, lambda count: self._origins(count, self.firsts.index(which)))

    def _origins(self, count: int, place: int) -> Tensor:
        """This process's outputs of a first linear, in the checkpoint's numbering; see `optq.vllm.weights.Origins`."""
        if count != self.inside * self.ranks:
            raise CheckpointError(f"{self.name}: an expert has {count} features, not {self.inside * self.ranks}.")
        origins = torch.full((len(self.firsts) * self.inside,), -1, dtype=torch.int64, device="cpu")
        own = torch.arange(self.rank * self.inside, (self.rank + 1) * self.inside, device="cpu")
        origins[place * self.inside : (place + 1) * self.inside] = own
        return origins

    def experts(self, activate: Activation) -> "PackedExperts":
        """Make the module of all tensors that have arrived.

        Raises:
            CheckpointError: a tensor is missing, or contradicts the others.
            KernelError: no kernel multiplies them here.
        """
        ups, downs = ([arriving.product() for arriving in each] for each in (self._up, self._down))
        biases: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._biases:
            own = slice(self.rank * self.inside, (self.rank + 1) * self.inside)
            up = [torch.cat([self._bias(index, which)[own] for which in self.firsts]) for index in range(len(ups))]
            # Every process adds its summand; one of them that of the bias.
            down = [self._bias(index, LAST) * (self.rank == 0) for index in range(len(downs))]
            biases = (
                torch.stack(up).to(self.device, self.dtype),
                torch.stack(down).to(self.device, self.dtype),
            )
            self._biases.clear()
        return PackedExperts(self.name, ups, downs, *biases, activate)

    def _bias(self, expert: int, which: str) -> Tensor:
        if (found := self._biases.get((expert, which))) is not None:
            return found.cpu()
        return torch.zeros(self.hidden if which == LAST else self.inside * self.ranks, device="cpu")


class PackedExperts(nn.Module):
    """All experts of a layer that this process has.

    Args:
        name: the layer's.
        ups: of each expert, (..., hidden) -> (..., gate and up side by side).
        downs: of each expert, (..., inside) -> (..., hidden).
        up_bias, down_bias: (experts, outputs), or None.
        activate: the activation between them, with the gate.
    """

    def __init__(
        self,
        name: str,
        ups: Sequence[Product],
        downs: Sequence[Product],
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activate: Activation,
    ) -> None:
        super().__init__()
        self.key = _free(name)
        LAYERS[self.key] = self
        self.count, self.activate = len(ups), activate
        self.biases = (up_bias, down_bias)
        self.joined = tuple(map(_joined_of, (ups, downs)))
        self.products = tuple(
            products if joined is None else _views_of(joined, len(products))
            for products, joined in zip((ups, downs), self.joined, strict=True)
        )

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The sum of the outputs of each token's chosen experts, times their weights.

        Args:
            x: (tokens, hidden).
            chosen: (tokens, choices), experts of this process; negative ones stand for none.
            weights: (tokens, choices).
        Returns:
            (tokens, hidden) in x's dtype.
        """
        if torch.compiler.is_compiling():
            output: Tensor = torch.ops.optq.experts(x, chosen, weights, self.key)
            return output
        return self.output(x, chosen, weights)

    def output(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Eager `forward`: x (tokens, hidden), chosen and weights (tokens, choices) -> (tokens, hidden)."""
        choices = chosen.shape[1]
        experts, order = chosen.where(chosen >= 0, self.count).reshape(-1).sort(stable=True)
        rows = x[order // choices]
        made = self._made(rows, experts)
        made = made * weights.reshape(-1)[order, None].to(made.dtype)
        made = made.masked_fill((experts == self.count)[:, None], 0)
        result = torch.empty_like(made)
        result[order] = made
        return result.view(*chosen.shape, made.shape[1]).sum(1).to(x.dtype)

    def _made(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Rows that are sorted by expert, through the linears of theirs."""
        count = torch.arange(self.count + 1, dtype=experts.dtype, device=experts.device)
        up, down = self.joined
        if up is not None and down is not None and self._at_once(rows, down):
            starts = torch.searchsorted(experts, count, out_int32=True)
            own = experts.clamp(max=self.count - 1)
            inside = self.activate(self._biased(_grouped(up, rows, starts), 0, own))
            return self._biased(_grouped(down, inside, starts), 1, own)
        bounds = torch.searchsorted(experts, count).tolist()
        result = torch.zeros_like(rows)
        for index, (start, stop) in enumerate(pairwise(bounds)):
            if stop > start:
                own = experts[start:stop]
                first, last = (products[index] for products in self.products)
                inside = self.activate(self._biased(first(rows[start:stop]), 0, own))
                result[start:stop] = self._biased(last(inside), 1, own)
        return result

    def _at_once(self, rows: Tensor, joined: Part) -> bool:
        assert joined.kernel is not None
        assert joined.kernel.grouped_gemm is not None
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph cannot ask who has tokens
            return True
        return joined.kernel.grouped_gemm.why_not(len(rows), self.count, rows.dtype) is None

    def _biased(self, output: Tensor, place: int, experts: Tensor) -> Tensor:
        bias = self.biases[place]
        return output if bias is None else output + bias[experts.long()]


def _joined_of(products: Sequence[Product]) -> Part | None:
    """All experts' weights as one, where a kernel multiplies them so; else None."""
    if any(len(product.parts) != 1 or product.parts[0].kernel is None for product in products):
        return None
    parts = [product.parts[0] for product in products]
    kernel = parts[0].kernel
    if kernel is None or kernel.grouped_gemm is None or kernel.joint is None:
        return None
    prepared = [part.prepared for part in parts if part.prepared is not None]
    if any(part.kernel is not kernel for part in parts) or kernel.joint.why_not(prepared) is not None:
        return None
    return Part(at=0, outputs=products[0].outputs, kernel=kernel, prepared=kernel.joint.of(prepared))


def _views_of(joined: Part, count: int) -> list[Product]:
    """The experts' products again, in the memory of all."""
    kernel, outputs = joined.kernel, joined.outputs
    assert kernel is not None
    assert kernel.joint is not None
    assert joined.prepared is not None
    parts = kernel.joint.split(joined.prepared, [outputs] * count)
    return [Product([Part(at=0, outputs=outputs, kernel=kernel, prepared=part)], outputs) for part in parts]


def _grouped(part: Part, rows: Tensor, starts: Tensor) -> Tensor:
    assert part.kernel is not None
    assert part.prepared is not None
    return grouped_gemm(rows, starts, part.kernel, part.prepared)


def _free(name: str) -> str:
    """The name, or one like it if another model in this process has it."""
    found, number = name, 1
    while found in LAYERS:
        number += 1
        found = f"{name}#{number}"
    return found


@torch.library.custom_op("optq::experts", mutates_args=())
def _experts(x: Tensor, chosen: Tensor, weights: Tensor, layer: str) -> Tensor:
    return LAYERS[layer].output(x, chosen, weights)


@_experts.register_fake
def _(x: Tensor, chosen: Tensor, weights: Tensor, layer: str) -> Tensor:
    return torch.empty_like(x)
