# SPDX-License-Identifier: Apache-2.0
"""Time of one product by shape and rows of activations: our kernel, dense ones, and the least that arithmetic allows.

On a GPU: medians of replayed CUDA graphs, whose weights change from call to call so that they come from memory and not
from the cache. On a CPU: the best of several turns, in which all ways alternate.

    python benchmarks/kernels.py                        # about 10 minutes on a GPU, 5 on a CPU
    python benchmarks/kernels.py --bits 2 3 4 8 --models 8B
    python benchmarks/kernels.py --picture docs/kernels-cpu.png    # draws what was measured; wants matplotlib
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
from peaks import Peaks, peaks

SHAPES: dict[str, dict[str, tuple[int, int]]] = {  # in, out
    "135M": {"gate": (576, 1536), "down": (1536, 576)},
    "7B": {"o": (4096, 4096)},
    "1B": {"o": (2048, 2048), "gate": (2048, 8192), "down": (8192, 2048)},
    "8B": {"o": (4096, 4096), "q/k/v": (4096, 6144), "gate": (4096, 14336), "down": (14336, 4096)},
    "70B": {"o": (8192, 8192), "gate": (8192, 28672), "down": (28672, 8192)},
}
GPU_MODELS, CPU_MODELS = ("1B", "8B", "70B"), ("135M", "1B", "7B")
GPU_ROWS, CPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096), (1, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048)
CPU_TURNS, GPU_REPLAYS, GRAPH_CALLS, SEED = 7, 30, 20, 0
PAST_THE_CACHE = 3e8  # bytes of weights that take turns: several times any GPU's second-level cache


def bytes_moved(shape: tuple[int, int], rows: int, bits: float, group_size: int) -> float:
    columns, outputs = shape
    grid = (columns / group_size) * outputs * (16 + 16) if bits < 16 else 0
    return (columns * outputs * bits + grid + 16 * rows * (columns + outputs)) / 8


def floor_us(shape: tuple[int, int], rows: int, bits: float, group_size: int, peaks: Peaks) -> float:
    """The time to read everything once, or to do the arithmetic, whichever is longer."""
    operations = 2 * rows * shape[0] * shape[1]
    return round(1e6 * peaks.floor_seconds(bytes_moved(shape, rows, bits, group_size), operations), 2)


def packed_weights(shape: tuple[int, int], bits: int, group_size: int, copies: int, device: str) -> list[Any]:
    """Random codes: speed does not depend on them."""
    import torch

    from optq.checkpoint import PackedWeight
    from optq.scheme import trivial_groups

    columns, outputs = shape
    groups = columns // group_size
    generator = torch.Generator(device).manual_seed(SEED)

    def words(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device=device, generator=generator)

    return [
        PackedWeight(
            qweight=words(columns * bits // 32, outputs),
            qzeros=words(groups, outputs * bits // 32),
            scales=torch.rand(groups, outputs, device=device, generator=generator).half() / 100,
            g_idx=trivial_groups(columns, group_size, torch.device(device)),
            bits=bits,
            checkpoint_format="gptq_v2",
        )
        for _ in range(copies)
    ]


def on_gpu(ways: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Microseconds per call of each way; its callables differ in their weights and take turns."""
    import torch

    graphs = {}
    for name, calls in ways.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for at in range(GRAPH_CALLS):
                calls[at % len(calls)]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(GPU_REPLAYS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(1000 * start.elapsed_time(end) / GRAPH_CALLS)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def on_cpu(ways: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(CPU_TURNS + 1):
        for name, (call, *_) in ways.items():
            calls, started = 0, time.perf_counter()
            while (taken := time.perf_counter() - started) < 0.02 or not calls:
                call()
                calls += 1
            if turn:  # the first turn warms up
                times[name].append(1e6 * taken / calls)
    return {name: round(min(values), 2) for name, values in times.items()}


def measure(shape: tuple[int, int], bits: int, group_size: int, all_rows: tuple[int, ...]) -> dict[str, Any]:
    import torch
    from torch.nn.functional import linear

    from optq.kernels import KERNELS, choose_kernel
    from optq.kernels.prepared import matmul_dense

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    columns, outputs = shape
    copies = max(2, int(PAST_THE_CACHE / (columns * outputs * bits / 8))) if gpu else 1
    packed = packed_weights(shape, bits, group_size, min(copies, 64), device)
    kernel = choose_kernel(packed[0], torch.bfloat16)
    prepared = [kernel.prepare(each) for each in packed]
    dense_copies = max(2, int(PAST_THE_CACHE / (2 * columns * outputs))) if gpu else 1
    dense = [torch.randn(outputs, columns, device=device).bfloat16() for _ in range(min(dense_copies, 64))]
    for_gemlite = [KERNELS["gemlite"].prepare(each) for each in packed] if gpu else []
    found: dict[str, Any] = {}
    limits = peaks(device) if gpu else peaks(device, int(bytes_moved(shape, 1, bits, group_size)))
    for rows in all_rows:
        x = torch.randn(rows, columns, device=device).bfloat16()
        ways: dict[str, list[Callable[[], Any]]] = {
            f"optq {kernel.name}": [partial(kernel.matmul, x, each) for each in prepared],
            "dense bfloat16": [partial(linear, x, each) for each in dense],
        }
        if not gpu:
            ways["dense float32"] = [partial(linear, x.float(), dense[0].float())]
            ways["dequantize, dense"] = [partial(matmul_dense, x, prepared[0], kernel.unpack)]
            if bits == 4:
                from optq.kernels.cpu import int4_product

                ways["int4 product"] = [partial(int4_product, x, prepared[0].codes, *prepared[0].extras)]
            exact = KERNELS["reference"]
            ways["optq reference, float32"] = [partial(exact.matmul, x.float(), exact.prepare(packed[0]))]
        elif bits == 4:
            ways["tinygemm"] = tinygemm(x, shape, group_size, len(packed))
        if gpu and KERNELS["gemlite"].why_not(packed[0], torch.bfloat16) is None:
            ways["gemlite"] = [partial(KERNELS["gemlite"].matmul, x, each) for each in for_gemlite]
        times = on_gpu(ways) if gpu else on_cpu(ways)
        floor = floor_us(shape, rows, bits, group_size, limits)
        ours = times[f"optq {kernel.name}"]
        found[str(rows)] = {
            "us": times,
            "floor_us": floor,
            "of_floor": round(floor / ours, 3),
            "dense_floor_us": floor_us(shape, rows, 16, group_size, limits),
            **{
                f"times_{way.replace(' ', '_')}": round(times[way] / ours, 3)
                for way in times
                if way.startswith("dense")
            },
        }
        print(shape, f"{bits} bits, {rows} rows:", found[str(rows)], flush=True)
    return found


def tinygemm(x: Any, shape: tuple[int, int], group_size: int, copies: int) -> list[Callable[[], Any]]:
    """torch's own int4 product for GPUs."""
    import torch

    columns, outputs = shape
    ways = []
    for _ in range(copies):
        bytes_ = torch.randint(0, 256, (outputs, columns // 2), dtype=torch.uint8, device="cuda")
        codes = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
        grid = torch.rand(columns // group_size, outputs, 2, device="cuda").bfloat16()
        ways.append(partial(torch.ops.aten._weight_int4pack_mm, x, codes, group_size, grid))
    return ways


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed over dense bfloat16 by rows, one line per shape, with the ideal where it is known."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for shape, rows in results.items():
        counts = [int(count) for count in rows]
        axes.plot(counts, [each["times_dense_bfloat16"] for each in rows.values()], marker="o", label=shape)
        ideal = [each["us"]["dense bfloat16"] / each["floor_us"] for each in rows.values()]
        axes.plot(counts, ideal, linestyle=":", color=axes.lines[-1].get_color())
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel="rows of activations", ylabel="times the speed of dense bfloat16")
    marks = [count for count in counts if not count & (count - 1)]  # powers of two have room for their labels
    axes.set_xticks(marks, [str(count) for count in marks])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("Dotted: what memory and arithmetic allow", fontsize="medium")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=110)


def main() -> None:
    import torch

    gpu = torch.cuda.is_available()
    name = "kernels-" + (torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, default=128 if gpu else 64)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=GPU_MODELS if gpu else CPU_MODELS)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    path = record.RESULTS / f"{name}.json"
    if arguments.picture:
        draw(json.loads(path.read_text())["results"], arguments.picture)
        return
    torch.manual_seed(SEED)
    settings = {
        "group_size": arguments.group_size,
        "activations": "bfloat16",
        "unit": "us per product; median of graph replays" if gpu else "us per product; best of the turns",
        "seed": SEED,
    }
    results = record.read(name)  # what was measured of other bits and shapes stays
    for model in arguments.models:
        for part, shape in SHAPES[model].items():
            for bits in arguments.bits:
                results[f"{model} {part}, {shape[0]} x {shape[1]}, {bits} bits"] = measure(
                    shape, bits, arguments.group_size, GPU_ROWS if gpu else CPU_ROWS
                )
                record.write(name, settings, results, quiet=True)


if __name__ == "__main__":
    main()
