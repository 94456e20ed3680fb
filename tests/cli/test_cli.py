# SPDX-License-Identifier: Apache-2.0
import argparse
import errno
import io
import json
import logging
import os
import pkgutil
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import optq
from optq.calibration import DATASETS
from optq.cli import COMMANDS, EXPORT, main
from optq.cli.command import DONE, EXIT_CODES, INTERNAL, MODEL, QUALITY, RESOURCES, USAGE, exit_code_of
from optq.cli.printing import print_table
from optq.config.fields import FIELDS
from optq.version import how_to_install


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 6)
    return str(file)


pytestmark = pytest.mark.usefixtures("optqs_logging_as_before")


@pytest.fixture
def run(capsys):
    """Call the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


SETTINGS = ("--group-size", 32, "--effort", "fast", "--seq-len", 32)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    arguments = ["quantize", "--model", tiny_llama, folder, *SETTINGS, "--dataset", text, "--quiet"]
    assert main([str(argument) for argument in arguments]) == DONE
    return folder


def has_one_line(words, err):
    """The error's line is one, says so, and holds the words."""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in err
    return True


# quantize


def test_quantizing_makes_a_checkpoint_and_says_how_to_judge_it(run, tiny_llama, text, tmp_path):
    code, out, err = run("quantize", "--model", tiny_llama, tmp_path / "out", *SETTINGS, "--dataset", text)
    assert code == DONE
    assert f"gptq compare {tiny_llama} {tmp_path / 'out'}" in out
    assert "model.layers.1: relative loss" in err  # a line for every block where there is no terminal
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["group_size"]) == (4, 32)


def test_the_options_of_qwens_script_are_understood(run, tiny_llama, tmp_path):
    chats = [{"messages": [{"role": "user", "content": "Say that again? " * 9}]}] * 3
    (tmp_path / "data.json").write_text(json.dumps(chats))
    arguments = ["--model_name_or_path", tiny_llama, "--data_path", tmp_path / "data.json", "--max_len", 64]
    arguments += ["--out_path", tmp_path / "out", "--bits", 4, "--group-size", 32]  # as its page prints them
    code, out, _ = run("quantize", *arguments, "--effort", "fast", "--json")
    assert code == DONE
    assert json.loads(out)["folder"] == str(tmp_path / "out")
    assert json.loads(out)["quality"]["perplexity_ratio"] > 0


def test_options_reach_the_config(run, tiny_llama, text, tmp_path):
    dynamic = '{"-:.*o_proj": {}, "+:.*v_proj": {"bits": 8}}'
    options = ["--bits", 3, "--no-sym", "--format", "gptq_v2", "--dynamic", dynamic, "--quiet"]
    code, _, err = run("quantize", "--model", tiny_llama, tmp_path / "out", *SETTINGS, "--dataset", text, *options)
    assert code == DONE
    assert "relative loss" not in err
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["sym"], stated["checkpoint_format"]) == (3, False, "gptq_v2")
    assert stated["dynamic"] == json.loads(dynamic)


