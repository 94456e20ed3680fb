# SPDX-License-Identifier: Apache-2.0
"""Calibration data as people have it: parts, batches, loaders, files of other encodings. Errors stay short."""

import gzip
import json
import logging
import re
from collections import deque

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import optq
from optq import GPTQConfig
from optq.calibration import Sampling, prepare_calibration
from optq.errors import LONGEST_MESSAGE, CalibrationError, OutputError, counted

TEXTS = ["hello you", "good day all", "abc def"]
IDS = torch.randint(4, 90, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def samples(tokenizer):
    """The samples, without padding, that become of some data."""

    def run(dataset, tokenizer=tokenizer, **settings):
        settings = {"vocabulary": 128, "window": 512, "hold_out": False, **settings}
        rows = []
        for batch in prepare_calibration(dataset, lambda: tokenizer, Sampling(**settings)).batches:
            mask = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
            rows += [ids[keep.bool()].tolist() for ids, keep in zip(batch.input_ids, mask, strict=True)]
        return sorted(rows)

    return run


def encoded(*texts):
    return sorted([ord(character) - 32 + 4 for character in text] for text in texts)


def chat(content, **more):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "yo", **more}]


class TestChats:
    @pytest.mark.parametrize(
        "content",
        [
            [{"type": "text", "text": "Hi"}],
            [{"type": "input_text", "text": "Hi", "image_url": None}],  # as a table fills it up
            {"type": "text", "text": "Hi"},
            ["Hi"],
        ],
    )
    def test_parts_are_read_as_their_text(self, samples, content):
        assert samples([chat(content)]) == samples([chat("Hi")]) == encoded("<user>Hi<assistant>yo")

    def test_a_turn_that_calls_a_tool_says_nothing(self, samples):
        called = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        ]
        assert samples([called]) == encoded("<user>x<assistant>")

    def test_a_template_that_reads_parts_only_gets_parts(self, samples, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.chat_template = (
            "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'text' %}"
            "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        )
        assert samples([chat("one "), chat([{"type": "text", "text": "two "}])], tokenizer) == encoded(
            "one yo", "two yo"
        )

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("{{ messages[0]['content'][0]['text'].strip() + messages[1]['content'][0].text }}", "hiyo"),  # parts only
            ("{{ messages[0]['content'].upper() + messages[1]['content'] }}", "HIyo"),  # strings only
            ("{{ messages[0]['content'] | replace('i', '') ~ messages[1]['content'] }}", "hyo"),
        ],
    )
    def test_a_template_gets_the_form_that_it_can_read(self, samples, tiny_llama, template, expected):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.chat_template = template
        assert samples([chat([{"type": "text", "text": "hi"}])], tokenizer) == encoded(expected)

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            (chat(None), r"sample 1, turn 0 \(user\) has no content"),
            (
                [*chat("x")[:1], {"role": "assistant", "content": None, "tool_calls": None}],
                "turn 1 .assistant. has no",
            ),
            ([{"role": "user"}], "sample 1, turn 0"),
            (chat([{"type": "text", "text": "a"}, {"type": "image"}]), "sample 1, turn 0 .* of the type 'image'"),
            (chat([{"type": "video_url", "video_url": {}}]), "of the type 'video_url'"),
            (chat(5), "turn 0 has a content that is a int"),
            ([*chat("x"), {"content": "who?"}], "turn 2 has no role"),
            ([{"from": "human", "value": None}], "sample 1, turn 0"),
            (chat("x")[0], "sample 1 is one turn of a chat"),
        ],
    )
    def test_what_is_no_text_is_refused_with_sample_and_turn(self, samples, turns, message):
        with pytest.raises(CalibrationError, match=message):
            samples([chat("fine"), turns])

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (
                "{{ raise_exception('roles must alternate') if messages[0]['content'] == 'x' }}a",
                "roles must alternate",
            ),
            ("{{ messages[0]['content'] + 1 if messages[0]['content'] == 'x' }}a", "can only concatenate"),
            ("{{ messages[0]['nothing']['at all'] if messages[0]['content'] == 'x' }}a", "has no attribute"),
            ("{% for %}", ""),
        ],
    )
    def test_a_template_that_raises_names_the_sample(self, samples, tiny_llama, template, message):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.chat_template = template
        with pytest.raises(CalibrationError, match=rf"sample [01] is a chat that .* template refuses.*{message}"):
            samples([chat("fine"), chat("x")], tokenizer)

    def test_tools_and_documents_reach_the_template(self, samples, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.chat_template = (
            "{% for part in (tools or []) + (documents or []) %}{{ part | tojson }}{% endfor %}"
            "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
        )
        add, look = {"name": "add"}, {"name": "look", "title": None}  # as a table fills it up
        for row in (
            {"messages": chat("hi"), "tools": [add, look]},
            {"messages": chat("hi"), "tools": json.dumps([add, look]), "documents": None},
            {"messages": chat("hi"), "tools": [json.dumps(add)], "documents": [look]},
            {"messages": [chat("hi")], "tools": [[add]], "documents": [[look]]},
        ):
            assert samples([row], tokenizer) == encoded('{"name": "add"}{"name": "look"}hiyo')
        two = {"messages": [chat("hi"), chat("ho")], "tools": [[add], None]}
        assert samples([two], tokenizer) == encoded('{"name": "add"}hiyo', "hoyo")
        with pytest.raises(CalibrationError, match="sample 0 has tools that are a str; a list of dicts is needed"):
            samples([{"messages": chat("hi"), "tools": "add, look"}], tokenizer)

    def test_a_text_that_the_tokenizer_refuses_names_the_sample(self, samples):
        with pytest.raises(CalibrationError, match="sample 1 cannot be encoded"):
            samples(["fine", "half a surrogate \ud800"])


class TestBatches:
    @pytest.mark.parametrize(
        "data",
        [
            IDS,
            IDS.numpy(),
            {"input_ids": IDS},
            [{"input_ids": IDS}],
            [{"input_ids": IDS.tolist()}],
            [{"input_ids": list(IDS)}],
            IDS.tolist(),
            DataLoader([{"input_ids": row} for row in IDS], batch_size=4),
            DataLoader(TensorDataset(IDS), batch_size=4),
            TensorDataset(IDS),
        ],
        ids=lambda data: type(data).__name__,
    )
    def test_a_batch_is_as_many_samples_as_it_has_rows(self, samples, data):
        assert samples(data) == sorted(IDS.tolist())

    def test_sparse_tensors_are_refused_in_few_words(self, samples):
        for data in (IDS.to_sparse(), [IDS[0].to_sparse()], {"input_ids": IDS, "attention_mask": IDS.to_sparse()}):
            with pytest.raises(CalibrationError, match=r"in a sparse tensor, torch.sparse_coo; .*to_dense") as refused:
                samples(data)
            assert len(str(refused.value)) < 300

    def test_a_loader_of_lists_gives_samples_and_not_positions(self, samples):
        rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * 15 + [0] * 5} for ids in IDS]
        expected = sorted(ids[:15].tolist() for ids in IDS)
        for size in (1, 4, 6):
            loader = DataLoader(rows, batch_size=size)
            assert samples(loader) == expected
            for batches in (list(loader), iter(loader)):
                with pytest.raises(CalibrationError, match=r"20 tensors of . numbers?, .*Pass the DataLoader itself"):
                    samples(batches)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_what_a_tokenizer_returns_is_taken_as_it_is(self, samples, tiny_llama, side):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama, padding_side=side)
        padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
        for data in (padded, [padded], tokenizer(TEXTS), dict(tokenizer(TEXTS)), iter([padded])):
            assert samples(data) == encoded(*TEXTS)
        assert samples({"input_ids": padded["input_ids"]}) != encoded(*TEXTS)  # it is the mask that removes padding

    def test_masks_of_any_kind_remove_padding(self, samples, tiny_llama):
        padded = AutoTokenizer.from_pretrained(tiny_llama, padding_side="left")(
            TEXTS, padding=True, return_tensors="pt"
        )
        ids, mask = padded["input_ids"], padded["attention_mask"]
        added = (1 - mask.float()) * torch.finfo(torch.float32).min  # zero is real
        for kind in (mask.bool(), mask.float(), mask.half(), mask.numpy().astype(np.uint8), mask.tolist(), added):
            assert samples([{"input_ids": ids, "attention_mask": kind}]) == encoded(*TEXTS)
        rows = [{"input_ids": row, "attention_mask": kept.tolist()} for row, kept in zip(ids, added, strict=True)]
        assert not any(rows[1]["attention_mask"])  # nothing to remove
        assert samples(rows) == encoded(*TEXTS)
        with pytest.raises(CalibrationError, match="not made of 0 and 1"):
            samples([{"input_ids": ids, "attention_mask": -mask}])

    @pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "uint64", ">i4"])
    def test_ids_of_every_integer_type_are_the_same(self, samples, dtype):
        array = IDS.numpy().astype(dtype)
        assert samples([{"input_ids": array}]) == sorted(IDS.tolist())
        if dtype.startswith(("u", "i")):
            assert samples([{"input_ids": IDS.to(getattr(torch, dtype))}]) == sorted(IDS.tolist())

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"input_ids": [[1, 2], [3, -4]]}, "sample 1, row 1 of its batch, .* not non-negative"),
            ({"input_ids": [1.5, 2.0]}, "sample 1 .* not non-negative integers: torch.float32"),
            ({"input_ids": torch.tensor([True, False])}, "torch.bool"),
            ({"input_ids": ["a"]}, "sample 1 has input_ids that are not integers"),
            ({"input_ids": [2**70]}, "sample 1 has input_ids"),
            ({"input_ids": [1, None]}, "sample 1 has input_ids"),
            ({"input_ids": IDS, "attention_mask": IDS[:2]}, "6 rows of input_ids and 2 of attention_mask"),
            ([IDS[0], IDS[1]], "sample 1 is 2 arrays without names"),
            ({"input_ids": [1, 2], "pixel_values": torch.zeros(1, 3)}, "sample 1 has pixel_values besides text"),
            (b"bytes", "sample 1 is a bytes"),
        ],
    )
    def test_what_is_no_batch_of_ids_is_refused_with_the_sample(self, samples, row, message):
        with pytest.raises(CalibrationError, match=message):
            samples(iter([{"input_ids": [1, 2]}, row]))


