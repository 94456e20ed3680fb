# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: two processes, as torchrun starts them, compute with half of every packed linear each."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Phi3Config

import optq
from conftest import tiny_llama_config, two_ranks
from optq import GPTQConfig
from optq.errors import ConfigError
from optq.integrations.tensor_parallel import ParallelLinear, groups_of_columns, make_ready
from optq.layers import QuantLinear
from optq.model import Experts, find_fused_experts
from optq.readers import why_not_in_parts
from optq.scheme import trivial_groups

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "dtype": "float32",
}
BIASED = {**SHAPE, "attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama": lambda: tiny_llama_config(**BIASED),
    "one head": lambda: tiny_llama_config(num_attention_heads=2, num_key_value_heads=1, head_dim=32),
    "narrow": lambda: tiny_llama_config(intermediate_size=72),
    "odd vocabulary": lambda: tiny_llama_config(vocab_size=136),
    "phi3": lambda: Phi3Config(**SHAPE),
    "mixtral": lambda: MixtralConfig(**SHAPE),
    "gpt_oss": lambda: GptOssConfig(
        **SHAPE, rope_scaling=None, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
    ),
}
EXPERTS = "model.layers.*.mlp.experts"
OWN_PLAN = {
    EXPERTS: "optq_summed",
    **{f"{EXPERTS}.*.{name}": "colwise" for name in ("gate_proj", "up_proj")},
    f"{EXPERTS}.*.down_proj": "optq_summand",
}
CASES = {
    "groups": ("llama", {"bits": 4, "group_size": 32}),
    "without g_idx": ("llama", {"bits": 4, "group_size": 32}),
    "cut groups": ("llama", {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"}),
    "desc_act": ("llama", {"bits": 4, "group_size": 32, "desc_act": True, "sym": False}),
    "one group, head": ("llama", {"bits": 8, "group_size": -1, "lm_head": True}),
    "3 bits, ragged": ("llama", {"bits": 3, "group_size": 96}),
    "2 bits": ("llama", {"bits": 2, "group_size": 32}),
    "mixed": ("llama", {"bits": 4, "group_size": 32, "dynamic": {"-:.*0.*o_proj": {}, "+:.*down_proj": {"bits": 8}}}),
    "whole head": ("odd vocabulary", {"bits": 4, "group_size": 32, "lm_head": True}),
    "phi3": ("phi3", {"bits": 4, "group_size": 32}),
    "mixtral": ("mixtral", {"bits": 4, "group_size": 32}),
    "some experts": ("mixtral", {"bits": 4, "group_size": 32, "dynamic": {"-:.*1.*w2": {}}}),
    "own plan": ("gpt_oss", {"bits": 4, "group_size": 32}),
    "own plan, some experts": ("gpt_oss", {"bits": 4, "group_size": 32, "dynamic": {"-:.*down_proj": {}}}),
}
"""Checkpoints by name: a model, and how it is quantized."""

REFUSED = {
    "one head": ("one head", {"bits": 4, "group_size": 32}),
    "narrow": ("narrow", {"bits": 4, "group_size": -1}),
}
FAULTS = ("groups of the first part", "every process adds the bias")

SCRIPT = """
import json, os, sys, time
from importlib import import_module
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import optq
from optq import GPTQConfig
from optq.errors import OptqError
from optq.integrations import tensor_parallel as parallel
from optq.integrations.tensor_parallel import ParallelLinear
from peft import LoraConfig, get_peft_model

folder, cases, refused, faults, plan = sys.argv[1], *map(json.loads, sys.argv[2:])
dist.init_process_group("gloo")
answers = {}

def loaded(name, plan="auto", **settings):
    config = DistributedConfig(tp_plan=plan, **settings.pop("distributed", {}))
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=config, **settings)

def plan_of(name):
    return plan if name.startswith("own plan") else "auto"

def errors(model, name, expected=None):
    expected = load_file(f"{folder}/{name}/expected") if expected is None else expected
    ids = expected["ids"]
    with torch.no_grad():
        logits = model(ids).logits
    inputs = expected["inputs"].requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=inputs).logits.square().sum(), inputs)
    found = {"logits": logits, "gradient": gradient}
    return {key: float((x - expected[key]).abs().max() / expected[key].abs().max()) for key, x in found.items()}

for name in cases:
    model = loaded(name, plan_of(name))
    ids = load_file(f"{folder}/{name}/expected")["ids"]
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, ParallelLinear)}
    answers[name] = {
        **errors(model, name),
        "tokens": model.generate(ids, max_new_tokens=6, do_sample=False).tolist(),
        "packed": {f"{key}.qweight": layer.packed().qweight.nbytes for key, layer in layers.items()},
        "groups": {key: len(layer.scales) for key, layer in layers.items()},
        "kernel_groups": {key: layer.held.prepared.group_width for key, layer in layers.items()},
    }
    model.save_pretrained(f"{folder}/{name}/again")

expected = load_file(f"{folder}/groups/expected.bfloat16")
answers["bfloat16"] = errors(loaded("groups", dtype=torch.bfloat16), "groups", expected)

take_part, groups_of_columns = ParallelLinear.take_part, parallel.groups_of_columns
def take_part_and_bias(layer):
    bias = layer.bias
    take_part(layer)
    layer.bias = layer.bias if layer.part.way.splits == "outputs" else bias
for fault, (place, name, wrong) in zip(faults, (
    (parallel, "groups_of_columns", lambda groups, start, stop: groups_of_columns(groups, 0, stop - start)),
    (ParallelLinear, "take_part", take_part_and_bias),
)):
    right = getattr(place, name)
    setattr(place, name, wrong)
    answers[fault] = errors(loaded("groups"), "groups")
    setattr(place, name, right)

rows = [{"input_ids": list(range(4, 60))}] * 8
quantizing, out = import_module("optq.hf.quantizing"), Path(folder, "out")
check = quantizing.check_request

def check_late(*arguments):
    # The second process comes when the first one was refused and has removed the folder that it had made.
    deadline = time.monotonic() + 20
    while dist.get_rank() and out.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    check(*arguments)

quantizing.check_request = check_late
split = loaded("groups")
for name, call in {
    **{name: lambda name=name: loaded(name) for name in refused},
    "from_pretrained": lambda: loaded("original llama", quantization_config=GPTQConfig(bits=4, dataset=rows)),
    "quantize": lambda: optq.quantize(
        f"{folder}/original llama", GPTQConfig(bits=4, dataset=rows), output_dir=out,
        distributed_config=DistributedConfig(tp_plan="auto"),
    ),
    "experts divided": lambda: loaded("mixtral", None, distributed={"tp_size": 2, "enable_expert_parallel": True}),
    "fused experts' style": lambda: loaded("own plan", {"model.layers.*.mlp.experts": "moe_tp_experts"}),
    "style": lambda: loaded("groups", {"model.layers.*.mlp.up_proj": "packed_colwise"}),
    "dequantize": lambda: split.dequantize(),
    "adapter": lambda: get_peft_model(split, LoraConfig(target_modules=["q_proj"])),
}.items():
    try:
        call()
    except OptqError as error:
        answers[name] = f"{type(error).__name__}: {error}"
    dist.barrier()

with open(f"{folder}/answers-{os.environ['RANK']}.json", "w") as stream:
    json.dump(answers, stream)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with what one process makes of them, and the answers of two."""
    folder = tmp_path_factory.mktemp("parallel")
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row.tolist()} for row in torch.randint(4, 98, (8, 48), generator=generator)]
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / f"original {name}")
    for name, (model, settings) in {**CASES, **REFUSED}.items():
        config = GPTQConfig(**settings, effort="fast", dataset=rows, quality_gate="off")
        quantized = AutoModelForCausalLM.from_pretrained(folder / f"original {model}", quantization_config=config)
        quantized.save_pretrained(folder / name)
    path = folder / "without g_idx/model.safetensors"
    save_file({key: x for key, x in load_file(path).items() if not key.endswith("g_idx")}, path, {"format": "pt"})
    for name in CASES:
        write_expected(folder / name, "expected")
    write_expected(folder / "groups", "expected.bfloat16", dtype=torch.bfloat16)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    two_ranks(
        script, str(folder), *map(json.dumps, (list(CASES), list(REFUSED), FAULTS, OWN_PLAN)), said=folder / "said"
    )
    return folder


