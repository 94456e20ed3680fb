# SPDX-License-Identifier: Apache-2.0
import ctypes
import multiprocessing
import platform
import resource
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from optq.device.memory import (
    MOST_GROWTH,
    all_finite,
    free_bytes,
    peak_gib,
    release_free_memory,
    reuse_of_free_memory,
)


def test_peak_follows_an_allocation():
    before = peak_gib("cpu")
    block = torch.ones(int(before * 2**30) // 4 + 50_000_000)  # more than everything so far
    assert peak_gib("cpu") > before + 0.15
    assert block.sum() > 0


def test_what_torch_keeps_of_a_gpu_and_nobody_uses_is_free(monkeypatch):
    figures = {"mem_get_info": (1000, 8000), "memory_reserved": 5000, "memory_allocated": 2000}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    assert free_bytes("cuda") == 1000 + 5000 - 2000


@pytest.mark.slow
def test_a_child_process_does_not_inherit_the_peak_of_its_parent():
    code = "import torch; from optq.device.memory import peak_gib; print(peak_gib('cpu'))"
    block = torch.ones(200_000_000)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(child.stdout) < peak_gib("cpu") - 0.5
    assert block.sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_entry_that_is_not_finite_is_found_and_a_sum_that_overflows_is_no_such_entry(dtype):
    tensor = torch.full((8, 64), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(tensor)
    for value in (float("nan"), float("inf"), -float("inf")):
        tensor[3, 5] = value
        assert not all_finite(tensor)
    tensor[3, 6] = float("inf")
    assert not all_finite(tensor)


def test_releasing_memory_is_harmless():
    block = torch.ones(1000)
    release_free_memory()
    assert block.sum() == 1000


glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves")


def pages_taken_twice_in_turn() -> int:
    # Not tensors: torch keeps small blocks between theirs, and one at the heap's end has glibc keep all the others.
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 20_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        blocks = [libc.malloc(size) for _ in range(8)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def pages_taken_with_and_without_reuse() -> tuple[int, int]:
    with reuse_of_free_memory():
        pages_taken_twice_in_turn()
        again = pages_taken_twice_in_turn()
    release_free_memory()
    pages_taken_twice_in_turn()
    return again, pages_taken_twice_in_turn()


@pytest.mark.slow
@glibc_only
def test_free_memory_is_used_again_and_only_for_the_while():
    # In a new process: which block glibc takes depends on the holes that all tests before have left in its heap.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new_process:
        again, after = new_process.submit(pages_taken_with_and_without_reuse).result()
    assert again < 1000 < 10_000 < after


@glibc_only
def test_free_memory_does_not_pile_up():
    resident = psutil.Process().memory_info
    with reuse_of_free_memory() as bound:
        bound()
        first = resident().rss
        # Held through small pieces, so that it is in the heap and not one block at its end.
        pieces = [torch.ones(20_000) for _ in range(int(first / 80_000))]
        kept = [torch.ones(1) for _ in pieces]
        del pieces
        assert resident().rss > MOST_GROWTH * first
        bound()
        assert resident().rss < MOST_GROWTH * first
    assert kept
