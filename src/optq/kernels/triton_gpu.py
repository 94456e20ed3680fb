# SPDX-License-Identifier: Apache-2.0
"""The Triton row: 2, 3, 4 and 8 bits on CUDA and ROCm GPUs. Nothing is built before run time, and no compiler is asked
for beyond the one inside Triton.

Codes are laid out anew, output by output, in blocks of 128 columns (8 bits: 64), so that one load brings all bits of
some columns and both halves of a word are neighbours. The third bits of 3-bit codes lie in a plane of their own, so
that they take 3 bits:

    4 bits: 16 words per block, 32 columns per step    word w = …  c65+2w c33+2w c1+2w | …  c64+2w c32+2w c2w
    2 bits:  8 words per block, 16 columns per step    word w = …  c33+2w c17+2w c1+2w | …  c32+2w c16+2w c2w
    8 bits: 16 words per block, 32 columns per step    word w =           c33+2w c1+2w |           c32+2w c2w
    3 bits: the lower two as 2 bits; the third in 8 words of 16 bits, in the same order

The blocks of 16 outputs lie side by side: first the first of each, then the second of each. So a warp reads whole
cache lines, and a program's reads are few long ones.

Beside them lies the grid, scale and zero of a group in one word: one load, wide enough to be made ahead.

By rows of activations: with few rows, the warps of a program share out the columns and add their sums; where there
still are too few programs, these split the columns, and the last one to be ready adds all parts, always in the same
order. Above `MOST_ROWS` the weight is dequantized into memory and multiplied by the dense library, which then is as
fast and whose product no longer waits for the weights.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from optq.checkpoint import PackedWeight, unpack_codes
from optq.device.triton import current, in_words, is_capturing, why_no_triton

from . import tilings
from .launches import Program
from .prepared import Prepared, columns_in_order, group_width, in_kernels_order, in_layers_order, prepared_from
from .roofline import Roofline, roofline
from .selftest import why_wrong
from .tilings import MOST_ROWS, Tiling, problem_of

logger = logging.getLogger(__name__)

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits -> the bits of each plane, lowest first
LARGEST_FLOAT16_SCALE = 31.0  # the kernel's own numbers are 2**11 times as large
DENSE_BYTES = 2**27  # of the weight while it is multiplied densely
TOGETHER = 16  # outputs whose blocks lie side by side
DEQUANTIZED_OUTPUTS = 32  # per program
ALIGNED = 16  # bytes, as Triton has it
MOST_REMEMBERED = 64  # rows whose launch is remembered: with more it takes a small part of the time


FEWEST_BLOCKS = 4  # per split
LATENCY, ADDING = 1.0, 2.0  # microseconds that a load takes, and to store parts, count them and load them again

# What is tried on a device before the kernel is used there: a row count for every tiling, and columns enough for split
# sums, each of more blocks than are loaded ahead, with a part of a group at the end.
TRIED_ROWS, TRIED_COLUMNS, TRIED_EXPERTS = (3, 12, 24, 48, 70), 6144 + 64, 3


def why_not(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    device = packed.scales.device
    return why_no_triton(device) or why_not_laid_out(packed, dtype) or _why_wrong(device, packed.bits, dtype)


def why_not_laid_out(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot run a layer of this shape, these groups and this dtype on any device, or None."""
    width = group_width(packed.g_idx)
    if not width:
        return "the groups have different numbers of columns"
    block = block_of(packed.bits)
    step = 2 * _words(packed.bits)
    if packed.scales.shape[0] > 1 and (width % step or (block % width and width % block)):
        return (
            f"groups of {width} columns; {packed.bits}-bit codes want {step}, …, {block // 2} or multiples of {block}"
        )
    if packed.scales.dtype not in (torch.float16, torch.bfloat16):
        return f"scales are {packed.scales.dtype}, not float16 or bfloat16"
    if dtype == torch.float16 and bool((packed.scales.abs() > LARGEST_FLOAT16_SCALE).any()):
        return f"scales above {LARGEST_FLOAT16_SCALE} are more than its float16 arithmetic holds"
    return None


@cache
def _why_wrong(device: torch.device, bits: int, dtype: torch.dtype) -> str | None:
    products = [(3, product_of_dense)]
    if dtype != torch.float32:
        products += [(rows, product) for rows in TRIED_ROWS for product in (_product_of_tiles, _product_in_parts)]
        products += [(TRIED_ROWS[1], _product_of_experts)]
    return why_wrong("triton", prepare, products, device, bits, dtype, TRIED_COLUMNS)