def test_a_finished_folder_is_not_overwritten(run, tiny_llama, text, checkpoint):
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    code, out, _ = run("quantize", "--model", tiny_llama, checkpoint, *SETTINGS, "--dataset", text, "--quiet")
    assert code == DONE
    assert len(out.splitlines()) == 1 and f"{checkpoint} is finished." in out
    code, _, err = run("quantize", "--model", tiny_llama, checkpoint, *SETTINGS, "--dataset", text, "--seed", 5)
    assert code == RESOURCES
    assert has_one_line("another run: settings.seed was 0 and is 5", err) and "`gptq push` uploads that" in err
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", 5], "bits=5 was asked for; allowed are 2, 3, 4, 8"),
        (["--effort", "most"], "effort='most' was asked for"),
        (["--group-size", 48], "dividing sizes are"),
        (["--device", "cuda:7"], "device='cuda:7' was asked for; this machine has"),
        (["--dataset", "wikitext3"], "wikitext3"),
        (["--serving", "vllm", "--bits", 3], "vLLM does not read 3 bits"),
    ],
)
def test_wrong_settings_are_told_before_any_work(run, tiny_llama, text, tmp_path, options, words):
    code, _, err = run("quantize", "--model", tiny_llama, tmp_path / "out", *SETTINGS, "--dataset", text, *options)
    assert code == USAGE
    assert has_one_line(words, err)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", 5], "bits=5 was asked for; allowed are 2, 3, 4, 8"),
        (["--effort", "most"], "allowed are 'fast', 'default', 'max'"),
        (["--group-size", -2], "group_size=-2 was asked for"),
        (["--format", "exllama"], "allowed are gptq, gptq_v2"),
        (["--damp-percent", 2], "it is a fraction above 0 and below 1"),
        (["--dataset", "wikitext3"], "dataset='wikitext3' is neither a known name nor a readable file"),
        (["--fit", "eight"], "fit='eight' was asked for; it is a size such as '8GiB'"),
        (["--scheme", "W4A8"], "scheme='W4A8' was asked for; allowed are W2A16"),
        (["--scheme", "W4A16", "--bits", 8], "scheme='W4A16' stands for bits=4, group_size=128, sym=True, but bits=8"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_before_anything_heavy_is_imported(run, monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "optq.config.gptq", None)  # importing it fails
    monkeypatch.setitem(sys.modules, "optq.api.plan", None)
    code, _, err = run("plan", "--model", "x", *options)
    assert code == USAGE
    assert has_one_line(words, err)


def test_underscores_are_taken_for_hyphens(run, monkeypatch):
    found = []
    monkeypatch.setattr("optq.plan", lambda model, config, **kwargs: found.append((model, config)) or sys.exit(0))
    run("plan", "--model_name_or_path", "x", "--data_path=wikitext2", "--max_len", 64, "--group_size", 32)
    ((model, config),) = found
    assert model == "x"
    assert (config.dataset, config.model_seqlen, config.group_size) == ("wikitext2", 64, 32)


@pytest.mark.parametrize("command", [("quantize", "out"), ("plan",)])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--group-szie", "there is no such option. Did you mean --group-size?"),
        ("-bits", "there is no such option. Did you mean --bits?"),
        ("--seqlen=64", "another tool's name. Here it is --model-seqlen"),
        ("--nsamples", "another tool's name. Here it is --num-samples"),
        ("--cache-examples-on-gpu", "Here it is --activation-memory"),
        ("--use_exllama", "has no counterpart here"),
        ("--max-shard-size", "write it with save_pretrained(..., max_shard_size=...)"),
    ],
)
def test_an_option_that_there_is_not_gets_the_nearest(run, command, option, words):
    name, *output = command
    code, _, err = run(name, *output, "--model", "x", option, 64)
    assert code == USAGE
    assert f"{option.partition('=')[0]} was given; " in err and words in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--dynamic", '{"+:.*": {"bit": 8}}'],
            "dynamic: '+:.*': bit=8 was asked for; there is no such setting. Did you",
        ),
        (["--dynamic", "[]"], "dynamic=[] was asked for"),
        (["--damp-percent", 0], "damp_percent=0.0 was asked for; it is a fraction above 0"),
        (["--damp-percent", "nan"], "damp_percent=nan was asked for"),
        (["--num-samples", 0], "num_samples=0 was asked for"),
        (["--device", ""], "device='' was asked for"),
        (["--activation-memory", '{"cpu": true}'], "activation_memory={'cpu': True} was asked for"),
        (["--modules-in-block-to-quantize", '"mlp"'], "it is a list of names inside a block"),
    ],
)
def test_values_of_options_are_checked_like_those_of_fields(run, options, words):
    code, _, err = run("plan", "--model", "x", *options)
    assert code == USAGE
    assert has_one_line(words, err)


def test_every_field_with_an_option_reaches_the_config(run, monkeypatch):
    found = []
    monkeypatch.setattr("optq.plan", lambda model, config, **kwargs: found.append(config) or sys.exit(0))
    texts = {"effort": "fast", "grid": "minmax", "quality_gate": "off", "serving": "vllm", "format": "gptq_v2"}
    texts |= {"backend": "reference", "scheme": "W3A16_ASYM", "fit": "8GiB", "dataset": "self"}
    monkeypatch.setattr("optq.api.check.servable_group_size", lambda *arguments, **kwargs: None)  # would load x
    values = {dict: '{"cpu": 5}', list: '["a"]', int: "8", float: "0.5", str: "text", object: "cpu"}
    for field in FIELDS.values():
        for flag in field.flags:
            value = texts.get(field.name, '{"-:a": {}}' if field.name == "dynamic" else values.get(field.kind, ""))
            beside = ["--fit", "8GiB"] if field.name == "context_length" else []
            run("plan", "--model", "x", *([flag] if field.kind is bool else [flag, value]), *beside)
            if field.name == "scheme":
                made = found.pop()
                assert (made.bits, made.sym) == (3, False)
                continue
            assert getattr(found.pop(), field.name) not in (None, field.default) or field.default is True
            if field.kind is bool:
                run("plan", "--model", "x", flag.replace("--", "--no-"))
                assert getattr(found.pop(), field.name) is False


