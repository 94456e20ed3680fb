# SPDX-License-Identifier: Apache-2.0
"""The loops over columns: the fused ones, in Triton's interpreter, choose the codes of single operations."""

import logging

import pytest
import torch

from optq.device import triton as triton_devices
from optq.gptq import columns as loops
from optq.gptq import solve
from optq.gptq.columns import FUSED_ROWS
from optq.scheme import LayerScheme

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the programs themselves")

OUT, IN = 5, 160  # neither whole tiles of rows nor whole blocks of columns
CASES = [
    LayerScheme(bits=4, group_size=64, refinement=1),
    LayerScheme(bits=3, group_size=32, act_order="desc_act", symmetric=False, refinement=1),
    LayerScheme(bits=2, group_size=-1, act_order="none", symmetric=False),
    LayerScheme(bits=8, group_size=128, act_order="group_aware"),
]


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(loops, "why_not_fused", lambda device: None)


def random_problem(out=OUT):
    torch.manual_seed(0)
    mixed = torch.eye(IN) + 0.2 * torch.randn(IN, IN)
    x = torch.randn(1024, IN) @ mixed
    return torch.randn(out, IN) / 10, x.T @ x / 1024


@pytest.fixture
def problem():
    return random_problem()


def solved(problem, scheme):
    weight, hessian = problem
    return solve(weight, hessian, scheme, drift=weight @ hessian / 50).quantized


@pytest.mark.slow
@pytest.mark.parametrize("scheme", CASES, ids=lambda scheme: f"{scheme.bits} bits, {scheme.act_order}")
def test_fused_loops_choose_the_codes_of_single_operations(scheme, request):
    problem = random_problem(OUT + FUSED_ROWS if scheme.act_order == "none" else OUT)  # two tiles in the cheapest case
    expected = solved(problem, scheme)
    request.getfixturevalue("fused")
    found = solved(problem, scheme)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.slow
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("at_once", [1, 33])
def test_blocks_of_columns_change_nothing_but_speed(problem, at_once):
    scheme = LayerScheme(group_size=32)
    expected = solve(*problem, scheme).quantized.codes
    assert torch.equal(solve(*problem, scheme, column_block=at_once).quantized.codes, expected)


@pytest.mark.slow
def test_the_trial_on_a_device_is_passed():
    assert loops._why_wrong(torch.device("cpu")) is None


FAULTS = {
    "the pivot of the block's first column": ("tl.load(row_of_hessian + i)", "tl.load(row_of_hessian)"),
    "rounding down": ("to_even(tl.div_rn(column, scale))", "to_even(tl.div_rn(column, scale) - 0.49)"),
    "errors not fed back": ("pushes[:, None] * error", "0 * pushes[:, None] * error"),
    "moves not fed back": ("pushes[:, None] * move", "0 * pushes[:, None] * move"),
    "the first group's scales": ("group = tl.load(groups + start + i)", "group = tl.load(groups + start + i * 0)"),
    "no program": ("def sweep_block(", "def another("),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_whose_codes_are_wrong_is_given_single_operations_and_that_is_said(
    fault, monkeypatch, planted, caplog
):
    faulty = planted("optq.gptq.triton_columns", FAULTS[fault])
    monkeypatch.setattr(loops, "_programs", lambda: faulty)
    monkeypatch.setattr(loops, "why_no_triton", lambda device: None)
    monkeypatch.setattr(loops, "FUSED_ON", ("cpu",))
    loops.why_not_fused.cache_clear()
    with caplog.at_level(logging.WARNING, logger="optq"):
        reason = loops.why_not_fused(torch.device("cpu"))
    loops.why_not_fused.cache_clear()
    assert reason is not None
    assert reason in caplog.text
    assert ("other codes" in reason) != (fault == "no program")


def test_a_cpu_is_given_single_operations_and_a_gpu_without_triton_as_well(monkeypatch):
    assert "GPUs" in loops.why_not_fused(torch.device("cpu"))
    monkeypatch.setattr(triton_devices, "find_spec", lambda name: None)
    assert "pip install triton" in loops.why_not_fused.__wrapped__(torch.device("cuda"))