class TestIterables:
    @pytest.mark.parametrize(
        "data",
        [
            lambda: (text for text in TEXTS),
            lambda: map(str, TEXTS),
            lambda: dict(enumerate(TEXTS)).values(),
            lambda: deque(TEXTS),
            lambda: set(TEXTS),
            lambda: np.array(TEXTS),
            lambda: DataLoader(TEXTS, batch_size=2),
            lambda: DataLoader([{"text": text} for text in TEXTS], batch_size=2),
            lambda: [{"text": TEXTS}],
        ],
    )
    def test_whatever_yields_texts_is_read(self, samples, data):
        assert samples(data()) == encoded(*TEXTS)

    def test_tables_are_read_by_rows(self, samples):
        pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
        for table in (
            pandas.DataFrame({"text": TEXTS}),
            arrow.table({"text": TEXTS}),
            pandas.Series(TEXTS, [7, 8, 9]),
        ):
            assert samples(table) == encoded(*TEXTS)

    def test_chats_in_cells_of_pandas_are_those_of_the_file(self, samples, tmp_path):
        pandas, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
        file = tmp_path / "chat.parquet"
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
        pandas.DataFrame({"messages": chats}).to_parquet(file)
        table = pandas.read_parquet(file)
        assert type(table["messages"][0]) is np.ndarray
        by_path = samples(str(file))
        for data in (table, table["messages"], table.to_dict("records"), iter(table["messages"])):
            assert samples(data) == by_path == encoded(*(f"<user>{text}" for text in TEXTS))

    def test_numbers_beside_a_text_are_no_images(self, samples):
        datasets = pytest.importorskip("datasets")
        columns = {"text": TEXTS, "score": [0.5] * 3, "embedding": [[0.1, 0.2]] * 3}
        assert samples(datasets.Dataset.from_dict(columns).with_format("torch")) == encoded(*TEXTS)

    def test_an_iterator_without_end_is_read_as_far_as_needed(self, samples):
        def endless():
            number = 0
            while True:
                yield {"input_ids": [number % 90 + 1, number // 90 + 1, 7]}
                number += 1

        assert len(samples(endless(), samples=5)) == 5

    def test_an_iterator_that_was_read_before_is_refused_as_such(self, samples):
        texts = iter(TEXTS)
        samples(texts)
        with pytest.raises(CalibrationError, match=r"is empty\. An iterator can be read only once"):
            samples(texts)

    @pytest.mark.parametrize("data", [torch.tensor(3), np.array(3), 3, [1, 2, 3], range(3), torch.rand(2, 3)])
    def test_numbers_that_are_no_samples_are_refused(self, samples, data):
        with pytest.raises(CalibrationError):
            samples(data)

    def test_a_function_is_to_be_called(self, samples):
        with pytest.raises(CalibrationError, match="Call it"):
            samples(lambda: TEXTS)


class TestFiles:
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_tells_the_encoding(self, samples, tmp_path, encoding):
        for name, text in (
            ("a.txt", "caf\u00e9s"),
            ("a.jsonl", '{"text": "caf\u00e9s"}\n'),
            ("a.json", '["caf\u00e9s"]'),
        ):
            (tmp_path / name).write_bytes(text.encode(encoding))
            assert samples(tmp_path / name) == [[*encoded("caf")[0], 3, *encoded("s")[0]]]

    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.gz"])
    def test_compressed_files_are_read(self, samples, tmp_path, name):
        text = json.dumps({"text": "hello"}) if "json" in name else "hello"
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert samples(tmp_path / name) == samples(tmp_path) == encoded("hello")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "one\ncaf\u00e9".encode("latin-1"), r"a\.txt is not UTF-8 text: line 2"),
            ("a.jsonl", '"ab"\n"caf\u00e9"\n'.encode("latin-1"), r"a\.jsonl is not UTF-8 text: line 2"),
            ("a.txt", "hello".encode("utf-16-le"), r"a\.txt, line 1 has a NUL character"),
            ("a.txt", b"\xff\xfeodd", r"a\.txt is not UTF-16 text"),
            ("a.txt.gz", gzip.compress(b"hello", mtime=0)[:-9], r"a\.txt\.gz cannot be read"),
            ("a.txt", b" \n", r"a\.txt is empty"),
            ("a.jsonl", b"", r"a\.jsonl is empty"),
            ("a.json", b"[]", r"a\.json is empty"),
            ("a.jsonl", b'"ab"\n\n{"text": \n', r"a\.jsonl, line 3, column 10, is not valid JSONL"),
            ("a.json", b'[\n"ab",\n', r"a\.json is not valid JSON: .*line 3"),
            ("a.json", b"[" * 100_000, r"a\.json is not valid JSON"),
            ("a.jsonl", b'"ab"\n5\n', r"sample in .*a\.jsonl, line 2, is a number, 5"),
            ("a.json", b'["ab", null]', r"sample 1 of .*a\.json is null"),
            ("a.jsonl", b'{"text": "ab"}\n{"text": 5}\n', r"a\.jsonl, line 2, is a dict"),
            ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a\.jsonl, line 1, turn 0 \(user\) has no content"),
            ("a.parquet", b"", r"a\.parquet is not a valid Parquet file"),
            ("a.parquet", b"PAR1 cut off PAR1", r"a\.parquet is not a valid Parquet file"),
            ("A.JSONL.GZ", gzip.compress(b"{", mtime=0), r"A\.JSONL\.GZ, line 1, column 2, is not valid JSONL"),
        ],
    )
    def test_what_cannot_be_read_is_refused_with_file_and_line(self, samples, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, tmp_path):
            with pytest.raises(CalibrationError, match=message):
                samples(source)


