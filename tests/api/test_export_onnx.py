# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime computes with exported models, beside what we compute."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

import optq
from conftest import save_tiny_llama, save_tiny_tokenizer, tiny_llama_config
from optq import GPTQConfig
from optq.api import export_onnx as exporting
from optq.cli import main
from optq.errors import CheckpointError, ConfigError, ModelError, OutputError
from optq.version import how_to_install

onnx = pytest.importorskip("onnx", reason="exporting needs the package onnx")
pytest.importorskip("onnxscript", reason="exporting needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported models are run in onnxruntime")

pytestmark = pytest.mark.slow
MIXED = {
    "sym": False,
    "lm_head": True,
    "group_size": -1,
    "dynamic": {r"+:.*\.q_proj": {"bits": 8}, r"+:.*\.down_proj": {"bits": 2}, r"-:.*\.v_proj": {}},
}
FILES = ("model.onnx", "model.onnx.data")


def quantized(dense, rows, folder, **settings):
    config = GPTQConfig(**{"bits": 4, "group_size": 32, **settings}, effort="fast", dataset=rows, quality_gate="off")
    return optq.quantize(dense, config, output_dir=folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A llama of one block: torch's exporter takes its time for each."""
    return save_tiny_llama(tmp_path_factory.mktemp("dense"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def checkpoint(dense, token_rows, tmp_path_factory):
    return quantized(dense, token_rows, tmp_path_factory.mktemp("onnx") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint):
    return optq.export_onnx(checkpoint, output_dir=checkpoint.parent / "exported")


def logits_in_onnxruntime(folder, ids, mask):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(logits)


def assert_same_logits(folder, checkpoint, ids):
    """With a row whose first tokens are padding, in another shape than the model was traced with."""
    mask = torch.ones_like(ids)
    mask[-1, :5] = 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        unmasked = model(input_ids=ids).logits
    found, seen = logits_in_onnxruntime(folder, ids, mask), mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
    # Negative control: without the mask, other logits would have come out.
    assert not torch.allclose(unmasked[seen], expected[seen], rtol=1e-2, atol=1e-2)


def operators(folder):
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


def test_logits_are_ours(checkpoint, exported, probe_ids):
    assert len(operators(exported)) == 7
    assert_same_logits(exported, checkpoint, probe_ids)


@pytest.mark.long
def test_logits_of_2_4_and_8_bits_with_a_group_per_row_a_quantized_head_and_a_dense_layer_are_ours(
    dense, token_rows, probe_ids, tmp_path
):
    checkpoint = quantized(dense, token_rows, tmp_path / "checkpoint", **MIXED)
    folder = optq.export_onnx(checkpoint, output_dir=tmp_path / "exported")
    assert len(operators(folder)) == 7  # six and the head
    assert_same_logits(folder, checkpoint, probe_ids)


@pytest.mark.long
def test_asymmetric_grids_in_the_second_format_and_activation_order_biases_and_an_untied_head_are_kept(
    token_rows, probe_ids, tmp_path
):
    torch.manual_seed(0)
    settings = {
        **tiny_llama_config(num_hidden_layers=1).to_dict(),
        "model_type": "qwen2",
        "tie_word_embeddings": False,
    }
    model = AutoModelForCausalLM.from_config(Qwen2Config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(tmp_path / "dense")
    save_tiny_tokenizer(tmp_path / "dense")
    second = {"sym": False, "format": "gptq_v2", "desc_act": True}
    checkpoint = quantized(tmp_path / "dense", token_rows, tmp_path / "checkpoint", **second)
    folder = optq.export_onnx(checkpoint, output_dir=tmp_path / "exported")
    assert len(operators(folder)) == 7
    assert_same_logits(folder, checkpoint, probe_ids)


def test_the_folder_is_complete_and_the_model_is_valid(checkpoint, exported):
    assert {path.name for path in exported.iterdir()} == {
        *FILES,
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (exported / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    onnx.checker.check_model(str(exported / "model.onnx"))
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "logits": ["batch", "length", 128],
    }


def test_operators_have_the_checkpoints_bits_and_groups(exported):
    attributes = [{attribute.name: attribute.i for attribute in node.attribute} for node in operators(exported)]
    assert {(found["bits"], found["block_size"]) for found in attributes} == {(4, 32)}
    assert {(found["K"], found["N"]) for found in attributes} == {(64, 64), (64, 32), (64, 96), (96, 64)}


def test_nothing_of_this_machine_is_in_the_files(exported):
    for file in FILES:
        assert b".py" not in (exported / file).read_bytes()


@pytest.mark.long
def test_exporting_again_from_the_command_line_gives_the_same_bytes_and_says_where(
    checkpoint, exported, tmp_path, capsys, optqs_logging_as_before
):
    assert main(["onnx", str(checkpoint), str(tmp_path / "again")]) == 0
    assert f"{tmp_path / 'again'} holds model.onnx" in capsys.readouterr().out
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (exported / file).read_bytes()


def test_a_layer_that_the_operator_cannot_compute_is_named_and_nothing_is_left(dense, token_rows, tmp_path):
    mixed = {r"+:.*\.0\.mlp\.up_proj": {"bits": 3}}
    checkpoint = quantized(dense, token_rows, tmp_path / "checkpoint", dynamic=mixed)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj has 3 bits.* 2, 4 or 8"):
        optq.export_onnx(checkpoint, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_path_depends_on_its_data_is_refused(token_rows, tmp_path):
    settings = {**tiny_llama_config(num_hidden_layers=1).to_dict(), "model_type": "qwen3_moe", "head_dim": 16}
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings, **sizes)).save_pretrained(tmp_path / "dense")
    save_tiny_tokenizer(tmp_path / "dense")
    checkpoint = quantized(tmp_path / "dense", token_rows, tmp_path / "checkpoint")
    with pytest.raises(ModelError, match=r"cannot trace Qwen3MoeForCausalLM: .* mixtures of experts"):
        optq.export_onnx(checkpoint, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told(checkpoint, tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"is no GPTQ checkpoint.* torch\.onnx\.export"):
        optq.export_onnx(tiny_llama, output_dir=tmp_path / "out")
    other = tmp_path / "compressed-tensors"
    optq.convert(checkpoint, output_dir=other, to="compressed-tensors")
    with pytest.raises(CheckpointError, match=r"is no GPTQ checkpoint\. optq\.convert makes one"):
        optq.export_onnx(other, output_dir=tmp_path / "out")
    with pytest.raises(OutputError, match="is not empty"):
        optq.export_onnx(checkpoint, output_dir=checkpoint)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=re.escape(f"needs the packages onnx and onnxscript: {how_to_install('onnx')}")
    ):
        optq.export_onnx(checkpoint, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
