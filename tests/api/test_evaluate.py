# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, T5Config, ViTConfig

import optq
from optq import GPTQConfig
from optq.api import evaluate as evaluating
from optq.api.evaluate import Evaluation
from optq.errors import CalibrationError, ConfigError

KWARGS = {"window": 64, "stride": 32, "dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optq.api.evaluate.ANSWER", 8)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 6)
    return file


@pytest.fixture(scope="module")
def quantized(tiny_llama, token_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    config = {bits: GPTQConfig(bits=bits, group_size=32, effort="fast", dataset=token_rows) for bits in (8, 2)}
    return {bits: optq.quantize(tiny_llama, config[bits], output_dir=folder / str(bits)) for bits in config}


@pytest.fixture(scope="module")
def table(tiny_llama, quantized, text):
    models = [tiny_llama, quantized[8], quantized[2]]
    return optq.compare(models, baseline=tiny_llama, dataset=text, batch_sizes=(1, 2), answers=True, **KWARGS)


@pytest.mark.slow
def test_every_model_is_measured_by_the_same_protocols(table):
    assert len({tuple(row.perplexities) for row in table}) == 1
    assert list(table[0].perplexities) == ["consecutive windows of 64", "sliding window of 64, stride 32"]
    assert len({tuple(p.tokens for p in row.perplexities.values()) for row in table}) == 1


@pytest.mark.slow
def test_the_figures_are_those_of_the_models_themselves(table, quantized, text):
    model = AutoModelForCausalLM.from_pretrained(quantized[2], dtype=torch.float32)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(quantized[2])(text.read_text(), return_tensors="pt").input_ids
    for (_, found), protocol in zip(table[2].perplexities.items(), ("consecutive", "sliding"), strict=True):
        alone = optq.perplexity(model, ids, 64, protocol=protocol, stride=32)
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
        assert found.tokens == alone.tokens


@pytest.mark.slow
def test_the_original_is_compared_with_nothing_and_the_others_with_it(table):
    original, eight, two = table
    assert original.comparison is None
    assert original.verdict is None
    assert eight.comparison.divergence < two.comparison.divergence
    assert eight.comparison.original_perplexity == pytest.approx(
        original.perplexities["consecutive windows of 64"].perplexity
    )
    assert original.kernels == {}
    assert sum(eight.kernels.values()) == 14


@pytest.mark.slow
def test_sizes_are_those_of_the_files(table):
    original, eight, two = table
    assert original.bits_per_weight == 32
    assert two.bits_per_weight + 6 == pytest.approx(eight.bits_per_weight, abs=0.2)
    assert two.size_gib < eight.size_gib < original.size_gib


@pytest.mark.slow
def test_speed_is_measured_for_every_batch_size_and_prompts_are_answered(table):
    assert [[speed.batch for speed in row.speeds] for row in table] == [[1, 2]] * 3
    assert [len(row.answers) for row in table] == [5] * 3
    assert table[0].answers != table[2].answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.99, "as good as the original"), (1.03, "good"), (1.2, "usable"), (1.3, "poor"), (float("nan"), "poor")],
)
def test_verdicts_follow_the_perplexity(table, ratio, verdict):
    from dataclasses import replace

    comparison = replace(table[1].comparison, original_perplexity=10.0, perplexity=10.0 * ratio)
    assert replace(table[1], comparison=comparison).verdict == verdict


@pytest.mark.slow
def test_evaluating_one_is_a_row_of_the_table(table, tiny_llama, quantized, text):
    found = optq.evaluate(quantized[2], baseline=tiny_llama, dataset=text, **KWARGS)
    assert isinstance(found, Evaluation)
    assert found.comparison == table[2].comparison
    assert found.speeds == ()
    assert found.answers == ()


def test_without_an_original_nothing_is_compared(quantized, text):
    assert optq.evaluate(quantized[2], dataset=text, protocols=("sliding",), **KWARGS).comparison is None


def test_a_text_that_is_too_short_is_refused(quantized, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match=r"has 9 tokens; at least 64 .* longer text, a shorter window"):
        optq.evaluate(quantized[2], dataset=tmp_path / "short.txt", **KWARGS)


def test_a_text_of_another_vocabulary_is_refused(quantized):
    with pytest.raises(CalibrationError, match="has token id 500, but the model's vocabulary ends at 127"):
        optq.evaluate(quantized[2], dataset=[{"input_ids": [500] * 128}], **KWARGS)


