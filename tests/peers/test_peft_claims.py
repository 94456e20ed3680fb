# SPDX-License-Identifier: Apache-2.0
"""What PEFT claims of GPTQ layers in its own tests, and what it says of its methods, asked of ours."""

import copy
import io

import peft
import pytest
import torch
from packaging import version
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file
from test_linear import in_threads
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    Trainer,
    TrainingArguments,
)

from optq import GPTQConfig, QuantLinear
from optq.errors import AdapterError
from optq.integrations.peft import ONLY_MULTIPLY

TARGETS = ["q_proj", "o_proj", "down_proj"]
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 32},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    "LILY": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "POLY": {"n_tasks": 3, "n_skills": 2, "n_splits": 1, "r": 4},
    "RANDLORA": {"r": 4},
    "VBLORA": {"vector_length": 16, "num_vectors": 20, "r": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 50},
}
KNOWN = {method.value: method for method in PEFT_TYPE_TO_TUNER_MAPPING}
REPLACING = [name for name, method in KNOWN.items() if issubclass(PEFT_TYPE_TO_TUNER_MAPPING[method], BaseTuner)]


def config_of(method, **settings):
    settings = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **SETTINGS.get(method, {}), **settings}
    return PEFT_TYPE_TO_CONFIG_MAPPING[KNOWN[method]](**settings)


@pytest.fixture
def load(saved):
    return lambda **settings: AutoModelForCausalLM.from_pretrained(saved, **settings)


