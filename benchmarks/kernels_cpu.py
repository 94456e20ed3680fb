# SPDX-License-Identifier: Apache-2.0
"""Where the CPU's int4 product stops being faster than dequantizing: milliseconds by shape and number of rows.

The four ways take turns; the best of several turns counts.

    python benchmarks/kernels_cpu.py
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import record

SHAPES = ((576, 1536), (1536, 576), (2048, 8192))  # in, out
ROWS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048)
TURNS, GROUP_SIZE, SEED = 5, 64, 0


def best_of(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:  # the first turn warms up
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(min(values), 3) for name, values in times.items()}


def main() -> None:
    import torch

    from optq.checkpoint import pack
    from optq.gptq import round_to_nearest
    from optq.kernels import cpu, reference
    from optq.scheme import LayerScheme

    torch.manual_seed(SEED)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for in_features, out_features in SHAPES:
        weight = torch.randn(out_features, in_features) / 10
        packed = pack(round_to_nearest(weight, LayerScheme(bits=4, group_size=GROUP_SIZE)))
        prepared, words = cpu.prepare_int4(packed), reference.prepare(packed)
        dense, half = packed.columns(0, out_features), packed.columns(0, out_features).bfloat16()
        table = results.setdefault(f"{in_features}x{out_features}", {})
        for rows in ROWS:
            x = torch.randn(rows, in_features).bfloat16()
            ways = {
                "int4 product": partial(cpu.int4_product, x, prepared.codes, prepared.extras[0]),
                "reference": partial(reference.matmul, x, words),
                "dense float32": partial(torch.matmul, x.float(), dense),
                "dense bfloat16": partial(torch.matmul, x, half),
            }
            table[str(rows)] = best_of(ways)
    settings = {"bits": 4, "group_size": GROUP_SIZE, "turns": TURNS, "seed": SEED, "unit": "ms, best of the turns"}
    record.write("kernels-cpu", settings, results)


if __name__ == "__main__":
    main()
