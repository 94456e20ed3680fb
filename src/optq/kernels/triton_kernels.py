# SPDX-License-Identifier: Apache-2.0
"""The programs of the Triton row. `triton_gpu` lays the codes out for them and launches them.

A step is the piece of a block's columns that one position in all of its words holds; every word gives it two
neighbouring columns, one from its lower and one from its upper 16 bits, so that both become numbers by the same
instructions and lie in the register where the tensor core wants them. With one row of activations a GPU that waits for
memory only has time for three to four instructions per weight, and it takes two to take codes apart in the usual way:

    word >> 8                     once for the codes at bits 8 … 15, so that all lie at some bit f < 8; then
    word & 15 << f                read as two 16-bit floating point numbers, is code * 2**f of the smallest there is;
    … * 2**(a - f) - zero * 2**b  is one exact instruction. a is as large as the dtype allows, and the power of two
                                  that is left over, b, is in the scales.

PTX says whether this arithmetic is written in assembly. Left to itself the compiler splits each pair into 16-bit
halves, at more instructions; but the interpreter and GPUs of other makers do not take assembly.

The weight is the first operand of the product, with output features in the place of rows: the first operand may come
from registers, and whole tensor cores are in use even for one row of activations.
"""

import triton
import triton.language as tl

TOGETHER = tl.constexpr(16)  # outputs whose blocks lie side by side: then a warp loads whole cache lines
NOBODY = tl.constexpr(0x6F7074715EED0000)  # a count of none: at random, but for the bits that count
MINUS_NOTHING = tl.constexpr(0x80008000 - 2**32)  # -0 in both halves: x * y + -0 is x * y, whatever its sign


@triton.constexpr_function
def words_of_block(columns, bits):
    """int32 words per output and block; each holds two columns of every step. With 3 bits, those of the lower two."""
    return columns * (2 if bits == 3 else bits) // 32


