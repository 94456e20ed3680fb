# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts from `from_pretrained` to the checkpoint and back, in every layout that transformers has."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from conftest import interrupted_after
from optq import GPTQConfig, QuantLinear
from optq.api.quantize import LOG_NAME
from optq.model import Experts

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8}, "model.layers.1.mlp.experts.0.gate_proj"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, "model.layers.1.block_sparse_moe.experts.0.w1"),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            **MLA,
        },
        "model.layers.1.mlp.experts.0.up_proj",
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4}, "model.layers.1.mlp.experts.0.gate_proj"),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 64, "intermediate_size_mlp": 96},
        "model.layers.1.feed_forward.experts.0.down_proj",
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_routed_experts": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        "backbone.layers.1.mixer.experts.0.up_proj",
    ),
}


LONG = {"qwen3_moe": pytest.mark.long}
"""Its experts, router and names are of kinds that the others have as well."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=LONG.get(name, ())) for name in FAMILIES])
def family(request, tmp_path_factory):
    """The folder of a random model, and the name on disk of an expert's linear."""
    kind, changes, linear = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SHAPE, **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, linear


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 128, (64,), generator=generator).tolist()} for _ in range(12)]


@pytest.fixture(scope="module")
def checkpoint(family, rows, tmp_path_factory):
    folder, linear = family
    output = tmp_path_factory.mktemp("checkpoint")
    return optq.quantize(folder, config(rows), output_dir=output), linear


