# SPDX-License-Identifier: Apache-2.0
"""The Triton row: 2, 3, 4 and 8 bits on CUDA and ROCm GPUs. Nothing is built before run time, and no compiler is asked
for beyond the one inside Triton.

Codes are laid out anew, output by output, in blocks of 128 columns, so that one load brings all bits of some columns
and both halves of a word are neighbours. Bits 2 and 1 lie in planes of their own, so 3-bit codes take 3 bits:

    4 bits: 16 words per block, 32 columns per step    word w = …  c65+2w c33+2w c1+2w | …  c64+2w c32+2w c2w
    2 bits:  8 words per block, 16 columns per step    word w = …  c33+2w c17+2w c1+2w | …  c32+2w c16+2w c2w
    3 bits: the lower two as 2 bits; the third in 8 words of 16 bits, in the same order
    8 bits: the lower four as 4 bits, and the upper four

By rows of activations: few rows split the sum over columns among more programs and add the parts in a second, short
program, always in the same order; above `MOST_ROWS` the weight is dequantized into memory and multiplied by the dense
library, which then is as fast and whose product no longer waits for the weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from optq.checkpoint import PackedWeight, unpack_codes
from optq.triton_devices import current, why_no_triton

from .prepared import Prepared, columns_in_order, group_width, in_layers_order, prepared_from

BLOCK = 128  # columns whose codes lie together
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}  # bits -> the bits of each plane, lowest first
WORD_TYPES = {4: torch.int32, 2: torch.int32, 1: torch.int16}  # of a plane, by its bits
MOST_ROWS = 1024
DENSE_BYTES = 2**27  # of the weight while it is multiplied densely
DEQUANTIZED_OUTPUTS = 32  # per program
SUMMED = 1024  # elements per program


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How `product` cuts its work, for up to `most_rows` rows of activations.

    Args:
        rows, outputs: of the result per program.
        warps, stages: Triton's own: of 32 threads, and loads in flight.
        scale_sums: scale sums instead of weights where groups are at least this wide; 0: never.
        programs_per_processor: aimed at by splitting the sum: enough loads in flight to keep memory busy.
    """

    most_rows: int
    rows: int
    outputs: int
    warps: int
    stages: int
    scale_sums: int
    programs_per_processor: int = 4


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What decides which tilings are fast, on one GPU."""

    bits: int
    group_width: int
    columns: int
    outputs: int
    dtype: torch.dtype

    @property
    def words(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.bits} bits, groups of {self.group_width}, {self.columns} x {self.outputs}, {dtype}"

    @classmethod
    def of(cls, words: str) -> "Problem":
        """The inverse of `words`. Raises ValueError if they are none."""
        found = re.fullmatch(r"(\d+) bits, groups of (\d+), (\d+) x (\d+), (float16|bfloat16)", words)
        if found is None:
            raise ValueError(f"{words!r} does not name a problem")
        bits, group_width, columns, outputs = map(int, found.groups()[:4])
        dtype = getattr(torch, found[5])
        return cls(bits=bits, group_width=group_width, columns=columns, outputs=outputs, dtype=dtype)


def problem_of(prepared: Prepared, dtype: torch.dtype) -> Problem:
    return Problem(
        bits=prepared.bits,
        group_width=prepared.group_width,
        columns=prepared.in_features,
        outputs=prepared.out_features,
        dtype=dtype,
    )


TILINGS = (
    # Not tuned on any GPU yet: sizes by arithmetic, registers and shared memory (at most 96 KiB, what small GPUs
    # have) checked ahead of time for sm_80 and sm_90.
    Tiling(most_rows=16, rows=16, outputs=64, warps=4, stages=5, scale_sums=64),
    Tiling(most_rows=32, rows=32, outputs=64, warps=4, stages=4, scale_sums=128),
    Tiling(most_rows=64, rows=64, outputs=64, warps=4, stages=4, scale_sums=0),
    Tiling(most_rows=MOST_ROWS, rows=64, outputs=128, warps=8, stages=3, scale_sums=0),
)
FEWEST_BLOCKS = 4  # per split


def why_not(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    return why_no_triton(packed.scales.device) or why_not_laid_out(packed, dtype)


def why_not_laid_out(packed: PackedWeight, dtype: torch.dtype) -> str | None:
    """What about the layer itself, wherever it is, keeps this kernel from running it."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"activations are {dtype}, not float16, bfloat16 or float32"
    width = group_width(packed.g_idx)
    if not width:
        return "the groups have different numbers of columns"
    step = 2 * _words(packed.bits)
    if packed.scales.shape[0] > 1 and (width % step or (BLOCK % width and width % BLOCK)):
        return (
            f"groups of {width} columns; {packed.bits}-bit codes want {step}, …, {BLOCK // 2} or multiples of {BLOCK}"
        )
    return None


