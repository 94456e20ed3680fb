# SPDX-License-Identifier: Apache-2.0
"""Against lm-evaluation-harness itself, where it is installed: `pip install lm-eval`.

Its tasks are three tiny ones in local files, written as its users write them.
"""

import json
import math
import re
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import optq
from optq import GPTQConfig, QuantLinear
from optq.cli import main
from optq.evaluation import compare_harness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="wants lm_eval"),
    pytest.mark.filterwarnings("ignore"),  # the harness's dependencies' own
]
WINDOW = 128
LOCAL = "dataset_path: json\ntest_split: train\ndataset_kwargs:\n  data_files: {}\n"
SUMS = (
    'task: offline_sums\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
    "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
)
TEXT = (
    'task: offline_text\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
)
CONTINUED = (
    'task: offline_continued\noutput_type: generate_until\ndoc_to_text: "{{start}}"\ndoc_to_target: "{{rest}}"\n'
    'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n  do_sample: false\n'
    "metric_list:\n  - metric: exact_match\n"
)


@pytest.fixture(autouse=True)
def without_looking_at_the_machine(monkeypatch):
    """The harness asks pip and others, in forty processes, what is installed, for its results' small print."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def words_of(text):
    return len(re.split(r"\s+", text))


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
def folders(tiny_llama, token_rows, tmp_path_factory):
    """The original, the quantized model, and the quantized weights in plain linears."""
    parent = tmp_path_factory.mktemp("models")
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    quantized = optq.quantize(tiny_llama, config, output_dir=parent / "quantized")
    AutoModelForCausalLM.from_pretrained(quantized).dequantize().save_pretrained(parent / "dequantized")
    AutoTokenizer.from_pretrained(quantized).save_pretrained(parent / "dequantized")
    return {"original": tiny_llama, "quantized": quantized, "dequantized": parent / "dequantized"}


@pytest.fixture(scope="module")
def tasks(text, folders, tmp_path_factory):
    """A folder with a YAML file and a JSONL file per task; one is to continue as the dequantized model does."""
    folder = tmp_path_factory.mktemp("tasks")
    model = AutoModelForCausalLM.from_pretrained(folders["dequantized"])
    tokenizer = AutoTokenizer.from_pretrained(folders["dequantized"])
    starts = [text[at : at + 20] for at in range(0, 160, 40)]
    sums = [
        {"question": f"{a} + {b} =", "choices": [f" {a + b}", " x"], "answer": 0} for a in (1, 2, 3) for b in range(4)
    ]
    rows = {"sums": sums, "text": [{"text": text}, {"text": text[:90]}], "continued": []}
    for start in starts:
        ids = tokenizer(start, return_tensors="pt")["input_ids"]
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        rest = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        rows["continued"].append({"start": start, "rest": rest})
    for name, task in (("sums", SUMS), ("text", TEXT), ("continued", CONTINUED)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(task + LOCAL.format(file))
    return folder


@pytest.fixture(scope="module")
def manager(tasks):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def results(manager, folders):
    """What the harness finds of each model, with every answer of the model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = {}
    for name, folder in folders.items():
        model = HFLM(pretrained=str(folder), max_length=WINDOW, dtype="float32", device="cpu", batch_size=4)
        assert any(isinstance(module, QuantLinear) for module in model.model.modules()) == (name == "quantized")
        found[name] = lm_eval.simple_evaluate(
            model,
            tasks=["offline_sums", "offline_text", "offline_continued"],
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    return found


def numbers(found, task):
    return {
        name: value
        for name, value in found["results"][task].items()
        if isinstance(value, (int, float)) and "stderr" not in name
    }


def answers(found, task):
    return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda each: each["doc_id"])]


@pytest.mark.parametrize("task", ["offline_sums", "offline_text", "offline_continued"])
def test_scores_are_those_of_the_dequantized_model(results, task):
    expected = numbers(results["dequantized"], task)
    assert len(expected) >= 1
    assert numbers(results["quantized"], task) == pytest.approx(expected, rel=1e-4)


def test_likelihoods_of_every_choice_are(results):
    found, expected = (
        torch.tensor([[choice[0] for choice in sample] for sample in answers(results[name], "offline_sums")])
        for name in ("quantized", "dequantized")
    )
    assert found.shape == (12, 2)
    assert torch.allclose(found, expected, atol=1e-3)


def test_texts_are_continued_as_by_the_dequantized_model(results):
    found = answers(results["quantized"], "offline_continued")
    assert found == answers(results["dequantized"], "offline_continued")
    assert any(sample[0].strip() for sample in found)
    assert results["quantized"]["results"]["offline_continued"]["exact_match,none"] > 0


def test_the_original_scores_otherwise(results):
    """Negative control: the harness tells models apart."""
    task = "offline_text"
    assert numbers(results["quantized"], task) != pytest.approx(numbers(results["original"], task), rel=1e-3)


def test_its_results_are_what_the_comparison_reads(results):
    found = compare_harness(results["original"], results["quantized"])
    assert {task.name for task in found.tasks} == {"offline_sums", "offline_text", "offline_continued"}
    same = compare_harness(results["dequantized"], results["quantized"])
    assert same.kept == pytest.approx(1, abs=1e-4)
    assert same.verdict == "as good as the original"


@pytest.mark.parametrize("which", ["original", "quantized"])
def test_rolling_perplexity_is_the_harnesss_word_perplexity(which, text, manager, folders):
    """The harness is called as its users do; of a quantized model it does not know."""
    import lm_eval

    arguments = {"pretrained": str(folders[which]), "max_length": WINDOW, "dtype": "float32"}
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=arguments,
        tasks=["offline_text"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
        limit=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(folders[which])
    model = AutoModelForCausalLM.from_pretrained(folders[which], dtype=torch.float32)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    ours = optq.perplexity(model, ids, WINDOW, protocol="rolling")
    theirs = found["results"]["offline_text"]["word_perplexity,none"]
    assert math.exp(ours.loss / words_of(text)) == pytest.approx(theirs, rel=1e-4)


def test_tasks_are_run_from_the_command_line(manager, monkeypatch, capsys, folders):
    import lm_eval

    with_task = partial(lm_eval.simple_evaluate, task_manager=manager)
    monkeypatch.setattr(lm_eval, "simple_evaluate", with_task)
    options = ["--lm-eval", "offline_sums", "--device", "cpu", "--dtype", "float32", "--json"]
    assert main(["compare", str(folders["original"]), str(folders["quantized"]), *options]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    (task,) = table["tasks"]
    assert task["name"] == "offline_sums"
    assert 0 <= task["quantized"] <= 1
    assert task["margin"] >= 0
