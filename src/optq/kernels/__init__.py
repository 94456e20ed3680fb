# SPDX-License-Identifier: Apache-2.0
"""The kernel table: ways to multiply by a packed weight, and why each of them can or cannot run a given layer.

A kernel is a row, not a class. `why_not` answers in words, and the same words feed the selection, error messages and
explanations. To add a kernel, add a row; rows are tried from fastest to slowest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight
from optq.errors import KernelError

from . import cpu, reference


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One row of the table.

    Args:
        name: what `backend=` and explanations call it.
        why_not: (packed, dtype of the activations) -> the reason this kernel cannot run it, or None.
        prepare: packed -> whatever `matmul` wants; runs once after loading, on the layer's device.
        matmul: (x (..., in), prepared) -> (..., out), without bias, in x's dtype. Need not be differentiable.
    """

    name: str
    why_not: Callable[[PackedWeight, torch.dtype], str | None]
    prepare: Callable[[PackedWeight], Any]
    matmul: Callable[[Tensor, Any], Tensor]


KERNELS: tuple[Kernel, ...] = (
    Kernel(name="cpu_int4", why_not=cpu.why_not_int4, prepare=cpu.prepare_int4, matmul=cpu.matmul_int4),
    Kernel(name="cpu_int8", why_not=cpu.why_not_int8, prepare=cpu.prepare_int8, matmul=cpu.matmul_int8),
    Kernel(name="reference", why_not=reference.why_not, prepare=reference.prepare, matmul=reference.matmul),
)

BACKENDS: dict[str, tuple[str, ...]] = {
    "auto": tuple(kernel.name for kernel in KERNELS),
    "cpu": ("cpu_int4", "cpu_int8"),
    **{kernel.name: (kernel.name,) for kernel in KERNELS},
}
"""backend= -> the rows that may be chosen."""


def explain(packed: PackedWeight, dtype: torch.dtype) -> dict[str, str | None]:
    """Every kernel's name with the reason it cannot run this layer, or None if it can; in order of preference."""
    return {kernel.name: kernel.why_not(packed, dtype) for kernel in KERNELS}


def choose_kernel(packed: PackedWeight, dtype: torch.dtype, backend: str = "auto") -> Kernel:
    """The first kernel of the table that `backend` allows and that can run this layer.

    Raises:
        KernelError: the backend is unknown, or none of its kernels can run the layer; the reasons are listed.
    """
    if backend not in BACKENDS:
        raise KernelError(f"backend={backend!r} was asked for; allowed are {', '.join(BACKENDS)}.")
    reasons = {}
    for kernel in KERNELS:
        if kernel.name in BACKENDS[backend]:
            reason = kernel.why_not(packed, dtype)
            if reason is None:
                return kernel
            reasons[kernel.name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise KernelError(
        f"backend={backend!r} cannot run a {packed.bits}-bit layer of {packed.in_features} x {packed.out_features} "
        f"with {dtype} on {packed.qweight.device}: {listed}. backend='auto' always finds a kernel."
    )


class _Matmul(torch.autograd.Function):
    """A kernel's product with the gradient towards its input, dequantizing again instead of keeping dense weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, kernel: Kernel, prepared: Any) -> Tensor:
        ctx.packed = packed
        return kernel.matmul(x, prepared)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return reference.matmul_transposed(grad_outputs[0], ctx.packed), None, None, None


def matmul(x: Tensor, packed: PackedWeight, kernel: Kernel, prepared: Any) -> Tensor:
    """x (..., in) times the packed weight: (..., out) in x's dtype, differentiable towards x."""
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _Matmul.apply(x, packed, kernel, prepared)
        return product
    return kernel.matmul(x, prepared)
