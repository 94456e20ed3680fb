# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from optq.errors import ConfigError
from optq.evaluation import compare_on, perplexity, spans


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def text():
    return torch.randint(128, (300,), generator=torch.Generator().manual_seed(3))


def covered(cut):
    return [token for span in cut for token in range(span.first, span.stop)]


@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("stride", [1, 17, 32, 63])
def test_sliding_windows_predict_every_token_but_the_first_once(tokens, stride):
    cut = spans(tokens, "sliding", window=64, stride=stride)
    assert covered(cut) == list(range(1, tokens))
    assert all(span.stop - span.start <= 64 for span in cut)
    # After the first window, whatever is predicted has at least window - stride tokens before it.
    assert all(span.first - span.start >= 64 - stride for span in cut[1:])


@pytest.mark.parametrize("tokens", [2, 64, 65, 66, 129, 300])
def test_rolling_windows_read_as_many_tokens_as_the_model_may(tokens):
    cut = spans(tokens, "rolling", window=64)
    assert covered(cut) == list(range(1, tokens))
    assert all(span.stop - 1 - span.start <= 64 for span in cut)
    if tokens > 65:
        assert cut[-1].stop - 1 - cut[-1].start == 64  # the last one reaches back for context


def test_consecutive_windows_leave_a_short_last_one_out():
    assert covered(spans(300, "consecutive", window=128)) == [*range(1, 128), *range(129, 256)]


@pytest.mark.parametrize("stride", [0, -1, 64, 65])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride} .* from 1 to below the window, 64"):
        spans(300, "sliding", window=64, stride=stride)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="has 100 tokens; at least 128"):
        spans(100, "consecutive", window=128)


def test_consecutive_is_the_loop_of_the_gptq_paper(model, text):
    """Mean of the windows' own mean losses, as that repository computes it."""
    losses = []
    for start in range(0, 256, 128):
        ids = text[None, start : start + 128]
        losses.append(model(input_ids=ids, labels=ids).loss.detach())
    found = perplexity(model, text, 128)
    assert found.perplexity == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert found.tokens == 2 * 127


def test_sliding_is_the_loop_of_the_guide(model, text):
    """Labels of what the window before has predicted are masked with -100."""
    total, count, before = 0.0, 0, 0
    for start in range(0, 300, 48):
        stop = min(start + 128, 300)
        ids = text[None, start:stop]
        labels = ids.clone()
        labels[:, : -(stop - before)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        total, count, before = (
            total + model(input_ids=ids, labels=labels).loss.item() * predicted,
            count + predicted,
            stop,
        )
        if stop == 300:
            break
    found = perplexity(model, text, 128, protocol="sliding", stride=48)
    assert found.tokens == count == 299
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_more_context_lowers_nothing_but_the_windows_differ(model, text):
    """Negative control: the protocols are not the same figure."""
    figures = {perplexity(model, text, 64, protocol=protocol).perplexity for protocol in ("consecutive", "sliding")}
    assert len(figures) == 2


def test_windows_from_the_start_only(model, text):
    assert perplexity(model, text, 64, 2).perplexity == perplexity(model, text[:128], 64).perplexity


def test_arguments_that_make_no_sense_are_refused(model, text):
    with pytest.raises(ConfigError, match=r"windows=0 was asked for; allowed are 1 and more"):
        perplexity(model, text, 64, 0)
    with pytest.raises(ConfigError, match=r"input_ids is a list; allowed is a tensor of token ids"):
        perplexity(model, text.tolist(), 64)


def test_comparing_gives_both_perplexities(model, text):
    other = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    cut = spans(300, "sliding", 64, 32)
    found = compare_on(model, other, text, cut)
    assert found.tokens == 299
    assert found.original_perplexity == pytest.approx(perplexity(model, text, 64, protocol="sliding").perplexity)
    assert found.perplexity == pytest.approx(perplexity(other, text, 64, protocol="sliding").perplexity)
    assert found.divergence > 0
    same = compare_on(model, model, text, cut)
    assert same.divergence == 0
    assert same.agreement == 1


def test_a_model_of_nothing_but_nan_has_no_perplexity(model, text):
    broken = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(broken, text, 128).perplexity)


def test_logits_are_those_of_one_forward(model, text):
    logits = model(input_ids=text[None, :200]).logits[0, :-1]
    whole = cross_entropy(logits, text[1:200])
    assert perplexity(model, text[:200], 200).perplexity == pytest.approx(math.exp(whole.item()), rel=1e-5)
