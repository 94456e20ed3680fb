# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality.py and downstream.py on tiny models: what they measure, and that no row mixes versions."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from conftest import save_tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import downstream
    import quality
    import real_models
    import tables
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

GRID = {"bits": 3, "group_size": 32, "sym": True}
CAUSAL = replace(quality.SMOLLM2, window=24, calibration=4, evaluation=3, compared=2)
ENCODER = replace(CAUSAL, embeds=True, evaluation=60, compared=60)
TEXT = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz .,", k=1600))
QUESTIONS = [
    downstream.Question(prompt="Q: a\nA:", choices=("b", "cde", "fg"), worth=(0.0, 1.0, 0.0)),
    downstream.Question(prompt="Q: xyz\nA:", choices=("yes", "no"), worth=(1.0, 0.0)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part in ("valid", "test"):
        (folder / f"wikitext2-{part}.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    BertModel(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_quantized_model_is_judged_by_its_difference_from_the_original(kind, tiny_llama, encoder, data, tmp_path):
    model, folder = (CAUSAL, str(tiny_llama)) if kind == "causal" else (ENCODER, str(encoder))
    calibration = tmp_path / "calibration.json"
    rows = quality.calibration_rows(AutoTokenizer.from_pretrained(folder), data / "wikitext2-valid.txt", model)
    calibration.write_text(json.dumps(rows))
    settings = {**GRID, "effort": "fast", "quality_gate": "off"}
    figures = quality.quantize_ours(model, folder, calibration, tmp_path / "made", settings, seed=1)
    assert figures["cpu_seconds"] > 0
    found = quality.evaluate(model, folder, tmp_path / "made", None, data)
    itself = quality.evaluate(model, folder, None, None, data)
    rounded = quality.evaluate(model, folder, None, GRID, data)
    if kind == "causal":
        assert itself["divergence"] == 0 and itself["agreement"] == 1
        assert 0 < found["divergence"] < rounded["divergence"]
    else:
        assert itself == {"cosine": 1.0, "neighbours": 1.0}
        assert rounded["cosine"] < found["cosine"] < 1
        assert found["neighbours"] < 1


def test_seeds_have_no_token_in_common_and_windows_have_their_special_tokens(tiny_llama, data, tmp_path):
    tokenizer, text = AutoTokenizer.from_pretrained(tiny_llama), tmp_path / "text.txt"
    text.write_text("".join(chr(code) for code in range(40, 120)))  # no character twice, a token each
    first, second = (quality.calibration_rows(tokenizer, text, replace(CAUSAL, window=10), seed) for seed in (0, 1))
    joined = [token for row in first + second for token in row]
    assert len(joined) == len(set(joined)) == 80
    with pytest.raises(ValueError, match=r"has 80 tokens, and windows 8 … 11 of 10 need 120\. Ask for fewer"):
        quality.calibration_rows(tokenizer, text, replace(CAUSAL, window=10), seed=2)

    def around(content, **settings):
        plain = tokenizer(content, **settings)
        if settings.get("add_special_tokens", True):
            plain["input_ids"] = [1, *plain["input_ids"], 2]
        return plain

    assert quality.windows_of(around, text, 10, 2, first=1).tolist() == [[1, *joined[8:16], 2], [1, *joined[16:24], 2]]


def seed_of(divergence, version):
    return {
        "divergence": divergence,
        "cpu_seconds": 1.0,
        "peak_rss_mb": 7,
        "measured_at": {"with": version, "device": "elsewhere"},
    }


def test_a_rows_seeds_were_all_measured_with_the_same():
    row = quality.with_seed(None, 2, seed_of(0.5, "src a"))
    row = quality.with_seed(row, 0, seed_of(0.2, "src a"))
    assert list(row["seeds"]) == ["0", "2"]
    assert row["mean"] == {"divergence": 0.35} and row["range"] == {"divergence": [0.2, 0.5]}
    assert quality.with_seed(row, 2, seed_of(0.4, "src a"))["mean"] == {"divergence": 0.3}
    assert list(quality.with_seed(row, 1, seed_of(0.2, "src b"))["seeds"]) == ["1"]


def test_missing_is_what_this_version_has_not_measured(monkeypatch, tmp_path, data):
    source, calls = ["src a"], []

    def measure(name, row_name, data, calibration):
        calls.append((row_name, calibration))
        return seed_of(0.5, source[0])

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "calibration_file", lambda name, data, seed: seed)
    monkeypatch.setattr(quality.record, "source", lambda: source[0])
    monkeypatch.setattr(quality.record, "RESULTS", tmp_path)
    names = ["original", "3-bit g64 sym, optq default"]
    quality.measure_rows("minilm", data, [1, 2], names, missing=False)
    assert calls == [(names[0], 1), (names[1], 1), (names[1], 2)]
    for now, seeds in (("src a", [3]), ("src b", [1, 2, 3])):
        source[0], calls[:] = now, []
        quality.measure_rows("minilm", data, [1, 2, 3], names[1:], missing=True)
        assert calls == [(names[1], seed) for seed in seeds]
    assert list(quality.record.read("quality-minilm")) == names


def test_checkpoints_are_made_again_when_what_they_depend_on_changed(monkeypatch, tmp_path, data):
    calibration, calls, source = tmp_path / "0" / "calibration.json", [], ["src a"]
    calibration.parent.mkdir()
    calibration.write_text("[[1]]")

    def quantize(command, folder):
        calls.append(command[command.index("--quantize") + 2])
        Path(calls[-1]).mkdir(exist_ok=True)
        return {"cpu_seconds": len(calls)}

    monkeypatch.setattr(quality, "last_json", quantize)
    monkeypatch.setattr(quality.record, "source", lambda: source[0])
    for change, made in (("", 1), ("", 1), ("src b", 2), ("src b and uncommitted changes", 3), ("", 4), ("[[2]]", 5)):
        if change.startswith("src"):
            source[0] = change
        elif change:
            source[0] = "src b"
            calibration.write_text(change)
        found = quality.checkpoint_of("smollm2", "3-bit g64 sym, optq default", data, calibration)
        assert found is not None and found[1] == {"cpu_seconds": made}
    assert Path(calls[0]).parent == calibration.parent


def test_noise_takes_every_weight_of_the_blocks_off_its_lattice(monkeypatch, tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    def on_lattice(weight):
        runs = weight.view(-1, real_models.RUN)
        low, step = runs.amin(1, keepdim=True), (runs.amax(1, keepdim=True) - runs.amin(1, keepdim=True)) / 15
        return ((runs - low) / step).round().mul(step).add(low).view(weight.shape)

    source = tmp_path / "source"
    source.mkdir()
    before = load_file(tiny_llama / "model.safetensors")
    before = {name: on_lattice(weight) if "proj" in name else weight for name, weight in before.items()}
    save_file(before, source / "model.safetensors")
    monkeypatch.setattr(real_models.smollm2, "fetch", lambda: source)
    for made in ("one", "two"):
        real_models.off_lattice(tmp_path / made)
    after = load_file(tmp_path / "one/model.safetensors")
    assert all(
        torch.equal(tensor, after[name]) for name, tensor in load_file(tmp_path / "two/model.safetensors").items()
    )
    for name, weight in before.items():
        linear = "proj" in name
        assert (after[name] - weight).abs().max().gt(0) == linear
        if linear:
            runs, moved = weight.view(-1, real_models.RUN), (after[name] - weight).view(-1, real_models.RUN)
            steps = (runs.amax(1) - runs.amin(1)) / 15
            assert 0.2 < (moved.abs().amax(1) / steps).max() <= 0.2501
            assert min(len(run.unique()) for run in after[name].view(-1, real_models.RUN)) == real_models.RUN


def test_choices_are_scored_by_their_own_tokens(tiny_llama):
    model, tokenizer = CAUSAL.load(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for question in QUESTIONS:
        prompt = tokenizer(question.prompt).input_ids
        expected = []
        for choice in question.choices:
            tokens = tokenizer(f" {choice}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum())
        found = downstream.answer(model, tokenizer, question)
        assert torch.allclose(found, torch.stack(expected).log_softmax(0), atol=1e-5)


def test_answers_are_compared_with_the_originals():
    original = [torch.tensor([0.2, 0.5, 0.3]).double().log(), torch.tensor([0.4, 0.6]).double().log()]
    other = [original[0], torch.tensor([0.6, 0.4]).double().log()]
    same = downstream.compared(QUESTIONS, original, original)
    assert [same[name]["mean"] for name in ("agreement", "divergence", "accuracy")] == [1, 0, 0.5]
    assert same["agreement"]["interval"] == [1, 1] and same["accuracy"]["interval"] == [0, 1]
    found = downstream.compared(QUESTIONS, original, other)
    assert found["agreement"]["mean"] == 0.5 and found["accuracy"]["mean"] == 1
    assert found["divergence"]["mean"] == pytest.approx(0.2 * torch.tensor(1.5).log().item() / 2, abs=1e-5)


def test_questions_have_big_benchs_form():
    example = {"input": "How many?", "target_scores": {"two": 0, "four": 1}}
    (plain,) = downstream.questions_of({"examples": [example, example]}, 1)
    assert plain.prompt == "\nQ: How many?\n  choice: two\n  choice: four\nA:"
    assert plain.choices == ("two", "four") and plain.worth == (0, 1)
    own = {"task_prefix": "Think.", "example_input_prefix": "", "example_output_prefix": " "}
    (found, _) = downstream.questions_of({"examples": [example] * 2, **own, "append_choices_to_input": False}, 5)
    assert found.prompt == "Think.How many?"


def content(title, rows):
    settings = {"model": title, "note": "A note.", "calibration": "c", "evaluation": "e", "compared_windows": 1}
    return {
        "settings": settings,
        "results": rows,
        "environment": {"torch": "2", "transformers": "5", "device": "here"},
    }


def test_tables_show_what_was_measured_and_leave_out_what_was_not(monkeypatch):
    name = "3-bit g64 sym, optq default"
    several = quality.with_seed(quality.with_seed(None, 0, seed_of(0.2, "a")), 1, seed_of(0.4, "a"))
    embedding = {"cosine": 0.98, "neighbours": 0.5, "measured_at": {"with": "a", "device": "elsewhere"}}
    models = [
        content("One (float32)", {name: several}),
        content("Two (float32)", {"original": quality.with_seed(None, 0, embedding)}),
    ]
    monkeypatch.setattr(tables, "qualities", lambda: models)
    lines = tables.headlines().splitlines()
    assert "| weights | One: perplexity | One: KL divergence | One: CPU-s | Two: same ten nearest |" in lines
    assert f"| {name} |  | 0.3000 (0.2000 … 0.4000) | 1\\* |  |" in lines
    assert "| original |  |  |  | 50.0% |" in lines
    page = tables.quality()
    assert f"| {name} | 0.3000 (0.2000 … 0.4000) | 2 | 1\\* | 7 |" in page
    assert "those with * of elsewhere" in " ".join(page.split())
    assert "| original | 0.9800 | 50.0% |  |  |  |" in page
    assert page.count("lowest … highest") == 1  # only where there are several


def test_answers_have_a_table_once_there_are_some(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.downstream().startswith("Not measured yet")
    original = [torch.tensor([0.2, 0.5, 0.3]).double().log(), torch.tensor([0.4, 0.6]).double().log()]
    row = downstream.judged({"a": QUESTIONS}, {"a": original}, {"a": original})
    assert row["tasks"]["a"] == row["all"]
    file = tmp_path / "benchmarks/results/downstream.json"
    file.parent.mkdir(parents=True)
    settings = {"tasks": {"a": 2}, "intervals": "95 %"}
    file.write_text(json.dumps({"settings": settings, "results": {"m": {"original": row}}}))
    line = "| m | original | 100.0% (100.0% … 100.0%) | 0.0000 (0.0000 … 0.0000) | 50.0% (0.0% … 100.0%) |"
    assert tables.downstream().splitlines()[-1] == line
