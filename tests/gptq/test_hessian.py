# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch

from optq.errors import CalibrationError
from optq.gptq import Hessian
from optq.gptq import hessian as products


@pytest.mark.parametrize("features", [1, 3, 30, 64, 500])
def test_is_the_mean_outer_product_over_all_batches(features):
    inputs = torch.randn(3, 10, features)
    hessian = Hessian(features, "cpu")
    for batch in inputs:
        hessian.add(batch)
    rows = inputs.reshape(-1, features)
    assert hessian.tokens == 30
    torch.testing.assert_close(hessian.mean(), rows.T @ rows / 30)
    assert torch.equal(hessian.mean(), hessian.mean().T)


def test_masked_tokens_do_not_count():
    inputs = torch.randn(2, 5, 8)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    masked, kept_only = Hessian(8, "cpu"), Hessian(8, "cpu")
    masked.add(torch.where(keep[..., None], inputs, torch.full_like(inputs, 1e6)), keep)
    kept_only.add(inputs[keep])
    assert masked.tokens == 4
    torch.testing.assert_close(masked.mean(), kept_only.mean())


def test_bfloat16_inputs_are_summed_in_float32():
    inputs = torch.randn(4096, 8).bfloat16()
    hessian = Hessian(8, "cpu")
    hessian.add(inputs)
    expected = (inputs.double().T @ inputs.double() / 4096).float()
    torch.testing.assert_close(hessian.mean(), expected, rtol=1e-5, atol=1e-6)


def test_no_tokens_and_infinite_inputs_are_refused():
    with pytest.raises(CalibrationError, match="No calibration token"):
        Hessian(4, "cpu").mean()
    hessian = Hessian(4, "cpu")
    hessian.add(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    with pytest.raises(CalibrationError, match="not finite"):
        hessian.mean()


@pytest.mark.parametrize("dtype", products.EXACT_IN_TF32)
def test_16_bit_numbers_are_exact_in_the_tensor_cores_format(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = every[every.isfinite()].float().view(torch.int32)
    assert not (bits & 0x1FFF).any()  # TF32 has the upper 10 of float32's 23 bits of fraction
    assert (torch.tensor([1 / 3]).view(torch.int32) & 0x1FFF).any()


@pytest.mark.parametrize(("device", "dtype", "expected"), [
    ("cuda", torch.bfloat16, "tf32"), ("cuda", torch.float32, "none"), ("cpu", torch.float16, "none"),
])  # fmt: skip
def test_only_16_bit_inputs_on_gpus_are_multiplied_there_and_the_setting_comes_back(device, dtype, expected):
    matmul = torch.backends.cuda.matmul
    inputs = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with pytest.raises(KeyError), products._fast_products(inputs):
        assert matmul.fp32_precision == expected
        raise KeyError
    assert matmul.fp32_precision == "none"
