# SPDX-License-Identifier: Apache-2.0
"""One operator of torch behind every kernel: `torch.ops.optq.matmul`, so that graphs hold a call, not Python.

Beside it, `torch.ops.optq.grouped_gemm` is that of all experts of a mixture.

torch.compile and torch.export see the operator and its fake implementation. Outside of graphs the kernel is called
directly: the dispatcher takes some 15 microseconds per call, which is half of what a small layer takes on a CPU.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .modes import without_autocast
from .prepared import Prepared
from .table import BY_NAME, Kernel

_ARGUMENTS = (
    "Tensor codes, Tensor[] extras, Tensor? order, Tensor scales, Tensor zeros, Tensor group_of_column, int bits, "
    "int group_width, str kernel"
)
_LIBRARY = torch.library.Library("optq", "DEF")
_LIBRARY.define(f"matmul(Tensor x, {_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"grouped_gemm(Tensor x, Tensor starts, {_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"matmul_transposed(Tensor gradient, {_ARGUMENTS}) -> Tensor")


def matmul(x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
    """x (..., in) times the prepared weight: (..., out) in x's dtype, differentiable towards x."""
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.optq.matmul(x, *_flat(prepared), kernel.name))
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Matmul.apply(x, kernel, prepared))
    return kernel.matmul(x, prepared)


def grouped_gemm(x: Tensor, starts: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
    """Multiply the rows of several experts, each by its own expert's weight; not differentiable.

    Args:
        x: (rows, in), sorted by expert.
        starts: (experts + 1,) int32, on x's device: the first row of each expert, and the end of the last one's rows.
        prepared: the weights of all experts, joined in their order; each has as many outputs.
    Returns:
        (rows, out of one expert) in x's dtype; undefined for rows beyond the last expert's.
    """
    assert kernel.grouped_gemm is not None
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.optq.grouped_gemm(x, starts, *_flat(prepared), kernel.name))
    return kernel.grouped_gemm.matmul(x, starts, prepared)


class _Matmul(torch.autograd.Function):
    """A kernel's product with the gradient towards its input, dequantizing again instead of keeping dense weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, prepared: Prepared) -> Tensor:
        ctx.kernel, ctx.prepared = kernel, prepared
        output = kernel.matmul(x, prepared)
        # Adapters add to it in place, which autograd forbids with a view that was made in here: this is the same
        # memory, but none.
        return cast(Tensor, torch.ops.aten._unsafe_view(output, output.shape)) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        with without_autocast(grad_outputs[0].device):  # a backward may be called under autocast, too
            return ctx.kernel.transposed(grad_outputs[0], ctx.prepared), None, None


def _flat(prepared: Prepared) -> tuple[Any, ...]:
    return (
        prepared.codes,
        list(prepared.extras),
        prepared.order,
        prepared.scales,
        prepared.zeros,
        prepared.group_of_column,
        prepared.bits,
        prepared.group_width,
    )


def _prepared(arguments: Sequence[Any]) -> tuple[Prepared, Kernel]:
    """The inverse of `_flat`, with the kernel's name at the end."""
    codes, extras, order, scales, zeros, group_of_column, bits, group_width, name = arguments
    prepared = Prepared(
        codes=codes,
        extras=tuple(extras),
        order=order,
        scales=scales,
        zeros=zeros,
        group_of_column=group_of_column,
        bits=bits,
        group_width=group_width,
    )
    return prepared, BY_NAME[name]


def _run(x: Tensor, *arguments: Any) -> Tensor:
    prepared, kernel = _prepared(arguments)
    return kernel.matmul(x, prepared)


def _run_grouped(x: Tensor, starts: Tensor, *arguments: Any) -> Tensor:
    prepared, kernel = _prepared(arguments)
    assert kernel.grouped_gemm is not None
    return kernel.grouped_gemm.matmul(x, starts, prepared)


def _run_transposed(gradient: Tensor, *arguments: Any) -> Tensor:
    prepared, kernel = _prepared(arguments)
    return kernel.transposed(gradient, prepared)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _prepared(arguments)[0].out_features)


def _fake_grouped(x: Tensor, starts: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], _prepared(arguments)[0].out_features // (starts.shape[0] - 1))


def _fake_transposed(gradient: Tensor, *arguments: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], _prepared(arguments)[0].in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, extras, order, scales, zeros, group_of_column, *ctx.rest = inputs
    ctx.save_for_backward(codes, order, scales, zeros, group_of_column, *extras)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    codes, order, scales, zeros, group_of_column, *extras = ctx.saved_tensors
    towards_x = torch.ops.optq.matmul_transposed(
        gradient, codes, extras, order, scales, zeros, group_of_column, *ctx.rest
    )
    return towards_x, None, [None] * len(extras), *[None] * 7  # one for each argument


_LIBRARY.impl("matmul", _run, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_gemm", _run_grouped, "CompositeExplicitAutograd")
_LIBRARY.impl("matmul_transposed", _run_transposed, "CompositeExplicitAutograd")
torch.library.register_fake("optq::matmul", _fake, lib=_LIBRARY)
torch.library.register_fake("optq::grouped_gemm", _fake_grouped, lib=_LIBRARY)
torch.library.register_fake("optq::matmul_transposed", _fake_transposed, lib=_LIBRARY)
torch.library.register_autograd("optq::matmul", _backward, setup_context=_keep, lib=_LIBRARY)
