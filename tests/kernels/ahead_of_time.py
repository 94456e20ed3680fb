# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton programs for GPUs that need not be there, and prints what became of them, one JSON line each.

    python tests/kernels/ahead_of_time.py           # every tiling, bits and architecture
    python tests/kernels/ahead_of_time.py --quick   # a few of them, as the tests do

A program of its own, because the interpreter and the compiler cannot be used in one process.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # unset, Triton 3.9 warns

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optq.gptq import triton_columns
from optq.gptq.columns import FUSED_BLOCK, FUSED_ROWS, FUSED_WARPS
from optq.kernels import triton_kernels
from optq.kernels.triton_gpu import DEQUANTIZED_OUTPUTS, PLANES, TILINGS, WORD_TYPES

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
WORDS = {bits: f"*i{8 * WORD_TYPES[planes[-1]].itemsize}" for bits, planes in PLANES.items()}
EXPERTS = 128
LOOPS = ("round_block", "sweep_block")
ALIGNED = (
    "x",
    "first",
    "second",
    "scales",
    "zeros",
    "output",
    "dense",
    "out",
    "columns",
    "in_features",
    "codes",
)  # to 16 bytes, or by 16


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: Any, **options: int) -> Any:
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name in ALIGNED}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def product(bits: int, dtype: str, group: int, tiling: Any, target: Any, experts: int = 0) -> Any:
    """Of one weight, or of those of some experts."""
    types = {
        "x": f"*{TYPES[dtype]}",
        "first": "*i32",
        "second": WORDS[bits],
        "scales": "*fp16",
        "zeros": "*i16" if bits == 8 else "*u8",
        "output": f"*{TYPES[dtype]}" if experts else "*fp32",
        "starts": "*i32",
    }
    constants = {
        "BITS": bits,
        "GROUP": group,
        "OUTPUTS": tiling.outputs,
        "ROWS": tiling.rows,
        "SCALE_SUMS": bool(tiling.scale_sums) and group >= tiling.scale_sums,
        "WHOLE": True,
        "PTX": target.backend == "cuda",
        "UPCAST": False,
    }
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    if experts:
        constants["EXPERTS"] = experts
    program = triton_kernels.grouped_product if experts else triton_kernels.product
    return compiled(program, types, constants, target, **options)


def dequantize(bits: int, dtype: str, group: int, target: Any) -> Any:
    types = {
        "first": "*i32",
        "second": WORDS[bits],
        "scales": "*fp16",
        "zeros": "*i16" if bits == 8 else "*u8",
        "dense": f"*{TYPES[dtype]}",
    }
    constants = {"BITS": bits, "GROUP": group, "OUTPUTS": DEQUANTIZED_OUTPUTS}
    return compiled(triton_kernels.dequantize, types, constants, target, num_warps=4)


def loop(name: str, target: Any) -> Any:
    types = dict.fromkeys(("pending", "pull", "factor", "hessian", "scales", "zeros"), "*fp32")
    types |= {"codes": "*u8", "groups": "*i32", "max_code": "fp32"}
    constants = {"COLUMNS": FUSED_BLOCK, "ROWS": FUSED_ROWS}
    return compiled(getattr(triton_columns, name), types, constants, target, num_warps=FUSED_WARPS)


def facts(binary: Any) -> dict[str, Any]:
    """What the machine code uses; of NVIDIA's, also its instructions."""
    found: dict[str, Any] = {"shared_bytes": binary.metadata.shared}
    if "cubin" not in binary.asm:
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found |= {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    instructions = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code))
    found["instructions"] = instructions.total()
    for name, pattern in {
        "tensor_core": r"H?G?MMA",
        "wide_loads": r"(LDG|LDGSTS)\b.*\.128",
        "spills": r"(LDL|STL)\b",
        "conversions": r"I2F",
    }.items():
        found[name] = sum(count for op, count in instructions.items() if re.match(pattern, op))
    return found


def cases(quick: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    targets = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90)} | {
        "gfx942": GPUTarget("hip", "gfx942", 64)
    }
    for name, target in targets.items():
        every = list(itertools.product(PLANES, ("float16", "bfloat16"), (32, 128), TILINGS))
        for at, (bits, dtype, group, tiling) in enumerate(every):
            # One in three of the cases meets every value of each choice, and every pair of most.
            if quick and (at % 3 or (name == "gfx942" and bits != 4)):
                continue
            what = {"target": name, "program": "product", "bits": bits, "dtype": dtype, "group": group}
            yield what | {"rows": tiling.rows}, product(bits, dtype, group, tiling, target)
        for at, (bits, dtype, group, tiling) in enumerate(every):
            if quick and (at % 3 != 1 or bits in (2, 8) or (name == "gfx942" and bits != 4)):
                continue
            what = {"target": name, "program": "grouped_product", "bits": bits, "dtype": dtype, "group": group}
            yield what | {"rows": tiling.rows}, product(bits, dtype, group, tiling, target, EXPERTS)
        for bits, dtype in zip(PLANES, itertools.cycle(TYPES), strict=False):
            what = {"target": name, "program": "dequantize", "bits": bits, "dtype": dtype, "group": 128}
            yield what, dequantize(bits, dtype, 128, target)
        for program in LOOPS:
            yield {"target": name, "program": program}, loop(program, target)


if __name__ == "__main__":
    for what, binary in cases("--quick" in sys.argv):
        print(json.dumps(what | facts(binary)), flush=True)
