# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from optq.errors import QualityError
from optq.evaluation import Comparer, Comparison, judge


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(2, 300, 11, generator=generator)
    return original, original + 0.5 * torch.randn(2, 300, 11, generator=generator)


def compared(*arguments):
    comparer = Comparer()
    comparer.add(*arguments)
    return comparer.result()


def test_the_figures_are_those_of_torch(logits):
    original, quantized = logits
    ids = torch.randint(11, (2, 300), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = -1
    found = compared(original, quantized, ids)
    divergence = kl_div(log_softmax(quantized, -1), log_softmax(original, -1), log_target=True, reduction="sum") / 600
    assert found.tokens == 600
    assert found.divergence == pytest.approx(float(divergence), rel=1e-5)
    assert found.agreement == pytest.approx(float((original.argmax(-1) == quantized.argmax(-1)).float().mean()))
    for values, perplexity in ((original, found.original_perplexity), (quantized, found.perplexity)):
        loss = cross_entropy(values.view(-1, 11), ids.view(-1), ignore_index=-1)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_padding_is_left_out(logits):
    original, quantized = (values.clone() for values in logits)
    keep = torch.ones(2, 300, dtype=torch.int64)
    keep[1, 200:] = 0
    whole = compared(original[:1], quantized[:1], None), compared(original[1:, :200], quantized[1:, :200], None)
    quantized[1, 200:] = 100.0
    found = compared(original, quantized, None, keep)
    assert found.tokens == 500
    assert found.divergence == pytest.approx((300 * whole[0].divergence + 200 * whole[1].divergence) / 500)
    assert found.perplexity is None
    assert found.perplexity_ratio is None


def test_a_token_that_is_impossible_for_the_original_does_not_count(logits):
    original, quantized = (values.clone() for values in logits)
    original[..., 3] = quantized[..., 3] = -math.inf
    found = compared(original, quantized, None)
    assert math.isfinite(found.divergence)


def comparison(**changes):
    values = {"tokens": 9, "finite": True, "divergence": 0.1, "agreement": 0.9, "original_perplexity": 20.0}
    return Comparison(**{**values, "perplexity": 22.0, **changes})


def test_the_gate_is_green_warns_or_raises(caplog):
    with caplog.at_level("INFO"):
        judge(comparison(), 1.5, held_out=True, strict=True)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "perplexity 1.100" in caplog.text and caplog.text.rstrip().endswith("same top token 90.0%: usable.")
        judge(comparison(perplexity=31.0), 1.5, held_out=True, strict=False)
        assert caplog.records[-1].levelname == "WARNING"
        assert "above the limit of 1.5" in caplog.records[-1].message
    with pytest.raises(QualityError, match=r"1\.550 × the original's"):
        judge(comparison(perplexity=31.0), 1.5, held_out=False, strict=True)


def test_outputs_that_are_not_finite_always_raise(logits):
    original, quantized = logits
    quantized[0, 0, 0] = torch.nan
    found = compared(original, quantized, torch.zeros(2, 300, dtype=torch.int64))
    assert not found.finite
    assert found.facts()["divergence"] is None
    with pytest.raises(QualityError, match="not finite"):
        judge(found, 1.5, held_out=True, strict=False)
