# SPDX-License-Identifier: Apache-2.0
"""Calibration on what the model writes itself."""

import io
import json
import logging
import os
import signal
import sys
from contextlib import contextmanager

import pytest
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import optq
from conftest import forked, interrupted_after, tiny_llama_config
from optq import GPTQConfig
from optq.api import quantize as api
from optq.calibration import generation, write_samples
from optq.errors import CalibrationError, OutputError
from optq.runs import journal
from optq.runs import own_text as writing
from optq.runs.journal import WRITTEN, Journal

LENGTH = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model, and nothing else: neither tokenizer nor generation config."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


def config(**changes):
    settings = {"bits": 4, "group_size": 32, "dataset": "self", "num_samples": 32, "model_seqlen": LENGTH}
    settings["effort"] = "fast"
    return GPTQConfig(**{**settings, **changes})


def quantize(source, **changes):
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config(**changes))


def info(model):
    return model.config.quantization_config.meta["calibration"]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_bar_counts_every_token_from_where_an_interrupted_call_was(source, monkeypatch):
    model, bars = AutoModelForCausalLM.from_pretrained(source), []

    def noted(**settings):
        bars.append(tqdm(**{**settings, "disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(generation, "tqdm", noted)
    settings = {"opening": [1], "vocabulary": 128, "seed": 0}
    whole = write_samples(model, 20, LENGTH, **settings)
    write_samples(model, 20, LENGTH, **settings, written=whole[:8])
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [
        (0, 20 * LENGTH, 20 * LENGTH),
        (8 * LENGTH, 20 * LENGTH, 20 * LENGTH),
    ]


def test_the_same_seed_writes_the_same_tokens_and_another_one_others(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    before = torch.random.get_rng_state()

    def write(seed, opening=(1,)):
        return write_samples(model, 5, LENGTH, opening=opening, vocabulary=128, seed=seed)

    first = write(3)
    assert [len(ids) for ids in first] == [LENGTH] * 5
    assert all(ids[0] == 1 for ids in first)
    assert len(set(map(tuple, first))) == 5
    assert write(3) == first
    assert write(4) != first
    assert len({ids[0] for ids in write(3, opening=())}) > 1  # drawn from the vocabulary
    assert torch.equal(torch.random.get_rng_state(), before)


def test_samples_are_written_in_batches_of_bounded_size(source, monkeypatch):
    monkeypatch.setattr("optq.calibration.generation.TOKENS_AT_ONCE", 2 * LENGTH)
    model = AutoModelForCausalLM.from_pretrained(source)
    sizes = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **settings: sizes.append(len(ids)) or generate(ids, **settings))
    assert len(write_samples(model, 5, LENGTH, opening=[1], vocabulary=128, seed=0)) == 5
    assert sizes == [2, 2, 1]


def test_what_is_written_follows_the_models_own_distribution(source):
    """Negative control: tokens that had nothing to do with the model would be far less likely to it."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform
        written = torch.tensor(write_samples(model, 16, LENGTH, opening=[1], vocabulary=128, seed=0))
        drawn = torch.randint(128, (16, LENGTH), generator=torch.Generator().manual_seed(0))
        losses = [model(input_ids=ids, labels=ids).loss for ids in (written, drawn)]
    assert losses[0] < losses[1] - 1


@pytest.fixture(scope="module")
def facts_of_seeds(source):
    return [info(quantize(source, seed=seed)) for seed in (0, 1)]


@pytest.mark.parametrize("dataset", ["self", None])
def test_a_model_is_calibrated_on_its_own_text_without_any_data(source, facts_of_seeds, dataset, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with caplog.at_level(logging.INFO, logger="optq"):
        model = quantize(source, dataset=dataset)
    facts = info(model)
    assert facts["source"] == "self"
    assert (facts["samples"], facts["held_out"], facts["tokens"]) == (30, 2, 30 * LENGTH)
    assert f"writes its own calibration data: 32 samples of {LENGTH} tokens, begun with token 1, seed 0" in caplog.text
    assert ("No dataset= was given" in caplog.text) is (dataset is None)
    assert facts_of_seeds[0]["sha256"] == facts["sha256"] != facts_of_seeds[1]["sha256"]
    assert model.config.quantization_config.to_dict().get("dataset") is None  # other readers refuse unknown names


def test_own_text_is_mixed_with_other_data(source, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps([{"input_ids": [5, index, 7]} for index in range(30)]))
    facts = info(quantize(source, dataset=f"self:0.25,{tmp_path / 'ids.json'}:0.75"))
    assert [(part["name"], part["samples"]) for part in facts["sources"]] == [("self", 8), (".json file", 24)]


def test_a_run_that_goes_on_neither_writes_again_nor_differs(source, tmp_path, monkeypatch, caplog):
    expected = weights(optq.quantize(source, config(), output_dir=tmp_path / "whole"))
    assert not list((tmp_path / "whole").rglob(WRITTEN))
    output = tmp_path / "out"

    def interrupted(stop):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write" if stop == "block" else "open", lambda *args: raising())
            with pytest.raises(KeyboardInterrupt):
                optq.quantize(source, config(), output_dir=output)

    def raising():
        raise KeyboardInterrupt

    interrupted("start")
    assert (output / api.PARTIAL / WRITTEN).exists()  # before any block
    monkeypatch.setattr(writing, "write_samples", lambda *args, **kwargs: pytest.fail("written again"))
    interrupted("block")
    with caplog.at_level(logging.INFO, logger="optq"):
        assert weights(optq.quantize(source, config(), output_dir=output)) == expected
    assert "Going on with the 32 samples" in caplog.text
    assert not (output / api.PARTIAL).exists()


@contextmanager
def parts_written(monkeypatch, most=None):
    """How many samples are written at a time; at the part after `most`, Ctrl-C."""
    sizes, generate = [], LlamaForCausalLM.generate

    def counting(self, ids, **settings):
        if len(sizes) == most:
            raise KeyboardInterrupt
        sizes.append(len(ids))
        return generate(self, ids, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "generate", counting)
        yield sizes


class TestInterruptedWriting:
    """What was written when a run was interrupted is kept, and the same call goes on from there."""

    def test_parts_do_not_depend_on_those_before(self, source):
        model, kept = AutoModelForCausalLM.from_pretrained(source), []
        settings = {"opening": [1], "vocabulary": 128, "seed": 5}
        whole = write_samples(model, 26, LENGTH, **settings, keep=lambda written: kept.append(list(written)))
        assert [len(written) for written in kept] == [8, 16, 24, 26]
        assert all(write_samples(model, 26, LENGTH, **settings, written=written) == whole for written in kept)
        assert whole[:8] != whole[8:16]  # negative control: not the same part again and again

    def test_with_a_folder_it_is_kept_there(self, source, tmp_path, monkeypatch, caplog):
        expected = weights(optq.quantize(source, config(), output_dir=tmp_path / "whole"))
        output = tmp_path / "out"
        for most in (1, 2):
            with parts_written(monkeypatch, most) as sizes, pytest.raises(KeyboardInterrupt):
                optq.quantize(source, config(), output_dir=output)
            assert sizes == [8] * most
        with parts_written(monkeypatch) as sizes, caplog.at_level(logging.INFO, logger="optq"):
            assert weights(optq.quantize(source, config(), output_dir=output)) == expected
        assert sizes == [8]
        assert "Going on with the 24 samples, of 32, that the model has written before" in caplog.text

    @pytest.mark.slow
    def test_a_killed_process_leaves_it_there_too(self, source, tmp_path, monkeypatch):
        def killed():
            whole = journal.write_checked

            def write(path, content):
                whole(path, content)
                os.kill(os.getpid(), signal.SIGTERM)

            journal.write_checked = write
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            optq.quantize(source, config(), output_dir=tmp_path / "out")

        assert os.WTERMSIG(os.waitpid(forked(killed), 0)[1]) == signal.SIGTERM
        with parts_written(monkeypatch) as sizes:
            found = weights(optq.quantize(source, config(), output_dir=tmp_path / "out"))
        assert sizes == [8] * 3
        assert found == weights(optq.quantize(source, config(), output_dir=tmp_path / "whole"))

    def test_without_a_folder_it_is_kept_in_the_process(self, source, monkeypatch):
        expected = info(quantize(source))
        with parts_written(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
            quantize(source)
        with parts_written(monkeypatch) as sizes:
            assert info(quantize(source, seed=1)) != expected  # another text, from its start
            assert sizes == [8] * 4
            assert info(quantize(source)) == expected
            assert sizes == [8] * 5
            quantize(source)  # what is finished is not kept
            assert sizes == [8] * 9


def test_blocks_calibrated_on_other_text_are_not_gone_on_with(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupted_after(1, monkeypatch, lambda: optq.quantize(source, config(), output_dir=output))
    with pytest.raises(OutputError, match="seed was 0 and is 1"):
        optq.quantize(source, config(seed=1), output_dir=output)


def test_without_finished_blocks_another_text_is_written(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "open", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optq.quantize(source, config(), output_dir=output)
    expected = weights(optq.quantize(source, config(seed=1), output_dir=tmp_path / "whole"))
    assert weights(optq.quantize(source, config(seed=1), output_dir=output)) == expected


def test_the_variant_that_is_quantized_writes(source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path, variant="four")
    settings = config(num_samples=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, variant="four", quantization_config=settings)
    assert info(model) == info(quantize(source, num_samples=2))


def test_planning_writes_nothing(source, monkeypatch):
    monkeypatch.setattr(writing, "write_samples", lambda *args, **kwargs: pytest.fail("written"))
    assert optq.plan(source, config()).tokens == 30 * LENGTH


def test_a_model_whose_weights_come_from_no_files_writes_too(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    made = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization_config=config()
    )
    assert made.config.quantization_config.meta["calibration"]["source"] == "self"


class TestRefusals:
    """With the reason, before the weights are read."""

    def test_an_encoder_and_decoder(self, tmp_path):
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path)
        with pytest.raises(CalibrationError, match=r"cannot write.*reads a text with its encoder.*list of strings"):
            T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config())

    def test_a_model_that_predicts_no_next_token(self, tmp_path):
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        BertModel(BertConfig(**sizes, vocab_size=128)).save_pretrained(tmp_path)
        with pytest.raises(
            CalibrationError, match=r"No dataset= was given.*BertModel does not predict the next token"
        ):
            BertModel.from_pretrained(tmp_path, quantization_config=config(dataset=None))

    def test_no_room_for_a_text(self, source):
        with pytest.raises(CalibrationError, match="model_seqlen=1 leaves no room"):
            quantize(source, model_seqlen=1)

    def test_a_misspelt_name(self, source):
        with pytest.raises(CalibrationError, match="Did you mean 'self'"):
            quantize(source, dataset="sel")