@pytest.mark.parametrize(
    ("config", "architecture", "reason"),
    [
        (LlamaConfig(), "LlamaForSequenceClassification", "is a LlamaForSequenceClassification, which does not pred"),
        (LlamaConfig(tie_word_embeddings=False), "LlamaModel", "is a LlamaModel, which does not predict"),
        (BertConfig(), "BertForMaskedLM", "is a BertForMaskedLM, which does not predict"),
        (T5Config(), "T5ForConditionalGeneration", "reads one text with its encoder"),
        (ViTConfig(), "ViTForImageClassification", "of the type 'vit', which writes no text"),
    ],
)
def test_what_does_not_predict_the_next_token_is_refused_before_it_is_loaded(config, architecture, reason, tmp_path):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)  # there are no weights to load
    with pytest.raises(ConfigError, match=f"{reason}.* no perplexity .* causal language models"):
        optq.evaluate(tmp_path, dataset=["a text"], **KWARGS)


def test_an_object_that_does_not_predict_the_next_token_has_no_perplexity():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=16, **sizes))
    with pytest.raises(ConfigError, match="BertForMaskedLM does not predict the next token"):
        optq.perplexity(model, torch.arange(16), 8)


def test_an_original_with_another_vocabulary_is_refused_before_it_is_loaded(tiny_llama, tmp_path):
    config = LlamaConfig(vocab_size=136, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"vocabulary of 128 tokens, .* one of 136; .*resize_token_embeddings"):
        optq.evaluate(tiny_llama, baseline=tmp_path, dataset=["a text"], **KWARGS)


@pytest.mark.slow
def test_what_a_tokenizer_returns_is_judged_on_as_the_text_is(quantized, text, tiny_llama):
    from transformers import AutoTokenizer

    settings = {**KWARGS, "protocols": ("consecutive",), "tokens": 128}
    expected = optq.evaluate(quantized[2], dataset=text, **settings).perplexities
    encoded = AutoTokenizer.from_pretrained(tiny_llama)([text.read_text()], return_tensors="pt")
    for dataset in (encoded, encoded["input_ids"], encoded["input_ids"].numpy(), iter([text.read_text()])):
        assert optq.evaluate(quantized[2], dataset=dataset, **settings).perplexities == expected


def test_tokens_bound_the_text(quantized, text):
    found = optq.evaluate(quantized[2], dataset=text, tokens=128, **KWARGS)
    assert [p.tokens for p in found.perplexities.values()] == [2 * 63, 127]


@pytest.mark.slow
def test_the_original_can_write_the_text_itself(tiny_llama, quantized):
    settings = {"dataset": "self", "tokens": 128, **KWARGS}
    found = optq.compare([tiny_llama, quantized[2]], baseline=tiny_llama, **settings)
    again = optq.evaluate(quantized[2], baseline=tiny_llama, **settings)
    assert found[1].comparison == again.comparison  # the same text every time
    assert found[1].comparison.tokens == 2 * 63
    # A model finds its own text likelier than random tokens.
    assert found[0].perplexities["consecutive windows of 64"].perplexity < 0.8 * 128
    with pytest.raises(CalibrationError, match="name it as the baseline"):
        optq.evaluate(quantized[2], **settings)


def test_no_more_is_written_than_asked_for(tiny_llama, monkeypatch):
    written, write = [], evaluating.write_samples

    def noted(*arguments, **settings):
        written.extend(write(*arguments, **settings))
        return written

    monkeypatch.setattr(evaluating, "write_samples", noted)
    settings = {"baseline": tiny_llama, "dataset": "self", "protocols": ("consecutive",), **KWARGS}
    optq.evaluate(tiny_llama, tokens=80, **settings)
    assert [len(sample) for sample in written] == [80]
    with pytest.raises(CalibrationError, match="has 1 token"):
        optq.evaluate(tiny_llama, tokens=1, **settings)


@pytest.mark.slow
def test_writing_leaves_the_original_as_it_was(tiny_llama, quantized, text):
    """Its generation config is needed for what it answers."""
    settings = {"tokens": 128, "answers": True, **KWARGS}
    (before,) = optq.compare([tiny_llama], baseline=tiny_llama, dataset=text, **settings)
    (after,) = optq.compare([tiny_llama], baseline=tiny_llama, dataset="self", **settings)
    assert after.answers == before.answers