def config(rows, **settings):
    return GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": rows, **settings})


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 83).view(2, 40)).logits


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(one, other):
    """Of two checkpoint folders."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def events(folder, kind):
    found = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def test_every_expert_is_quantized_under_its_name_and_no_router_is(checkpoint):
    folder, linear = checkpoint
    found = tensors(folder)
    assert f"{linear}.qweight" in found
    model = AutoModelForCausalLM.from_pretrained(folder)
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    assert mixtures
    for mixture in mixtures:
        assert sum(isinstance(module, QuantLinear) for module in mixture.modules()) == mixture.layout.count * len(
            mixture.layout.roles
        )
    quantized = [name for name in found if name.endswith(".qweight")]
    assert not any(part in name for name in quantized for part in ("router", ".gate."))


def test_loading_computes_what_the_dequantized_weights_do_in_the_original_architecture(checkpoint, tmp_path):
    folder, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, Experts) for module in model.modules())
    model.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, (Experts, QuantLinear)) for module in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)


def test_saving_what_was_loaded_writes_the_same_tensors(checkpoint, tmp_path):
    folder, _ = checkpoint
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert_same_tensors(folder, tmp_path)


def test_a_model_that_is_quantized_in_memory_gets_the_same_bytes(family, checkpoint, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(family[0], quantization_config=config(rows))
    model.save_pretrained(tmp_path)
    assert_same_tensors(checkpoint[0], tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(reloaded))


def test_quantizing_costs_little_but_a_damaged_expert_is_noticed(family, checkpoint, tmp_path):
    folder, linear = checkpoint
    original = logits(AutoModelForCausalLM.from_pretrained(family[0]))
    quantized = logits(AutoModelForCausalLM.from_pretrained(folder))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in tmp_path.glob("*.safetensors"):
        found = load_file(file)
        if f"{linear}.scales" in found:
            found[f"{linear}.scales"] *= 3
            save_file(found, file, metadata={"format": "pt"})
    damaged = logits(AutoModelForCausalLM.from_pretrained(tmp_path))

    def error(other):
        return float((other - original).square().mean() / original.square().mean())

    assert error(quantized) < 0.3
    assert not torch.equal(damaged, quantized)


def test_an_interrupted_run_goes_on_with_the_same_bytes(family, checkpoint, rows, tmp_path, monkeypatch):
    interrupted_after(1, monkeypatch, lambda: optq.quantize(family[0], config(rows), output_dir=tmp_path))
    optq.quantize(family[0], config(rows), output_dir=tmp_path)
    assert_same_tensors(checkpoint[0], tmp_path)


@pytest.fixture
def qwen(tmp_path):
    torch.manual_seed(0)
    kind, changes, _ = FAMILIES["qwen3_moe"]
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SHAPE, **changes}))
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_starved_experts_are_said_counted_and_still_better_than_rounding(qwen, rows, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        few = [{"input_ids": rows[0]["input_ids"][:24]}]
        output = optq.quantize(qwen, config(few, quality_gate="off"), output_dir=tmp_path / "out")
    assert "experts saw fewer calibration tokens than the 64 inputs of up_proj and gate_proj" in caplog.text
    starved = events(output, "starved_experts")
    assert {event["block"] for event in starved} == {"model.layers.0", "model.layers.1"}
    gate, down = starved[:2]
    assert sum(gate["tokens"]) == 24 * 2
    assert gate["tokens"] == down["tokens"]
    done = [event for event in events(output, "linear") if ".experts." in event["linear"]]
    assert len(done) == 2 * 8 * 3  # also those without a token
    assert all(event["relative_loss"] <= event["rtn_relative_loss"] for event in done)


def test_a_plan_counts_the_hessians_of_all_experts(qwen, rows):
    estimate = optq.plan(qwen, config(rows))
    assert sum(estimate.linears.values()) == 2 * (4 + 8 * 3)
    assert round(estimate.memory_gib["Hessians"] * 2**30) == 4 * (3 + 8) * 64**2
    size = sum(file.stat().st_size for file in qwen.glob("*.safetensors")) / 2**30
    assert estimate.dense_gib == pytest.approx(size, rel=0.05)
    written = optq.quantize(qwen, config(rows), output_dir=qwen.parent / "out")
    size = sum(file.stat().st_size for file in written.glob("*.safetensors")) / 2**30
    assert estimate.checkpoint_gib == pytest.approx(size, rel=0.15)  # the names of many small tensors take space too


def test_all_experts_may_be_shown_all_tokens(qwen, rows, tmp_path):
    output = optq.quantize(
        qwen, config(rows, calibrate_all_experts=True, quality_gate="off"), output_dir=tmp_path / "out"
    )
    assert not events(output, "starved_experts")
    assert {event["tokens"] for event in events(output, "linear")} == {12 * 64}
    assert "calibrate_all_experts" not in json.loads((output / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("rule", "quantized"),
    [
        (r"-:.*\.experts\..*", 0),
        (r"-:.*\.down_proj", 2 * 8 * 2),
        (r"-:model\.layers\.0\.mlp.*", 8 * 3),
        (r"-:.*\.experts\.3\..*", 2 * 7 * 3),
    ],
)
def test_rules_leave_experts_or_parts_of_them_alone(qwen, rows, tmp_path, rule, quantized):
    model = AutoModelForCausalLM.from_pretrained(qwen, quantization_config=config(rows, dynamic={rule: {}}))
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [name for name, module in reloaded.named_modules() if isinstance(module, QuantLinear)]
    assert sum(".experts." in name for name in layers) == quantized
    assert torch.equal(logits(model), logits(reloaded))
    if quantized == 0:
        assert not any(isinstance(module, Experts) for module in reloaded.modules())


def test_a_budget_gives_all_experts_of_a_layer_one_scheme(qwen, rows, tmp_path):
    settings = config(rows, target_bits_per_weight=4.5)
    model = AutoModelForCausalLM.from_pretrained(qwen, quantization_config=settings)
    for mixture in (module for module in model.modules() if isinstance(module, Experts)):
        assert len({mixture.linear(index, "gate_proj").bits for index in range(8)}) == 1
        assert len({mixture.linear(index, "down_proj").bits for index in range(8)}) == 1


def test_names_of_other_tools_are_read(checkpoint, tmp_path):
    """GPTQModel calls experts' linears as transformers does, also where the original checkpoint does not."""
    folder, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    renamed = {}
    for name, tensor in tensors(folder).items():
        parts = name.replace("block_sparse_moe", "mlp").split(".")
        renamed[".".join(theirs.get(part, part) for part in parts)] = tensor
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_generation_goes_on_as_without_a_cache(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    prompt = torch.arange(3, 23)[None]
    cached = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert cached.shape == (1, 26)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_all_experts_at_once_compute_and_save_the_same(checkpoint, launches, tmp_path):
    folder, _ = checkpoint
    settings = {"quantization_config": GPTQConfig(bits=4, backend="triton"), "dtype": torch.float16}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    routed = all(mixture.layout.routed for mixture in mixtures)
    assert all((mixture.grouped_gemm is not None and mixture.grouped_gemm.are_fused) == routed for mixture in mixtures)
    assert model.hf_quantizer.is_compileable == routed
    ids = torch.arange(3, 7).view(1, 4)
    with torch.no_grad():
        found = model(ids).logits
        assert launches.count("grouped_product") == 2 * len(mixtures) * routed
        # One by one, and not in the interpreter. That it takes none of their products then: test_fused_experts.py.
        settings["quantization_config"] = GPTQConfig(bits=4, backend="reference")
        other = AutoModelForCausalLM.from_pretrained(folder, **settings)
        torch.testing.assert_close(found, other(ids).logits, rtol=2e-2, atol=2e-2)
    model.save_pretrained(tmp_path)
    before, after = tensors(folder), tensors(tmp_path)
    assert before.keys() == after.keys()
    parts = ("qweight", "qzeros", "scales", "g_idx")  # what is not packed is float16 now
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(parts))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_model_is_one_graph_when_all_experts_run_at_once(rows, tmp_path):
    torch.manual_seed(0)
    sizes = {**SHAPE, "num_hidden_layers": 1, "num_experts": 4}
    AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**sizes)).save_pretrained(tmp_path / "source")
    settings = config(rows, quality_gate="off")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=settings)
    quantized.save_pretrained(tmp_path / "quantized")
    settings = {"quantization_config": GPTQConfig(bits=4, backend="triton"), "dtype": torch.float16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", **settings)
    ids = torch.arange(3, 7).view(1, 4)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
