# SPDX-License-Identifier: Apache-2.0
"""The main path: quantize in from_pretrained, save, load, run, dequantize."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from conftest import rewritten
from optq import GPTQConfig, QuantLinear
from optq.errors import CalibrationError, CheckpointError, ConfigError, ModelError


def quantize(folder, rows, **changes):
    settings = {"bits": 4, "group_size": 32, "dataset": rows, **changes}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=GPTQConfig(**settings))


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


CASES = [
    {"bits": bits, "sym": sym, "group_size": group_size, "desc_act": desc_act, "format": form}
    for bits, sym, group_size, desc_act, form in (
        (4, True, 32, False, "gptq"),
        (4, False, 32, True, "gptq"),
        (4, False, 64, False, "gptq_v2"),
        (3, False, 32, False, "gptq"),
        (3, True, 64, True, "gptq"),
        (2, False, 16, False, "gptq"),
        (8, True, -1, False, "gptq"),
        (8, False, 32, False, "gptq"),
    )
]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_saved_and_loaded_logits_are_bit_identical_and_files_too(tiny_llama, token_rows, probe_ids, tmp_path, changes):
    model = quantize(tiny_llama, token_rows, **changes)
    assert len(quantized_layers(model)) == 14
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded, probe_ids), logits(model, probe_ids))
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one["quantization_config"] == two["quantization_config"]


def test_the_stock_config_class_works(tiny_llama, token_rows):
    stock = transformers.GPTQConfig(bits=4, group_size=32, dataset=list(token_rows))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=stock)
    assert len(quantized_layers(model)) == 14


def test_quantization_changes_the_outputs_a_little(tiny_llama, quantized, probe_ids):
    original = logits(AutoModelForCausalLM.from_pretrained(tiny_llama), probe_ids)
    change = (logits(quantized, probe_ids) - original).norm() / original.norm()
    assert 0.001 < change < 0.3


def test_text_is_encoded_with_the_tokenizer_of_the_models_folder(tiny_llama):
    model = quantize(tiny_llama, ["some text to calibrate on", "and some more of it"])
    assert model.config.quantization_config.meta["calibration"]["tokens"] == 25 + 19


def test_short_samples_are_packed_with_the_models_end_of_text(tiny_llama, tmp_path):
    texts = [f"number {index}" for index in range(40)]
    model = quantize(tiny_llama, texts, packing=True, model_seqlen=64)
    packed = sum(len(text) + 1 for text in texts)
    facts = model.config.quantization_config.meta["calibration"]
    assert facts["samples"] == -(-packed // 64)
    assert facts["tokens"] == packed
    shutil.copytree(tiny_llama, tmp_path / "endless")
    with rewritten(tmp_path / "endless/config.json") as config:
        config["eos_token_id"] = None
    with pytest.raises(ConfigError, match="packing=True joins texts by the model's eos_token_id"):
        quantize(tmp_path / "endless", texts, packing=True)


@pytest.mark.parametrize("as_object", [True, False])
def test_a_tokenizer_can_be_given_as_object_or_folder(tiny_llama, token_rows, tmp_path, as_object):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama) if as_object else str(tiny_llama)
    assert quantized_layers(quantize(bare, ["some text to calibrate on"], tokenizer=tokenizer))
    with pytest.raises(CalibrationError, match="no tokenizer could be loaded"):
        quantize(bare, ["some text to calibrate on"])


def test_the_checkpoint_has_the_tensors_of_the_format(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert {
        key: (tuple(tensors[f"{name}.{key}"].shape), tensors[f"{name}.{key}"].dtype)
        for key in ("qweight", "qzeros", "scales", "g_idx")
    } == {
        "qweight": ((12, 64), torch.int32),
        "qzeros": ((3, 8), torch.int32),
        "scales": ((3, 64), torch.float16),
        "g_idx": ((96,), torch.int32),
    }
    assert set(tensors[f"{name}.qzeros"].flatten().tolist()) == {0x77777777}
    assert f"{name}.weight" not in tensors


def test_tied_embeddings_stay_tied(saved, quantized):
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_config_json_holds_no_calibration_data(saved):
    written = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert not {"dataset", "tokenizer", "log_file"} & set(written)
    assert written["meta"]["quantizer"][0].startswith("optq:")
    assert written["meta"]["calibration"]["tokens"] == 15 * 48
    assert written["meta"]["calibration"]["held_out"] == 1
    assert (saved / "generation_config.json").exists()


def test_the_configs_of_the_caller_are_not_changed(tiny_llama, token_rows):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert config.dataset is token_rows
    assert config.meta is None


def test_large_models_are_sharded_with_an_index(quantized, tmp_path, probe_ids):
    quantized.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), probe_ids), logits(quantized, probe_ids))


def test_keys_unknown_to_us_survive_loading_and_saving(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "marked")
    with rewritten(tmp_path / "marked/config.json") as config:
        config["quantization_config"] |= {"is_marlin_format": False, "uuid": "abc"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "marked").save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert {"is_marlin_format": False, "uuid": "abc"}.items() <= again.items()


def test_dequantize_gives_plain_linears_with_the_same_outputs(saved, probe_ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    expected = logits(model, probe_ids)
    model.dequantize()
    assert not quantized_layers(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(model, probe_ids), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain, probe_ids), logits(model, probe_ids))


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(tiny_llama, token_rows, probe_ids, quantized, saved, device_map):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, device_map=device_map)
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
    if not torch.accelerator.is_available():
        assert torch.equal(logits(model, probe_ids), logits(quantized, probe_ids))
        assert torch.equal(logits(loaded, probe_ids), logits(quantized, probe_ids))


def test_loading_in_bfloat16_uses_the_fast_kernel_and_keeps_the_scales(saved, probe_ids, quantized, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map="cpu")
    layers = quantized_layers(model)
    assert {layer.kernel_name for layer in layers.values()} == {"cpu_int4"}
    assert {layer.scales.dtype for layer in layers.values()} == {torch.float16}
    torch.testing.assert_close(logits(model, probe_ids).float(), logits(quantized, probe_ids), rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    before, after = load_file(saved / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    packed = [name for name in before if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert len(packed) == 56
    assert all(torch.equal(before[name], after[name]) for name in packed)


def test_a_kernel_can_be_asked_for_by_name(saved):
    config = GPTQConfig(bits=4, backend="reference")
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, dtype=torch.bfloat16)
    assert {layer.kernel_name for layer in quantized_layers(model).values()} == {"reference"}


def test_generate_works(saved, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.generate(
        probe_ids, attention_mask=torch.ones_like(probe_ids), max_new_tokens=4, do_sample=False
    ).shape == (2, 28)


@pytest.mark.slow
def test_generate_compiled_for_a_static_cache_gives_the_same_tokens(saved, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.hf_quantizer.is_compileable
    model.config.num_hidden_layers = 1  # each is traced anew
    arguments = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(probe_ids[:1], **arguments)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(probe_ids[:1], **arguments), expected)


def test_a_head_that_another_thread_kept_from_being_tied_is_named(tiny_llama, token_rows, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "tie_weights", lambda *arguments, **settings: None)  # as transformers does
    with pytest.raises(ModelError, match=r"^lm_head\.weight has no values .* two threads at once"):
        AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=token_rows)
        )


def test_a_missing_g_idx_is_filled_in(saved, tmp_path, probe_ids, quantized):
    from safetensors.torch import save_file

    shutil.copytree(saved, tmp_path / "old")
    tensors = load_file(saved / "model.safetensors")
    save_file(
        {key: value for key, value in tensors.items() if not key.endswith("g_idx")},
        tmp_path / "old/model.safetensors",
        metadata={"format": "pt"},
    )
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "old"), probe_ids), logits(quantized, probe_ids)
    )


def test_layers_left_out_are_written_down_and_reloaded(tiny_llama, token_rows, probe_ids, tmp_path):
    model = quantize(tiny_llama, token_rows, dynamic={r"-:.*layers\.0\.mlp.*": {}, r"+:.*v_proj": {"bits": 8}})
    layers = quantized_layers(model)
    assert len(layers) == 11
    assert layers["model.layers.1.self_attn.v_proj"].bits == 8
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(quantized_layers(loaded)) == set(layers)
    assert torch.equal(logits(loaded, probe_ids), logits(model, probe_ids))


def test_conv1d_models_work(token_rows, tmp_path, probe_ids):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    model = quantize(tmp_path / "gpt2", token_rows)
    assert len(quantized_layers(model)) == 8
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, probe_ids), logits(model, probe_ids))


def test_a_generation_config_that_cannot_be_saved_is_mended_before_the_end(tiny_llama, token_rows, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "warm")
    (tmp_path / "warm/generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    model = quantize(tmp_path / "warm", token_rows)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.6


class TestRefusals:
    """Before any long work, with what was found and what to do."""

    def test_a_group_size_that_does_not_fit(self, tiny_llama, token_rows):
        with pytest.raises(ConfigError, match="not a multiple of group_size 100"):
            quantize(tiny_llama, token_rows, group_size=100)

    def test_token_ids_of_another_vocabulary(self, tiny_llama):
        with pytest.raises(CalibrationError, match="token id 5000"):
            quantize(tiny_llama, [{"input_ids": [5000] * 8}])

    def test_a_model_without_blocks(self, tiny_llama, token_rows):
        with pytest.raises(ModelError, match=r"model\.blocks"):
            quantize(tiny_llama, token_rows, block_name_to_quantize="model.blocks")

    def test_weights_that_are_not_finite(self, tiny_llama, token_rows, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.model.layers[1].self_attn.k_proj.weight.data[3, 5] = torch.inf
        model.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.k_proj"):
            quantize(tmp_path, token_rows)

    @pytest.mark.parametrize(("key", "value"), [("bits", 8), ("group_size", 64)])
    def test_labels_that_contradict_the_bytes(self, saved, tmp_path, key, value):
        shutil.copytree(saved, tmp_path / "wrong")
        with rewritten(tmp_path / "wrong/config.json") as config:
            config["quantization_config"][key] = value
        with pytest.raises(CheckpointError, match=rf"config\.json says.*{value}"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "wrong")

    def test_a_dense_checkpoint_that_says_it_is_quantized(self, tiny_llama, tmp_path):
        shutil.copytree(tiny_llama, tmp_path / "dense")
        with rewritten(tmp_path / "dense/config.json") as config:
            config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        with pytest.raises(CheckpointError, match="qweight"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
