# SPDX-License-Identifier: Apache-2.0
"""A packed model in the hands of transformers' other parts, accelerate, copy and pickle."""

import copy
import pickle

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from optq import QuantLinear


@pytest.fixture(scope="module")
def saved(saved, tiny_llama):
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(saved)
    return saved


@pytest.fixture
def model(saved):
    return AutoModelForCausalLM.from_pretrained(saved)


@pytest.fixture(scope="module")
def dense(saved):
    """The same weights in plain linears."""
    return AutoModelForCausalLM.from_pretrained(saved).dequantize()


@pytest.fixture(scope="module")
def expected(saved, probe_ids):
    return logits(AutoModelForCausalLM.from_pretrained(saved), probe_ids)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def generated(model, ids, **settings):
    length = {"min_new_tokens": 24, "max_new_tokens": 24}  # random weights may end at once
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length, **settings)


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def test_a_pipeline_writes_what_the_dense_model_does(saved, dense):
    ours = pipeline("text-generation", model=str(saved))
    assert len(layers(ours.model)) == 14
    theirs = pipeline("text-generation", model=dense, tokenizer=ours.tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert ours("some text", **settings) == theirs("some text", **settings)


def test_beams_are_those_of_the_dense_model(model, dense, probe_ids):
    assert torch.equal(generated(model, probe_ids, num_beams=3), generated(dense, probe_ids, num_beams=3))


@pytest.mark.parametrize("helper", ["prompt lookup", "packed assistant", "dense assistant"])
def test_assisted_generation_writes_the_same_tokens_in_fewer_forwards(model, saved, dense, probe_ids, helper):
    ids = probe_ids[:1].repeat(1, 2)
    settings = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "packed assistant": {"assistant_model": AutoModelForCausalLM.from_pretrained(saved)},
        "dense assistant": {"assistant_model": dense},
    }[helper]
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    plain = generated(model, ids)
    alone = len(forwards)
    assert torch.equal(generated(model, ids, **settings), plain)
    assert len(forwards) - alone < alone


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_blocks_on_the_disk_are_brought_for_each_call(saved, probe_ids, expected, tmp_path, offload_buffers):
    """The limit is enough for the embeddings: without an accelerator, the blocks go to the disk."""
    model = AutoModelForCausalLM.from_pretrained(
        saved,
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
    )
    assert "disk" in model.hf_device_map.values()
    for _ in range(2):
        assert torch.equal(logits(model, probe_ids), expected)
    last = model.model.layers[1].mlp.down_proj
    assert (last.kernel_name is None) == offload_buffers  # nothing that a kernel keeps stays behind
    assert (last.scales.device.type == "meta") == offload_buffers
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.dequantize()
    torch.testing.assert_close(logits(model, probe_ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offloads_a_loaded_model(model, probe_ids, expected, tmp_path, where):
    logits(model, probe_ids)  # kernels hold the codes by now
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    for _ in range(2):
        assert torch.equal(logits(model, probe_ids), expected)
        assert all(layer.kernel_name is None and layer.scales.device.type == "meta" for layer in layers(model))


def test_a_compiled_model_has_the_same_logits(model, probe_ids, expected):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, probe_ids), expected)


def test_the_footprint_is_that_of_the_packed_tensors(model, dense, saved):
    stored = sum(tensor.nbytes for tensor in load_file(saved / "model.safetensors").values())
    assert model.get_memory_footprint() == pytest.approx(stored, rel=0.01)
    assert model.get_memory_footprint() < 0.5 * dense.get_memory_footprint()


@pytest.mark.parametrize("origin", ["quantized", "model"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_the_same_logits_and_are_independent(request, probe_ids, expected, origin, duplicate):
    reference = duplicate(request.getfixturevalue(origin))
    assert torch.equal(logits(reference, probe_ids), expected)
    for layer in layers(reference):
        layer.load_state_dict({**layer.state_dict(), "scales": torch.zeros_like(layer.scales)})
    assert not torch.equal(logits(reference, probe_ids), expected)
    assert torch.equal(logits(request.getfixturevalue(origin), probe_ids), expected)


def test_checkpointing_changes_nothing_in_use_and_trains_what_is_not_packed(model, dense, probe_ids, expected):
    for each in (model, reference := copy.deepcopy(dense)):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(logits(model.eval(), probe_ids), expected)
    for each in (model, reference):
        each.train()(probe_ids, labels=probe_ids).loss.backward()
    theirs = dict(reference.named_parameters())
    trained = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert len(trained) == 2 + 2 * 2  # embeddings and norms
    torch.testing.assert_close(trained, {name: theirs[name].grad for name in trained}, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("transformers_adapters")
def test_the_trainer_evaluates_it_once_it_has_an_adapter(model, dense, token_rows, tmp_path):
    """transformers refuses a Trainer for purely quantized models, of whichever kind."""
    lora = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"])
    rows = [{**row, "labels": row["input_ids"]} for row in token_rows]
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, eval_dataset=rows)
    model.add_adapter(lora)  # which starts as zero
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    expected = Trainer(dense, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-4)
