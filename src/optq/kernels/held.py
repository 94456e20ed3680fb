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
    """Codes in the order that one kernel wants, and how activations are multiplied by them.

    Args:
        kernel: which laid out the codes.
        prepared: what it made.
        device: where that is.
        products: by the dtype of activations, as far as such have come: the kernel itself, or its codes' product that
            is made densely.
    """

    kernel: Kernel
    prepared: Prepared
    device: torch.device
    products: Mapping[torch.dtype, Kernel]

    @classmethod
    def of(cls, kernel: Kernel, prepared: Prepared, dtype: torch.dtype) -> "Held":
        return cls(kernel=kernel, prepared=prepared, device=prepared.scales.device, products={dtype: kernel})

    def also_for(self, dtype: torch.dtype, chosen: Kernel) -> "Held | None":
        """The same for a further dtype; None if its kernel is faster than this one and wants its own order of codes.

        So the codes are laid out anew for faster kernels only, and a layer that gets dtypes in turns comes to rest.
        """
        if _SPEED[chosen.name] < _SPEED[self.kernel.name]:
            return None
        product = self.kernel if chosen.name == self.kernel.name else DENSELY[self.kernel.name]
        return replace(self, products={**self.products, dtype: product})
