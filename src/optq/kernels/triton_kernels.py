# SPDX-License-Identifier: Apache-2.0
"""The programs of the Triton row. `triton_gpu` lays the codes out for them and launches them.

A step is the piece of a block's columns that one position in all of its words holds; every word gives it two
neighbouring columns, one from its lower and one from its upper 16 bits. So both are made by one instruction each, and
lie in the register where the tensor core wants them:

    (word >> 4 * step) & 0x000F000F | 0x64006400     two float16 numbers, 1024 + code
    (word >> 4 * step) & 0x000F000F | 0x43004300     two bfloat16 numbers, 128 + code

PTX says whether their arithmetic is written in assembly. Left to itself the compiler splits each pair into 16-bit
halves, at more instructions; but the interpreter and GPUs of other makers do not take assembly.

The weight is the first operand of the product, with output features in the place of rows: the first operand may come
from registers, and whole tensor cores are in use even for one row of activations.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # columns that a block of words holds


@triton.jit
def low_pairs(first, second, step: tl.constexpr, BITS: tl.constexpr):
    """Per word two codes, in its lower and upper 16 bits, from words as `triton_gpu.prepare` lays them out.

    Of 8-bit codes the lower four bits.
    """
    if BITS == 2:
        return (first >> (2 * step)) & 0x00030003
    if BITS == 3:
        high = second.to(tl.int32) & 0xFFFF
        high = high | (high << 8)  # bits 8 … 15 also at 16 … 23: the second columns' are in the upper half then
        return ((first >> (2 * step)) & 0x00030003) | (((high >> step) & 0x00010001) << 2)
    return (first >> (4 * step)) & 0x000F000F


@triton.jit
def high_pairs(second, step: tl.constexpr):
    """The upper four bits of 8-bit codes, like `low_pairs`."""
    return (second >> (4 * step)) & 0x000F000F


@triton.jit
def twice(x):
    """A 16-bit number in both halves of an int32."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def rounded_to_bfloat16(x):
    """float32 to the nearest bfloat16, and of two to the even one, as GPUs convert; the interpreter cuts off."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def weights(
    first,  # (rows, words) int32
    second,  # (rows, words) int32 or int16, of 3- and 8-bit codes
    zeros,  # (rows,) int16
    scales,  # (rows,) float32
    step: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(code - zero) * scale, or without the scale, (rows, 2 * words) float32."""
    pairs = low_pairs(first, second, step, BITS)
    if BITS == 8:
        pairs = pairs | (high_pairs(second, step) << 4)
    steps = (tl.interleave(pairs & 0xFFFF, pairs >> 16) - zeros.to(tl.int32)[:, None]).to(tl.float32)
    return steps * scales[:, None] if SCALED else steps