def write_expected(checkpoint, name, **settings):
    """What one process computes: logits, the gradient towards the inputs, generated tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **settings)
    ids = torch.randint(4, 98, (2, 24), generator=torch.Generator().manual_seed(2))
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), inputs)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    found = {"ids": ids, "inputs": inputs, "logits": logits, "gradient": gradient, "tokens": tokens}
    save_file({key: tensor.detach().clone() for key, tensor in found.items()}, checkpoint / name)


@pytest.fixture(scope="module")
def answers(folder):
    """Of both processes."""
    return [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(folder, answers, name):
    for answer in answers:
        assert answer[name]["logits"] < 5e-6
        assert answer[name]["gradient"] < 5e-6
        assert answer[name]["tokens"] == load_file(folder / name / "expected")["tokens"].tolist()


def test_in_16_bit_they_differ_by_its_rounding(answers):
    assert all(answer["bfloat16"]["logits"] < 0.02 for answer in answers)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault(answers, fault):
    assert all(answer[fault]["logits"] > 0.1 for answer in answers)


@pytest.mark.parametrize("name", CASES)
def test_each_has_half_of_the_codes(folder, answers, name):
    """Of everything but a head of 136 outputs, which are no two parts of whole words, and what no plan splits."""
    split = "experts" if name.startswith("own plan") else "layers"
    whole = [x.nbytes for key, x in load_file(folder / name / "model.safetensors").items() if is_packed(key, split)]
    for answer in answers:
        own = [size for key, size in answer[name]["packed"].items() if is_packed(key, split)]
        assert len(own) == len(whole) > 7
        assert sum(own) == sum(whole) / 2


def is_packed(key, part):
    return key.endswith("qweight") and part in key


def test_each_has_the_groups_of_its_columns(answers):
    down = "model.layers.0.mlp.down_proj"
    for rank, answer in enumerate(answers):
        assert answer["groups"]["groups"][down] == 3
        # The second part begins in the middle of a group of 64: its groups are 32 wide, for the sake of the kernels.
        assert answer["cut groups"]["groups"][down] == (2, 3)[rank]
        assert answer["cut groups"]["kernel_groups"][down] == (64, 32)[rank]
        assert 3 <= answer["desc_act"]["groups"][down] <= 6
        assert answer["one group, head"]["groups"][down] == 1


@pytest.mark.parametrize("name", CASES)
def test_saving_writes_the_whole_checkpoint_again(folder, name):
    before, after = (load_file(folder / name / path) for path in ("model.safetensors", "again/model.safetensors"))
    if name == "without g_idx":
        after = {key: tensor for key, tensor in after.items() if not key.endswith("g_idx")}
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert (folder / name / "config.json").read_text() == (folder / name / "again/config.json").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "one head": (
            "ConfigError: model.layers.0.self_attn.k_proj, 32 x 64",
            "1 head of 32 outputs",
            "Start fewer: 1",
        ),
        "narrow": ("ConfigError: model.layers.0.mlp.gate_proj, 72 x 64 in 4 bits", "no multiples of 8", "1 group,"),
        "from_pretrained": ("ConfigError: A tensor-parallel plan was asked for while quantizing",),
        "quantize": ("ConfigError: A tensor-parallel plan was asked for while quantizing",),
        "experts divided": ("ConfigError: Packed experts are not divided among processes",),
        "fused experts' style": ("'moe_tp_experts'", "give them 'optq_summed'"),
        "style": ("mlp.up_proj is packed and cannot be split in the style 'packed_colwise'", "allowed are colwise"),
        "dequantize": ("ConfigError: model.layers.0.self_attn.q_proj cannot be dequantized",),
        "adapter": ("AdapterError: model.layers.0.self_attn.q_proj is split over 2 processes",),
    }.items(),
)
def test_what_cannot_be_split_is_refused_in_words(answers, name, words):
    for answer in answers:
        assert all(word in answer[name] for word in words), answer[name]


def test_what_stays_whole_is_said_once(folder):
    assert (folder / "said").read_text().count("lm_head is whole in every process: 136 outputs in 2 parts") == 1


@pytest.mark.parametrize(
    ("name", "settings"), [("one head", {}), ("narrow", {"group_size": -1}), ("odd vocabulary", {"lm_head": True})]
)
def test_check_says_the_same_beforehand(folder, name, settings):
    config = GPTQConfig(**{"bits": 4, "group_size": 32, **settings})
    found = optq.check(folder / f"original {name}", config, server="transformers", tensor_parallel=2)
    assert bool(found) == (name in REFUSED)
    if name in REFUSED:
        assert optq.check(folder / name, server="transformers", tensor_parallel=2) == found
        assert optq.check(folder / name, server="transformers") == ()


def test_experts_are_checked_by_what_they_have_inside(folder):
    assert optq.check(folder / "mixtral", server="transformers", tensor_parallel=2) == ()
    found = optq.check(folder / "mixtral", server="transformers", tensor_parallel=64)
    assert any(".experts.*.w2: 192 inputs in 64 parts" in reason for reason in found)


@pytest.mark.parametrize(
    ("size", "bits", "parts", "fits"),
    [(64, 3, 2, True), (32, 3, 2, False), (32, 2, 2, True), (16, 2, 2, False), (8, 8, 2, True), (24, 4, 3, True)],
)
def test_parts_are_whole_words(size, bits, parts, fits):
    assert (why_not_in_parts(size, "inputs", parts, bits) is None) == fits


@pytest.mark.parametrize(
    ("groups", "start", "stop", "needed", "own"),
    [
        (trivial_groups(8, 2), 4, 8, [2, 3], [0, 0, 1, 1]),
        (trivial_groups(8, 8), 4, 8, [0], [0, 0, 0, 0]),
        (trivial_groups(12, 8), 6, 12, [0, 1, 1], [0, 0, 1, 1, 2, 2]),  # the last group is narrower
        (torch.tensor([1, 0, 3, 1, 0, 3, 2, 2]), 0, 4, [0, 1, 3], [1, 0, 2, 1]),
    ],
)
def test_a_part_has_the_groups_that_its_columns_need(groups, start, stop, needed, own):
    found = groups_of_columns(groups.int(), start, stop)
    assert [part.tolist() for part in found] == [needed, own]
    assert torch.equal(found[0][found[1].long()], groups[start:stop].long())


@pytest.fixture
def mixture():
    """A model on the meta device, and its experts, split."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["mixtral"]())
    return model, {name: Experts(fused) for name, fused in find_fused_experts(model).items()}


def test_experts_take_over_the_rules_of_the_fused_ones(mixture):
    model, experts = mixture
    before = dict(model.tp_plan)
    make_ready(model, experts)
    rules = {rule: way for rule, way in model.tp_plan.items() if ".experts" in rule}
    assert {rule.rpartition("experts")[2]: way for rule, way in rules.items()} == {
        "": "optq_summed",
        ".*.gate_proj": "colwise",
        ".*.up_proj": "colwise",
        ".*.down_proj": "optq_summand",
    }
    others = {rule: way for rule, way in before.items() if ".experts" not in rule}
    assert others == {rule: way for rule, way in model.tp_plan.items() if rule not in rules}
    model.tp_plan.clear()
    make_ready(model, experts)  # what no plan splits stays whole
    assert not model.tp_plan


def test_experts_with_a_norm_at_their_end_are_refused(mixture):
    model, experts = mixture
    for module in experts.values():
        module.fused.has_post_expert_norm = True
    with pytest.raises(ConfigError, match="experts with a norm at their end are not split"):
        make_ready(model, experts)


def test_a_layer_that_was_not_split_is_as_any_other(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "groups")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert not any(isinstance(layer, ParallelLinear) for layer in layers)
