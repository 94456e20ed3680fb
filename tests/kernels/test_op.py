# SPDX-License-Identifier: Apache-2.0
"""The operator behind every kernel, in eager mode, in compiled graphs and in exported ones."""

import pytest
import torch
from torch import nn

from optq.checkpoint import pack
from optq.gptq import round_to_nearest
from optq.kernels import KERNELS
from optq.kernels.op import _flat
from optq.layers import QuantLinear
from optq.scheme import LayerScheme

IN, OUT = 64, 96


def layer(bits: int = 4, bias: bool = True) -> QuantLinear:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(bits)) / 10
    quantized = round_to_nearest(weight, LayerScheme(bits=bits, group_size=32))
    return QuantLinear(pack(quantized), bias=torch.arange(float(OUT)) if bias else None)


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if not kernel.only_by_name])
def test_the_operator_keeps_torchs_rules(name):
    dtype = torch.float32 if name == "reference" else torch.bfloat16
    bits, group_size = {"cpu_int8": (8, -1), "cpu_int4_twice": (8, 32)}.get(name, (4, 32))
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / 10
    kernel, packed = KERNELS[name], pack(round_to_nearest(weight, LayerScheme(bits=bits, group_size=group_size)))
    x = torch.randn(3, IN, dtype=dtype, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.optq.matmul.default, (x, *_flat(kernel.prepare(packed)), name), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break_and_gives_the_same(dtype):
    model = nn.Sequential(layer(), nn.GELU(), nn.LayerNorm(OUT)).to(dtype)
    x = torch.randn(2, 5, IN, dtype=dtype)
    expected = model(x)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)


def test_gradients_of_the_compiled_graph_are_those_of_the_eager_one():
    model = layer(3)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 2 * IN).view(2, IN).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (8, torch.float16), (4, torch.float32)])
def test_what_a_layer_returns_may_be_written_to(bits, dtype):
    """As adapters do."""
    x = torch.randn(2, 3, IN).to(dtype).requires_grad_()
    model = layer(bits, bias=False)
    expected = torch.autograd.grad((2 * model(x)).float().sum(), x)[0]
    output = model(x)
    output += output.detach()
    output.mul_(2).float().sum().backward()
    assert torch.equal(x.grad, expected)


def test_gradcheck():
    kernel = KERNELS["reference"]
    prepared = kernel.prepare(layer().packed())
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    # The weights are float32, so the numerical derivative is exact to float32 only.
    assert torch.autograd.gradcheck(
        lambda x: torch.ops.optq.matmul(x, *_flat(prepared), "reference"), (x,), eps=1e-3, atol=1e-4
    )


def test_exports():
    model = layer().bfloat16()
    x = torch.randn(2, IN).bfloat16()
    expected = model(x)
    exported = torch.export.export(model, (x,))
    assert "optq.matmul" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected)