@triton.jit
def weights_in_ptx(
    first,
    second,
    zeros,
    scales,
    step: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    dtype: tl.constexpr,
):
    """The same in `dtype`. code - zero is exact there as well: an integer of at most 8 bits."""
    low = low_pairs(first, second, step, BITS)
    if dtype == tl.float16:
        if BITS == 8:
            low = low | (high_pairs(second, step) << 4)
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 t; or.b32 t, $1, 0x64006400; sub.f16x2 $0, t, $2; }",  # 1024 + code
            "=r,r,r",
            [low, twice((zeros + 1024).to(tl.float16))[:, None]],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        if SCALED:
            pairs = tl.inline_asm_elementwise(
                "mul.f16x2 $0, $1, $2;",
                "=r,r,r",
                [pairs, twice(scales.to(tl.float16))[:, None]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        # sm_80 adds and multiplies bfloat16 as parts of a * b + c only.
        if BITS == 8:
            pairs = tl.inline_asm_elementwise(
                "{ .reg .b32 low, high, one, sixteen, minus128, minus2048;"
                "  mov.b32 one, 0x3f803f80; mov.b32 sixteen, 0x41804180;"
                "  mov.b32 minus128, 0xc300c300; mov.b32 minus2048, 0xc500c500;"
                "  or.b32 low, $1, 0x43004300; or.b32 high, $2, 0x43004300;"  # 128 + half of the code
                "  fma.rn.bf16x2 low, low, one, minus128;"
                "  fma.rn.bf16x2 high, high, sixteen, minus2048;"
                "  fma.rn.bf16x2 low, high, one, low;"
                "  fma.rn.bf16x2 $0, low, one, $3; }",
                "=r,r,r,r",
                [low, high_pairs(second, step), twice((-zeros.to(tl.float32)).to(tl.bfloat16))[:, None]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            pairs = tl.inline_asm_elementwise(
                "{ .reg .b32 t, one, minus128; mov.b32 one, 0x3f803f80; mov.b32 minus128, 0xc300c300;"
                "  or.b32 t, $1, 0x43004300; fma.rn.bf16x2 $0, t, one, $2; }",  # 128 + code
                "=r,r,r",
                [low, twice((-128 - zeros.to(tl.float32)).to(tl.bfloat16))[:, None]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        if SCALED:
            pairs = tl.inline_asm_elementwise(
                "{ .reg .b32 nothing; mov.b32 nothing, 0x80008000; fma.rn.bf16x2 $0, $1, $2, nothing; }",  # -0
                "=r,r,r",
                [pairs, twice(rounded_to_bfloat16(scales))[:, None]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    return tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def grid_of(scales, zeros, group, groups, grid_stride, n, inside):
    """The scales, float32, and zeros, int16, of outputs n in a group.

    Columns that only fill up the last block may lie beyond the last group. What they get does not matter.
    """
    at = tl.minimum(group, groups - 1) * grid_stride + n
    return tl.load(scales + at, mask=inside, other=0).to(tl.float32), tl.load(zeros + at, mask=inside, other=0).to(
        tl.int16
    )


@triton.jit
def sum_over_columns(
    inputs,  # (WIDTH, ROWS) pointers to the first step's columns of x
    first,  # (OUTPUTS, WORDS) pointers to the first block's words
    second,  # likewise, of 3 and 8 bits
    scales,  # those of the first group, for outputs n
    zeros,
    n,  # (OUTPUTS,)
    inside,  # (OUTPUTS,) which outputs there are
    there,  # (ROWS,) which rows there are
    first_block,
    last_block,
    columns,
    groups,
    grid_stride,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of the product, (OUTPUTS, ROWS) float32, summed over some blocks of columns. Constants as of product."""
    WORDS: tl.constexpr = BLOCK * 2 // 32 if BITS == 2 or BITS == 3 else BLOCK * 4 // 32
    WIDTH: tl.constexpr = 2 * WORDS  # columns per step
    column = tl.arange(0, WIDTH)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for block in range(first_block, last_block):
        low = tl.load(first + block * WORDS, mask=inside[:, None], other=0)
        high = low
        if BITS == 3 or BITS == 8:
            high = tl.load(second + block * WORDS, mask=inside[:, None], other=0)
        part = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for step in tl.static_range(BLOCK // WIDTH):
            start = block * BLOCK + step * WIDTH
            if step * WIDTH % GROUP == 0:
                scale, zero = grid_of(scales, zeros, start // GROUP, groups, grid_stride, n, inside)
            known = there[None, :]
            if not WHOLE:
                known = known & (start + column < columns)[:, None]
            values = tl.load(inputs + start, mask=known, other=0)
            if PTX:
                weight = weights_in_ptx(low, high, zero, scale, step, BITS, not SCALE_SUMS, dtype)
            else:
                weight = weights(low, high, zero, scale, step, BITS, not SCALE_SUMS)
            if UPCAST:
                values = values.to(tl.float32)
                weight = weight.to(tl.float32)
            else:
                weight = weight.to(dtype)
            if SCALE_SUMS:
                part = tl.dot(weight, values, part, input_precision="ieee")
                if (step + 1) * WIDTH % GROUP == 0 or step == BLOCK // WIDTH - 1:
                    total += part * scale[:, None]
                    part = tl.zeros([OUTPUTS, ROWS], tl.float32)
            else:
                total = tl.dot(weight, values, total, input_precision="ieee")
    return total


@triton.jit
def product(
    x,  # (rows, columns) float16 or bfloat16, row-major, columns in the kernel's order
    first,  # (out, blocks * WORDS) int32, row-major
    second,  # the same shape: int16 for 3 bits, int32 for 8; else not read
    scales,  # (groups, out), grid_stride numbers from group to group
    zeros,  # (groups, out) uint8 or int16, likewise
    output,  # (splits, rows, out), row-major: float32 parts of the sum, or with one split the sum itself
    rows,
    out,
    columns,
    groups,
    grid_stride,
    blocks,  # of BLOCK columns
    blocks_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns per group: a divisor or a multiple of BLOCK, and a multiple of a step's columns
    OUTPUTS: tl.constexpr,  # per program
    ROWS: tl.constexpr,  # per program
    SCALE_SUMS: tl.constexpr,  # scale each group's sum and not its weights: less work for few rows, and more exact
    WHOLE: tl.constexpr,  # columns is a multiple of BLOCK
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 products are wrong
):
    """x times the transposed weight: a program makes (ROWS, OUTPUTS) of one split's part of the sum over columns."""
    WORDS: tl.constexpr = BLOCK * 2 // 32 if BITS == 2 or BITS == 3 else BLOCK * 4 // 32
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    inside, there = n < out, m < rows
    words = n.to(tl.int64)[:, None] * (blocks * WORDS) + tl.arange(0, WORDS)[None, :]
    total = sum_over_columns(
        x + m.to(tl.int64)[None, :] * columns + tl.arange(0, 2 * WORDS)[:, None],
        first + words,
        second + words,
        scales,
        zeros,
        n,
        inside,
        there,
        split * blocks_per_split,
        tl.minimum((split + 1) * blocks_per_split, blocks),
        columns,
        groups,
        grid_stride,
        x.dtype.element_ty,
        BITS,
        GROUP,
        OUTPUTS,
        ROWS,
        SCALE_SUMS,
        WHOLE,
        PTX,
        UPCAST,
    )
    at = (split.to(tl.int64) * rows + m[None, :]) * out + n[:, None]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside[:, None] & there[None, :])


@triton.jit
def expert_of_tile(starts, tile, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Whose rows a tile holds, and how many tiles lie before that expert's; at least `experts` for tiles beyond."""
    each = tl.arange(0, EXPERTS)
    known = each < experts
    rows = tl.load(starts + 1 + each, mask=known, other=0) - tl.load(starts + each, mask=known, other=0)
    tiles = (rows + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    return expert, tl.sum(tl.where(each < expert, tiles, 0), 0)


@triton.jit
def grouped_product(
    x,  # (rows, columns), as for `product`: rows of the first expert, then of the second, …
    first,  # (experts * out, blocks * WORDS): the outputs of the first expert, then of the second, …
    second,
    scales,  # (groups, experts * out), grid_stride numbers from group to group
    zeros,
    output,  # (splits, rows, out); rows beyond the last expert's are left as they are
    rows,
    out,  # of one expert
    columns,
    groups,
    grid_stride,
    blocks,
    blocks_per_split,
    starts,  # (experts + 1,) int32: each expert's first row; where the last one's end
    experts,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least `experts`
):
    """`product` with a weight per expert: a tile of rows lies inside one expert's, and is multiplied by its weight.

    How many tiles there are depends on the data; the programs of those that there are not return at once.
    """
    WORDS: tl.constexpr = BLOCK * 2 // 32 if BITS == 2 or BITS == 3 else BLOCK * 4 // 32
    tile = tl.program_id(1)
    expert, tiles_before = expert_of_tile(starts, tile, experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.load(starts + expert) + (tile - tiles_before) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    inside, there = n < out, m < tl.load(starts + expert + 1)
    words = (expert * out + n).to(tl.int64)[:, None] * (blocks * WORDS) + tl.arange(0, WORDS)[None, :]
    total = sum_over_columns(
        x + m.to(tl.int64)[None, :] * columns + tl.arange(0, 2 * WORDS)[:, None],
        first + words,
        second + words,
        scales + expert * out,
        zeros + expert * out,
        n,
        inside,
        there,
        split * blocks_per_split,
        tl.minimum((split + 1) * blocks_per_split, blocks),
        columns,
        groups,
        grid_stride,
        x.dtype.element_ty,
        BITS,
        GROUP,
        OUTPUTS,
        ROWS,
        SCALE_SUMS,
        WHOLE,
        PTX,
        UPCAST,
    )
    at = (split.to(tl.int64) * rows + m[None, :]) * out + n[:, None]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside[:, None] & there[None, :])


@triton.jit
def sum_of_parts(
    parts,  # (splits, size) float32
    output,  # (size,)
    splits,
    size,
    SIZE: tl.constexpr,  # per program
):
    """The sum over splits, always in the same order: the same bytes at every run."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < size
    total = tl.zeros([SIZE], tl.float32)
    for _ in range(splits):
        total += tl.load(parts + at, mask=inside, other=0)
        parts += size
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(
    first,  # as for `product`
    second,
    scales,
    zeros,
    dense,  # (count, columns) float16, bfloat16 or float32, row-major
    first_output,
    count,
    out,
    columns,
    groups,
    grid_stride,
    blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Some outputs of the dense weight, columns in the kernel's order: a program makes (OUTPUTS, BLOCK)."""
    WORDS: tl.constexpr = BLOCK * 2 // 32 if BITS == 2 or BITS == 3 else BLOCK * 4 // 32
    WIDTH: tl.constexpr = 2 * WORDS
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    n = first_output + row
    block = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = row < count
    words = n.to(tl.int64)[:, None] * (blocks * WORDS) + tl.arange(0, WORDS)[None, :] + block * WORDS
    low = tl.load(first + words, mask=inside[:, None], other=0)
    high = low
    if BITS == 3 or BITS == 8:
        high = tl.load(second + words, mask=inside[:, None], other=0)
    for step in tl.static_range(BLOCK // WIDTH):
        start = block * BLOCK + step * WIDTH
        if step * WIDTH % GROUP == 0:
            scale, zero = grid_of(scales, zeros, start // GROUP, groups, grid_stride, n, inside)
        # In float32 whatever the result: this is bound by memory, and the weight is rounded once.
        weight = weights(low, high, zero, scale, step, BITS, True)
        at = row.to(tl.int64)[:, None] * columns + (start + column)[None, :]
        known = inside[:, None] & (start + column < columns)[None, :]
        tl.store(dense + at, weight.to(dense.dtype.element_ty), mask=known)
