# SPDX-License-Identifier: Apache-2.0
"""Every kernel against float64, and the table's words."""

import itertools
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from optq import kernels
from optq.checkpoint import PackedWeight, pack, unpack_codes
from optq.errors import KernelError
from optq.gptq import round_to_nearest, solve
from optq.kernels import KERNELS, choose_kernel, cpu, explain
from optq.kernels.prepared import matmul_dense, matmul_transposed, pieces
from optq.scheme import BITS, LayerScheme, QuantizedWeight

OUT, IN = 64, 192


def packed_weight(
    bits: int, group_size: int, symmetric: bool, act_order: str = "static", out: int = OUT
) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(out, IN, generator=generator) / 10
    scheme = LayerScheme(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    if act_order == "desc_act":
        energies = torch.rand(IN, generator=generator) + 0.1
        return pack(solve(weight, torch.diag(energies), scheme).quantized)
    quantized = round_to_nearest(weight, scheme)
    # Symmetric scales may be negative.
    signs = torch.where(torch.rand(quantized.scales.shape, generator=generator) < 0.5, -1.0, 1.0) if symmetric else 1.0
    return pack(replace(quantized, scales=quantized.scales * signs))


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


CASES = [
    *itertools.product((2, 3, 4, 8), (32, 64, 128, -1), (True, False), ("static",)),
    (4, 32, True, "desc_act"),
    (3, 64, False, "desc_act"),
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_order"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, cpu.MOST_ROWS_WITHOUT_BFLOAT16 + 1])
def test_kernel_error_is_at_most_twice_torchs(bits, group_size, symmetric, act_order, dtype, rows):
    packed = packed_weight(bits, group_size, symmetric, act_order)
    dense = packed.columns(0, OUT)  # (in, out)
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).to(dtype)
    exact = x.double() @ dense.double()
    ran = []
    for kernel in KERNELS.values():
        if kernel.why_not(packed, dtype) is None:
            # torch's integer products round float16 activations to bfloat16, and say so.
            rounded = torch.bfloat16 if dtype == torch.float16 and kernel.name.startswith("cpu_") else dtype
            torchs_own = relative_error((x.to(rounded) @ dense.to(rounded)), exact)
            found = kernel.matmul(x, kernel.prepare(packed))
            assert found.dtype == dtype
            assert found.shape == (rows, OUT)
            assert relative_error(found, exact) <= 2 * torchs_own, kernel.name
            ran.append(kernel.name)
    assert "reference" in ran
    if dtype != torch.float32:
        assert ("cpu_int4_twice" if bits == 8 else "cpu_int4") in ran


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_order"), CASES)
@pytest.mark.parametrize("out", [OUT, 96, 160])  # whole tiles of torch's int4 packing, and not
def test_every_kernel_gives_the_codes_back(bits, group_size, symmetric, act_order, out):
    packed = packed_weight(bits, group_size, symmetric, act_order, out=out)
    codes = unpack_codes(packed.qweight, bits)
    for kernel in KERNELS.values():
        if kernel.why_not(packed, torch.bfloat16) is None:
            prepared = kernel.prepare(packed)
            assert torch.equal(kernel.unpack(prepared, 0, out), codes), kernel.name
            assert torch.equal(kernel.unpack(prepared, 32, out), codes[:, 32:]), kernel.name


def test_the_order_of_torchs_int4_packing_may_be_any(monkeypatch):
    """On other processors than this one it is; the table that is then read off must lead to the same codes."""
    packed = packed_weight(4, 64, True, out=160)
    prepared = KERNELS["cpu_int4"].prepare(packed)
    monkeypatch.setattr(cpu, "AVX512_ORDER", False)
    cpu._nibble_order.cache_clear()
    assert torch.equal(KERNELS["cpu_int4"].unpack(prepared, 0, 160), unpack_codes(packed.qweight, 4))
    cpu._nibble_order.cache_clear()


def test_the_gradient_of_float64_is_as_precise():
    packed = packed_weight(4, 64, True)
    reference, gradient = KERNELS["reference"], torch.randn(3, OUT, dtype=torch.float64)
    found = reference.transposed(gradient, reference.prepare(packed))
    assert relative_error(found, gradient @ packed.columns(0, OUT).double().T) <= 1e-14


def test_a_wrong_zero_would_be_noticed():
    """Negative control of the tolerance above."""
    packed = packed_weight(4, 64, True)
    wrong = PackedWeight(**{**vars(packed), "checkpoint_format": "gptq_v2"})
    x = torch.randn(5, IN)
    exact = x.double() @ packed.columns(0, OUT).double()
    assert relative_error(x @ wrong.columns(0, OUT), exact) > 0.1


def test_leading_dimensions_are_kept():
    packed = packed_weight(4, 64, True)
    for kernel in KERNELS.values():
        if kernel.why_not(packed, torch.bfloat16) is None:
            prepared = kernel.prepare(packed)
            x = torch.randn(2, 3, IN).bfloat16()
            assert kernel.matmul(x, prepared).shape == (2, 3, OUT)
            assert kernel.matmul(x[:0], prepared).shape == (0, 3, OUT)


@pytest.mark.parametrize("case", [(4, 64, True, "static"), (4, 64, True, "desc_act"), (8, -1, True, "static")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_input_of_another_width_is_refused(case, dtype):
    """Where columns are gathered, one that is too wide would pass unnoticed, and on GPUs any."""
    packed = packed_weight(*case)
    names = [name for name, kernel in KERNELS.items() if kernel.why_not(packed, dtype) is None]
    for name in [*names, *(["triton"] if find_spec("triton") else [])]:
        kernel = KERNELS[name]
        prepared = kernel.prepare(packed)
        for width in (IN - 32, IN + 64):
            with pytest.raises(RuntimeError, match=r"features|shapes"):
                kernel.matmul(torch.ones(3, width, dtype=dtype), prepared)
        if kernel.grouped_gemm is not None:
            with pytest.raises(RuntimeError, match="and the layer takes"):
                kernel.grouped_gemm.matmul(torch.ones(3, 2 * IN).half(), torch.tensor([0, 3]).int(), prepared)


def test_outputs_are_padded_where_the_int4_product_wants_multiples_of_16():
    packed = packed_weight(4, 64, True, out=40)
    x = torch.randn(3, IN).bfloat16()
    kernel = choose_kernel(packed, torch.bfloat16)
    assert kernel.name == "cpu_int4"
    reference = KERNELS["reference"]
    torch.testing.assert_close(
        kernel.matmul(x, kernel.prepare(packed)),
        reference.matmul(x, reference.prepare(packed)),
        rtol=2e-2,
        atol=2e-2,
    )


@pytest.mark.parametrize("name", ["cpu_int4", "reference"])
def test_dense_columns_come_in_pieces(name, monkeypatch):
    packed = packed_weight(3, 64, False, out=160)
    kernel = KERNELS[name]
    prepared = kernel.prepare(packed)
    x = torch.randn(4, IN)
    whole = matmul_dense(x, prepared, kernel.unpack)
    monkeypatch.setattr("optq.kernels.prepared.PIECE_BYTES", 1)
    assert len(list(pieces(prepared, kernel.unpack))) == 3
    torch.testing.assert_close(matmul_dense(x, prepared, kernel.unpack), whole)
    torch.testing.assert_close(
        matmul_transposed(whole, prepared, kernel.unpack), whole @ packed.columns(0, 160).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act_order", ["static", "desc_act"])
def test_the_gradient_towards_the_input_is_that_of_the_dense_layer(dtype, act_order):
    packed = packed_weight(4, 64, True, act_order)
    kernel = choose_kernel(packed, dtype)
    x = torch.randn(3, IN, dtype=dtype, requires_grad=True)
    kernels.matmul(x, kernel, kernel.prepare(packed)).float().sum().backward()
    expected = packed.columns(0, OUT).sum(1).expand(3, IN)
    torch.testing.assert_close(x.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_the_first_kernel_that_can_is_chosen_and_the_others_say_why_not():
    packed = packed_weight(4, 64, True)
    assert choose_kernel(packed, torch.bfloat16).name == "cpu_int4"
    assert choose_kernel(packed, torch.float32).name == "reference"
    reasons = explain(packed, torch.float32)
    assert list(reasons) == list(KERNELS)
    assert "bfloat16" in reasons["cpu_int4"]
    assert reasons["reference"] is None
    assert choose_kernel(packed_weight(8, -1, True), torch.bfloat16).name == "cpu_int8"
    assert choose_kernel(packed_weight(8, 64, True), torch.float16).name == "cpu_int4_twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 5, 6, 7])
def test_a_width_that_no_kernel_has_declared_is_not_multiplied_by_it(bits, dtype, monkeypatch):
    """The format could hold such codes; a kernel that has not heard of them would give a product all the same."""
    monkeypatch.setattr("optq.scheme.BITS", (*BITS, bits))
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    groups = torch.arange(IN, dtype=torch.int32) // 64
    scales = torch.rand(OUT, IN // 64, generator=torch.Generator().manual_seed(1)).half().float() / 2**bits
    zeros = torch.full_like(scales, 2 ** (bits - 1)).short()
    quantized = QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group_of_column=groups, bits=bits)
    packed = pack(quantized, "gptq_v2")
    assert {name for name, reason in explain(packed, dtype).items() if reason is None} == {"reference"}
    kernel, x = choose_kernel(packed, dtype), torch.randn(5, IN).to(dtype)
    expected = x.float() @ quantized.decode().to(dtype).float().T
    assert relative_error(kernel.matmul(x, kernel.prepare(packed)).float(), expected.double()) < 0.01
    with pytest.raises(KernelError, match=f"cpu_int4: takes codes of 2, 3, 4 bits, these have {bits}"):
        choose_kernel(packed, torch.bfloat16, "cpu_int4")


def test_a_kernel_asked_for_by_name_is_given_or_refused_in_the_tables_words():
    assert choose_kernel(packed_weight(4, 64, True), torch.bfloat16, "reference").name == "reference"
    with pytest.raises(KernelError, match=r"cpu_int4.*these have 8"):
        choose_kernel(packed_weight(8, 64, True), torch.bfloat16, "cpu_int4")
    with pytest.raises(KernelError, match=r"backend='marlin'.*auto, cpu"):
        choose_kernel(packed_weight(4, 64, True), torch.bfloat16, "marlin")
    with pytest.raises(KernelError, match=r"reference: takes .*these are torch\.int64"):
        choose_kernel(packed_weight(4, 64, True), torch.int64)
