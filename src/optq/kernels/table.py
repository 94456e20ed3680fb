# SPDX-License-Identifier: Apache-2.0
"""The table of kernels, and the choice of one for a layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight
from optq.device.triton import DEVICES as TRITON_DEVICES
from optq.errors import KernelError

from . import cpu, gemlite_gpu, reference, triton_gpu
from .prepared import Joint, Prepared, Unpack, matmul_dense, matmul_transposed


@dataclass(frozen=True, kw_only=True)
class GroupedGemm:
    """A kernel's product for all experts of a mixture at once.

    Args:
        why_not: (rows, experts, dtype of the activations) -> the reason to multiply expert by expert, or None.
        matmul: (x, starts, prepared) -> (rows, out of one expert); see `optq.kernels.grouped_gemm`.
    """

    why_not: Callable[[int, int, torch.dtype], str | None]
    matmul: Callable[[Tensor, Tensor, Prepared], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel: what it can run, and its functions. One row of the table.

    Args:
        name: its name in `backend=` and in explanations.
        bits, devices, dtypes: supported widths of codes, types of devices, dtypes of activations. None: any.
        why_not_layer: (packed, dtype of the activations) -> a further reason why it cannot run a layer, or None.
        prepare: runs once after loading, on the layer's device. Its result holds all codes, so that the words on disk
            need not be kept beside them.
        unpack: (prepared, start, stop) -> the codes of outputs start … stop, bit for bit, (in, stop - start) uint8.
        matmul: (x (..., in), prepared) -> (..., out), without bias, in x's dtype. Need not be differentiable.
        transposed: (gradient (..., out), prepared) -> (..., in), the gradient towards x.
        joint: how weights with a common input become one; None where one product is no faster than several.
        grouped_gemm: one product for all experts of a mixture; None where each expert multiplies by itself.
        only_by_name: never chosen unless `backend` names it.
    """

    name: str
    bits: frozenset[int]
    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype]
    why_not_layer: Callable[[PackedWeight, torch.dtype], str | None]
    prepare: Callable[[PackedWeight], Prepared]
    unpack: Unpack
    matmul: Callable[[Tensor, Prepared], Tensor]
    transposed: Callable[[Tensor, Prepared], Tensor]
    joint: Joint | None = None
    grouped_gemm: GroupedGemm | None = None
    only_by_name: bool = False

    def why_not(self, packed: PackedWeight, dtype: torch.dtype) -> str | None:
        """Why this kernel cannot multiply activations of `dtype` by a weight, where that is; or None."""
        device = packed.scales.device
        if self.devices is not None and device.type not in self.devices:
            return f"runs on {' and '.join(sorted(self.devices))} devices, the layer is on {device}"
        if packed.bits not in self.bits:
            return f"takes codes of {', '.join(map(str, sorted(self.bits)))} bits, these have {packed.bits}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(sorted(map(str, self.dtypes)))} activations, these are {dtype}"
        return self.why_not_layer(packed, dtype)


