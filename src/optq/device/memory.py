# SPDX-License-Identifier: Apache-2.0
"""Measure memory, and give back what is free."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

if sys.platform != "win32":
    import resource

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
MOST_IN_HEAP = 32 * 2**20  # the largest blocks, in bytes, for which glibc can be made to use its heap
MOST_GROWTH = 1.1


def peak_gib(device: torch.device | str) -> float | None:
    """Peak memory so far: what torch allocated on an accelerator, or the process's resident set on a CPU; GiB."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / GIB
    if sys.platform == "linux":
        # Not getrusage: its figure survives exec, so a child process starts with its parent's.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be allocated on an accelerator, or in the system's memory.

    What torch's allocator keeps of an accelerator's memory and nobody uses is free, although the driver does not know.
    """
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor of any shape (...) holds no NaN and no infinity.

    Mostly without the temporaries as large as the tensor that `isfinite` makes: a sum is not finite if an entry is
    not, and only a sum that is not finite is looked into.
    """
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def release_free_memory() -> None:
    """Hand freed heap pages back to the system, where the C library can.

    glibc keeps freed blocks in its heap, and activations that outlive others tear holes into it: without this,
    quantizing 135M parameters grew by 300 MB from the first block to the last.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@contextmanager
def reuse_of_free_memory() -> Iterator[Callable[[], None]]:
    """For a while, what is freed stays with the process and is used again, where the C library is glibc.

    Otherwise glibc hands much of it back at once, and each activation gets new pages that the system must fill with
    zeros first: a fifth of the time that it takes to quantize on a CPU. Blocks above 32 MiB go back in any case.

    Yields:
        To be called at times when about as much is in use as the first time: releases free memory if what the process
        holds has grown by more than MOST_GROWTH since.
    """
    libc = _glibc()
    limit = 0.0

    def bound() -> None:
        nonlocal limit
        if libc is not None and (resident := psutil.Process().memory_info().rss) > limit:
            if limit:
                release_free_memory()
                resident = psutil.Process().memory_info().rss
            limit = max(limit, MOST_GROWTH * resident)

    if libc is None:
        yield bound
        return
    _set_thresholds(libc, 2**31 - 1, arenas=1)
    try:
        yield bound
    finally:
        # What glibc's own adjustment arrives at in a process that frees large blocks, and its default.
        _set_thresholds(libc, 2 * MOST_IN_HEAP, arenas=0)


def _set_thresholds(libc: ctypes.CDLL, trim: int, arenas: int) -> None:
    """How much may be free at a heap's end, in bytes, and how many heaps threads share (0: no limit)."""
    libc.mallopt(M_MMAP_THRESHOLD, MOST_IN_HEAP)
    libc.mallopt(M_TRIM_THRESHOLD, trim)
    libc.mallopt(M_ARENA_MAX, arenas)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # musl has neither