class TestMessages:
    @pytest.mark.parametrize(
        "data", [[{"x" * 1_000_000: 1}], [{"input_ids": ["y" * 1_000_000]}], {"z" * 1_000_000: "1"}, ["\ud800" * 5000]]
    )
    def test_no_message_quotes_data_at_length(self, samples, data):
        with pytest.raises(CalibrationError) as raised:
            samples(data)
        assert len(str(raised.value)) <= LONGEST_MESSAGE

    def test_the_start_and_the_end_of_a_long_message_stay(self):
        message = str(OutputError("What is wrong: " + "x" * 100_000 + " What to do."))
        assert len(message) <= LONGEST_MESSAGE
        assert message.startswith("What is wrong: x")
        assert message.endswith("What to do.")
        assert str(OutputError("short")) == "short"

    def test_a_saved_dataset_that_is_damaged_is_refused_by_name(self, samples, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path)
        (file,) = tmp_path.glob("*.arrow")
        file.write_bytes(b"cut off")
        with pytest.raises(CalibrationError, match=f"{tmp_path} is no dataset that can be read"):
            samples(tmp_path)

    def test_a_run_with_one_of_everything_says_so(self, tiny_llama, caplog):
        config = GPTQConfig(
            bits=4,
            group_size=32,
            effort="fast",
            dataset=["ab", "ab", "c"],
            num_samples=2,
            modules_in_block_to_quantize=["self_attn.q_proj"],
        )
        with caplog.at_level(logging.INFO, logger="optq"):
            AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        assert "Calibration: 1 sample (1 of list), 2 tokens" in caplog.text
        assert "only 1 sample of the 2 asked for was found" in caplog.text
        said = f"{caplog.text}\n{optq.plan(tiny_llama, config)}"
        assert not re.search(r"(?<![\d.])1 (more )?(calibration )?\w+s( are)?\b", said)

    def test_one_is_not_several(self):
        assert (counted(1, "sample"), counted(0, "sample"), counted(2, "sample is", "samples are")) == (
            "1 sample",
            "0 samples",
            "2 samples are",
        )
