# SPDX-License-Identifier: Apache-2.0
"""Every accepted form of calibration data, and every refusal."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optq.calibration import (
    DATASETS,
    DEFAULT_SAMPLES,
    Sampling,
    check_sources,
    prepare_calibration,
    read_for_evaluation,
)
from optq.calibration.sources import read
from optq.errors import CalibrationError

VOCABULARY = 128


@pytest.fixture
def prepare(tiny_llama):
    from transformers import AutoTokenizer

    def run(dataset, write=None, **changes):
        settings = {"vocabulary": VOCABULARY, "window": 16, **changes}
        return prepare_calibration(
            dataset, lambda: AutoTokenizer.from_pretrained(tiny_llama), Sampling(**settings), write
        )

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
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
CHAT_IDS = encoded("<user>hi<assistant>yo")[:16]


def test_texts_chats_ids_and_datasets_give_the_same_tokens(prepare, tmp_path):
    datasets = pytest.importorskip("datasets")

    texts = ["hello", "good day"]
    expected = sorted(encoded(text) for text in texts)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    dataset = datasets.Dataset.from_dict({"text": texts, "label": [0, 1]})
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text(texts[0])
    (tmp_path / "folder/b.json").write_text(json.dumps(texts[1:]))
    (tmp_path / "folder/readme.md").write_text("not data")
    sources = {
        "texts": texts,
        "ids": [{"input_ids": encoded(text)} for text in texts],
        "tensors": [{"input_ids": torch.tensor([encoded(text)])} for text in texts],
        "dataset": dataset,
        "jsonl": str(tmp_path / "rows.jsonl"),
        "json": str(tmp_path / "rows.json"),
        "parquet": str(tmp_path / "rows.parquet"),
        "saved dataset": str(tmp_path / "saved"),
        "folder": tmp_path / "folder",
        "iterable": dataset.to_iterable_dataset(),
    }
    for name, source in sources.items():
        assert rows_of(prepare(source)) == expected, name


def test_chats_go_through_the_chat_template(prepare, tmp_path):
    datasets = pytest.importorskip("datasets")

    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    for source in (
        [CHAT],
        [{"messages": CHAT}],
        [SHAREGPT],
        [{"id": 1, "conversations": SHAREGPT}],
        [{"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}]}],
        str(tmp_path / "chats.jsonl"),
        datasets.Dataset.from_list([{"messages": CHAT}]),
    ):
        assert CHAT_IDS in rows_of(prepare(source))


def test_a_text_file_is_one_document_cut_into_windows(prepare, tmp_path):
    (tmp_path / "book.txt").write_text("abcdefghabcdefghijklmnopijklmnop")
    calibration = prepare(str(tmp_path / "book.txt"))
    assert rows_of(calibration) == [encoded("abcdefgh" * 2), encoded("ijklmnop" * 2)]
    assert calibration.info["tokens"] == 32
    assert calibration.info["source"] == ".txt file"


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
    assert drawn.info["samples"] == 3
    assert rows_of(drawn) == rows_of(prepare(rows, samples=3, seed=1))
    assert rows_of(drawn) != rows_of(prepare(rows, samples=3, seed=2))


def test_a_file_is_drawn_from_and_a_list_is_used_whole(prepare, tmp_path):
    texts = [f"sample {index}" for index in range(DEFAULT_SAMPLES + 20)]
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    whole, drawn = prepare(texts).info, prepare(str(tmp_path / "rows.json")).info
    assert whole["samples"] + whole["held_out"] == len(texts)
    assert drawn["samples"] + drawn["held_out"] == DEFAULT_SAMPLES
    assert whole["held_out"] == drawn["held_out"] == 8


def test_held_out_samples_are_not_calibrated_on(prepare):
    rows = [{"input_ids": [index + 1, *range(50, 80)]} for index in range(32)]
    for seed in (0, 1):
        calibration = prepare(rows, seed=seed, window=64)
        fitted = {int(ids[0]) for batch in calibration.batches for ids in batch.input_ids}
        held_out = {int(batch.input_ids[0, 0]) for batch in calibration.held_out}
        assert calibration.truly_held_out
        assert len(held_out) == 2
        assert fitted | held_out == set(range(1, 33))
        assert not fitted & held_out
    assert prepare(rows, hold_out=False).held_out == ()


def test_of_few_samples_none_is_held_out(prepare):
    calibration = prepare([{"input_ids": [5] * length} for length in (4, 600, 9)], window=1000)
    assert not calibration.truly_held_out
    assert [batch.input_ids.shape for batch in calibration.held_out] == [(1, 512)]
    assert sum(batch.input_ids.shape[0] for batch in calibration.batches) == 3


def test_next_ids_end_with_the_sample(prepare):
    (batch,) = prepare([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], batch_size=2).batches
    assert batch.next_ids.tolist() == [[2, 3, -1], [5, -1, -1]]


def test_weak_data_is_named(prepare):
    weak = prepare([{"input_ids": [index, 2, 3]} for index in range(3)], samples=5, window=1024).weak_for(1000)
    for words in ("9 tokens in all", "3 samples of the 5", "longest sample"):
        assert words in str(weak)
    assert "1000 x 1000 Hessian" in weak[-1]
    strong = prepare([{"input_ids": [index, *range(1, 128)] * 8} for index in range(20)], window=1024)
    assert strong.weak_for(1000) == ()


def test_repeated_samples_are_used_once_and_counted(prepare, caplog):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [1, 2, 3]}]
    with caplog.at_level(logging.INFO, logger="optq"):
        assert rows_of(prepare(rows)) == [[1, 2, 3], [4, 5]]
    assert "1 calibration sample is an exact repetition of others" in caplog.text
    assert "2 samples (2 of list), 5 tokens" in caplog.text


def test_every_window_of_a_long_text_begins_as_the_tokenizer_begins_texts(prepare, tiny_llama):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    text = "abcdefghijklmnopqrstuvwxyz"
    assert rows_of(prepare([text])) == [encoded(text[:16]), encoded(text[16:])]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = prepare_calibration([text], lambda: tokenizer, Sampling(vocabulary=VOCABULARY, window=16))
    assert rows_of(found) == [[1, *encoded(text[:15])], [1, *encoded(text[15:])]]


def test_short_samples_are_joined_only_if_asked(prepare):
    rows = ["abcdef", "ghijkl", "mnopqr"]
    assert rows_of(prepare(rows)) == [encoded(row) for row in rows]
    stream = [token for row in rows for token in (*encoded(row), 2)]
    assert rows_of(prepare(rows, separator=2)) == [stream[:16], stream[16:]]


def test_the_recipe_holds_no_text(prepare):
    info = prepare(["a secret text"]).info
    assert "secret" not in json.dumps(info)
    assert info["sha256"] != prepare(["another secret"]).info["sha256"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the Hub: local Parquet files, read by the real `load_dataset`; yields what was asked for."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    real, asked = datasets.load_dataset, []

    def load_dataset(path, name=None, **arguments):
        asked.append((path, arguments))
        named = next(named for named in DATASETS.values() if named.path == path)
        values = {column: [f"{path} {column} {index}" for index in range(40)] for column in named.columns}
        if named.columns == ("messages",):
            values["messages"] = [[{**CHAT[0], "content": f"question {index}"}, CHAT[1]] for index in range(40)]
        file = tmp_path / "hub.parquet"
        datasets.Dataset.from_dict({"unused": list(range(40)), **values}).to_parquet(file)
        streaming = arguments.get("streaming", False)
        return real("parquet", data_files=str(file), split="train", streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # It sleeps at the end of a stream, so that connections can close. There are none.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, path, revision: SimpleNamespace(sha=f"commit of {path}")
    )
    return asked


@pytest.mark.parametrize("name", DATASETS)
def test_names_are_loaded_through_datasets_at_a_recorded_revision(prepare, hub, name):
    named = DATASETS[name]
    calibration = prepare(name, samples=8, window=4096)
    source = {"name": name, "path": named.path, "revision": f"commit of {named.path}"}
    assert calibration.info["sources"] == [{**source, "weight": 1.0, "samples": 1 if named.one_document else 8}]
    arguments = {key: value for key, value in named.arguments.items() if key != "name"}
    assert hub == [(named.path, {**arguments, "revision": source["revision"]})]
    text = "".join(chr(token - 4 + 32) for row in rows_of(calibration) for token in row if token >= 4)
    for column in named.columns:
        assert ("<user>question" if column == "messages" else f"{named.path} {column}") in text


@pytest.mark.parametrize("name", [name for name, named in DATASETS.items() if named.evaluation and name != "chat"])
def test_of_a_name_the_part_for_evaluation_is_judged_on_whole_and_in_order(tiny_llama, hub, name):
    from transformers import AutoTokenizer

    rows = read_for_evaluation(name, lambda: AutoTokenizer.from_pretrained(tiny_llama))
    named = DATASETS[name]
    assert hub[0][1]["split"] == named.evaluation["split"] != named.arguments["split"]
    assert len(rows) == (1 if named.one_document else 40)
    assert rows[0][: len(named.path)] == encoded(named.path)
    assert rows[-1][-1:] == encoded("9")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("math", "'math' has no part for evaluation.*wikitext2, c4"),
        ("self", "does not say which text models are judged on"),
        ("c4:0.5,wikitext2:0.5", "name one source"),
        (None, "is a NoneType"),
    ],
)
def test_models_are_judged_on_one_text_that_is_kept_for_that(dataset, message):
    with pytest.raises(CalibrationError, match=message):
        read_for_evaluation(dataset, lambda: None)


def test_what_the_hub_no_longer_has_as_it_was_is_named(prepare, hub, monkeypatch):
    datasets = pytest.importorskip("datasets")

    changed = datasets.Dataset.from_dict({"body": ["x"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: changed)
    with pytest.raises(CalibrationError, match="finemath has columns body, but no text"):
        prepare("math")


def test_empty_rows_separate_paragraphs_in_one_document_and_are_no_samples_elsewhere(hub, monkeypatch):
    datasets = pytest.importorskip("datasets")

    rows = datasets.Dataset.from_dict({"text": ["one", "", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert [row.content for row in read("wikitext2", 4, seed=0)[0]] == ["one\n\n\n\ntwo"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows.to_iterable_dataset())
    assert sorted(row.content for row in read("c4", 4, seed=0)[0]) == ["one", "two"]


def test_without_a_connection_the_way_out_is_named(prepare):
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match=r"could not be read from the Hub: .*[^.]\. Without .*dataset='self'"):
        prepare("wikitext2")


def test_sources_give_samples_by_weight(prepare, tmp_path):
    for name, token in (("a", 5), ("b", 7)):
        rows = [{"input_ids": [token, 10 + index]} for index in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    for dataset in (f"{a}:0.75,{b}:0.25", f"{a}:3, {b}", {a: 3, b: 1.0}):
        calibration = prepare(dataset, samples=16, hold_out=False)
        assert [row[0] for row in rows_of(calibration)] == [5] * 12 + [7] * 4
        assert [source["samples"] for source in calibration.info["sources"]] == [12, 4]
        assert str(tmp_path) not in json.dumps(calibration.info)
    assert ".jsonl file has 40 samples, but 64 are its share" in prepare(f"{a},{b}").weaknesses[0]
    assert prepare(f"{a}:1,{b}:0", samples=4).info["source"] == ".jsonl file"
    (tmp_path / "x:0.5").mkdir()
    (tmp_path / "x:0.5/a.txt").write_text("a colon in the name of a folder that exists")
    assert prepare(str(tmp_path / "x:0.5")).info["source"] == "folder"


def test_what_the_model_writes_is_used_as_it_is(prepare):
    written = [[1, 20 + index, 30] for index in range(8)]
    calibration = prepare("self", samples=4, write=lambda count: written[:count])
    assert rows_of(calibration) == written[:4]
    assert calibration.info["source"] == "self"
    mixed = prepare({"self": 1, "unused": 0}, write=lambda count: written[: min(count, 8)])
    assert rows_of(mixed) == written


def test_without_the_package_datasets_only_what_needs_it_is_refused(prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(["hello there"]).info["samples"] == 1
    with pytest.raises(CalibrationError, match="pip install datasets"):
        prepare("wikitext2")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "is a NoneType"),
        ("self", "needs a model that can write"),
        ([], "is empty"),
        (["a", ""], "shorter than 2 tokens"),
        ("wikitext3", "neither a known name nor a readable file or folder. Did you mean 'wikitext2'"),
        ("wikitext2:half", "'wikitext2' exists, but its weight 'half' is not a number"),
        ("c4:0.5,wikitext3:0.5", "Did you mean 'wikitext2'"),
        ("wikitext2:-1,c4:2", "weight of 'wikitext2' is -1.0; it is a number, 0 or more"),
        ({"wikitext2": "1"}, "weight of 'wikitext2' is '1'"),
        ("wikitext2:0,c4:0", "all weights of wikitext2, c4 are 0"),
        ({}, "names no source"),
        ("", "dataset='' names no source"),
        ("a text of many words " * 500, "A text itself goes into a list"),
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


@pytest.mark.parametrize("dataset", ["wikitext3", "c4:0.5,wikitext3:0.5", {"wikitext2": 0}, "no/such.jsonl"])
def test_names_and_weights_can_be_checked_without_loading_anything(dataset):
    with pytest.raises(CalibrationError):
        check_sources(dataset)
    check_sources("wikitext2:0.5,self:0.5")
    check_sources(["hello"])


def test_a_list_of_names_or_files_is_not_taken_for_texts(prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('"a text of its own"')
    for dataset in (["wikitext2"], ("a.jsonl", "b.jsonl"), ["wikitext2:0.7", "a.jsonl:0.3"], [Path("a.jsonl"), "c4"]):
        named = re.escape(repr(",".join(map(str, dataset))))
        with pytest.raises(CalibrationError, match=f"a list of names or files; .* Pass one string, {named}"):
            prepare(dataset)
    assert prepare(["wikitext2", "hello there"]).info["samples"] >= 1


def test_damaged_files_are_refused(prepare, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "dict.json").write_text("{}")
    (tmp_path / "bad.parquet").write_text("PAR")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="not a valid Parquet"):
        prepare(str(tmp_path / "bad.parquet"))
    with pytest.raises(CalibrationError, match="is a folder without files of text"):
        prepare(str(tmp_path / "empty"))
    with pytest.raises(CalibrationError, match="not valid JSONL"):
        prepare(str(tmp_path / "bad.jsonl"))
    with pytest.raises(CalibrationError, match="holds a dict"):
        prepare(str(tmp_path / "dict.json"))


def test_chats_without_a_template_are_refused(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template"):
        prepare_calibration([CHAT], lambda: tokenizer, Sampling(vocabulary=VOCABULARY, window=16))


def test_samples_that_are_too_short_are_counted(prepare, caplog):
    with caplog.at_level(logging.WARNING):
        assert prepare(["hello", "x"]).info["samples"] == 1
    assert "1 calibration sample shorter than 2 tokens is" in caplog.text
