# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, measured with plain copies and products: the floors under other figures.

A figure of time has a floor: the time to move its bytes at the rate of a copy, or to do its arithmetic at the rate of
a large product, whichever is longer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

TURNS = 5
COPIED = 2**30  # bytes, on a GPU: past its caches
SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices that are multiplied


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes that a copy moves in a second, read and written; operations of a product, two for each multiplication.

    In the faster one of bfloat16 and float32: some processors have no instructions for bfloat16.
    """

    bytes_per_second: float
    operations_per_second: float

    def floor_seconds(self, moved: float, operations: float) -> float:
        """The least time for so many bytes and operations."""
        return max(moved / self.bytes_per_second, operations / self.operations_per_second)


def settle(device: Any) -> None:
    """Wait for what still runs there."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def least_seconds(run: Callable[[], Any], device: Any) -> float:
    """Of some turns after one that warms up."""
    least = float("inf")
    for turn in range(TURNS + 1):
        settle(device)
        started = time.perf_counter()
        run()
        settle(device)
        if turn:
            least = min(least, time.perf_counter() - started)
    return least


@cache
def bytes_per_second(device: str, moved: int = COPIED) -> float:
    """Of copies that read and write so many bytes together."""
    import torch

    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved / least_seconds(partial(target.copy_, source), device)


@cache
def operations_per_second(device: str, dtype: Any, *, tf32: bool = False) -> float:
    """Of a product of large square matrices with random numbers: zeros would be multiplied faster."""
    import torch

    side = SIDE[torch.device(device).type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        return 2 * side**3 / least_seconds(partial(torch.mm, a, b), device)
    finally:
        matmul.fp32_precision = before


def peaks(device: str, moved: int = COPIED) -> Peaks:
    """This machine's.

    Args:
        moved: bytes of the copy: on a CPU, where weights may stay in the caches, as many as the figure moves.
    """
    import torch

    return Peaks(
        bytes_per_second=bytes_per_second(device, moved),
        operations_per_second=max(operations_per_second(device, kind) for kind in (torch.bfloat16, torch.float32)),
    )