def prepare(packed: PackedWeight) -> Prepared:
    """Codes: the lowest plane, (out, words) int32; extras: the next plane, int16 or int32, of 3 and 8 bits."""
    codes = unpack_codes(packed.qweight, packed.bits)
    order = columns_in_order(packed.g_idx)
    if order is not None:
        codes = codes[order]
    codes = pad(codes, (0, 0, 0, -codes.shape[0] % BLOCK)).T  # (out, columns)
    planes = []
    for bits in PLANES[packed.bits]:
        planes.append(_pack_plane(codes & 2**bits - 1, bits, _words(packed.bits)))
        codes = codes >> bits
    return prepared_from(packed, *planes)


def unpack(prepared: Prepared, start: int, stop: int) -> Tensor:
    codes, shift = None, 0
    words = _words(prepared.bits)
    for plane, bits in zip((prepared.codes, *prepared.extras), PLANES[prepared.bits], strict=True):
        part = _unpack_plane(plane[start:stop], bits, words) << shift
        codes, shift = part if codes is None else codes | part, shift + bits
    assert codes is not None
    return in_layers_order(codes[:, : prepared.in_features].T, prepared.order)


def matmul(x: Tensor, prepared: Prepared) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if prepared.order is not None:
        rows = rows.index_select(1, prepared.order)
    if rows.shape[0] > MOST_ROWS or x.dtype == torch.float32:
        output = _product_of_dense(rows, prepared)
    else:
        output = product(rows.contiguous(), prepared, _tiling(rows.shape[0], prepared, x.dtype, prepared.out_features))
    return output.view(*x.shape[:-1], prepared.out_features)


def matmul_transposed(gradient: Tensor, prepared: Prepared) -> Tensor:
    rows = gradient.reshape(-1, gradient.shape[-1])
    total = rows.new_zeros(rows.shape[0], prepared.in_features)
    for outputs, weight in _dense_pieces(prepared, rows.dtype):
        total.addmm_(rows[:, outputs], weight)
    if prepared.order is not None:
        total = torch.empty_like(total).index_copy_(1, prepared.order, total)
    return total.view(*gradient.shape[:-1], prepared.in_features)


def _tiling(rows: int, prepared: Prepared, dtype: torch.dtype, outputs: int) -> Tiling:
    tilings: tuple[Tiling, ...] = TILINGS
    if tuned := _tuned(prepared.codes.device):  # else nothing is looked up at every call
        tilings = tuned.get(replace(problem_of(prepared, dtype), outputs=outputs), TILINGS)
    return next(tiling for tiling in tilings if rows <= tiling.most_rows)


@cache
def _tuned(device: torch.device) -> dict[Problem, tuple[Tiling, ...]]:
    from .tuning import remembered  # which needs this module

    return remembered(device) if device.type == "cuda" else {}


def forget_tilings() -> None:
    """Read anew what `tuning` has found."""
    _tuned.cache_clear()