HALF = frozenset({torch.float16, torch.bfloat16})
CPU = frozenset({"cpu"})
GPU = frozenset(TRITON_DEVICES)

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            name="cpu_int4",
            bits=frozenset({2, 3, 4}),
            devices=CPU,
            dtypes=HALF,
            why_not_layer=cpu.why_not_int4,
            prepare=cpu.prepare_int4,
            unpack=cpu.unpack_int4,
            matmul=cpu.matmul_int4,
            transposed=partial(matmul_transposed, unpack=cpu.unpack_int4),
            joint=Joint(codes=0, extras=(1,), multiple=cpu.TILE),
        ),
        Kernel(
            name="cpu_int8",
            bits=frozenset({8}),
            devices=CPU,
            dtypes=HALF,
            why_not_layer=cpu.why_not_int8,
            prepare=cpu.prepare_int8,
            unpack=cpu.unpack_int8,
            matmul=cpu.matmul_int8,
            transposed=partial(matmul_transposed, unpack=cpu.unpack_int8),
            joint=Joint(codes=0, extras=(0,)),
        ),
        Kernel(
            name="cpu_int4_twice",
            bits=frozenset({8}),
            devices=CPU,
            dtypes=HALF,
            why_not_layer=cpu.why_not_int4,
            prepare=cpu.prepare_int4_twice,
            unpack=cpu.unpack_int4_twice,
            matmul=cpu.matmul_int4_twice,
            transposed=partial(matmul_transposed, unpack=cpu.unpack_int4_twice),
            joint=Joint(codes=1, extras=(1, 1), multiple=cpu.TILE),
        ),
        Kernel(
            name="triton",
            bits=frozenset(triton_gpu.PLANES),
            devices=GPU,
            dtypes=HALF | {torch.float32},
            why_not_layer=triton_gpu.why_not,
            prepare=triton_gpu.prepare,
            unpack=triton_gpu.unpack,
            matmul=triton_gpu.matmul,
            transposed=triton_gpu.matmul_transposed,
            joint=Joint(codes=0, extras=(1, 0), multiple=triton_gpu.TOGETHER),
            grouped_gemm=GroupedGemm(why_not=triton_gpu.why_not_grouped, matmul=triton_gpu.grouped_gemm),
        ),
        Kernel(
            name="gemlite",
            bits=frozenset({2, 4, 8}),
            devices=GPU,
            dtypes=HALF,
            why_not_layer=gemlite_gpu.why_not,
            prepare=gemlite_gpu.prepare,
            unpack=gemlite_gpu.unpack,
            matmul=gemlite_gpu.matmul,
            transposed=partial(matmul_transposed, unpack=gemlite_gpu.unpack),
            only_by_name=True,
        ),
        Kernel(
            name="reference",
            bits=frozenset(range(1, 9)),
            devices=None,
            dtypes=HALF | {torch.float32, torch.float64},
            why_not_layer=reference.why_not,
            prepare=reference.prepare,
            unpack=reference.unpack,
            matmul=reference.matmul,
            transposed=partial(matmul_transposed, unpack=reference.unpack),
        ),
    )
}
"""By name, from fastest to slowest, as far as they are chosen unasked."""

DENSELY: dict[str, Kernel] = {
    name: replace(
        kernel,
        name=f"{name}, densely",
        matmul=partial(matmul_dense, unpack=kernel.unpack),
        transposed=partial(matmul_transposed, unpack=kernel.unpack),
        joint=None,
        grouped_gemm=None,
    )
    for name, kernel in KERNELS.items()
}
"""By the name of the kernel that has laid the codes out: the reference's product of them, to the last bit. For
activations of another dtype than that kernel's, so that there need be no second copy of the codes."""

BY_NAME = {kernel.name: kernel for kernel in (*KERNELS.values(), *DENSELY.values())}

BACKENDS: dict[str, tuple[str, ...]] = {
    "auto": tuple(name for name, kernel in KERNELS.items() if not kernel.only_by_name),
    "cpu": tuple(name for name in KERNELS if name.startswith("cpu_")),
    **{name: (name,) for name in KERNELS},
}
"""backend= -> the rows that may be chosen."""


def known_backend(name: str) -> str:
    """Return `name` if it is a backend.

    Raises:
        KernelError: it is none of `BACKENDS`.
    """
    if name not in BACKENDS:
        raise KernelError(f"backend={name!r} was asked for; allowed are {', '.join(BACKENDS)}.")
    return name


def explain(packed: PackedWeight, dtype: torch.dtype) -> dict[str, str | None]:
    """By kernel, in order of preference: the reason why it cannot run this layer, or None if it can."""
    return {name: kernel.why_not(packed, dtype) for name, kernel in KERNELS.items()}


def choose_kernel(packed: PackedWeight, dtype: torch.dtype, backend: str = "auto") -> Kernel:
    """The first kernel of the table that `backend` allows and that can run this layer.

    Raises:
        KernelError: the backend is unknown, or none of its kernels can run the layer; the reasons are listed.
    """
    reasons = {}
    for name in BACKENDS[known_backend(backend)]:
        reason = KERNELS[name].why_not(packed, dtype)
        if reason is None:
            return KERNELS[name]
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise KernelError(
        f"backend={backend!r} cannot run a {packed.bits}-bit layer of {packed.in_features} x {packed.out_features} "
        f"with {dtype} on {packed.scales.device}: {listed}. backend='auto' always finds a kernel."
    )