def test_a_model_that_is_not_there_is_told(run, text, tmp_path):
    code, _, err = run("quantize", "--model", tmp_path / "nowhere", tmp_path / "out", "--dataset", text)
    assert code == MODEL
    assert has_one_line("nowhere", err)


def test_a_wrong_path_is_not_taken_for_a_fault_of_the_network(run, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    for path, words in {
        "models/tiny-lama": "There is no folder 'models/tiny-lama' in ",
        "tiny-lama": "There is no folder 'tiny-lama' in ",
        "./models/tiny-lama": "There is no folder './models/tiny-lama', and a model's id on the Hub is no path.",
        str(tmp_path / "models/tiny-lama"): "models/tiny-lama', and a model's id on the Hub is no path.",
    }.items():
        code, _, err = run("inspect", path)
        assert code == MODEL
        assert has_one_line(words, err)
        assert ("models/tiny-llama'?" in err) == ("models" in path)


def test_a_file_or_nothing_where_a_folder_is_expected_is_named(run, tiny_llama, text, tmp_path):
    for model, words in ((text, "text.txt' is a file. Name a model's folder"), ("", "'' is no name. Name a model's")):
        for command in (("plan", "--model"), ("inspect",), ("bench",)):
            code, _, err = run(*command, model)
            assert code == MODEL
            assert has_one_line(words, err)
    code, _, err = run("quantize", "--model", tiny_llama, "", "--dataset", text)
    assert code == RESOURCES
    assert has_one_line("output_dir='' names no folder", err)


def test_a_dataset_that_is_there_but_not_read_is_not_called_missing(run, tiny_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    for name, words in {"empty": "is a folder without files of text", "weights.bin": "of a kind that is not"}.items():
        code, _, err = run("plan", "--model", tiny_llama, "--dataset", tmp_path / name)
        assert code == USAGE
        assert has_one_line(words, err)


def test_dynamic_must_be_json(run, tiny_llama, tmp_path):
    code, _, err = run("quantize", "--model", tiny_llama, tmp_path, "--dynamic", "{-:o_proj}")
    assert code == USAGE
    assert "is not valid JSON" in err


def test_a_red_gate_has_an_exit_code_of_its_own(run, tiny_llama, text, tmp_path):
    options = ["--bits", 2, "--quality-gate", "raise", "--max-perplexity-ratio", 0.5]
    code, _, err = run("quantize", "--model", tiny_llama, tmp_path / "out", *SETTINGS, "--dataset", text, *options)
    assert code == QUALITY
    assert has_one_line("above the limit of 0.5", err)


# plan


def test_a_plan_reads_no_weights_and_writes_nothing(run, tiny_llama, text, tmp_path):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    shutil.copy(tiny_llama / "tokenizer_config.json", tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, _ = run("plan", "--model", tmp_path, *SETTINGS, "--dataset", text, "--json")
    assert code == DONE
    facts = json.loads(out)
    assert facts["blocks"] == 2
    assert facts["fits"] is True
    assert sum(linear["count"] for linear in facts["linears"]) == 14
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_is_a_plan(run, tiny_llama, text, tmp_path):
    settings = ["--model", tiny_llama, *SETTINGS, "--dataset", text]
    dry = run("quantize", tmp_path / "out", *settings, "--dry-run")
    planned = run("plan", *settings)
    lines, expected = ([line for line in out.splitlines() if "are free" not in line] for _, out, _ in (dry, planned))
    assert (dry[0], lines) == (planned[0], expected)  # what is free may have changed in between
    assert "bits per weight" in dry[1]
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_has_an_exit_code(run, tiny_llama, text, monkeypatch):
    monkeypatch.setattr("optq.api.plan.free_bytes", lambda device: 1000)
    code, out, _ = run("plan", "--model", tiny_llama, *SETTINGS, "--dataset", text)
    assert code == RESOURCES
    assert "does not fit; try" in out


def test_whom_it_is_for_decides_what_is_not_asked_for(run, tiny_llama, text):
    code, out, err = run("plan", "--model", tiny_llama, "--dataset", text, "--for", "vllm")
    assert code == DONE
    assert "--group-size 32: with 128, vllm would not read it" in err and "groups of 32" in out
    code, _, err = run("plan", "--model", tiny_llama, "--dataset", text, "--for", "vllm", "--group-size", 64)
    assert code == USAGE
    assert has_one_line("group_size=32 would be read", err)


def test_a_plan_says_who_will_read_it(run, tiny_llama, text):
    settings = ["--model", tiny_llama, *SETTINGS, "--dataset", text]
    assert "vLLM 0.33 and GPTQModel 7.6 read it." in run("plan", *settings)[1]
    assert "96 inputs in 2 parts" in run("plan", *settings, "--tensor-parallel", 2)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--bits", 7], "bits=7 was asked for"), (["--dataset", "wikitext"], "Did you mean 'wikitext2'")],
)
def test_a_plan_that_makes_no_sense_is_refused(run, tiny_llama, text, options, words):
    code, _, err = run("plan", "--model", tiny_llama, *SETTINGS, "--dataset", text, *options)
    assert code == USAGE
    assert has_one_line(words, err)


@pytest.mark.parametrize("command", [["plan", "--model", "x"], ["inspect", "x"]])
def test_a_model_is_served_by_one_gpu_at_least(run, command):
    code, _, err = run(*command, "--tensor-parallel", 0)
    assert code == USAGE
    assert "0 is not a positive whole number" in err


# inspect


def test_inspecting_says_what_is_stored_and_who_reads_it(run, checkpoint):
    code, out, _ = run("inspect", checkpoint)
    assert code == DONE
    assert "model.layers.*.self_attn.q_proj" in out
    assert "vllm 0.33 reads it" in out
    assert "vllm 0.29 reads it" in run("inspect", checkpoint, "--reader", "vllm=0.29")[1]
    code, out, _ = run("inspect", checkpoint, "--json")
    assert json.loads(out)["linears"][0]["bits"] == 4


def test_a_dense_model_is_said_to_be_one(run, tiny_llama):
    code, out, _ = run("inspect", tiny_llama)
    assert code == DONE
    assert "not quantized; 32.00 bits per weight" in out


def test_a_wrong_label_is_an_error_for_scripts(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(
        path.read_text().replace('"gptq"', '"gptq_v2"').replace('"quant_method": "gptq_v2"', '"quant_method": "gptq"')
    )
    code, out, _ = run("inspect", tmp_path / "copy")
    assert code == MODEL
    assert "WRONG: " in out
    assert run("inspect", tmp_path / "copy", "--json")[0] == MODEL


def test_what_is_no_checkpoint_is_told(run, tmp_path):
    code, _, err = run("inspect", tmp_path)
    assert code == MODEL
    assert has_one_line("config.json", err)


@pytest.mark.parametrize("command", [("quantize", "out"), ("evaluate",)])
def test_a_dtype_in_which_nothing_is_computed_is_refused(run, tiny_llama, command):
    name, *output = command
    code, _, err = run(name, tiny_llama, *output, "--dtype", "int8")
    assert code == USAGE
    assert "invalid choice: 'int8'" in err
    assert "float32" in err


# evaluate and compare

WINDOWS = ("--window", 64, "--stride", 32, "--dtype", "float32", "--device", "cpu")


def test_evaluating_names_both_protocols(run, checkpoint, text):
    code, out, _ = run("evaluate", checkpoint, "--dataset", text, *WINDOWS, "--markdown")
    assert code == DONE
    assert "perplexity, consecutive windows of 64" in out
    assert "perplexity, sliding window of 64, stride 32" in out
    assert "KL" not in out


@pytest.mark.slow
def test_beside_the_original_there_is_a_verdict(run, tiny_llama, checkpoint, text, monkeypatch):
    monkeypatch.setattr("optq.api.evaluate.ANSWER", 8)
    code, out, _ = run("evaluate", checkpoint, "--baseline", tiny_llama, "--dataset", text, *WINDOWS, "--answers")
    assert code == DONE
    assert "the original" in out
    assert "The capital of France is" in out
    assert any(verdict in out for verdict in ("as good as", "good", "usable", "poor"))


@pytest.mark.slow
def test_comparing_prints_markdown_and_json(run, tiny_llama, checkpoint, text):
    table = run("compare", tiny_llama, checkpoint, "--dataset", text, *WINDOWS, "--markdown")[1]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 4  # columns, rule, two models
    rows = json.loads(run("compare", tiny_llama, checkpoint, "--dataset", text, *WINDOWS, "--json")[1])
    assert [row["model"] for row in rows] == [str(tiny_llama), str(checkpoint)]
    assert rows[1]["comparison"]["divergence"] > 0
    assert rows[0]["verdict"] is None


def test_a_script_can_ask_for_a_limit(run, tiny_llama, checkpoint, text):
    arguments = ["compare", tiny_llama, checkpoint, "--dataset", text, *WINDOWS, "--tokens", 64, "--fail-above"]
    assert run(*arguments, 1000)[0] == DONE
    code, _, err = run(*arguments, 0.001)
    assert code == QUALITY
    assert has_one_line("--fail-above 0.001 was asked for; the perplexity, times the original's, is ", err)
    assert f" for {checkpoint}." in err


def test_a_limit_needs_something_to_compare_with(run, checkpoint, text, tmp_path):
    code, _, err = run("evaluate", checkpoint, "--dataset", text, "--fail-above", 1.1)
    assert code == USAGE
    assert has_one_line("name it as --baseline", err)
    files = harness_file(tmp_path, "fp", 0.60), harness_file(tmp_path, "quantized", 0.57)
    assert run("compare", *files, "--fail-above", 1.1)[0] == USAGE


def test_one_model_is_no_comparison(run, checkpoint, text):
    code, _, err = run("compare", checkpoint, "--dataset", text)
    assert code == USAGE
    assert has_one_line("`gptq evaluate` measures one", err)


def test_a_text_that_is_too_short_is_told(run, checkpoint, text):
    code, _, err = run("evaluate", checkpoint, "--dataset", text, "--window", 128, "--tokens", 100)
    assert code == USAGE
    assert has_one_line("has 100 tokens; at least 128", err)


def test_a_stride_as_long_as_the_window_is_told(run, checkpoint, text):
    code, _, err = run("evaluate", checkpoint, "--dataset", text, "--window", 64, "--stride", 64)
    assert code == USAGE
    assert has_one_line("stride=64 was asked for; it is a number from 1 to below the window", err)


def test_short_windows_slide_by_half_of_themselves(run, checkpoint, text):
    code, out, _ = run("evaluate", checkpoint, "--dataset", text, "--window", 64, "--markdown")
    assert code == DONE
    assert "sliding window of 64, stride 32" in out


def test_a_model_that_is_not_there_cannot_be_evaluated(run, text, tmp_path):
    code, _, err = run("evaluate", tmp_path / "nowhere", "--dataset", text)
    assert code == MODEL
    assert has_one_line("nowhere", err)


def harness_file(folder, name, accuracy):
    path = folder / f"results_{name}.json"
    path.write_text(json.dumps({"results": {"arc_easy": {"acc,none": accuracy, "acc_stderr,none": 0.01}}}))
    return path


def test_results_of_the_harness_are_compared(run, tmp_path):
    files = harness_file(tmp_path, "fp", 0.60), harness_file(tmp_path, "quantized", 0.57)
    code, out, _ = run("compare", *files)
    assert code == DONE
    assert "loses more than 2 %" in out
    assert "95.0% of the original's scores is left: usable" in out
    (table,) = json.loads(run("compare", *files, "--json")[1])
    assert table["kept"] == pytest.approx(0.95)


def test_a_missing_harness_is_told(run, tiny_llama, checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, err = run("compare", tiny_llama, checkpoint, "--lm-eval", "arc_easy")
    assert code == USAGE
    assert has_one_line("pip install lm-eval", err)


# bench and kernels


def test_speed_is_one_row_per_model_and_batch(run, tiny_llama, checkpoint):
    options = ["--batch-sizes", 1, 2, "--prompt", 8, "--new", 3, "--runs", 1]
    code, out, _ = run("bench", tiny_llama, checkpoint, *options, "--markdown")
    assert code == DONE
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 2 + 4
    speeds = json.loads(run("bench", checkpoint, *options, "--json")[1])
    assert [speed["batch"] for speed in speeds[str(checkpoint)]] == [1, 2]


@pytest.mark.parametrize("option", ["--batch-sizes", "--new", "--runs", "--prompt"])
def test_speed_needs_positive_numbers(run, checkpoint, option):
    code, _, err = run("bench", checkpoint, option, 0)
    assert code == USAGE
    assert "0 is not a positive" in err


def test_every_kind_of_linear_has_its_kernel(run, checkpoint):
    code, out, _ = run("kernels", checkpoint, "--device", "cpu", "--dtype", "bfloat16")
    assert code == DONE
    assert "not triton: " in out
    rows = json.loads(run("kernels", checkpoint, "--device", "cpu", "--json")[1])
    assert sum(row["count"] for row in rows) == 14


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_kernel_that_cannot_run_says_why(run, checkpoint):
    code, _, err = run("kernels", checkpoint, "--device", "cpu", "--backend", "triton")
    assert code == USAGE
    assert has_one_line("backend='triton' cannot run", err)


def test_a_dense_model_has_no_kernels(run, tiny_llama):
    code, _, err = run("kernels", tiny_llama)
    assert code == MODEL
    assert has_one_line("not quantized", err)


def test_an_unknown_device_is_told(run, checkpoint):
    code, _, err = run("kernels", checkpoint, "--device", "tpu")
    assert code == USAGE
    assert has_one_line("device='tpu' was asked for", err)


# all


@pytest.mark.parametrize("command", [EXPORT, *COMMANDS], ids=lambda command: command.name)
def test_help_lists_the_exit_codes(run, command):
    code, out, _ = run("quantize" if command is EXPORT else command.name, "--help")
    assert code == 0
    assert all(meaning in out for meaning in EXIT_CODES.values())


@pytest.mark.parametrize("command", [EXPORT, *COMMANDS], ids=lambda command: command.name)
def test_the_examples_of_the_help_are_understood(command):
    parser = argparse.ArgumentParser(prog="optq x")
    command.declare(parser)
    assert command.examples
    for example in command.examples:
        assert f"  optq x {example}\n" in parser.format_help()
        assert parser.parse_args(shlex.split(example))


def test_the_help_names_the_datasets(run):
    out = "".join(run("plan", "--help")[1].split())
    assert all(name in out for name in DATASETS.keys() - {"c4-new"})


def test_the_version_is_said(run):
    assert run("--version")[:2] == (0, f"optq {optq.__version__}\n")


def test_there_is_a_command_of_our_own(run, monkeypatch):
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(declared["optq"]) is main
    monkeypatch.setattr(sys, "argv", ["/usr/bin/optq"])
    assert run("plan", "--help")[1].startswith("usage: optq plan ")


def test_a_shell_completes_options_and_choices():
    pytest.importorskip("argcomplete", reason="completion needs the package argcomplete")
    ask = "import sys; sys.argv = ['optq']; from optq.cli import main; main()"
    for line, offered in {
        "optq pl": "plan",
        "optq plan --effort ma": "max",
        "optq plan --group": "--group-size",
    }.items():
        environment = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        environment |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
        ended = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
        assert offered in [found.strip() for found in ended.stdout.split("\n")]


def test_a_table_is_never_folded_inside_of_a_cell(monkeypatch, capsys):
    columns = ("model", "perplexity, consecutive windows of 256", "perplexity, sliding window of 256, stride 128")
    rows = [("a/model-of-some-length", "12.345", "12.345"), ("b", "1.5", "2.5")]
    print_table("", columns, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and any(line.split() == ["b", "1.5", "2.5"] for line in lines)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "30")
    print_table("", columns, rows)
    assert "b\n  perplexity, consecutive windows of 256: 1.5\n" in capsys.readouterr().out


def test_a_defect_is_called_one_and_debug_shows_where(run, checkpoint, monkeypatch):
    def broken(*arguments, **settings):
        raise IndexError("list index out of range")

    monkeypatch.setattr("optq.api.inspect.read_headers", broken)
    code, _, err = run("inspect", checkpoint)
    assert code == INTERNAL
    assert has_one_line("IndexError: list index out of range (a defect", err)
    assert "Traceback" in run("inspect", checkpoint, "--debug")[2]


class Full(io.StringIO):
    """A stream to a full disk, or to a terminal that is gone."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", [None, Full()], ids=["closed", "full"])
def test_without_a_standard_error_the_work_is_done_all_the_same(checkpoint, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["inspect", str(checkpoint)]) == DONE
    logging.getLogger("optq").warning("Nobody can read this.")
    assert main(["inspect", str(tmp_path / "nowhere")]) == MODEL
    sys.stderr.close()


def test_no_file_gets_the_place_of_a_standard_stream():
    """A library in C would write what it has to say into a checkpoint."""
    code = (
        "import os, sys; os.closerange(0, 3); sys.stdin = sys.stdout = sys.stderr = None; "
        "from optq.cli.command import _open_standard_streams as opened; opened(); "
        f"sys.exit(os.open({os.devnull!r}, os.O_RDONLY) <= 2 or sys.stderr is None)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_interruption_ends_with_the_shells_code():
    assert exit_code_of(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(("device", "code"), [("tpu", USAGE), ("cpu", MODEL)])
def test_what_cannot_be_timed_is_told(run, tmp_path, device, code):
    found, _, err = run("bench", tmp_path / "nowhere", "--device", device)
    assert found == code
    assert has_one_line("tpu" if code == USAGE else "nowhere", err)


# convert


def test_converting_says_what_the_folder_holds(run, checkpoint, tmp_path):
    code, out, _ = run("convert", checkpoint, tmp_path / "dense", "--to", "dense")
    assert code == DONE
    assert "the same weights as dense" in out
    assert "not quantized" in run("inspect", tmp_path / "dense")[1]


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [("awq", USAGE, "allowed are gptq, gptq_v2, compressed-tensors, dense"), ("dense", RESOURCES, "not empty")],
)
def test_what_cannot_be_converted_is_told(run, checkpoint, tmp_path, target, code, words):
    found, _, err = run("convert", checkpoint, tmp_path if target == "awq" else checkpoint, "--to", target)
    assert found == code
    assert has_one_line(words, err)


def test_a_dense_model_is_not_converted(run, tiny_llama, tmp_path):
    code, _, err = run("convert", tiny_llama, tmp_path / "out", "--to", "gptq")
    assert code == MODEL
    assert has_one_line("says nothing of quantization", err)


# onnx


def test_of_a_dense_model_no_onnx_model_is_made(run, tiny_llama, tmp_path):
    pytest.importorskip("onnxscript", reason="exporting needs the package onnxscript")
    code, _, err = run("onnx", tiny_llama, tmp_path / "out")
    assert code == MODEL
    assert has_one_line("no GPTQ checkpoint", err)


# report


def test_a_report_is_one_page_beside_the_run(run, checkpoint, tmp_path):
    code, out, _ = run("report", checkpoint, "--output", tmp_path / "report")
    assert code == DONE
    assert out.strip() == str(tmp_path / "report" / "report.html")
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_folder_without_a_log_is_told(run, tiny_llama, tmp_path):
    code, _, err = run("report", tiny_llama, "--output", tmp_path)
    assert code == USAGE
    assert has_one_line("quantization_log.jsonl", err)
    assert run("report", tmp_path / "nowhere", "--output", tmp_path)[0] == USAGE


def test_a_report_needs_matplotlib(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.delitem(__import__("sys").modules, "optq.report.figures", raising=False)
    monkeypatch.delattr("optq.report.figures", raising=False)
    code, _, err = run("report", checkpoint, "--output", tmp_path)
    assert code == USAGE
    assert has_one_line(how_to_install("report"), err)


# card


def test_the_card_is_printed(run, checkpoint):
    code, out, _ = run("card", checkpoint, "--repo-id", "someone/tiny")
    assert code == DONE
    assert "vllm serve someone/tiny" in out
    assert json.loads(run("card", checkpoint, "--json")[1])["card"].startswith("---")


def test_there_is_no_card_without_the_log_of_the_run(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "quantization_log.jsonl").unlink()
    code, _, err = run("card", tmp_path / "copy")
    assert code == USAGE
    assert has_one_line("holds no quantization_log.jsonl", err)


def test_there_is_no_card_of_a_dense_model(run, tiny_llama):
    code, _, err = run("card", tiny_llama)
    assert code == MODEL
    assert has_one_line("is not quantized", err)
