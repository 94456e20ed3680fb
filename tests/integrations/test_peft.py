# SPDX-License-Identifier: Apache-2.0
"""LoRA on packed layers, through PEFT's and transformers' own calls."""

import copy
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, MixtralConfig, Trainer, TrainingArguments

from conftest import tiny_llama_config
from optq import GPTQConfig, QuantLinear
from optq.errors import AdapterError

peft = pytest.importorskip("peft")
from peft import AdaLoraConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def quantize(folder, rows):
    config = GPTQConfig(bits=4, group_size=32, dataset=rows)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.fixture(scope="module")
def mixtral(token_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    shape = {**tiny_llama_config().to_dict(), "num_local_experts": 4, "tie_word_embeddings": False}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MixtralConfig(**{name: shape[name] for name in names}, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return quantize(folder, token_rows)


def with_adapter(model, **settings):
    torch.manual_seed(3)
    settings = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "r": 4, **settings}
    return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


def trained(model):
    """As if trained: an adapter that changes the outputs."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model.eval()(ids, **kwargs).logits


def gradients(model, ids):
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["quantized here", "loaded"])
def test_twenty_steps_of_the_trainer_lower_the_loss_and_change_the_adapter_only(
    quantized, saved, token_rows, tmp_path, kind, source
):
    base = quantized if source == "quantized here" else AutoModelForCausalLM.from_pretrained(saved)
    model = with_adapter(base, **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    rows = [{**row, "labels": row["input_ids"]} for row in token_rows[:4]]
    arguments = TrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=4, learning_rate=0.02, report_to=[], use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * loss
    after = model.state_dict()
    assert sum(name.endswith("qweight") for name in before) == 14
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_pefts_own_layer_on_the_dequantized_weight(
    quantized, probe_ids, kind, dropout
):
    settings = {"lora_dropout": dropout, **KINDS[kind]}
    packed = trained(with_adapter(quantized, **settings))
    dense = trained(with_adapter(copy.deepcopy(quantized).dequantize(), **settings))
    assert type(dense.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is lora.Linear
    assert (logits(packed, probe_ids) - logits(quantized, probe_ids)).norm() > 1
    torch.testing.assert_close(logits(packed, probe_ids), logits(dense, probe_ids), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    found = gradients(packed, probe_ids)
    torch.manual_seed(0)
    expected = gradients(dense, probe_ids)
    assert len(found) == 2 * 3 * (3 if kind == "dora" else 2)
    assert all("lora_" in name for name in found)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_saved_adapter_gives_the_same_outputs_in_a_process_that_never_imports_optq(saved, probe_ids, tmp_path):
    model = trained(with_adapter(AutoModelForCausalLM.from_pretrained(saved)))
    model.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 2 * 3 * 2
    code = """
import sys
import peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
import torch
base, adapter, ids, logits = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, logits)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__module__)
print(AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__module__)
"""
    torch.save(probe_ids, tmp_path / "ids")
    arguments = [saved, tmp_path / "adapter", tmp_path / "ids", tmp_path / "logits"]
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)]
    said = subprocess.run(command, check=True, env=dict(os.environ), stdout=subprocess.PIPE, text=True).stdout
    assert said.split() == ["optq.integrations.peft", "optq.config.gptq"]  # with PEFT imported first
    found = torch.load(tmp_path / "logits")
    assert torch.equal(found, logits(model, probe_ids))
    assert not torch.equal(found, logits(model.unload(), probe_ids))


def test_transformers_own_adapter_calls_work_too(saved, probe_ids, tmp_path):
    model = trained(with_adapter(AutoModelForCausalLM.from_pretrained(saved)))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, probe_ids), logits(model, probe_ids))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), probe_ids), logits(model, probe_ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(quantized, probe_ids, reentrant):
    expected = gradients(trained(with_adapter(quantized)), probe_ids)
    prepared = prepare_model_for_kbit_training(
        copy.deepcopy(quantized), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    calls = []
    model = trained(with_adapter(prepared))
    model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(model, probe_ids), expected)
    assert len(calls) == 2


def test_a_bfloat16_model_has_adapters_in_float32(saved, probe_ids):
    base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model = trained(with_adapter(base, use_dora=True))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.base_layer.kernel_name == "cpu_int4"
    found = logits(model, probe_ids)
    assert found.dtype == torch.bfloat16
    expected = logits(model.dequantize(), probe_ids)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert gradients(model, probe_ids)


def test_all_linear_means_packed_ones_but_not_the_head(quantized):
    model = with_adapter(quantized, target_modules="all-linear")
    layers = {name for name, module in model.named_modules() if isinstance(module, lora.Linear)}
    assert len(layers) == 14
    assert not any("lm_head" in name for name in layers)
    model.add_adapter("second", LoraConfig(target_modules="all-linear"))
    assert {name for name, module in model.named_modules() if isinstance(module, lora.Linear)} == layers
    assert all(set(model.get_submodule(name).lora_A) == {"default", "second"} for name in layers)


def test_dense_layers_get_pefts_own(mixtral):
    model = with_adapter(mixtral, target_modules=["lm_head", "q_proj"])
    assert type(model.get_submodule("base_model.model.lm_head")) is lora.Linear


def test_adapters_can_be_switched_and_mixed_within_a_batch(quantized, probe_ids):
    model = trained(with_adapter(quantized))
    model.add_adapter("other", LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    results = {"default": logits(model, probe_ids)}
    with model.disable_adapter():
        results["__base__"] = logits(model, probe_ids)
    model.set_adapter("other")
    results["other"] = logits(model, probe_ids)
    assert torch.equal(results["__base__"], logits(quantized, probe_ids))
    assert len({result.sum().item() for result in results.values()}) == 3
    for names in (["default", "other"], ["__base__", "default"]):
        mixed = logits(model, probe_ids, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], results[name][row])


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_until_the_model_is_dequantized_and_then_exact(quantized, probe_ids, kind, tmp_path):
    model = trained(with_adapter(quantized, **KINDS[kind]))
    expected = logits(model, probe_ids)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(AdapterError, match=r"Call model\.dequantize\(\) and then merge"):
            merge()
    assert torch.equal(logits(model, probe_ids), expected)
    model.dequantize()
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, probe_ids), expected, rtol=1e-4, atol=1e-4)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, QuantLinear) for module in plain.modules())
    assert torch.equal(logits(plain, probe_ids), logits(merged, probe_ids))


def test_a_layer_that_was_a_conv1d_counts_its_outputs_first(token_rows, probe_ids, tmp_path):
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = quantize(tmp_path, token_rows)
    model = trained(with_adapter(base, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True))
    expected = logits(model, probe_ids)
    model.dequantize()
    torch.testing.assert_close(logits(model.merge_and_unload(), probe_ids), expected, rtol=1e-4, atol=1e-4)


def test_the_example_trains_on_a_text_and_refuses_a_short_one(saved, tiny_llama, tmp_path, monkeypatch, capsys):
    import finetune

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    shutil.copytree(saved, base, dirs_exist_ok=True)
    text = tmp_path / "text.txt"
    command = ["finetune.py", "--model", str(base), "--text", str(text), "--output", str(tmp_path), "--steps", "4"]
    monkeypatch.setattr(sys, "argv", command)
    text.write_text("the same again, " * 50)
    with pytest.raises(SystemExit):
        finetune.main()
    assert "the text has 3 rows of 256 tokens, and 16 are held out" in capsys.readouterr().err
    text.write_text("the same again, " * 400)
    finetune.main()
    found = re.search(r"([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert float(found[2]) < float(found[1])
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")


class TestRefusals:
    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "mica"])
    def test_starts_that_take_the_dense_weight(self, quantized, start):
        with pytest.raises(AdapterError, match=rf"init_lora_weights='{start}'.*'gaussian'.*model\.dequantize"):
            with_adapter(quantized, init_lora_weights=start)
        assert with_adapter(copy.deepcopy(quantized).dequantize(), init_lora_weights=start)

    def test_qalora(self, quantized):
        with pytest.raises(AdapterError, match="use_qalora=True"):
            with_adapter(quantized, use_qalora=True)

    def test_other_variants(self, quantized):
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            with_adapter(quantized, alora_invocation_tokens=[5, 6])

    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"], r".*experts\.0\.w2"])
    def test_experts(self, mixtral, targets):
        with pytest.raises(AdapterError, match="experts are packed one by one"):
            with_adapter(mixtral, target_modules=targets)
        assert not any(isinstance(module, lora.LoraLayer) for module in mixtral.modules())

    def test_biases_of_experts(self, token_rows, probe_ids, tmp_path):
        shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        AutoModelForCausalLM.from_config(GptOssConfig(**shape, **heads)).save_pretrained(tmp_path)
        model = quantize(tmp_path, token_rows)
        with pytest.raises(AdapterError, match="bias='all' counts the biases of experts"):
            with_adapter(copy.deepcopy(model), target_modules=["q_proj"], bias="all")
        model = with_adapter(model, target_modules=["q_proj"], bias="lora_only")
        assert sum(name.endswith("bias") for name in gradients(model, probe_ids)) == 1

    def test_a_peft_that_is_too_old(self, quantized, monkeypatch):
        monkeypatch.delattr(lora.LoraLayer, "lora_variants")
        with pytest.raises(AdapterError, match=r"needs PEFT 0\.20 or newer"):
            with_adapter(quantized)


def test_methods_that_know_no_experts_adapt_the_rest_of_a_mixture(mixtral):
    """As of a dense one. LoRA would adapt the experts of that, and is refused."""
    model = get_peft_model(copy.deepcopy(mixtral), AdaLoraConfig(target_modules="all-linear", total_step=10))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any(isinstance(module, QuantLinear) for name, module in model.named_modules() if ".experts." in name)


def test_parameters_of_packed_layers_are_refused(quantized):
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    with pytest.raises(AdapterError, match=r"'mlp.up_proj.weight', but model.layers.0.mlp.up_proj is packed"):
        get_peft_model(copy.deepcopy(quantized), config)


def test_a_mixture_of_experts_is_fine_tuned_in_its_attention(mixtral, probe_ids):
    model = trained(with_adapter(mixtral, target_modules=["q_proj", "v_proj"]))
    expected = logits(model, probe_ids)
    assert len(gradients(model, probe_ids)) == 8
    model.dequantize()
    torch.testing.assert_close(logits(model.merge_and_unload(), probe_ids), expected, rtol=1e-4, atol=1e-4)
