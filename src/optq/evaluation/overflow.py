# SPDX-License-Identifier: Apache-2.0
"""Whether a model in float16 would overflow, seen while it runs in float32.

On CPUs blocks run in float32, so what the gate compares is finite where the model itself, in float16, is not. Running
it a second time in its own dtype would double the work on held-out batches; to look at what its modules hand over
costs next to nothing. bfloat16 has the range of float32 and cannot overflow more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Overflow:
    """Finds values that the model's own dtype cannot hold while it runs in a wider one.

    Args:
        own: the model's dtype, or None if it does not say.
        working: the dtype that it runs in here; None: its own.

    Attributes:
        found: the first module that handed such a value over, or None.
    """

    def __init__(self, own: torch.dtype | None, working: torch.dtype | None) -> None:
        narrower = own is not None and working is not None and torch.finfo(own).max < torch.finfo(working).max
        self._limit = torch.finfo(own).max if own is not None and narrower else None
        self.found: str | None = None

    @property
    def is_possible(self) -> bool:
        """Whether there is anything to look out for."""
        return self._limit is not None

    @contextmanager
    def watching(self, name: str, block: nn.Module) -> Iterator[None]:
        """Look at what every module inside the block of this name is given and returns."""
        if not self.is_possible or self.found is not None:
            yield
            return
        hooks = [
            module.register_forward_hook(partial(self._look, f"{name}.{path}" if path else name))
            for path, module in block.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def look_at(self, name: str, values: Any) -> None:
        """Note the name if one of the tensors holds such a value."""
        if self._limit is None or self.found is not None:
            return
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool((leaf.abs() > self._limit).any()):
                self.found = name
                return

    def _look(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        # Masks, which are as good as infinite, have a dimension for heads.
        given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim < 4]
        self.look_at(name, (given, output))
