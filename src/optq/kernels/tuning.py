# SPDX-License-Identifier: Apache-2.0
"""Times the tilings of the Triton product on this GPU, and remembers the fastest of each shape.

Nothing is tuned unless it is asked for: by `tune(model)`, or by OPTQ_AUTOTUNE=1 in the environment, while a model is
loaded. `tilings` keeps what was found.
"""

import itertools
import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from optq.device.triton import current, in_words

from . import tilings, triton_gpu
from .prepared import Prepared
from .selftest import MOST_DIFFERENT
from .tilings import MOST_ROWS, Problem, Tiling, problem_of, remember, remembered

logger = logging.getLogger(__name__)

REPLAYS = 20
GAIN = 0.97  # a tiling takes the place of the one that is there if it takes less than this part of its time
MANY_ROWS = (96, 128, 192, 256, 384, 512, 768, MOST_ROWS)  # where dequantizing may be faster
LAYERS = 16  # of one shape that take turns, so that weights come from memory and not from the cache


def candidates(default: Tiling) -> list[Tiling]:
    """Tilings to try for as many rows as `default` is for; the default comes first."""
    few = default.most_rows <= 32  # as long as the product waits for memory
    choices = itertools.product(
        sorted({default.rows, max(8, default.rows // 2)}),
        (32, 64, 128) if few else (64, 128),
        (1, 2, 4) if few else (4, 8),
        (3, 5) if few else (2, 3),
        (1, 4, 8, 12) if few else (1, 2, 4),
    )
    found = [default]
    for rows, outputs, warps, stages, programs in choices:
        if rows * outputs >= 128 * warps:  # of the tensor cores' products, 16 x 8, one for each warp
            cut = {"rows": rows, "outputs": outputs, "warps": warps, "stages": stages}
            found.append(replace(default, **cut, programs_per_processor=programs, split_fully=True))
    return found


def tune(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Find the fastest tilings for a loaded model's layers that run the kernel `triton`; takes a minute or so.

    Returns:
        By shape and rows, the time with the tiling that was found as a part of that with the one before.
    Raises:
        OutputError: what is found cannot be kept; before anything is measured.
    """
    by_problem: dict[tuple[str, Problem], list[Prepared]] = {}
    for module in model.modules():
        products: Iterable[tuple[str, Prepared, torch.dtype]] = getattr(module, "products", tuple)()
        for kernel, prepared, dtype in products:
            if kernel == "triton" and dtype != torch.float32:
                kind = tilings.kind_of(prepared.codes.device)
                by_problem.setdefault((kind, problem_of(prepared, dtype)), []).append(prepared)
    if not by_problem:
        logger.warning("There is nothing to tune: no layer runs the kernel triton with 16-bit activations.")
        return {}
    tilings.make_folder()
    gains: dict[str, dict[str, float]] = {}
    for (_, problem), layers in by_problem.items():
        device = layers[0].codes.device
        together = [prepared for prepared in layers if prepared.codes.device == device]
        present = remembered(device).get(problem, tilings.untuned(device))
        with current(device):  # whose streams a graph is captured from, and timed on
            best, gains[problem.words] = _fastest(problem, together[:LAYERS], present)
        remember(device, problem, best)
        tilings.tuned.cache_clear()
        for prepared in layers:
            prepared.memo.clear()
    return gains


def _fastest(
    problem: Problem, layers: list[Prepared], present: tuple[Tiling, ...]
) -> tuple[tuple[Tiling, ...], dict[str, float]]:
    chosen, gains = [], {}
    for tiling in present:
        x = torch.randn(min(tiling.most_rows, 256), problem.columns, device=layers[0].codes.device).to(problem.dtype)
        expected = triton_gpu.product(x, layers[0], tiling)
        start = least = _seconds(x, layers, tiling)
        best = tiling
        for candidate in candidates(tiling)[1:]:
            try:
                taken = _seconds(x, layers, candidate)
            except Exception as error:  # Triton's own are of no common kind: too little shared memory, or no registers
                logger.debug("%s: %s cannot run: %s", problem.words, candidate, in_words(error))
                continue
            if taken < GAIN * least and _agrees(triton_gpu.product(x, layers[0], candidate), expected):
                best, least = candidate, taken
        chosen.append(best)
        gains[f"up to {tiling.most_rows} rows"] = round(least / start, 3)
    if chosen[-1].most_rows >= MANY_ROWS[0]:
        most = _most_fused_rows(problem, layers, chosen[-1])
        chosen[-1:] = [replace(chosen[-1], most_rows=most)] if most else []
    logger.info("%s: %s", problem.words, gains)
    return tuple(chosen), gains


def _most_fused_rows(problem: Problem, layers: list[Prepared], tiling: Tiling) -> int:
    """Of `MANY_ROWS`, how many the fused product is the faster one for, from the fewest on; 0: for none."""
    most = 0
    for rows in MANY_ROWS:
        x = torch.randn(rows, problem.columns, device=layers[0].codes.device).to(problem.dtype)
        if _seconds(x, layers, tiling) > _seconds(x, layers, None):
            break
        most = rows
    return most


def _agrees(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= MOST_DIFFERENT * expected.abs().max())


def _seconds(x: Tensor, layers: list[Prepared], tiling: Tiling | None) -> float:
    """Seconds of one product in a replayed CUDA graph, without the time to start it from Python.

    Args:
        tiling: of the fused product; None: the weight is dequantized, and multiplied densely.
    """

    def run() -> None:
        for prepared in layers:
            if tiling is None:
                triton_gpu.product_of_dense(x, prepared)
            else:
                triton_gpu.product(x, prepared, tiling)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000 / REPLAYS / len(layers)
