# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton programs for GPUs that need not be there, and prints what became of them, one JSON line each.

    python tests/kernels/ahead_of_time.py           # every tiling, bits and architecture
    python tests/kernels/ahead_of_time.py --quick   # a few of them, as `make test-all` does
    python tests/kernels/ahead_of_time.py --quick --half   # and half of these, as `make test` does
    python tests/kernels/ahead_of_time.py --loops   # NVIDIA's, groups of 128, bfloat16: for benchmarks/instructions.py

A program of its own, because the interpreter and the compiler cannot be used in one process.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
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
from optq.kernels.tilings import BY_CAPABILITY, TILINGS
from optq.kernels.triton_gpu import DEQUANTIZED_OUTPUTS, PLANES, block_of, launch_options

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
EXPERTS = 128
TENSOR_CORE = r"(UTC)?H?G?MMA"
AROUND_IT = ((4, "bfloat16", 32), (4, "float16", 128), (3, "bfloat16", 128), (3, "float16", 32))
"""With `--quick`: what is in the experts' program, around the same product, for each tiling in turn."""
PLANES_IN_ORDER = list(PLANES)
LOOPS = ("round_block", "sweep_block")
ALIGNED = (
    "x",
    "first",
    "third",
    "grid",
    "parts",
    "counts",
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
        "third": "*i16",
        "grid": "*i32",
        "parts": "*fp32",
        "counts": "*i64",
        "output": f"*{TYPES[dtype]}",
        "starts": "*i32",
    }
    constants = {
        "BITS": bits,
        "BLOCK": block_of(bits),
        "GROUP": group,
        "OUTPUTS": tiling.outputs,
        "ROWS": tiling.rows,
        "PARTS": tiling.parts,
        "SCALE_SUMS": bool(tiling.scale_sums) and group >= tiling.scale_sums,
        "WHOLE": True,
        "BFLOAT16_SCALES": False,
        "PTX": target.backend == "cuda",
        "UPCAST": False,
        "LAST_ADDS": target.backend == "cuda",
    }
    options = launch_options(tiling, constants["PTX"])
    if experts:
        constants["EXPERTS"] = experts
    program = triton_kernels.grouped_product if experts else triton_kernels.product
    return compiled(program, types, constants, target, **options)


def dequantize(bits: int, dtype: str, group: int, target: Any) -> Any:
    types = {
        "first": "*i32",
        "third": "*i16",
        "grid": "*i32",
        "dense": f"*{TYPES[dtype]}",
    }
    constants = {
        "BITS": bits,
        "BLOCK": block_of(bits),
        "GROUP": group,
        "OUTPUTS": DEQUANTIZED_OUTPUTS,
        "BFLOAT16_SCALES": False,
    }
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
    lines = code.splitlines()
    instructions = operations(lines)
    found["instructions"] = len(instructions)
    for name, pattern in {
        "tensor_core": TENSOR_CORE,
        "wide_loads": r"(LDG|LDGSTS)\b.*\.128",
        "spills": r"(LDL|STL)\b",
    }.items():
        found[name] = sum(bool(re.match(pattern, op)) for op in instructions)
    loop = loop_over_columns(lines)
    found["loop_instructions"] = len(loop)
    found["loop_waits_for_loads"] = sum(op.startswith("LDG.") for op in loop)  # LDGSTS does not
    return found


def operations(lines: list[str]) -> list[str]:
    """The instructions' names."""
    found = (re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line) for line in lines)
    return [operation[1] for operation in found if operation]


def loop_over_columns(lines: list[str]) -> list[str]:
    """The instructions from a label to a branch back to it, with the most of the tensor core's among them.

    Of such loops, the shortest: where a program waits for sm_100's tensor core is put at its end, and branches back.
    """
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[]]
    for at, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = at
        elif (branch := re.search(r"\bBRA.*?(\.L_\w+)", line)) and branch[1] in labels:
            loops.append(operations(lines[labels[branch[1]] : at + 1]))
    return max(loops, key=lambda loop: (sum(bool(re.match(TENSOR_CORE, op)) for op in loop), -len(loop)))


def weights_per_thread(bits: int, tiling: Any) -> float:
    """In one turn of the loop."""
    return tiling.parts * tiling.outputs * block_of(bits) / (32 * tiling.warps)


def tilings_of(target: Any) -> tuple[Any, ...]:
    return TILINGS if target.backend == "hip" else BY_CAPABILITY.get(target.arch // 10, TILINGS)


def cases(quick: bool) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    others = () if quick else (89, 100, 120)
    targets = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, *others)} | {
        "gfx942": GPUTarget("hip", "gfx942", 64)
    }
    for name, target in targets.items():
        tilings = tilings_of(target)
        every = list(itertools.product(PLANES, ("float16", "bfloat16"), (32, 128), tilings))
        # One in four of the cases, another one for each number of bits, meets every pair of choices; NVIDIA's two
        # share them. Of the larger tilings, each with half of the bits, and both groups, will do.
        order = [at + at // (len(every) // len(PLANES)) for at in range(len(every))]
        own = 4 * (name == "sm_90")
        for at, (bits, dtype, group, tiling) in zip(order, every, strict=True):
            turn = (PLANES_IN_ORDER.index(bits) - tilings.index(tiling)) % len(PLANES)
            if quick and (at % 8 != own or (bits != 4 if name == "gfx942" else tiling.rows > 8 and turn in (1, 2))):
                continue
            what = {"target": name, "program": "product", "bits": bits, "dtype": dtype, "group": group}
            what |= {"rows": tiling.rows, "weights_per_thread": weights_per_thread(bits, tiling)}
            yield what, partial(product, bits, dtype, group, tiling, target)
        for bits, dtype, group, tiling in every:
            at = tilings.index(tiling)
            own_one = at == 1 if name == "gfx942" else at % 2 == (name == "sm_90")
            if quick and not (own_one and (bits, dtype, group) == AROUND_IT[at % len(AROUND_IT)]):
                continue
            what = {"target": name, "program": "grouped_product", "bits": bits, "dtype": dtype, "group": group}
            what |= {"rows": tiling.rows, "weights_per_thread": weights_per_thread(bits, tiling)}
            yield what, partial(product, bits, dtype, group, tiling, target, EXPERTS)
        for bits, dtype in zip(PLANES, itertools.cycle(TYPES), strict=False):
            if quick and (name != "sm_90" if bits in (3, 8) else name == "sm_90" or (name == "gfx942" and bits == 2)):
                continue
            what = {"target": name, "program": "dequantize", "bits": bits, "dtype": dtype, "group": 128}
            yield what, partial(dequantize, bits, dtype, 128, target)
        for program in LOOPS:
            yield {"target": name, "program": program}, partial(loop, program, target)


def loops() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    for target in [GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)]:
        for bits, tiling in itertools.product(PLANES, tilings_of(target)):
            what = {"target": f"sm_{target.arch}", "bits": bits, "rows": tiling.rows, "most_rows": tiling.most_rows}
            what |= {"weights_per_thread": weights_per_thread(bits, tiling)}
            yield what, partial(product, bits, "bfloat16", 128, tiling, target)


if __name__ == "__main__":
    every = loops() if "--loops" in sys.argv else cases("--quick" in sys.argv)
    for what, compiles in itertools.islice(every, 0, None, 2 if "--half" in sys.argv else 1):
        print(json.dumps(what | facts(compiles())), flush=True)
