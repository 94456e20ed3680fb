# SPDX-License-Identifier: Apache-2.0
"""`Held`: what a packed layer multiplies by, as one value that is exchanged and never changed.

A forward reads it once. So any number of threads may call a layer, each with activations of its own dtype, while one
of them has something laid out: each goes on with what it has read, which stays right.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .prepared import Prepared
from .table import DENSELY, KERNELS, Kernel

CHANGING = threading.RLock()
"""Held by whoever exchanges what layers hold; by nobody who multiplies."""

_SPEED = {name: place for place, name in enumerate(KERNELS)}  # the fastest first


@dataclass(frozen=True, kw_only=True)
class Held:
    """A layer's codes as one kernel laid them out, and which kernel multiplies activations of which dtype by them.

    Args:
        kernel: the kernel that laid out the codes.
        prepared: its result.
        device: the device of `prepared`.
        products: by dtype of activations, as far as they have been needed: `kernel` itself, or the dense product with
            its codes.
    """

    kernel: Kernel
    prepared: Prepared
    device: torch.device
    products: Mapping[torch.dtype, Kernel]

    @classmethod
    def of(cls, kernel: Kernel, prepared: Prepared, dtype: torch.dtype) -> "Held":
        return cls(kernel=kernel, prepared=prepared, device=prepared.scales.device, products={dtype: kernel})

    def also_for(self, dtype: torch.dtype, chosen: Kernel) -> "Held | None":
        """A copy that also takes activations of `dtype`; None if `chosen`, the kernel for it, is faster than this one.

        Codes are laid out anew for faster kernels only, so a layer that gets several dtypes in turns does not
        alternate.
        """
        if _SPEED[chosen.name] < _SPEED[self.kernel.name]:
            return None
        product = self.kernel if chosen.name == self.kernel.name else DENSELY[self.kernel.name]
        return replace(self, products={**self.products, dtype: product})