def _product_of_tiles(x: Tensor, prepared: Prepared) -> Tensor:
    tiling = _tiling(x.shape[0], prepared, x.dtype, prepared.out_features)
    return product(x, prepared, replace(tiling, programs_per_processor=0))


def _product_in_parts(x: Tensor, prepared: Prepared) -> Tensor:
    tiling = _tiling(x.shape[0], prepared, x.dtype, prepared.out_features)
    return product(x, prepared, replace(tiling, split_fully=True))


def _product_of_experts(x: Tensor, prepared: Prepared) -> Tensor:
    """The product by the program for experts: each has a part of the outputs, and gets all rows once."""
    rows, out = x.shape[0], prepared.out_features // TRIED_EXPERTS
    tiling = replace(_tiling(-(-rows // TRIED_EXPERTS), prepared, x.dtype, out), split_fully=True)
    launch = _launch(x, prepared, tiling, TRIED_EXPERTS)
    every = torch.arange(TRIED_EXPERTS + 1, dtype=torch.int32, device=x.device)
    return torch.cat([launch(((every > expert).int() * rows, x)) for expert in range(TRIED_EXPERTS)], 1)


def prepare(packed: PackedWeight) -> Prepared:
    """codes: the first plane, (padded out, words) int32; every `TOGETHER` rows are contiguous in memory.

    Extras: the grid, (groups, out) int32, 16 bits of the scale above 16 of the zero; of 3 bits also the second plane,
    (padded out, words) int16.
    """
    codes = unpack_codes(packed.qweight, packed.bits)
    order = columns_in_order(packed.g_idx)
    if order is not None:
        codes = codes[order]
    codes = pad(codes, (0, -codes.shape[1] % TOGETHER, 0, -codes.shape[0] % block_of(packed.bits))).T  # (out, columns)
    planes = []
    for bits in PLANES[packed.bits]:
        planes.append(_pack_plane(codes & 2**bits - 1, bits, packed.bits))
        codes = codes >> bits
    grid = packed.scales.contiguous().view(torch.int16).int() << 16 | packed.zeros().int()
    return prepared_from(packed, planes[0], grid, *planes[1:])


def unpack(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Codes of output features start … stop: (in, stop - start) uint8, columns in the layer's order."""
    shifts = {2: 0, 1: 2, 4: 0, 8: 0}  # where a plane's bits belong
    planes = zip((prepared.codes, *prepared.extras[1:]), PLANES[prepared.bits], strict=True)
    first = start // TOGETHER * TOGETHER
    pieces = slice(first, -(-stop // TOGETHER) * TOGETHER)
    codes, *more = (_unpack_plane(plane[pieces], bits, prepared.bits) << shifts[bits] for plane, bits in planes)
    for part in more:
        codes |= part
    return in_layers_order(codes[start - first : stop - first, : prepared.in_features].T, prepared.order)


def matmul(x: Tensor, prepared: Prepared) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, by the fused kernel; float32 and many rows are multiplied densely."""
    rows = in_kernels_order(x.reshape(-1, x.shape[-1]), prepared)
    many = rows.shape[0] > MOST_REMEMBERED  # else nothing is looked up at every call
    if x.dtype == torch.float32 or (many and rows.shape[0] > _most_rows(prepared, x.dtype)):
        output = product_of_dense(rows, prepared)
    else:
        output = _multiplied((rows.contiguous(),), prepared)
    return output.view(*x.shape[:-1], prepared.out_features)


def matmul_transposed(gradient: Tensor, prepared: Prepared) -> Tensor:
    """The gradient towards x: gradient (..., out) -> (..., in) in its dtype, by dequantizing the weight again."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    total = rows.new_zeros(rows.shape[0], prepared.in_features)
    for outputs, weight in _dense_pieces(prepared, rows.dtype):
        total.addmm_(rows[:, outputs], weight)
    if prepared.order is not None:
        total = torch.empty_like(total).index_copy_(1, prepared.order, total)
    return total.view(*gradient.shape[:-1], prepared.in_features)


def _tiling(rows: int, prepared: Prepared, dtype: torch.dtype, outputs: int) -> Tiling:
    """The tiling for so many rows; with more than any is for, that of the most rows."""
    device = prepared.codes.device
    candidates = tilings.untuned(device)
    if tuned := tilings.tuned(device):
        candidates = tuned.get(replace(problem_of(prepared, dtype), outputs=outputs), candidates)
    return next((tiling for tiling in candidates if rows <= tiling.most_rows), candidates[-1])


def _most_rows(prepared: Prepared, dtype: torch.dtype) -> int:
    """Rows of activations for which the fused product is the faster one: measured by `tune`, or estimated."""
    device = prepared.codes.device
    if tuned := tilings.tuned(device).get(problem_of(prepared, dtype)):
        return tuned[-1].most_rows
    return min(MOST_ROWS, roofline(device).dense_from())


def product(x: Tensor, prepared: Prepared, tiling: Tiling) -> Tensor:
    """The fused product: contiguous x (rows, in), float16 or bfloat16, columns in kernel order -> (rows, out)."""
    return _launch(x, prepared, tiling)((x,))


def why_not_grouped(rows: int, experts: int, dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return "activations are float32, which are multiplied densely"
    if rows > MOST_ROWS * experts:
        return f"more than {MOST_ROWS} rows per expert, which are multiplied densely"
    return None


def grouped_gemm(x: Tensor, starts: Tensor, prepared: Prepared) -> Tensor:
    """Multiply the rows of all experts in one launch, which does not depend on the values of `starts`.

    Args:
        x: (rows, in), float16 or bfloat16, sorted by expert.
        starts: (experts + 1,) int32, the first row of each expert and the end of the last one's rows.
        prepared: the weights of all experts, joined.
    Returns:
        (rows, out of one expert) in x's dtype; undefined for rows beyond the last expert's.
    """
    x = in_kernels_order(x, prepared)
    return _multiplied((starts, x.contiguous()), prepared, starts.shape[0] - 1)


def _multiplied(inputs: tuple[Tensor, ...], prepared: Prepared, experts: int = 0) -> Tensor:
    """The product with one weight, or those of some experts, by the launch that is remembered for such inputs."""
    x = inputs[-1]
    if x.device != prepared.codes.device:  # what a launch would do with memory of another GPU depends on the machine
        raise RuntimeError(f"The input is on {x.device}, and the weight on {prepared.codes.device}.")
    rows = x.shape[0]
    # What else Triton would look at is the weight's, or freshly allocated.
    key = (experts, rows, x.dtype, *(tensor.data_ptr() % ALIGNED == 0 for tensor in inputs))
    launch: Launch | None = prepared.memo.get(key)
    if launch is None:
        at_most, out = -(-rows // experts) if experts else rows, prepared.out_features // max(experts, 1)
        launch = _launch(x, prepared, _tiling(at_most, prepared, x.dtype, out), experts)
        if rows <= MOST_REMEMBERED:
            prepared.memo[key] = launch
    if _not_running and launch.program in _not_running:
        return _densely(inputs, prepared, experts)
    try:
        return launch(inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and a driver that nobody has seen yet may raise anything
        if launch.multiply.has_run or is_capturing(x.device):
            raise
        _give_up(launch, error)
    return _densely(inputs, prepared, experts)


_not_running: set[tuple[Any, ...]] = set()
"""The programs of this process that were started, and could not be."""


def _give_up(launch: "Launch", error: Exception) -> None:
    """Say once that a program does not run, although others of the kernel do, and that dense products take its place.

    What is tried before a kernel is used does not reach every choice of constants.
    """
    _not_running.add(launch.program)
    logger.warning(
        "%s: a program of the kernel triton, with %s, does not run (%s); dequantizing takes its place, and is slower.",
        *launch.program[:2],
        in_words(error),
    )


def _densely(inputs: tuple[Tensor, ...], prepared: Prepared, experts: int) -> Tensor:
    """The product of `_multiplied` by way of a dense weight; with experts, it waits for the device."""
    x = inputs[-1]
    if not experts:
        return product_of_dense(x, prepared)
    starts, out = inputs[0].tolist(), prepared.out_features // experts
    output = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
    for expert, (start, stop) in enumerate(pairwise(starts)):
        for outputs, weight in _dense_pieces(prepared, x.dtype, range(expert * out, (expert + 1) * out)):
            output[start:stop, outputs] = linear(x[start:stop], weight)
    return output


def most_tiles(rows: int, experts: int, size: int) -> int:
    """The most tiles of `size` rows, each of one expert, that `rows` rows can fall into, however they are routed."""
    busy = min(rows, experts)
    return busy + (rows - busy) // size


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch of `product` or `grouped_product` for one weight and number of rows.

    Args:
        weight: two planes of codes, (padded out, words) each, twice the same if there is one; and the grid,
            (groups, out).
    """

    program: tuple[Any, ...]  # what makes it another one for Triton: device, tiling, constants
    shape: tuple[int, int]  # of the output
    splits: int
    tiles: int
    last_adds: bool
    multiply: Program
    weight: tuple[Tensor, ...]
    no_parts: tuple[Tensor, Tensor]
    constants: tuple[Any, ...]

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """(rows, out) from x (rows, in), or from the experts' starts and x."""
        x = inputs[-1]
        output = torch.empty(self.shape, dtype=x.dtype, device=x.device)
        if not self.shape[0]:
            return output
        parts = self.no_parts if self.splits == 1 else room_for_parts(self.splits, self.shape, self.tiles, x.device)
        with current(x.device):
            self.multiply(*inputs, *self.weight, *parts, output, *self.constants)
        return output if self.splits == 1 or self.last_adds else output.copy_(parts[0].sum(0))


def room_for_parts(splits: int, shape: tuple[int, int], tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory of a launch's own, so that any others may run at the same time; what is in it does not matter.

    Returns:
        `parts` of `product`, (splits, rows, out) float32; and `counts`, (tiles,) int64.
    """
    return (
        torch.empty((splits, *shape), dtype=torch.float32, device=device),
        torch.empty(tiles, dtype=torch.int64, device=device),
    )


def _launch(x: Tensor, prepared: Prepared, tiling: Tiling, experts: int = 0) -> Launch:
    rows, out = x.shape[0], prepared.out_features // max(experts, 1)
    row_tiles = most_tiles(rows, experts, tiling.rows) if experts else -(-rows // tiling.rows)
    output_tiles = -(-out // tiling.outputs)
    columns, groups = prepared.in_features, prepared.scales.shape[0]
    block = block_of(prepared.bits)
    blocks = -(-columns // block)
    per_split = blocks_per_split(max(row_tiles * output_tiles, 1), blocks, roofline(x.device), tiling)
    splits = -(-blocks // per_split)
    width = prepared.group_width if groups > 1 else blocks * block
    ptx = _takes_ptx(x.device)
    function = _kernels().grouped_product if experts else _kernels().product
    constants = {
        "rows": rows,
        "out": out,
        "columns": columns,
        "groups": groups,
        "grid_stride": prepared.extras[0].stride(0),
        "blocks": blocks,
        "blocks_per_split": per_split,
        "experts": experts,
        "BITS": prepared.bits,
        "BLOCK": block,
        "GROUP": width,
        "OUTPUTS": tiling.outputs,
        "ROWS": tiling.rows,
        "PARTS": tiling.parts,
        "SCALE_SUMS": bool(tiling.scale_sums) and width >= tiling.scale_sums,
        "WHOLE": columns % block == 0,
        "BFLOAT16_SCALES": prepared.scales.dtype == torch.bfloat16,
        "PTX": ptx,
        "UPCAST": x.device.type == "cpu" and x.dtype == torch.bfloat16,
        # On ROCm, only the thread that counts waits until what it has stored is where other processors find it. What
        # Intel's compiler makes of it nobody has looked at.
        "LAST_ADDS": torch.version.hip is None and x.device.type != "xpu",
        "EXPERTS": 1 << (experts - 1).bit_length() if experts else 0,
    }
    names = function.arg_names
    compiled = tuple(value for name, value in constants.items() if name.isupper())
    return Launch(
        program=(x.device, tiling, bool(experts), x.dtype, compiled),
        shape=(rows, out),
        splits=splits,
        tiles=row_tiles * output_tiles,
        last_adds=bool(constants["LAST_ADDS"]),
        multiply=Program(function, (output_tiles, row_tiles, splits), launch_options(tiling, ptx)),
        weight=_arguments(prepared),
        no_parts=room_for_parts(0, (rows, out), 0, x.device),
        constants=tuple(constants[name] for name in names[names.index("output") + 1 :]),
    )


def launch_options(tiling: Tiling, ptx: bool) -> dict[str, int]:
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    if ptx and tiling.registers:
        options["maxnreg"] = tiling.registers
    return options


def blocks_per_split(tiles: int, blocks: int, gpu: Roofline, tiling: Tiling) -> int:
    """How many blocks of columns each program sums, chosen by an estimate of the time.

    The estimate is the work of the busiest processor, or the memory latency of a single program if that is longer; and
    the time to add the parts where there is more than one split.
    """
    fewest = max(FEWEST_BLOCKS, tiling.parts * tiling.stages)

    def microseconds(splits: int) -> tuple[float, int]:
        summed = -(-blocks // splits)
        rate = min(gpu.weights, gpu.products / tiling.rows)
        busiest = -(-tiles * splits // gpu.processors) * summed * tiling.outputs * 128 / rate
        waiting = summed / tiling.parts / (tiling.stages - 1) * LATENCY
        return max(busiest, waiting) + (ADDING if splits > 1 else 0), -splits

    most = max(1, min(round(tiling.programs_per_processor * gpu.processors / tiles), blocks // fewest))
    return -(-blocks // (most if tiling.split_fully else min(range(1, most + 1), key=microseconds)))


def product_of_dense(x: Tensor, prepared: Prepared) -> Tensor:
    """x (rows, in), columns in kernel order -> (rows, out), by way of a dense weight, some outputs at a time."""
    output = torch.empty(x.shape[0], prepared.out_features, dtype=x.dtype, device=x.device)
    for outputs, weight in _dense_pieces(prepared, x.dtype):
        output[:, outputs] = linear(x, weight)
    return output


def _dense_pieces(prepared: Prepared, dtype: torch.dtype, of: range | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The weight (out, in), columns in the kernel's order, some outputs at a time; or only the outputs `of`.

    Yields:
        Which of these outputs they are, and the weight.
    """
    of = range(prepared.out_features) if of is None else of
    columns, groups = prepared.in_features, prepared.scales.shape[0]
    block = block_of(prepared.bits)
    blocks = -(-columns // block)
    at_once = max(DEQUANTIZED_OUTPUTS, DENSE_BYTES // (columns * dtype.itemsize) // 128 * 128)
    for start in range(of.start, of.stop, at_once):
        count = min(at_once, of.stop - start)
        dense = torch.empty(count, columns, dtype=dtype, device=prepared.codes.device)
        with current(dense.device):
            _kernels().dequantize[-(-count // DEQUANTIZED_OUTPUTS), blocks](
                *_arguments(prepared),
                dense,
                start,
                count,
                prepared.out_features,
                columns,
                groups,
                prepared.extras[0].stride(0),
                blocks,
                BITS=prepared.bits,
                BLOCK=block,
                GROUP=prepared.group_width if groups > 1 else blocks * block,
                OUTPUTS=DEQUANTIZED_OUTPUTS,
                BFLOAT16_SCALES=prepared.scales.dtype == torch.bfloat16,
            )
        yield slice(start - of.start, start - of.start + count), dense


def _arguments(prepared: Prepared) -> tuple[Tensor, Tensor, Tensor]:
    grid, *third = prepared.extras
    return prepared.codes, third[0] if third else prepared.codes, grid


def block_of(bits: int) -> int:
    """Columns whose codes lie together."""
    return 64 if bits == 8 else 128


def _words(bits: int) -> int:
    """Per block and plane."""
    return block_of(bits) * PLANES[bits][0] // 32


def _pack_plane(codes: Tensor, plane: int, bits: int) -> Tensor:
    """(out, columns) numbers of `plane` bits, from codes of `bits` -> (out, blocks * words), in pieces."""
    words, block = _words(bits), block_of(bits)
    steps = codes.reshape(codes.shape[0], -1, block // (2 * words), words, 2)
    half = steps.shape[2] * plane  # bits
    packed = torch.zeros(steps.shape[0], steps.shape[1], words, dtype=torch.int64, device=codes.device)
    for step in range(steps.shape[2]):
        for side in (0, 1):
            packed |= steps[:, :, step, :, side].long() << (plane * step + half * side)
    size = 2 * half
    packed -= (packed >> (size - 1)) << size  # to the signed number with the same bits
    words_type = torch.int16 if size == 16 else torch.int32
    pieces = packed.to(words_type).view(-1, TOGETHER, *packed.shape[1:]).transpose(1, 2)
    return pieces.reshape(packed.shape[0], -1)  # in memory: (out / TOGETHER, blocks, TOGETHER, words)


def _unpack_plane(packed: Tensor, plane: int, bits: int) -> Tensor:
    """The inverse of `_pack_plane`, (out, columns) uint8."""
    words = _words(bits)
    steps = block_of(bits) // (2 * words)
    blocks = packed.reshape(packed.shape[0] // TOGETHER, -1, TOGETHER, words).transpose(1, 2).flatten(0, 1)
    codes = torch.empty(*blocks.shape[:2], steps, words, 2, dtype=torch.uint8, device=packed.device)
    for step in range(steps):
        for side in (0, 1):
            codes[:, :, step, :, side] = blocks >> plane * (step + steps * side) & 2**plane - 1
    return codes.flatten(1)


def _kernels() -> Any:
    """Imported late: Triton takes a second, and is not everywhere."""
    from . import triton_kernels

    return triton_kernels


def _takes_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None
