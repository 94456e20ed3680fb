# SPDX-License-Identifier: Apache-2.0
"""Every accepted form of calibration data, and every refusal."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from optq.calibration import DATASETS, DEFAULT_SAMPLES, prepare_calibration
from optq.errors import CalibrationError

VOCABULARY = 128


@pytest.fixture
def prepare(tiny_llama):
    from transformers import AutoTokenizer

    def run(dataset, **changes):
        settings = {"vocabulary": VOCABULARY, "window": 16, **changes}
        return prepare_calibration(dataset, lambda: AutoTokenizer.from_pretrained(tiny_llama), **settings)

    return run


def rows_of(calibration):
    """The samples without padding, as lists of ids."""
    rows = []
    for batch in calibration.batches:
        mask = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
        rows += [ids[keep.bool()].tolist() for ids, keep in zip(batch.input_ids, mask, strict=True)]
    return sorted(rows)


def encoded(text: str) -> list[int]:
    return [ord(character) - 32 + 4 for character in text]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CHAT_IDS = encoded("<user>hi<assistant>yo")[:16]


def test_texts_chats_ids_and_datasets_give_the_same_tokens(prepare, tmp_path):
    datasets = pytest.importorskip("datasets")

    texts = ["hello", "good day"]
    expected = sorted(encoded(text) for text in texts)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    dataset = datasets.Dataset.from_dict({"text": texts, "label": [0, 1]})
    dataset.to_parquet(tmp_path / "rows.parquet")
    sources = {
        "texts": texts,
        "ids": [{"input_ids": encoded(text)} for text in texts],
        "tensors": [{"input_ids": torch.tensor([encoded(text)])} for text in texts],
        "dataset": dataset,
        "jsonl": str(tmp_path / "rows.jsonl"),
        "json": str(tmp_path / "rows.json"),
        "parquet": str(tmp_path / "rows.parquet"),
    }
    for name, source in sources.items():
        assert rows_of(prepare(source)) == expected, name


def test_chats_go_through_the_chat_template(prepare, tmp_path):
    datasets = pytest.importorskip("datasets")

    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    for source in (
        [CHAT],
        [{"messages": CHAT}],
        str(tmp_path / "chats.jsonl"),
        datasets.Dataset.from_list([{"messages": CHAT}]),
    ):
        assert CHAT_IDS in rows_of(prepare(source))


def test_a_text_file_is_one_document_cut_into_windows(prepare, tmp_path):
    (tmp_path / "book.txt").write_text("abcdefgh" * 6)
    calibration = prepare(str(tmp_path / "book.txt"))
    assert rows_of(calibration) == [encoded("abcdefgh" * 2)] * 3
    assert calibration.recipe["tokens"] == 48
    assert calibration.recipe["source"] == ".txt file"


def test_padding_is_masked_and_padded_samples_are_unpadded(prepare):
    rows = [
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [8, 9, 0], "attention_mask": [1, 1, 0]},
    ]
    calibration = prepare(rows)
    assert rows_of(calibration) == [[5, 6, 7], [8, 9]]
    (batch,) = calibration.batches
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert prepare(rows[:1]).batches[0].attention_mask is None  # nothing to mask


def test_batch_size_and_number_of_samples(prepare):
    rows = [{"input_ids": [index + 4] * 8} for index in range(10)]
    assert [len(batch.input_ids) for batch in prepare(rows, batch_size=4).batches] == [4, 4, 2]
    assert len(prepare(rows).batches) == 1
    drawn = prepare(rows, samples=3, seed=1)
    assert drawn.recipe["samples"] == 3
    assert rows_of(drawn) == rows_of(prepare(rows, samples=3, seed=1))
    assert rows_of(drawn) != rows_of(prepare(rows, samples=3, seed=2))


def test_a_file_is_drawn_from_and_a_list_is_used_whole(prepare, tmp_path):
    texts = [f"sample {index}" for index in range(DEFAULT_SAMPLES + 20)]
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    whole, drawn = prepare(texts).recipe, prepare(str(tmp_path / "rows.json")).recipe
    assert whole["samples"] + whole["held_out"] == len(texts)
    assert drawn["samples"] + drawn["held_out"] == DEFAULT_SAMPLES
    assert whole["held_out"] == drawn["held_out"] == 8


def test_held_out_samples_are_not_calibrated_on(prepare):
    rows = [{"input_ids": [index + 1, *range(50, 80)]} for index in range(32)]
    for seed in (0, 1):
        calibration = prepare(rows, seed=seed, window=64)
        fitted = {int(ids[0]) for batch in calibration.batches for ids in batch.input_ids}
        probes = {int(batch.input_ids[0, 0]) for batch in calibration.probes}
        assert calibration.probes_held_out
        assert len(probes) == 2
        assert fitted | probes == set(range(1, 33))
        assert not fitted & probes
    assert prepare(rows, probe=False).probes == ()


def test_of_few_samples_none_is_held_out(prepare):
    calibration = prepare([{"input_ids": [5] * length} for length in (4, 600, 9)], window=1000)
    assert not calibration.probes_held_out
    assert [batch.input_ids.shape for batch in calibration.probes] == [(1, 512)]
    assert sum(batch.input_ids.shape[0] for batch in calibration.batches) == 3


def test_next_ids_end_with_the_sample(prepare):
    (batch,) = prepare([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], batch_size=2).batches
    assert batch.next_ids.tolist() == [[2, 3, -1], [5, -1, -1]]


def test_weak_data_is_named(prepare):
    weak = prepare([{"input_ids": [1, 2, 3]}] * 3, samples=5, window=1024).weak_for(1000)
    for words in ("9 tokens in all", "2 of 3 samples", "3 samples of the 5", "longest sample"):
        assert words in str(weak)
    assert "1000 x 1000 Hessian" in weak[-1]
    strong = prepare([{"input_ids": [index, *range(1, 128)] * 8} for index in range(20)], window=1024)
    assert strong.weak_for(1000) == ()


def test_the_recipe_holds_no_text(prepare):
    recipe = prepare(["a secret text"]).recipe
    assert "secret" not in json.dumps(recipe)
    assert recipe["sha256"] != prepare(["another secret"]).recipe["sha256"]


@pytest.mark.parametrize("name", DATASETS)
def test_names_are_loaded_through_datasets(prepare, monkeypatch, name):
    datasets = pytest.importorskip("datasets")

    asked = []

    def load_dataset(path, **arguments):
        asked.append((path, arguments))
        return {DATASETS[name].column: ["", "some text here", "and more of it"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prepare(name).recipe["source"] == name
    assert asked == [(DATASETS[name].path, DATASETS[name].arguments)]


def test_without_the_package_datasets_only_what_needs_it_is_refused(prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(["hello there"]).recipe["samples"] == 1
    with pytest.raises(CalibrationError, match="pip install datasets"):
        prepare("wikitext2")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "needs calibration data.*a list of strings"),
        ([], "is empty"),
        (["a", ""], "shorter than 2 tokens"),
        ("wikitext3", "neither a known name nor a readable file.*wikitext2"),
        (42, "is a int"),
        ([3.5], "sample 0 is a float"),
        ([{"question": "?"}], r"sample 0 is a dict with \['question'\]"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "2 input_ids and 1 entries"),
        ([{"input_ids": [1, -2]}], "non-negative"),
        ([{"input_ids": [4, VOCABULARY]}], "tokenizer does not belong"),
        (SimpleNamespace(column_names=["label"]), "columns label"),
        (SimpleNamespace(column_names={"train": ["text"]}), "DatasetDict"),
    ],
)
def test_unusable_data_is_refused_with_the_reason(prepare, dataset, message):
    with pytest.raises(CalibrationError, match=message):
        prepare(dataset)


def test_damaged_files_are_refused(prepare, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "dict.json").write_text("{}")
    with pytest.raises(CalibrationError, match="not valid JSONL"):
        prepare(str(tmp_path / "bad.jsonl"))
    with pytest.raises(CalibrationError, match="holds a dict"):
        prepare(str(tmp_path / "dict.json"))


def test_chats_without_a_template_are_refused(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template"):
        prepare_calibration([CHAT], lambda: tokenizer, vocabulary=VOCABULARY, window=16)


def test_samples_that_are_too_short_are_counted(prepare, caplog):
    with caplog.at_level(logging.WARNING):
        assert prepare(["hello", "x"]).recipe["samples"] == 1
    assert "1 calibration samples shorter than 2 tokens" in caplog.text
