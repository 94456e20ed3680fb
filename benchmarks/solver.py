# SPDX-License-Identifier: Apache-2.0
"""Time of `optq.gptq.solve` by shape: on a GPU the fused loops over columns against single operations, alternating.

The floor is the arithmetic of its products with Hessians, factors and inverses at the speed of large float32 products.

python benchmarks/solver.py                         # on a GPU: 8B shapes and an expert's; about 3 minutes
python benchmarks/solver.py --models 135M --turns 3 # anywhere
"""

import argparse
import statistics
import time
from typing import Any

import record
from kernels import SHAPES
from peaks import operations_per_second

SEED, TOKENS = 0, 4096
EXPERT = {"30B-A3B expert": {"gate/up": (2048, 1536), "down": (768, 2048)}}  # in, out; 128 of each in a layer
ALL: dict[str, dict[str, tuple[int, int]]] = SHAPES | EXPERT
EFFORTS = {"fast": 1, "default": 3}  # rounds of refinement


def problem(shape: tuple[int, int], device: str) -> tuple[Any, Any]:
    """A weight, and the Hessian of correlated inputs of different energies."""
    import torch

    columns, outputs = shape
    generator = torch.Generator(device).manual_seed(SEED)
    made = {"generator": generator, "device": device}
    x = torch.randn(TOKENS, columns, **made) * torch.rand(columns, **made).add(0.1)
    x[:, 1:] += 0.5 * x[:, :-1]
    return torch.randn(outputs, columns, **made) / 50, x.T @ x / TOKENS


def seconds(weight: Any, hessian: Any, scheme: Any) -> float:
    import torch

    from optq.gptq import solve

    started = time.perf_counter()
    solve(weight, hessian, scheme, drift=weight @ hessian / 100)
    if weight.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(shape: tuple[int, int], bits: int, turns: int, device: str) -> dict[str, Any]:
    import torch

    from optq.gptq import columns
    from optq.gptq.cost import work_of
    from optq.scheme import LayerScheme

    weight, hessian = problem(shape, device)
    reason, chosen = columns.why_not_fused(torch.device(device)), columns.why_not_fused
    ways = {"single operations": "for comparison"} | ({} if reason else {"fused": None})
    found: dict[str, Any] = {"fused_not_run": reason}
    for effort, refinement in EFFORTS.items():
        scheme = LayerScheme(bits=bits, group_size=64 if shape[0] < 1024 else 128, refinement=refinement)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(turns + 1):
            for way, why_not in ways.items():
                columns.why_not_fused = lambda device, why_not=why_not: why_not  # type: ignore[assignment]
                taken = seconds(weight, hessian, scheme)
                if turn:  # the first one warms up
                    times[way].append(taken)
        columns.why_not_fused = chosen
        found[effort] = {way: round(statistics.median(values), 4) for way, values in times.items()}
        work = work_of(shape[1], shape[0], scheme, drift=True, device=weight.device)
        multiplications = operations_per_second(device, torch.float32) / 2
        found[effort]["floor"] = round((work.products + work.cubes) / multiplications, 4)
    return found


def main() -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ALL, default=["8B", *EXPERT] if on_gpu else ["135M"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if on_gpu else "cpu"
    name_of_file = f"solver-{device}"
    settings = {"bits": arguments.bits, "turns": arguments.turns, "seconds": "median per solve", "seed": SEED}
    results = record.read(name_of_file)  # what was measured of other shapes stays
    for model in arguments.models:
        for name, shape in ALL[model].items():
            results[f"{model} {name}, {shape[0]} x {shape[1]}"] = facts = measured(
                shape, arguments.bits, arguments.turns, device
            )
            print(model, name, facts, flush=True)
            record.write(name_of_file, settings, results, quiet=True)


if __name__ == "__main__":
    main()