def product(x: Tensor, prepared: Prepared, tiling: Tiling) -> Tensor:
    """(rows, in) contiguous, columns in the kernel's order, float16 or bfloat16 -> (rows, out)."""
    return _launched(_kernels().product, x, prepared, prepared.out_features, tiling, -(-x.shape[0] // tiling.rows))


def why_not_grouped(rows: int, experts: int, dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return "activations are float32, which are multiplied densely"
    if rows > MOST_ROWS * experts:
        return f"more than {MOST_ROWS} rows per expert, which are multiplied densely"
    return None


def grouped(x: Tensor, starts: Tensor, prepared: Prepared) -> Tensor:
    """One launch for the rows of all experts; nothing here depends on the values of `starts`."""
    if prepared.order is not None:
        x = x.index_select(1, prepared.order)
    experts = starts.shape[0] - 1
    out = prepared.out_features // experts
    tiling = _tiling(min(-(-x.shape[0] // experts), MOST_ROWS), prepared, x.dtype, out)
    return _launched(
        _kernels().grouped_product,
        x.contiguous(),
        prepared,
        out,
        tiling,
        most_tiles(x.shape[0], experts, tiling.rows),
        starts,
        experts,
        EXPERTS=1 << (experts - 1).bit_length(),
    )


def most_tiles(rows: int, experts: int, size: int) -> int:
    """Into how many tiles of `size` rows, each of one expert, rows can fall, however they are shared out."""
    busy = min(rows, experts)
    return busy + (rows - busy) // size


def _launched(
    program: Any, x: Tensor, prepared: Prepared, out: int, tiling: Tiling, row_tiles: int, *more: Any, **constants: int
) -> Tensor:
    """(rows, out) by `product` or `grouped_product`, and the parts of its sum added up."""
    rows = x.shape[0]
    output = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if not rows:
        return output
    output_tiles = -(-out // tiling.outputs)
    blocks = -(-prepared.in_features // BLOCK)
    programs = tiling.programs_per_processor * _processors(x.device)
    per_split = blocks_per_split(row_tiles * output_tiles, blocks, programs)
    splits = -(-blocks // per_split)
    parts = output if splits == 1 else torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
    width = prepared.group_width if prepared.scales.shape[0] > 1 else blocks * BLOCK
    with current(x.device):
        program[output_tiles, row_tiles, splits](
            x,
            *_arguments(prepared),
            parts,
            rows,
            out,
            prepared.in_features,
            prepared.scales.shape[0],
            prepared.scales.stride(0),
            blocks,
            per_split,
            *more,
            BITS=prepared.bits,
            GROUP=width,
            OUTPUTS=tiling.outputs,
            ROWS=tiling.rows,
            SCALE_SUMS=bool(tiling.scale_sums) and width >= tiling.scale_sums,
            WHOLE=prepared.in_features % BLOCK == 0,
            PTX=_takes_ptx(x.device),
            UPCAST=x.device.type == "cpu" and x.dtype == torch.bfloat16,
            **constants,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        if splits > 1:
            _kernels().sum_of_parts[(-(-output.numel() // SUMMED),)](
                parts, output, splits, output.numel(), SIZE=SUMMED
            )
    return output


def blocks_per_split(tiles: int, blocks: int, programs: int) -> int:
    """How many blocks of columns each program sums, so that there are about so many programs."""
    splits = max(1, min(programs // tiles, blocks // FEWEST_BLOCKS))
    return -(-blocks // splits)


def _product_of_dense(x: Tensor, prepared: Prepared) -> Tensor:
    output = torch.empty(x.shape[0], prepared.out_features, dtype=x.dtype, device=x.device)
    for outputs, weight in _dense_pieces(prepared, x.dtype):
        output[:, outputs] = linear(x, weight)
    return output


def _dense_pieces(prepared: Prepared, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight (out, in), columns in the kernel's order, some outputs at a time."""
    columns, groups = prepared.in_features, prepared.scales.shape[0]
    blocks = -(-columns // BLOCK)
    at_once = max(DEQUANTIZED_OUTPUTS, DENSE_BYTES // (columns * dtype.itemsize) // 128 * 128)
    for start in range(0, prepared.out_features, at_once):
        count = min(at_once, prepared.out_features - start)
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
                prepared.scales.stride(0),
                blocks,
                BITS=prepared.bits,
                GROUP=prepared.group_width if groups > 1 else blocks * BLOCK,
                OUTPUTS=DEQUANTIZED_OUTPUTS,
            )
        yield slice(start, start + count), dense


def _arguments(prepared: Prepared) -> tuple[Tensor, ...]:
    # Of a single group the stride is not used, and not the same in tensors that were read and that were computed.
    assert prepared.scales.shape[0] == 1 or prepared.zeros.stride(0) == prepared.scales.stride(0)
    second = prepared.extras[0] if prepared.extras else prepared.codes
    return prepared.codes, second, prepared.scales, prepared.zeros


def _words(bits: int) -> int:
    """Per block and plane; of 3 and 8 bits, whose planes go side by side, in both."""
    return BLOCK * PLANES[bits][0] // 32


def _pack_plane(codes: Tensor, bits: int, words: int) -> Tensor:
    """(out, columns) codes of `bits` -> (out, blocks * words)."""
    half = BLOCK // (2 * words) * bits  # bits of a word's lower half that are in use
    steps = codes.reshape(codes.shape[0], -1, BLOCK // (2 * words), words, 2)
    packed = torch.zeros(steps.shape[0], steps.shape[1], words, dtype=torch.int64, device=codes.device)
    for step in range(steps.shape[2]):
        for side in (0, 1):
            packed |= steps[:, :, step, :, side].long() << (bits * step + half * side)
    word = WORD_TYPES[bits]
    size = 8 * word.itemsize
    packed -= (packed >> (size - 1)) << size  # to the signed number with the same bits
    return packed.to(word).flatten(1).contiguous()


def _unpack_plane(packed: Tensor, bits: int, words: int) -> Tensor:
    """The inverse of `_pack_plane`, (out, columns) uint8."""
    half = BLOCK // (2 * words) * bits
    blocks = packed.view(packed.shape[0], -1, words)
    codes = torch.empty(*blocks.shape[:2], BLOCK // (2 * words), words, 2, dtype=torch.uint8, device=packed.device)
    for step in range(codes.shape[2]):
        for side in (0, 1):
            codes[:, :, step, :, side] = blocks >> (bits * step + half * side) & 2**bits - 1
    return codes.flatten(1)


def _kernels() -> Any:
    """Imported late: Triton takes a second, and is not everywhere."""
    from . import triton_kernels

    return triton_kernels


def _takes_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 16  # the interpreter's, and a guess for other makers' GPUs
