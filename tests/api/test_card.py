# SPDX-License-Identifier: Apache-2.0
import ast
import json
import re
import shlex
import shutil

import pytest
from huggingface_hub import ModelCard

import optq
from optq import GPTQConfig
from optq.api.card import INSTALLED
from optq.errors import CheckpointError, ReportError
from optq.report import read_run


@pytest.fixture(scope="module")
def original(tiny_llama, tmp_path_factory):
    """With a card of its own."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_llama, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(original, mixed_config, tmp_path_factory):
    return optq.quantize(original, mixed_config, output_dir=tmp_path_factory.mktemp("made") / "tiny-4bit")


def test_every_export_has_a_card(checkpoint):
    assert (checkpoint / "README.md").read_text() == optq.card(checkpoint)


def test_its_figures_are_those_that_were_measured(checkpoint):
    text = optq.card(checkpoint)
    log = [json.loads(line) for line in (checkpoint / "quantization_log.jsonl").read_text().splitlines()]
    (quality,) = [event for event in log if event["event"] == "quality"]
    assert f"| KL divergence, nats per token | {quality['divergence']:.4f} |" in text
    assert f"| perplexity, times the original's | {quality['perplexity_ratio']:.3f} |" in text
    assert f"On {quality['tokens']} tokens, rows held out of the calibration data" in text
    (started,) = [event for event in log if event["event"] == "started"]
    assert started["calibration"]["sha256"] in text
    assert "tokens in all are few" in text  # what the run warned of


def test_it_says_what_is_stored_how(checkpoint):
    text = optq.card(checkpoint)
    assert "| 4 bits, group size 32 | 10 linears |" in text
    assert "| 8 bits, group size 32 | 2 linears |" in text
    assert "| not quantized: `model.layers.*.self_attn.o_proj.weight` | 2 tensors |" in text


def test_the_hub_understands_it(checkpoint):
    data = ModelCard(optq.card(checkpoint, repo_id="someone/tiny-4bit")).data
    assert data.license == "mit"  # the original's
    assert data.library_name == "transformers"
    assert {"gptq", "4-bit", "optq"} <= set(data.tags)
    assert "vllm serve someone/tiny-4bit" in optq.card(checkpoint, repo_id="someone/tiny-4bit")


def test_no_path_of_this_machine_is_told(checkpoint, original):
    text = optq.card(checkpoint)
    assert str(original.parent) not in text
    assert "tiny, quantized with GPTQ" in text


def test_a_base_on_the_hub_is_named_as_such(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    log = folder / "quantization_log.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    events = [
        event | ({"model": "org/base", "from_folder": False} if event["event"] == "started" else {})
        for event in events
    ]
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    data = ModelCard(optq.card(folder)).data
    assert data.base_model == "org/base"
    assert data.base_model_relation == "quantized"
    assert data.license is None  # it could not be read from here


def test_the_verdict_is_that_of_the_report(original, token_rows, tmp_path):
    config = GPTQConfig(bits=2, group_size=32, effort="fast", dataset=token_rows)
    folder = optq.quantize(original, config, output_dir=tmp_path / "out")
    verdict = read_run(folder).verdict
    assert verdict is not None and f"| verdict | {verdict} |" in optq.card(folder)


def test_readers_that_refuse_it_are_not_recommended(original, token_rows, tmp_path):
    config = GPTQConfig(bits=3, group_size=32, effort="fast", dataset=token_rows)
    text = optq.card(optq.quantize(original, config, output_dir=tmp_path / "out"))
    assert "| vllm | no: all linears: 3 bits; use 4 or 8 |" in text
    assert f"| vllm+optq | {INSTALLED} beside vLLM, then `vllm serve out` |" in text
    assert "GPTQModel.load" in text


def test_a_run_without_a_gate_is_said_to_be_unjudged(original, token_rows, tmp_path):
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows, quality_gate="off")
    text = optq.card(optq.quantize(original, config, output_dir=tmp_path / "out"))
    assert "It was not compared with the original." in text
    assert "perplexity" not in text


def test_there_is_no_card_without_a_run(original, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="is not quantized"):
        optq.card(original)
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "quantization_log.jsonl").unlink()
    with pytest.raises(ReportError, match=r"holds no quantization_log\.jsonl"):
        optq.card(tmp_path / "copy")


HOSTILE = "a`b|c<script>alert(1)</script> [x](http://evil) $(touch x); 'y' \"z\""


def test_names_are_text_and_never_markup_or_commands(checkpoint):
    text = optq.card(checkpoint, repo_id=HOSTILE)
    escaped = re.sub(r"\\.", "", text)
    assert "<script>" not in re.sub("(`+).*?\\1", "", escaped)
    assert "](http" not in re.sub("(`+).*?\\1", "", escaped)
    rows = [line for line in text.splitlines() if line.startswith("| vllm |")]
    assert len(rows) == 1
    command = re.search("(`{2,}) (.*) \\1", rows[0])[2].replace("\\|", "|")
    assert shlex.split(command) == ["vllm", "serve", HOSTILE]
    call = re.search(r"(`{2,}) AutoModelForCausalLM\.from_pretrained\((.*)\) \1", text)[2].replace("\\|", "|")
    assert ast.literal_eval(call) == HOSTILE
    assert "# tiny-4bit_x\n" in optq.card(checkpoint, repo_id="tiny-4bit_x")  # negative control
