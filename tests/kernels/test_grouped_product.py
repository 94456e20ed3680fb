# SPDX-License-Identifier: Apache-2.0
"""The product of a mixture's experts: its program in Triton's interpreter against float64, expert by expert."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_kernels import IN, packed_weight, relative_error

from optq.kernels import KERNELS, triton_gpu
from optq.kernels.op import _flat

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the program itself")

OUT = 96  # neither a whole tile nor a whole piece
KERNEL = KERNELS["triton"]
BEYOND = 2  # rows of no expert
COUNTS = {
    "every expert": [1, 2, 1, 3, 1],
    "all rows to one expert": [0, 0, 20, 0, 0],
    "none to some, several tiles to others": [0, 40, 0, 16, 17],
    "one row": [0, 0, 0, 0, 1],
    "none": [0, 0, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def _nothing_is_left_from_before():
    """Memory that nobody has written to is NaN: else it may well hold the result of the test before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def experts(bits=4, group_size=32, symmetric=True, act_order="static", count=5):
    """Packed weights that differ in their codes and scales, and share the order of their columns."""
    first = packed_weight(bits, group_size, symmetric, act_order, out=OUT)
    generator = torch.Generator().manual_seed(1)
    return [
        replace(
            first,
            qweight=first.qweight[:, torch.randperm(OUT, generator=generator)],
            scales=first.scales * (1 + index),
        )
        for index in range(count)
    ]


def joined(packed):
    parts = [KERNEL.prepare(each) for each in packed]
    assert KERNEL.joint.why_not(parts) is None
    return KERNEL.joint.of(parts)


def starts_of(counts):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def error(packed, counts, dtype):
    """The relative error of all experts' rows, as a multiple of that of torch's dense products."""
    starts = starts_of(counts)
    rows = int(starts[-1]) + BEYOND
    # Some rows more than are used: a program with a planted fault may read beyond its input.
    x = torch.randn(rows + 64, IN, generator=torch.Generator().manual_seed(rows)).to(dtype)[:rows]
    found = triton_gpu.grouped_gemm(x, starts, joined(packed))
    assert found.dtype == dtype
    assert found.shape == (rows, OUT)
    if not bool(found[-BEYOND:].isnan().all()):
        return float("inf")  # an expert has written to rows that are not its own
    dense = [each.columns(0, OUT) for each in packed]
    own = x[:-BEYOND].split(counts)
    exact = torch.cat([part.double() @ weight.double() for part, weight in zip(own, dense, strict=True)])
    torchs_own = torch.cat([part @ weight.to(dtype) for part, weight in zip(own, dense, strict=True)])
    return relative_error(found[:-BEYOND], exact) / relative_error(torchs_own, exact) if len(exact) else 0


# Every pair of choices; the product within is that of a single weight, and test_triton.py has all of them.
PAIRS = [
    (bits, group_size, (i + j) % 2 == 0, "static", (torch.bfloat16, torch.float16)[(i + j // 2) % 2])
    for (i, bits), (j, group_size) in itertools.product(enumerate((2, 3, 4, 8)), enumerate((32, 64, 128, -1)))
]
PAIRS += [(4, 32, True, "desc_act", torch.bfloat16), (3, 64, False, "desc_act", torch.float16)]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_order", "dtype"), PAIRS)
def test_error_of_every_expert_is_at_most_twice_torchs(bits, group_size, symmetric, act_order, dtype):
    packed = experts(bits, group_size, symmetric, act_order, count=3)
    assert error(packed, [1, 2, 1], dtype) <= 2


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("splits", [1, 2])
def test_however_rows_are_shared_out(name, splits, monkeypatch):
    monkeypatch.setattr(triton_gpu, "blocks_per_split", lambda tiles, blocks, *_: -(-blocks // splits))
    assert error(experts(), COUNTS[name], torch.float16) <= 2


def test_rows_enough_for_wider_tiles():
    assert error(experts(count=2), [100, 40], torch.float16) <= 2


@pytest.mark.parametrize("counts", [*COUNTS.values(), [16] * 5, [17] * 5])
@pytest.mark.parametrize("size", [16, 64])
def test_there_are_programs_for_all_tiles_and_few_others(counts, size):
    needed = sum(-(-count // size) for count in counts)
    launched = triton_gpu.most_tiles(sum(counts), len(counts), size)
    assert needed <= launched <= sum(counts) // size + len(counts)
    assert triton_gpu.most_tiles(8, 128, 16) == 8


def test_each_expert_gets_what_it_would_get_alone_and_the_same_bytes_again():
    packed, counts = experts(), COUNTS["none to some, several tiles to others"]
    whole, starts, x = joined(packed), starts_of(counts), torch.randn(sum(counts), IN).half()
    found = triton_gpu.grouped_gemm(x, starts, whole)
    assert torch.equal(triton_gpu.grouped_gemm(x, starts, whole), found)
    for view, own, result in zip(
        KERNEL.joint.split(whole, [OUT] * len(packed)), x.split(counts), found.split(counts), strict=True
    ):
        if len(own):  # alone, by another tiling, which may scale weights where this one scales sums
            assert relative_error(result, triton_gpu.matmul(own, view)) <= 1e-3


def test_refuses_in_words():
    assert KERNEL.grouped_gemm.why_not(1024 * 8, 8, torch.float16) is None
    assert "more than 1024 rows per expert" in KERNEL.grouped_gemm.why_not(1024 * 8 + 1, 8, torch.float16)
    assert "float32" in KERNEL.grouped_gemm.why_not(1, 8, torch.float32)


def test_the_operator_keeps_torchs_rules():
    whole, counts = joined(experts()), COUNTS["every expert"]
    arguments = (torch.randn(sum(counts), IN).half(), starts_of(counts), *_flat(whole), "triton")
    torch.library.opcheck(
        torch.ops.optq.grouped_gemm.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert torch.equal(torch.ops.optq.grouped_gemm(*arguments), triton_gpu.grouped_gemm(*arguments[:2], whole))


FAULTS = {
    "the first expert's weights for all": ("first_words(expert * out,", "first_words(0 * expert,"),
    "the first expert's scales and zeros for all": ("grid + expert * out", "grid"),
    "tiles counted from the first expert's": ("(tile - tiles_before) * ROWS", "tile * ROWS"),
    "the first tile of an expert for all of its": ("(tile - tiles_before) * ROWS", "0 * tile"),
    "a tile that runs into the next expert's rows": ("end = tl.load(starts + expert + 1)", "end = rows"),
    "an expert too early": ("tl.cumsum(tiles, 0) <= tile)", "tl.cumsum(tiles, 0) < tile)"),
    "rows of a last tile left out": ("(rows + ROWS - 1) // ROWS", "rows // ROWS"),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_noticed(fault, monkeypatch, planted):
    text = Path(triton_gpu._kernels().__file__).read_text()
    assert fault is None or text.count(FAULTS[fault][0]) == 1
    faulty = planted("optq.kernels.triton_kernels", FAULTS.get(fault))
    monkeypatch.setattr(triton_gpu, "_kernels", lambda: faulty)
    packed = experts(symmetric=False)
    for index, each in enumerate(packed):  # zeros that differ
        packed[index] = replace(each, qzeros=each.qzeros.roll(index, 1))
    counts = COUNTS["none to some, several tiles to others"]
    assert (error(packed, counts, torch.float16) <= 2) != bool(fault)
