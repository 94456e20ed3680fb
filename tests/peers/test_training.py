# SPDX-License-Identifier: Apache-2.0
"""Training as its users start it: Trainer, TRL and accelerate, in mixed precision, on models moved and offloaded."""

import copy
import warnings

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, Trainer, TrainingArguments

from conftest import save_tiny_tokenizer
from optq import GPTQConfig, QuantLinear

peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402

LOW = (torch.bfloat16, torch.float16)
PRECISIONS = (*LOW, torch.float32)
STEPS = 3


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, **settings)


@pytest.fixture(scope="module")
def opt(token_rows, tmp_path_factory):
    """A checkpoint of a tiny OPT, whose packed linears have biases."""
    folder = tmp_path_factory.mktemp("opt")
    shape = {"vocab_size": 128, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = OPTConfig(**shape, num_attention_heads=4, max_position_embeddings=256, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llama(saved):
    save_tiny_tokenizer(saved)
    return saved


@pytest.fixture(params=["opt", "llama"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def moved(folder, dtype):
    """A model that is moved, to where it is, before its first forward."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cpu")


def packed(model):
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(("qweight", "scales"))
    }


def adapters(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" in name}


def check_trained(model, before, start):
    after = packed(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(parameter, start[name]) for name, parameter in adapters(model).items())


class TestAutocast:
    @pytest.mark.parametrize("precision", LOW)
    @pytest.mark.parametrize("dtype", PRECISIONS)
    def test_a_model_has_the_logits_of_one_that_was_not_moved(self, llama, probe_ids, dtype, precision):
        found = []
        for model in (moved(llama, dtype), AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)):
            with torch.no_grad(), torch.autocast("cpu", precision):
                found.append(model(probe_ids).logits)
        assert torch.equal(*found)
        with torch.no_grad(), torch.autocast("cpu", precision):
            expected = model.dequantize(dtype=dtype)(probe_ids).logits
        assert found[0].dtype == expected.dtype == precision
        torch.testing.assert_close(found[0], expected, rtol=0.1, atol=0.1)

    @pytest.mark.parametrize("precision", LOW)
    @pytest.mark.parametrize("dtype", [*PRECISIONS, torch.float64])
    def test_a_layer_returns_what_a_dense_one_does(self, llama, dtype, precision):
        layer = moved(llama, torch.bfloat16).model.layers[0].mlp.down_proj
        dense = layer.dense(dtype)
        x = torch.randn(2, 3, layer.in_features, dtype=dtype)
        with torch.autocast("cpu", precision):
            inside = layer(x), dense(x)
            with torch.autocast("cpu", enabled=False):
                outside = layer(x), dense(x)
        for found, expected in (inside, outside):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        assert outside[0].dtype == dtype

    def test_gradients_are_those_of_the_call_that_casts_itself(self, llama):
        layer = moved(llama, torch.bfloat16).model.layers[0].mlp.down_proj
        x = torch.randn(2, layer.in_features)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            layer(found).float().square().sum().backward()  # also the backward inside
        layer(expected.bfloat16()).float().square().sum().backward()
        assert found.grad.dtype == torch.float32
        assert torch.equal(found.grad, expected.grad)

    def test_a_graph_has_no_break(self, llama):
        layer = moved(llama, torch.bfloat16).model.layers[0].mlp.down_proj
        x = torch.randn(2, layer.in_features)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = layer(x)
            found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trainer_in_bfloat16(checkpoint, token_rows, tmp_path, dtype):
    model = prepare_model_for_kbit_training(
        moved(checkpoint, dtype), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, lora())
    before, start = packed(model), adapters(model)
    rows = [{**row, "labels": row["input_ids"]} for row in token_rows[:4]]
    arguments = TrainingArguments(tmp_path, max_steps=STEPS, bf16=True, learning_rate=0.02, report_to=[], use_cpu=True)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    check_trained(model, before, start)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_accelerators_prepare(checkpoint, probe_ids, precision):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # which is one for all of a process
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
    model = get_peft_model(moved(checkpoint, torch.bfloat16), lora())
    before, start = packed(model), adapters(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    losses = []
    for _ in range(STEPS):
        output = model(input_ids=probe_ids, labels=probe_ids)
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert output.logits.dtype == (torch.float32 if precision == "bf16" else torch.bfloat16)
    assert losses[-1] < losses[0]
    check_trained(accelerator.unwrap_model(model), before, start)


@pytest.fixture
def trl():
    """TRL with what its own defaults ask of transformers."""
    module = pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield module


@pytest.mark.parametrize("given", ["model", "folder"])
def test_trls_sft_trainer_with_its_defaults(checkpoint, trl, tmp_path, given):
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_list([{"text": f"the {count} words of a text"} for count in range(8)])
    config = trl.SFTConfig(str(tmp_path), max_steps=STEPS, report_to=[], use_cpu=True)
    assert config.bf16
    model = moved(checkpoint, torch.bfloat16) if given == "model" else str(checkpoint)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=texts, peft_config=lora())
    before, start = packed(trainer.model), adapters(trainer.model)
    trainer.train()
    check_trained(trainer.model, before, start)


def test_trls_dpo_trainer(checkpoint, trl, tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = [{"prompt": "a b c", "chosen": f" yes {count}", "rejected": f" no {count}"} for count in range(8)]
    config = trl.DPOConfig(str(tmp_path), max_steps=STEPS, report_to=[], use_cpu=True, learning_rate=0.02)
    trainer = trl.DPOTrainer(
        model=moved(checkpoint, torch.bfloat16),
        args=config,
        train_dataset=datasets.Dataset.from_list(pairs),
        peft_config=lora(),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    before, start = packed(trainer.model), adapters(trainer.model)
    trainer.train()
    check_trained(trainer.model, before, start)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "and buffers"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("precision", [None, torch.float16], ids=str)
def test_offloaded_models_have_the_logits_of_whole_ones(llama, probe_ids, tmp_path, where, buffers, precision):
    model = moved(llama, torch.bfloat16)
    whole = copy.deepcopy(model)
    offload = {"execution_device": "cpu", "offload_buffers": buffers}
    if where == "cpu":
        accelerate.cpu_offload(model, **offload)
    else:
        accelerate.disk_offload(model, tmp_path, **offload)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision is not None):
        expected = whole(probe_ids).logits
        for _ in range(2):
            assert torch.equal(model(probe_ids).logits, expected)
    held = [layer.held for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert [each is None for each in held] == [buffers] * 14


@pytest.mark.parametrize("forced", [False, True])
def test_a_model_in_use_is_dispatched_over_memory_and_disk(llama, probe_ids, tmp_path, forced):
    model = moved(llama, torch.bfloat16)
    with torch.no_grad():
        expected = model(probe_ids).logits
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
        accelerate.dispatch_model(
            model, {"": "cpu"} if forced else places, main_device="cpu", offload_dir=tmp_path, force_hooks=forced
        )
        assert torch.equal(model(probe_ids).logits, expected)
    assert not any(buffer.is_meta for buffer in model.buffers())  # nothing that another process could not be sent
