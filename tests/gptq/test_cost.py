# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch

from optq.gptq import measured, seconds_of, solve, work_of
from optq.scheme import LayerScheme

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [LayerScheme(group_size=32), LayerScheme(bits=3, group_size=64, refinement=2)])
def test_what_is_predicted_is_about_what_solving_takes(correlated_problem, scheme):
    weight, hessian = correlated_problem(1024, 640)
    predicted = work_of(1024, 640, scheme, drift=False).times(measured(scheme, CPU))
    took = seconds_of(partial(solve, weight, hessian, scheme), CPU)
    assert 0.4 < predicted / took < 2.5  # 0.8 … 1.2 on a machine that does nothing else


def test_work_grows_as_the_loops_do():
    scheme = LayerScheme(group_size=32, refinement=1)
    one, rows, columns = (work_of(*shape, scheme, drift=True) for shape in ((64, 256), (128, 256), (64, 512)))
    assert (rows.products, rows.cubes, rows.steps) == (2 * one.products, one.cubes, one.steps)
    assert (columns.products, columns.cubes, columns.steps) == (4 * one.products, 8 * one.cubes, 2 * one.steps)
    large = work_of(2**15, 1024, scheme, drift=True)  # is solved in two parts
    assert large.steps == 2 * work_of(2**14, 1024, scheme, drift=True).steps


def test_every_piece_costs_something():
    def work(drift=False, **settings):
        return work_of(64, 256, LayerScheme(**{"group_size": 32, "refinement": 0, **settings}), drift=drift)

    plain = work()
    assert work(refinement=1).products > plain.products < work(drift=True).products
    assert work(refinement=1).updates > plain.updates
    assert work(drift=True, propagation=0.0) == plain
