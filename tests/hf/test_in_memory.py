# SPDX-License-Identifier: Apache-2.0
"""`optq.quantize` of a model object: the same result as from its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, Qwen3MoeConfig

import optq
from optq import GPTQConfig, QuantLinear
from optq.errors import CalibrationError, ConfigError, ModelError, OutputError


@pytest.fixture
def config(token_rows) -> GPTQConfig:
    return GPTQConfig(bits=4, group_size=32, dataset=token_rows)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_the_object_itself_becomes_what_loading_its_folder_gives(tiny_llama, config, quantized, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    assert optq.quantize(model, config) is model
    assert model.training
    assert_same(model.state_dict(), quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(probe_ids).logits, quantized(probe_ids).logits)
    assert model.config.quantization_config == quantized.config.quantization_config
    assert (model.is_quantized, model.quantization_method) == (True, quantized.quantization_method)


def test_its_checkpoint_is_that_of_its_folder(tiny_llama, config, tmp_path):
    optq.quantize(tiny_llama, config, output_dir=tmp_path / "from folder")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    optq.quantize(model, config, output_dir=tmp_path / "from memory")
    assert_same(tensors_in(tmp_path / "from memory"), tensors_in(tmp_path / "from folder"))
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "from memory" / name).read_bytes() == (tmp_path / "from folder" / name).read_bytes()
    assert (
        "4 bits" in (tmp_path / "from memory" / "README.md").read_text()
        or "4-bit" in (tmp_path / "from memory" / "README.md").read_text()
    )
    assert not list((tmp_path / "from memory").glob(".*"))


def test_other_models_of_the_same_config_stay_as_they_are(tiny_llama, config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    other = AutoModelForCausalLM.from_config(model.config)
    optq.quantize(model, config)
    assert model.config is model.model.config is model.model.layers[0].self_attn.config
    other.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("where", ["subfolder", "nowhere", "beside", "passed"])
def test_a_checkpoint_without_a_tokenizer_is_said(tiny_llama, config, tmp_path, caplog, where):
    place = tmp_path / "model" / ("inside" if where != "beside" else "")
    shutil.copytree(tiny_llama, place)
    subfolder = {} if where == "beside" else {"subfolder": "inside"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **subfolder)
    if where == "nowhere":
        model.config.name_or_path = ""
    config.effort = "fast"
    if where == "passed":
        config.tokenizer = AutoTokenizer.from_pretrained(place)
    optq.quantize(model, config, output_dir=tmp_path / "out")
    assert ("without a tokenizer" in caplog.text) == (where in ("subfolder", "nowhere"))
    assert (tmp_path / "out" / "tokenizer.json").exists() == (where in ("beside", "passed"))


@pytest.mark.parametrize("part", ["", ".mlp", ".self_attn.q_proj"])
def test_a_shared_layer_is_refused_before_the_work(tiny_llama, config, part):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.set_submodule(f"model.layers.1{part}", model.get_submodule(f"model.layers.0{part}"))
    with pytest.raises(
        ModelError, match=r"one linear under several names: model\.layers\.0.*, model\.layers\.1.*deepcopy"
    ):
        optq.quantize(model, config)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_what_counts_is_in_memory_not_in_the_folder(tiny_llama, config, quantized):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    optq.quantize(model, config)
    ours, folders = (m.model.layers[1].mlp.down_proj.scales for m in (model, quantized))
    torch.testing.assert_close(ours.float(), 2 * folders.float(), rtol=0.1, atol=0)


def test_a_model_that_has_no_folder(config, tmp_path, probe_ids):
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**settings, vocab_size=128, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    )
    optq.quantize(model, config, output_dir=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(probe_ids).logits, model.eval()(probe_ids).logits)


def test_an_encoder_in_bfloat16(token_rows):
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    model = BertModel(bert).bfloat16()
    optq.quantize(model, GPTQConfig(bits=8, group_size=32, effort="fast", dataset=token_rows))
    assert isinstance(model.encoder.layer[0].output.dense, QuantLinear)
    assert model(torch.tensor([[5, 6, 7]])).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.slow
def test_it_writes_its_own_calibration_text_itself(tiny_llama):
    config = GPTQConfig(bits=4, group_size=32, effort="fast", num_samples=4, model_seqlen=16)
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    generation = model.generation_config
    optq.quantize(model, config)
    assert_same(model.state_dict(), expected.state_dict())
    assert model.generation_config is generation


def test_texts_are_encoded_by_the_tokenizer_that_is_passed(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [f"some text about {subject} " * 4 for subject in ("cats", "dogs", "fish")]
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=texts, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config._name_or_path = ""
    optq.quantize(model, config)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_hooks_that_move_activations_between_devices_do_not_matter(tiny_llama, config, quantized, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    placement = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"), "cpu")
    dispatch_model(model, {**placement, "model.rotary_emb": "cpu", "lm_head": "cpu"}, "cpu", force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    optq.quantize(model, config)
    with torch.no_grad():
        assert torch.equal(model(probe_ids).logits, quantized(probe_ids).logits)


def test_offloaded_weights_are_refused(tiny_llama, config):
    model = cpu_offload(AutoModelForCausalLM.from_pretrained(tiny_llama), "cpu")
    with pytest.raises(ModelError, match="offloaded"):
        optq.quantize(model, config)


def test_what_is_refused_before_the_work_leaves_the_model_as_it_was(tiny_llama, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        before = model(probe_ids).logits
    with pytest.raises(CalibrationError):
        optq.quantize(model, GPTQConfig(bits=4, group_size=32, dataset=[{"input_ids": [5000, 1, 2]}]))
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(model(probe_ids).logits, before)


def refused(kind: str, tiny_llama: Path, quantized: Any) -> Any:
    if kind == "quantized":
        return quantized
    if kind == "adapted":
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules=["q_proj"]))
    if kind == "with adapters inside":
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
        return model
    if kind == "without weights":
        return AutoModelForCausalLM.from_pretrained(tiny_llama).to("meta")
    return torch.nn.Linear(64, 64)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("quantized", r"quantized already \(gptq\)"),
        ("adapted", "merge_and_unload"),
        ("with adapters inside", "adapters of PEFT"),
        ("without weights", "no weights in memory, such as model.embed_tokens.weight"),
        ("a linear", "no model of transformers"),
    ],
)
def test_models_that_cannot_be_quantized_are_refused_by_name(
    kind, reason, tiny_llama, quantized, config, tmp_path, request
):
    if kind == "with adapters inside":
        request.getfixturevalue("transformers_adapters")
    with pytest.raises(ModelError, match=reason):
        optq.quantize(refused(kind, tiny_llama, quantized), config, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_of_from_pretrained_are_refused(tiny_llama, config):
    with pytest.raises(ConfigError, match="dtype"):
        optq.quantize(AutoModelForCausalLM.from_pretrained(tiny_llama), config, dtype="bfloat16")


def test_a_folder_needs_a_place_for_the_result(tiny_llama, config):
    with pytest.raises(ConfigError, match="pass output_dir="):
        optq.quantize(tiny_llama, config)


def test_a_folder_that_holds_something_is_left_alone(tiny_llama, config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(OutputError, match=r"notes\.txt"):
        optq.quantize(model, config, output_dir=tmp_path)
    assert not isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_fails_leaves_no_files(tiny_llama, config, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optq.hf.quantizing.quantize_model", fail)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(KeyboardInterrupt):
        optq.quantize(model, config, output_dir=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"quantization_log.jsonl"}
    assert "quantization_config" not in json.loads(model.config.to_json_string())


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, config, folder: optq.plan(model, config),
        lambda model, config, folder: optq.check(model, config, server="vllm"),
        lambda model, config, folder: optq.inspect(model),
        lambda model, config, folder: optq.kernel_choices(model),
        lambda model, config, folder: optq.evaluate(model, dataset=["text"]),
        lambda model, config, folder: optq.compare([model], dataset=["text"]),
        lambda model, config, folder: optq.bench(model),
        lambda model, config, folder: optq.convert(model, output_dir=folder, to="gptq_v2"),
        lambda model, config, folder: optq.export_onnx(model, output_dir=folder),
        lambda model, config, folder: optq.card(model),
        lambda model, config, folder: optq.push(model, "user/name"),
    ],
    ids=["plan", "check", "inspect", "kernels", "evaluate", "compare", "bench", "convert", "onnx", "card", "push"],
)
def test_what_takes_no_object_says_so(verb, quantized, config, tmp_path):
    with pytest.raises(ModelError, match=r"folder is needed here, not a LlamaForCausalLM.*save_pretrained"):
        verb(quantized, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
