# SPDX-License-Identifier: Apache-2.0
"""Runs gemlite's programs in Triton's interpreter, through the table's row, against float64.

A program of its own: gemlite asks for a GPU when it is imported, and is told of one that is not there. The interpreter
runs its programs for one and two rows only; those for more get the same tensors.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_kernels import packed_weight, relative_error
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from optq.checkpoint import unpack_codes
from optq.device import triton as triton_devices
from optq.kernels import KERNELS, choose_kernel, gemlite_gpu
from optq.kernels.selftest import why_wrong


class Properties:
    multi_processor_count, name, major, minor = 132, "a GPU that is not there", 9, 0
    shared_memory_per_block_optin = 227 * 1024


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 2**16}


class Driver:
    utils = Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles=None, **more: [1.0, 1.0, 1.0]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def main() -> None:
    driver.set_active(Driver())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: Properties
    torch.cuda.get_device_name = lambda device=None: Properties.name
    triton_devices.DEVICES = ("cpu",)
    KERNELS["gemlite"] = replace(KERNELS["gemlite"], devices=frozenset({"cpu"}))
    few = [(1, gemlite_gpu.matmul), (2, gemlite_gpu.matmul)]
    gemlite_gpu._why_wrong = lambda *where: why_wrong("gemlite", gemlite_gpu.prepare, few, *where)
    gemlite = KERNELS["gemlite"]
    for bits, group_size, symmetric, act_order in (
        (4, 64, True, "static"),
        (4, 32, False, "desc_act"),
        (2, 64, False, "static"),
        (8, -1, False, "static"),
    ):
        packed = packed_weight(bits, group_size, symmetric, act_order, out=96)
        assert choose_kernel(packed, torch.float16, "gemlite") is gemlite
        prepared, dense = gemlite.prepare(packed), packed.columns(0, 96)
        assert torch.equal(gemlite.unpack(prepared, 0, 96), unpack_codes(packed.qweight, bits))
        for rows in (1, 2):
            x = torch.randn(rows, packed.in_features, generator=torch.Generator().manual_seed(rows)).half()
            exact = x.double() @ dense.double()
            error = relative_error(gemlite.matmul(x, prepared), exact) / relative_error(x @ dense.half(), exact)
            assert error <= 3, f"{bits} bits, groups of {group_size}, {act_order}, {rows} rows: {error}"
        assert prepared.memo[torch.float16].W_q.data_ptr() == prepared.codes.data_ptr(), "two copies of the codes"


if __name__ == "__main__":
    main()