@triton.jit
def first_words(n, blocks, WORDS: tl.constexpr):
    """Offset of the words of output n's first block, int64; the next is TOGETHER * WORDS on."""
    return ((n // TOGETHER).to(tl.int64) * (blocks * TOGETHER) + n % TOGETHER) * WORDS


@triton.jit
def twice(x):
    """The lower 16 bits of an int32 in both halves."""
    return (x & 0xFFFF) * 0x00010001


@triton.jit
def rounded_to_bfloat16(x):
    """float32 to the nearest bfloat16, and of two to the even one, as GPUs convert; the interpreter cuts off.

    As an int32, the number in its lower half.
    """
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def third_bits(words):
    """int16 words of 3-bit codes: the eight for the upper halves' columns move to the upper half of an int32."""
    words = words.to(tl.int32) & 0xFFFF
    return (words | (words << 8)) & 0x00FF00FF


@triton.jit
def weights(
    first,  # (rows, words) int32
    third,  # (rows, words) int32, of 3-bit codes: from `third_bits`
    zeros,  # (rows,) int32
    scales,  # (rows,) float32
    step: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(code - zero) * scale, or without the scale, (rows, 2 * words) float32."""
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    pairs = (first >> (PLANE * step)) & (0x00010001 * (2**PLANE - 1))
    if BITS == 3:
        pairs = pairs | (((third >> step) & 0x00010001) << 2)
    steps = (tl.interleave(pairs & 0xFFFF, pairs >> 16) - zeros[:, None]).to(tl.float32)
    return steps * scales[:, None] if SCALED else steps


@triton.constexpr_function
def left_over(dtype):
    """The assembly's weights are 2 to the power of minus this times the true ones."""
    return 11 if dtype == tl.float16 else 8


@triton.constexpr_function
def power(bit, dtype, negative=False):
    """The power of two, in both halves of an int32, that turns a code at this bit of a subnormal into a weight."""
    smallest, bias, mantissa = (24, 15, 10) if dtype == tl.float16 else (133, 127, 7)
    exponent = smallest - left_over(dtype) - bit
    assert -bias < exponent <= bias
    halves = 0x00010001 * (exponent + bias << mantissa)
    return halves + 0x80008000 - 2**32 if negative else halves


@triton.jit
def fma(a, b, c, dtype: tl.constexpr):
    """a * b + c of both halves; subnormal numbers are numbers."""
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def weights_in_ptx(
    first,
    third,
    zeros,
    scales,
    step: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    dtype: tl.constexpr,
):
    """`weights` in PTX, in `dtype`; without the scale, 2**-left_over of it. Exact but for the scale's rounding."""
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    BIT: tl.constexpr = PLANE * step % 8
    codes = (first >> (PLANE * step // 8 * 8)) & (0x00010001 * ((2**PLANE - 1) << BIT))
    minus_zero = fma(twice(zeros), power(0, dtype, True), 0, dtype)
    pairs = fma(codes, power(BIT, dtype), minus_zero[:, None], dtype)
    if BITS == 3:
        pairs = fma(third & (0x00010001 << step), power(step - 2, dtype), pairs, dtype)  # four times as much as a bit
    if SCALED:
        scales *= 2 ** left_over(dtype)
        if dtype == tl.float16:
            scale = scales.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        else:
            scale = rounded_to_bfloat16(scales)
        pairs = fma(pairs, twice(scale)[:, None], MINUS_NOTHING, dtype)
    return tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def grid_of(grid, group, groups, grid_stride, n, BFLOAT16_SCALES: tl.constexpr):
    """The scales, float32, and zeros, int32, of outputs n in a group.

    Columns that only fill up the last block may lie beyond the last group. What they get does not matter.
    """
    words = tl.load(grid + tl.minimum(group, groups - 1) * grid_stride + n)
    scales = (words >> 16).to(tl.int16)
    if BFLOAT16_SCALES:
        return scales.to(tl.bfloat16, bitcast=True).to(tl.float32), words & 0xFFFF
    return scales.to(tl.float16, bitcast=True).to(tl.float32), words & 0xFFFF


@triton.jit
def sum_over_columns(
    x,  # (rows, columns)
    first,  # the first output's words
    third,  # likewise, of 3 bits
    grid,  # the first output's, in the first group
    n,  # the tile's first output
    m,  # its first row
    end,  # the first row that is not the tile's
    out,
    first_block,
    last_block,
    blocks,
    columns,
    groups,
    grid_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    BFLOAT16_SCALES: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of the product, (OUTPUTS, ROWS) float32, summed over some blocks of columns. Constants as of product."""
    WORDS: tl.constexpr = words_of_block(BLOCK, BITS)
    WIDTH: tl.constexpr = 2 * WORDS  # columns per step
    TILE: tl.constexpr = [OUTPUTS, ROWS] if PARTS == 1 else [PARTS, OUTPUTS, ROWS]
    OF_OUTPUTS: tl.constexpr = [OUTPUTS, 1] if PARTS == 1 else [PARTS, OUTPUTS, 1]
    dtype: tl.constexpr = x.dtype.element_ty
    # Until they are multiplied, the outputs of the second part follow those of the first, as if they were others.
    row = tl.arange(0, PARTS * OUTPUTS)
    part_of_row = row // OUTPUTS
    # Outputs beyond the last are the last again, and not stored: a mask would take an instruction for each load.
    output = tl.minimum(n + row % OUTPUTS, out - 1)
    words_at = first_words(output, blocks, WORDS) + part_of_row * (TOGETHER * WORDS)
    words_at = words_at[:, None] + tl.arange(0, WORDS)[None, :]
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    m += tl.arange(0, ROWS)
    there = m < end
    if PARTS == 1:
        inputs = x + m.to(tl.int64)[None, :] * columns + column[:, None]
    else:
        inputs = x + m.to(tl.int64)[None, None, :] * columns + (part[:, None] * BLOCK + column[None, :])[:, :, None]
    total = tl.zeros(TILE, tl.float32)
    for block in range(first_block, last_block, PARTS):
        at = words_at + block * (TOGETHER * WORDS)
        if PARTS == 1:
            words = tl.load(first + at)
            thirds = third_bits(tl.load(third + at)) if BITS == 3 else words
        else:
            known_words = (block + part_of_row < last_block)[:, None]
            words = tl.load(first + at, mask=known_words, other=0)
            thirds = third_bits(tl.load(third + at, mask=known_words, other=0)) if BITS == 3 else words
        sums = tl.zeros(TILE, tl.float32)
        for step in tl.static_range(BLOCK // WIDTH):
            start = block * BLOCK + step * WIDTH
            if step * WIDTH % GROUP == 0:
                group = (start + part_of_row * BLOCK) // GROUP
                scale, zero = grid_of(grid, group, groups, grid_stride, output, BFLOAT16_SCALES)
            if PARTS == 1:
                known = there[None, :]
                if not WHOLE:
                    known = known & (start + column < columns)[:, None]
            else:
                known = there[None, None, :] & (block + part < last_block)[:, None, None]
                if not WHOLE:
                    known = known & (start + part[:, None] * BLOCK + column[None, :] < columns)[:, :, None]
            values = tl.load(inputs + start, mask=known, other=0)
            if PTX:
                weight = weights_in_ptx(words, thirds, zero, scale, step, BITS, not SCALE_SUMS, dtype)
            else:
                weight = weights(words, thirds, zero, scale, step, BITS, not SCALE_SUMS)
            if UPCAST:
                values = values.to(tl.float32)
                weight = weight.to(tl.float32)
            else:
                weight = weight.to(dtype)
            if PARTS > 1:
                weight = tl.reshape(weight, [PARTS, OUTPUTS, WIDTH])
            if SCALE_SUMS:
                sums = tl.dot(weight, values, sums, input_precision="ieee")
                if (step + 1) * WIDTH % GROUP == 0 or step == BLOCK // WIDTH - 1:
                    total += sums * tl.reshape(scale, OF_OUTPUTS)
                    sums = tl.zeros(TILE, tl.float32)
            else:
                total = tl.dot(weight, values, total, input_precision="ieee")
    if PARTS > 1:
        total = tl.sum(total, 0)
    if SCALE_SUMS and PTX:
        total *= 2 ** left_over(dtype)
    return total


@triton.jit
def with_one_more(count, of):
    """What the word of `is_last` holds after one more arrival."""
    arrived = count ^ NOBODY
    return tl.where((arrived > 0) & (arrived < of), count + 1, NOBODY + 1)


@triton.jit
def is_last(
    count,  # a word, int64, in memory that may hold anything, and belongs to these programs
    of,
):
    """Whether this is the last of `of` programs to ask. What they wrote before they asked is then visible to it.

    Zeroing the count before would be a start of its own; and counts that are left at zero from launch to launch must
    not be shared by two at a time, as streams do, or graphs that were captured one after the other. So a count that is
    under way is told from what memory held before by its upper bits, which nothing else writes; a random word is a
    given count once in 2**64 times.

    What the word holds is learned from the exchange alone, which one thread makes and tells the others. A load is made
    by every warp: two that load while others count may find different words, and would part ways.
    """
    known = tl.full([], 0, tl.int64)  # as a launch leaves it
    found = tl.atomic_cas(count, known, with_one_more(known, of), sem="acq_rel", scope="gpu")
    while found != known:
        known = found
        found = tl.atomic_cas(count, known, with_one_more(known, of), sem="acq_rel", scope="gpu")
    return (known ^ NOBODY) == of - 1


@triton.jit
def store_tile(
    total,  # (OUTPUTS, ROWS)
    parts,  # (splits, rows, out), as for product
    counts,  # (row tiles, output tiles)
    output,  # (rows, out)
    n,  # the tile's first output
    m,  # its first row
    end,  # the first row that is not the tile's to store
    rows,
    out,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    LAST_ADDS: tl.constexpr,
):
    """Store a tile of the product; with several splits, a part of it. The last to be ready adds all in their order.

    So the same input gives the same bytes, whichever is the last.
    """
    splits = tl.num_programs(2)
    row, column = tl.arange(0, ROWS), tl.arange(0, OUTPUTS)
    at = row[None, :] * out + column[:, None]  # int32: with int64, every number of the tile had two registers more
    known = (n + column < out)[:, None] & (m + row < end)[None, :]
    first = m.to(tl.int64) * out + n
    output += first
    if splits == 1:
        tl.store(output + at, total.to(output.dtype.element_ty), mask=known)
    else:
        size = rows.to(tl.int64) * out
        parts += first
        tl.store(parts + tl.program_id(2) * size + at, total, mask=known)
        if LAST_ADDS:
            tl.debug_barrier()  # all threads have stored before one of them counts
            count = counts + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            if is_last(count, splits):
                total = tl.zeros_like(total)
                for _ in range(splits):
                    total += tl.load(parts + at, mask=known, other=0, cache_modifier=".cg")
                    parts += size
                tl.store(output + at, total.to(output.dtype.element_ty), mask=known)
                tl.store(count, 0)  # or a later launch that finds this word may take it for its own


@triton.jit(do_not_specialize=["rows", "groups", "blocks", "blocks_per_split"])  # or each kind of value is compiled
def product(
    x,  # (rows, columns) float16 or bfloat16, row-major, columns in the kernel's order
    first,  # (out / TOGETHER, blocks, TOGETHER, words) int32, row-major
    third,  # the same shape, int16, of 3 bits; else not read
    grid,  # (groups, out) int32, grid_stride from group to group: 16 bits of the scale above 16 of the zero
    parts,  # (splits, rows, out) float32, row-major: parts of the sum; with one split not used
    counts,  # (row tiles, output tiles) int64: of the parts that are ready. Both may hold anything at first
    output,  # (rows, out), row-major
    rows,
    out,
    columns,
    groups,
    grid_stride,
    blocks,  # of columns
    blocks_per_split,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns whose codes lie together
    GROUP: tl.constexpr,  # columns per group: a divisor or a multiple of a block's, and a multiple of a step's
    OUTPUTS: tl.constexpr,  # per program
    ROWS: tl.constexpr,  # per program
    PARTS: tl.constexpr,  # blocks of columns that are summed at once, each by a warp; 1: all warps share one
    SCALE_SUMS: tl.constexpr,  # scale each group's sum and not its weights: less work for few rows, and more exact
    WHOLE: tl.constexpr,  # columns are whole blocks
    BFLOAT16_SCALES: tl.constexpr,  # and not float16
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 products are wrong
    LAST_ADDS: tl.constexpr,  # the last of a tile's splits to be ready adds the parts; else nothing does
):
    """x times the transposed weight: a program makes (ROWS, OUTPUTS) of one split's part of the sum over columns."""
    n = tl.program_id(0) * OUTPUTS
    m = tl.program_id(1) * ROWS
    split = tl.program_id(2)
    total = sum_over_columns(
        x,
        first,
        third,
        grid,
        n,
        m,
        rows,
        out,
        split * blocks_per_split,
        tl.minimum((split + 1) * blocks_per_split, blocks),
        blocks,
        columns,
        groups,
        grid_stride,
        BITS,
        BLOCK,
        GROUP,
        OUTPUTS,
        ROWS,
        PARTS,
        SCALE_SUMS,
        WHOLE,
        BFLOAT16_SCALES,
        PTX,
        UPCAST,
    )
    store_tile(total, parts, counts, output, n, m, rows, rows, out, OUTPUTS, ROWS, LAST_ADDS)


@triton.jit
def expert_of_tile(starts, tile, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile, and the number of tiles before that expert's; at least `experts` for tiles beyond."""
    each = tl.arange(0, EXPERTS)
    known = each < experts
    rows = tl.load(starts + 1 + each, mask=known, other=0) - tl.load(starts + each, mask=known, other=0)
    tiles = (rows + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    return expert, tl.sum(tl.where(each < expert, tiles, 0), 0)


@triton.jit(do_not_specialize=["rows", "groups", "blocks", "blocks_per_split", "experts"])
def grouped_product(
    starts,  # (experts + 1,) int32: each expert's first row; where the last one's end
    x,  # (rows, columns), as for `product`: rows of the first expert, then of the second, …
    first,  # the outputs of the first expert, a multiple of TOGETHER, then of the second, …
    third,
    grid,  # (groups, experts * out)
    parts,
    counts,
    output,  # (rows, out); rows beyond the last expert's are left as they are
    rows,
    out,  # of one expert
    columns,
    groups,
    grid_stride,
    blocks,
    blocks_per_split,
    experts,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    BFLOAT16_SCALES: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least `experts`
):
    """`product` with a weight per expert: a tile of rows lies inside one expert's, and is multiplied by its weight.

    How many tiles there are depends on the data; the programs of those that there are not return at once.
    """
    tile = tl.program_id(1)
    expert, tiles_before = expert_of_tile(starts, tile, experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    n = tl.program_id(0) * OUTPUTS
    m = tl.load(starts + expert) + (tile - tiles_before) * ROWS
    end = tl.load(starts + expert + 1)
    split = tl.program_id(2)
    WORDS: tl.constexpr = words_of_block(BLOCK, BITS)
    words = first_words(expert * out, blocks, WORDS)
    total = sum_over_columns(
        x,
        first + words,
        third + words,
        grid + expert * out,
        n,
        m,
        end,
        out,
        split * blocks_per_split,
        tl.minimum((split + 1) * blocks_per_split, blocks),
        blocks,
        columns,
        groups,
        grid_stride,
        BITS,
        BLOCK,
        GROUP,
        OUTPUTS,
        ROWS,
        PARTS,
        SCALE_SUMS,
        WHOLE,
        BFLOAT16_SCALES,
        PTX,
        UPCAST,
    )
    store_tile(total, parts, counts, output, n, m, end, rows, out, OUTPUTS, ROWS, LAST_ADDS)


@triton.jit(do_not_specialize=["first_output", "count"])
def dequantize(
    first,  # as for `product`
    third,
    grid,
    dense,  # (count, columns) float16, bfloat16 or float32, row-major
    first_output,
    count,
    out,
    columns,
    groups,
    grid_stride,
    blocks,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BFLOAT16_SCALES: tl.constexpr,
):
    """Some outputs of the dense weight, columns in the kernel's order: a program makes OUTPUTS of one block."""
    WORDS: tl.constexpr = words_of_block(BLOCK, BITS)
    WIDTH: tl.constexpr = 2 * WORDS
    row = tl.minimum(tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), count - 1)  # the last one is made again
    n = first_output + row
    block = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    at = (first_words(n, blocks, WORDS) + block * (TOGETHER * WORDS))[:, None] + tl.arange(0, WORDS)[None, :]
    words = tl.load(first + at)
    thirds = third_bits(tl.load(third + at)) if BITS == 3 else words
    for step in tl.static_range(BLOCK // WIDTH):
        start = block * BLOCK + step * WIDTH
        if step * WIDTH % GROUP == 0:
            scale, zero = grid_of(grid, start // GROUP, groups, grid_stride, n, BFLOAT16_SCALES)
        # In float32 whatever the result: this is bound by memory, and the weight is rounded once.
        weight = weights(words, thirds, zero, scale, step, BITS, True)
        at = row.to(tl.int64)[:, None] * columns + (start + column)[None, :]
        tl.store(dense + at, weight.to(dense.dtype.element_ty), mask=(start + column < columns)[None, :])