@pytest.fixture(scope="module")
def opt(token_rows, tmp_path_factory):
    """A checkpoint whose packed layers have biases."""
    folder = tmp_path_factory.mktemp("opt")
    shape = {"vocab_size": 128, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = OPTConfig(**shape, num_attention_heads=4, max_position_embeddings=256, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_head(tiny_llama, token_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed-head")
    settings = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows, lm_head=True)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings).save_pretrained(folder)
    return folder


def with_adapter(model, config, name="default"):
    torch.manual_seed(3)
    return get_peft_model(model, config, adapter_name=name)


def trained(model, seed=4):
    """As if trained: an adapter that changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def results(model, ids, **extra):
    """Logits of a step, and the gradients."""
    torch.manual_seed(0)
    output = model.train()(input_ids=ids, labels=ids, **extra)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model, ids, **extra):
    return model.eval()(ids, **extra).logits


def steps(model, ids, count=3, rate=0.5):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    for _ in range(count):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor",
    "ignore:Detected that the base layer has no bias",
)
@pytest.mark.parametrize("method", [name for name in ONLY_MULTIPLY if name in KNOWN])
def test_a_method_that_only_multiplies_gives_what_it_does_on_the_dequantized_model(load, probe_ids, tmp_path, method):
    extra = {"task_ids": torch.tensor([0, 1])} if method == "POLY" else {}
    packed, dense = (trained(with_adapter(base, config_of(method))) for base in (load(), load().dequantize()))
    found, expected = (results(model, probe_ids, **extra) for model in (packed, dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[1]
    packed.save_pretrained(tmp_path)
    assert not any("qweight" in key or "scales" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = load()
    before = logits(again, probe_ids)
    again = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(logits(again, probe_ids, **extra), logits(packed, probe_ids, **extra))
    assert not torch.allclose(logits(again, probe_ids, **extra), before, atol=1e-3)
    assert sum(isinstance(module, QuantLinear) for module in again.modules()) == 14
    with pytest.raises(AdapterError, match=r"Call model\.dequantize\(\) and then merge"):
        packed.merge_and_unload()


REFUSED = [name for name in REPLACING if name not in (*ONLY_MULTIPLY, "SHADOW", "XLORA")]


@pytest.mark.parametrize(("method", "targets"), [*((name, TARGETS) for name in REFUSED), ("HRA", "all-linear")])
def test_all_other_methods_are_refused_in_a_sentence_of_ours(quantized, method, targets):
    settings = {"token_indices": [1]} if method == "TRAINABLE_TOKENS" else {}
    with pytest.raises(AdapterError, match=rf"{method} computes with the weight .* LORA, ADALORA, OFT.*dequantize"):
        with_adapter(quantized, config_of(method, target_modules=targets, **settings))
    assert not any(isinstance(module, BaseTunerLayer) for module in quantized.modules())
    assert sum(isinstance(module, QuantLinear) for module in quantized.modules()) == 14


@pytest.mark.parametrize("method", ["LORA", "ADALORA", "OFT"])
def test_methods_in_mixed_precision(load, probe_ids, method):
    found = []
    for dequantized in (False, True):
        model = load(dtype=torch.bfloat16).to("cpu")
        model = trained(with_adapter(model.dequantize(torch.bfloat16) if dequantized else model, config_of(method)))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(model, probe_ids))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.1, atol=0.1)
    assert found[0][1].keys() == found[1][1].keys()


def test_a_model_with_an_adapter_can_be_copied_and_pickled(load, probe_ids):
    model = trained(with_adapter(load(), config_of("OFT")))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other, probe_ids), logits(model, probe_ids))


def test_threads_share_a_layer_with_dora(load):
    layer = trained(with_adapter(load(dtype=torch.bfloat16), config_of("LORA", use_dora=True))).eval()
    layer = layer.base_model.model.model.layers[0].self_attn.o_proj
    inputs = [torch.randn(2, 64).to(dtype) for dtype in (torch.float32, torch.bfloat16)] * 2
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
    found = in_threads([lambda x=x: layer(x) for x in inputs], times=20)
    for outputs, output in zip(found, expected, strict=True):
        assert all(torch.equal(each, output) for each in outputs)
    assert layer.base_layer.weight.isnan().all()


class TestRefusals:
    def test_methods_that_make_layers_of_their_own(self, load, tmp_path):
        with pytest.raises(AdapterError, match="XLORA makes its adapters beside dense weights only"):
            with_adapter(
                load(), peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters={"a": str(tmp_path)})
            )

    @pytest.mark.parametrize("method", ["LORA", "OFT"])
    def test_mixed_methods(self, load, method):
        with pytest.raises(AdapterError, match="mixed=True"):
            get_peft_model(load(), config_of(method, task_type=None), mixed=True)

    def test_a_start_that_takes_the_weight(self, load):
        with pytest.raises(AdapterError, match="init_weights='bat'"):
            with_adapter(load(), config_of("MISS", init_weights="bat"))

    @pytest.mark.parametrize("method", ["LORA", "OFT", "VERA"])
    @pytest.mark.parametrize("name", ["up_proj", "mlp", "layers.1"])
    def test_modules_to_save_that_hold_packed_weights(self, quantized, method, name):
        model = quantized
        with pytest.raises(AdapterError, match=rf"names '{name}', but model\.layers\.\S+ is packed.*target_modules"):
            with_adapter(model, config_of(method, modules_to_save=[name]))
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def test_a_packed_head_as_a_module_to_save_or_of_tokens(self, packed_head):
        model = AutoModelForCausalLM.from_pretrained(packed_head)
        for settings in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [1]}}):
            with pytest.raises(AdapterError, match="names 'lm_head', but lm_head is packed"):
                with_adapter(model, config_of("LORA", **settings))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_modules_to_save_that_are_dense_are_trained_and_saved(load, probe_ids, tmp_path):
    model = with_adapter(load(), config_of("LORA", modules_to_save=["norm", "embed_tokens"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    steps(model, probe_ids)
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(before.get(name, parameter), parameter)
    }
    assert any("modules_to_save.default" in name for name in changed)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path), probe_ids), logits(model, probe_ids))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_packed_head_takes_an_adapter(packed_head, probe_ids, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(packed_head)
    before = logits(base, probe_ids)
    model = with_adapter(base, config_of("LORA", target_modules=["lm_head"]))
    steps(model, probe_ids)
    assert not torch.equal(logits(model, probe_ids), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed_head), tmp_path)
    assert torch.equal(logits(again, probe_ids), logits(model, probe_ids))


@pytest.mark.parametrize(
    ("method", "bias"), [("LORA", "all"), ("LORA", "lora_only"), ("ADALORA", "all"), ("OFT", "oft_only")]
)
def test_biases_of_packed_layers_are_trained_as_those_of_dense_ones(opt, probe_ids, tmp_path, method, bias):
    config = config_of(method, target_modules=["q_proj", "fc1"], bias=bias)
    after = []
    for dense in (False, True):
        model = AutoModelForCausalLM.from_pretrained(opt)
        model = with_adapter(model.dequantize() if dense else model, copy.deepcopy(config))
        steps(model, probe_ids, rate=0.1)
        after.append({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
        if not dense:
            packed = model
    found, expected = after
    biases = {name for name in found if name.endswith(".bias")}
    assert biases == {name for name in expected if name.endswith(".bias")}
    assert len(biases) >= 4
    for name in biases:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-7)
        assert found[name].any()  # they began as zeros
    if bias != "all" and version.parse(peft.__version__) < version.parse("0.21"):
        pytest.skip("before 0.21, PEFT does not save these biases, of dense layers either")
    packed.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(opt), tmp_path)
    assert torch.equal(logits(again, probe_ids), logits(packed, probe_ids))
    packed.dequantize()
    torch.testing.assert_close(
        logits(packed.merge_and_unload(), probe_ids), logits(again, probe_ids), rtol=1e-3, atol=1e-4
    )


def test_a_model_whose_biases_were_trained_is_saved_with_them(opt, probe_ids, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(opt)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_adapter(base, config_of("LORA", target_modules=["q_proj"], bias="all"))
    steps(model, probe_ids)
    model.unload().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == before.keys() - {"lm_head.weight"}
    changed = {name for name, tensor in written.items() if not torch.equal(tensor, before[name])}
    assert {f"model.decoder.layers.{layer}.fc1.bias" for layer in range(2)} <= changed
    assert all(name.endswith("bias") for name in changed)


class TestWhatPeftsOwnTestsSay:
    """Of GPTQ models, one test each."""

    @pytest.mark.parametrize(
        ("method", "backend"), [("LORA", None), ("LORA", "auto_trainable"), ("ADALORA", None), ("OFT", None)]
    )
    def test_causal_lm_training(self, load, token_rows, tmp_path, method, backend):
        model = load() if backend is None else load_with(load, backend)
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        model = with_adapter(model, config_of(method))
        rows = [{**row, "labels": row["input_ids"]} for row in token_rows[:4]]
        arguments = TrainingArguments(tmp_path / "run", max_steps=3, learning_rate=0.01, report_to=[], use_cpu=True)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").is_file()
        assert load_file(tmp_path / "adapter_model.safetensors")
        assert trainer.state.log_history[-1]["train_loss"] > 0

    def test_adalora_allocates_its_ranks(self, load, probe_ids):
        config = config_of("ADALORA", init_r=6, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6)
        model = with_adapter(load(), config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(1, 7):
            model.train()(input_ids=probe_ids, labels=probe_ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        ranks = [int(kept) for pattern in config.rank_pattern.values() for kept in pattern]
        assert sum(ranks) == 2 * 6

    def test_non_default_adapter_name(self, load):
        trainable = [
            with_adapter(load(), config_of("LORA"), name).get_nb_trainable_parameters()
            for name in ("default", "other")
        ]
        assert trainable[0] == trainable[1]
        assert trainable[0][0] > 0

    def test_adding_several_adapters_keeps_the_first_and_its_device(self, load, probe_ids, tmp_path):
        for name in ("first", "second"):
            trained(with_adapter(load(), config_of("LORA", r=4 if name == "first" else 8), name)).save_pretrained(
                tmp_path
            )
        model = PeftModel.from_pretrained(load(), tmp_path / "first", adapter_name="first")
        before = logits(model, probe_ids)
        model.load_adapter(tmp_path / "second", adapter_name="second")
        assert torch.equal(logits(model, probe_ids), before)
        model.set_adapter("second")
        assert not torch.equal(logits(model, probe_ids), before)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}

    @pytest.mark.parametrize("method", ["LORA", "OFT", "IA3"])
    def test_several_adapters_of_one_method_and_their_deletion(self, load, probe_ids, method):
        model = trained(with_adapter(load(), config_of(method)))
        first = logits(model, probe_ids)
        model.add_adapter("second", config_of(method))
        model.set_adapter("second")
        trained(model, seed=5)
        assert not torch.equal(logits(model, probe_ids), first)
        model.set_adapter("default")
        assert torch.equal(logits(model, probe_ids), first)
        model.delete_adapter("second")
        with model.disable_adapter():
            assert torch.equal(logits(model, probe_ids), logits(load(), probe_ids))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("method", ["LORA", "OFT"])
    def test_gradient_checkpointing(self, load, probe_ids, method, reentrant):
        expected = results(trained(with_adapter(load(), config_of(method))), probe_ids)
        model = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = results(trained(with_adapter(model, config_of(method))), probe_ids)
        torch.testing.assert_close(found, expected)

    def test_all_linear_does_not_count_the_head(self, packed_head):
        for method in ("LORA", "OFT", "VERA"):
            model = with_adapter(
                AutoModelForCausalLM.from_pretrained(packed_head), config_of(method, target_modules="all-linear")
            )
            adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
            assert len(adapted) == 14
            assert not any("lm_head" in name for name in adapted)

    @pytest.mark.parametrize("method", ["LORA", "ADALORA", "OFT"])
    def test_the_calls_of_transformers_and_of_injection(self, load, probe_ids, tmp_path, method):
        model = trained(with_adapter(load(), config_of(method)))
        model.save_pretrained(tmp_path)
        plain = load()
        plain.load_adapter(str(tmp_path))
        assert torch.equal(logits(plain, probe_ids), logits(model, probe_ids))
        injected = peft.inject_adapter_in_model(config_of(method), load())
        assert torch.equal(logits(injected, probe_ids), logits(load(), probe_ids))
        assert isinstance(injected.model.layers[0].self_attn.q_proj.base_layer, QuantLinear)

    def test_sequence_classification_with_a_packed_head_left_out(self, packed_head, probe_ids):
        base = AutoModelForSequenceClassification.from_pretrained(packed_head, num_labels=3)
        model = with_adapter(base, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=TARGETS))
        model(input_ids=probe_ids, labels=torch.tensor([0, 2])).loss.backward()
        assert model.base_model.model.score.modules_to_save["default"].weight.grad is not None

    @pytest.mark.filterwarnings("ignore:Unsupported layer type")
    @pytest.mark.parametrize(
        "config",
        [
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
            peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_methods_that_replace_no_linear(self, load, probe_ids, config):
        found, expected = (
            results(trained(with_adapter(model, copy.deepcopy(config))), probe_ids)
            for model in (load(), load().dequantize())
        )
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        assert found[1]


def load_with(load, backend):
    with pytest.warns(UserWarning, match="loading attributes"):
        return load(quantization_config=GPTQConfig(bits=4, backend=backend))


def test_what_was_derived_stays_when_an_adapter_is_made_loaded_or_removed(load, probe_ids, tmp_path):
    base = load(dtype=torch.bfloat16)
    held = {module: module.held for module in base.modules() if isinstance(module, QuantLinear)}
    with_adapter(load(), config_of("OFT")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path)
    model.load_adapter(tmp_path, "again")
    model.to("cpu")
    logits(model, probe_ids)
    model.unload()
    assert all(module.held is value for module, value in held.items())
    assert not any(type(module) is nn.Linear and module.weight.is_meta for module in base.modules())
