# SPDX-License-Identifier: Apache-2.0
"""Against lm-evaluation-harness itself, where it is installed: `pip install lm-eval`."""

import json
import math
import re
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import optq
from optq import GPTQConfig
from optq.cli import main

lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the harness's dependencies' own
]
WINDOW = 128


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 9, (180,), generator=generator)
    letters = torch.randint(97, 123, (int(lengths.sum()),), generator=generator).tolist()
    words, start = [], 0
    for length in lengths.tolist():
        words.append("".join(map(chr, letters[start : start + length])))
        start += length
    return " ".join(words)


@pytest.fixture(scope="module")
def task(text, tmp_path_factory):
    """As the harness's wikitext, from a local file."""
    file = tmp_path_factory.mktemp("task") / "text.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    return {
        "task": "offline_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "process_results": lambda doc, results: {"word_perplexity": (results[0], words_of(doc["text"]))},
        "metric_list": [{"metric": "word_perplexity"}],
    }


def words_of(text):
    return len(re.split(r"\s+", text))


@pytest.fixture(scope="module")
def quantized(tiny_llama, token_rows, tmp_path_factory):
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    return optq.quantize(tiny_llama, config, output_dir=tmp_path_factory.mktemp("quantized") / "out")


@pytest.mark.parametrize("which", ["original", "quantized"])
def test_rolling_perplexity_is_the_harnesss_word_perplexity(which, text, task, tiny_llama, quantized):
    """The harness is called as its users do; of a quantized model it does not know."""
    folder = tiny_llama if which == "original" else quantized
    arguments = {"pretrained": str(folder), "max_length": WINDOW, "dtype": "float32"}
    found = lm_eval.simple_evaluate("hf", model_args=arguments, tasks=[task], device="cpu", bootstrap_iters=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    ours = optq.perplexity(model, ids, WINDOW, protocol="rolling")
    theirs = found["results"]["offline_text"]["word_perplexity,none"]
    assert math.exp(ours.loss / words_of(text)) == pytest.approx(theirs, rel=1e-4)


def test_tasks_are_run_from_the_command_line(tmp_path, monkeypatch, capsys, tiny_llama, quantized):
    rows = [
        {"question": f"{a} + {b} =", "choices": [str(a + b), "x"], "answer": 0} for a in range(4) for b in range(4)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: offline_sums\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'sums.jsonl'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
    )
    with_task = partial(lm_eval.simple_evaluate, task_manager=TaskManager(include_path=str(tmp_path)))
    monkeypatch.setattr(lm_eval, "simple_evaluate", with_task)
    options = ["--lm-eval", "offline_sums", "--device", "cpu", "--dtype", "float32", "--json"]
    assert main(["compare", str(tiny_llama), str(quantized), *options]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    (task,) = table["tasks"]
    assert task["name"] == "offline_sums"
    assert 0 <= task["quantized"] <= 1
    assert task["margin"] > 0
