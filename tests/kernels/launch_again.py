# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton products with a driver that only takes notes, and compares first with later launches.

A program of its own, as ahead_of_time.py is. What is launched is compiled for sm_90; no GPU is needed.
"""

import itertools
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from test_kernels import packed_weight
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from optq.kernels import triton_gpu
from optq.kernels.roofline import H200

launched: list[tuple[Any, ...]] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        launched.append(arguments)


class Utilities:
    loaded = 0

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return 0, self.loaded, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 2**16}

    def unload_module(self, *arguments: Any) -> None:
        pass


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


def like(arguments: tuple[Any, ...]) -> list[Any]:
    """Without what may differ: where tensors lie that every call allocates, and Triton's own notes on a launch."""
    return [
        (value.dtype, value.shape, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
        for value in arguments
        if isinstance(value, torch.Tensor | int | tuple)
    ]


def check(multiply: Any, x: torch.Tensor) -> None:
    looked_at: list[str] = []
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *given, **more: (
        looked_at.append(self.fn.__name__) or run(self, *given, **more)
    )
    calls = []
    for _ in range(3):
        launched.clear()
        multiply(x)
        calls.append([like(arguments) for arguments in launched])
    assert len(calls[0]) == 1
    assert calls[0] == calls[1] == calls[2]
    assert len(looked_at) == 1, looked_at
    launched.clear()
    multiply(torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape))  # not aligned
    assert launched[0][4] != calls[0][0][4]  # another compiled function
    assert len(looked_at) == 2
    triton.JITFunction.run = run


def check_counts(prepared: Any) -> None:
    """No number of rows, splits or outputs is compiled for: a graph that is being captured must not wait for it."""
    triton_gpu.matmul(torch.randn(2, prepared.in_features).half(), prepared)
    deque(triton_gpu._dense_pieces(prepared, torch.float16, range(32, 64)), maxlen=0)
    loaded = Driver.utils.loaded
    for rows, per_split in itertools.product((1, 3, 8), (1, 2, 16)):
        triton_gpu.blocks_per_split = lambda *given, per_split=per_split: per_split
        prepared.memo.clear()
        triton_gpu.matmul(torch.randn(rows, prepared.in_features).half(), prepared)
        deque(triton_gpu._dense_pieces(prepared, torch.float16, range(rows, rows + per_split)), maxlen=0)
    assert Driver.utils.loaded == loaded


def main() -> None:
    driver.set_active(Driver())
    triton_gpu._takes_ptx = lambda device: True
    triton_gpu.roofline = lambda device: H200
    triton_gpu.blocks_per_split = lambda *given: 1
    for bits in (3, 4):
        prepared = triton_gpu.prepare(packed_weight(bits, 64, True))
        check(lambda x, prepared=prepared: triton_gpu.matmul(x, prepared), torch.randn(1, prepared.in_features).half())
        check_counts(prepared)
    starts = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    experts = triton_gpu.prepare(packed_weight(4, 64, True, out=96))
    check(lambda x: triton_gpu.grouped_gemm(x, starts, experts), torch.randn(3, experts.in_features).half())


if __name__ == "__main__":
    main()
