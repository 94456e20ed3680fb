# SPDX-License-Identifier: Apache-2.0
"""Experts as separate linears compute what transformers' fused ones do, for every kind that it has."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers.models
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optq.errors import ModelError
from optq.model import Experts, find_fused_experts, find_linears, independent_groups, observe_stages, put_split
from optq.model.experts import find_layout

COUNT, WIDTH, INNER = 4, 32, 24
NOT_SPLIT = {
    "InklingSharedExperts": "gate and up in tensors of their own, all experts for every token",
    "LongcatFlashExperts": "more experts than weights: some only hand their input on",
}


class AnyConfig:
    """Stands in for every architecture's config: answers by what a field's name suggests."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        for parts, value in (
            (("hidden_act", "hidden_activation", "activation"), "silu"),
            (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed"), COUNT),
            (("limit", "alpha", "eps"), 1.7),
            (("bias",), False),
            (("intermediate", "ffn"), INNER),
            (("hidden_size", "d_model"), WIDTH),
        ):
            if any(part in name for part in parts):
                return value
        return 2


def experts_classes():
    """Where every class of transformers is that keeps experts in a `down_proj` of its own: class to module.

    The files are read, not imported: half of transformers would be, and each worker of pytest asks.
    """
    found = {}
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if OWN_EXPERTS not in text:
            continue
        for statement in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
            if OWN_EXPERTS in statement and (name := re.match(r"class (\w+)", statement)):
                found[name[1]] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


OWN_EXPERTS = "self.down_proj = nn.Parameter("
CLASSES = experts_classes()


def class_named(name):
    return getattr(importlib.import_module(CLASSES[name]), name)


def fused(kind=Qwen3MoeExperts):
    torch.manual_seed(0)
    module = kind(AnyConfig())
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return module.eval().requires_grad_(False)


def split(module):
    experts = Experts(module)
    weights = {name: parameter.clone() for name, parameter in module.named_parameters(recurse=False)}
    experts.take_weights()
    return experts, weights


def routing(tokens, choices=2, count=COUNT):
    scores = torch.rand(tokens, count).topk(choices)
    return scores.indices, scores.values


def test_there_are_many_kinds():
    assert len(CLASSES) > 40
    assert CLASSES.keys() >= NOT_SPLIT.keys()


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NOT_SPLIT.keys()))
def test_every_kind_is_split_and_put_together_again(name):
    module = fused(class_named(name))
    layout = find_layout(module)
    x = torch.randn(40, module.down_proj.shape[2 if layout.transposed else 1])
    chosen = routing(40) if layout.routed else ()
    expected = module(x, *chosen)
    experts, weights = split(module)
    assert all(parameter.is_meta for parameter in module.parameters(recurse=False))
    torch.testing.assert_close(experts(x, *chosen), expected, rtol=1e-4, atol=1e-5)
    experts.return_weights()
    for key, value in weights.items():
        assert torch.equal(module.get_parameter(key), value), key


@pytest.mark.parametrize("name", sorted(NOT_SPLIT))
def test_kinds_that_are_not_understood_are_left_alone(name):
    assert find_layout(fused(class_named(name))) is None


def test_linears_that_would_compute_something_else_are_refused():
    class Scaled(Qwen3MoeExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 1.1 * super().forward(hidden_states, top_k_index, top_k_weights)

    with pytest.raises(ModelError, match="Scaled computes something else"):
        split(fused(Scaled))


def test_choices_beyond_the_last_expert_stand_for_none():
    module = fused()
    chosen, weights = routing(12)
    chosen[::3, 0] = COUNT
    x = torch.randn(12, WIDTH)
    try:
        expected = module(x, chosen, weights)
    except RuntimeError:
        pytest.skip("this version of transformers knows no choice that stands for none")
    experts, _ = split(module)
    torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(experts(x, torch.full((12, 2), COUNT), weights), torch.zeros(12, WIDTH))


def seen_by(experts, *arguments):
    """Rows that each expert's first and last linear get."""
    rows = {}
    for index in range(COUNT):
        for role in ("up_proj", "down_proj"):
            linear = experts.linear(index, role)
            linear.register_forward_pre_hook(lambda _, args, key=(index, role): rows.update({key: args[0].shape[0]}))
    experts(*arguments)
    return rows


@pytest.mark.parametrize("kind", [Qwen3MoeExperts, Llama4TextExperts, GptOssExperts])
def test_an_expert_sees_its_own_tokens_or_if_wanted_all(kind):
    experts, _ = split(fused(kind))
    x = torch.randn(10, WIDTH)
    arguments = (x, torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1))
    if kind is Llama4TextExperts:  # all tokens of expert 0, then zeros for the others
        arguments = (torch.cat((x, torch.zeros((COUNT - 1) * 10, WIDTH))),)
    expected = experts(*arguments)
    assert seen_by(experts, *arguments) == {(0, "up_proj"): 10, (0, "down_proj"): 10}
    experts.every_token = True
    assert set(seen_by(experts, *arguments).values()) == {10}
    assert len(seen_by(experts, *arguments)) == 2 * COUNT
    torch.testing.assert_close(experts(*arguments), expected)


class Block(nn.Module):
    """A mixture as most architectures write it: a router beside the experts, and an expert for all tokens."""

    def __init__(self, experts):
        super().__init__()
        self.gate = nn.Linear(WIDTH, COUNT)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.experts = experts

    def forward(self, x):
        scores = self.gate(x).topk(1)
        routed = (
            self.experts(x, scores.indices, scores.values)
            if not isinstance(self.experts, nn.ModuleList)
            else sum(
                expert(x[scores.indices[:, 0] == index]).sum(0)
                for index, expert in enumerate(self.experts)
                if (scores.indices[:, 0] == index).any()
            )
        )
        return self.shared(x) + routed


def listed():
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)) for _ in range(COUNT))


def test_experts_are_found_and_their_linears_grouped_whether_or_not_a_token_comes():
    block = Block(fused())
    (name,) = find_fused_experts(block)
    assert name == "experts"
    put_split(block, {name: split(block.experts)[0]})
    views = find_linears(block, "b")
    assert [name for name, view in views.items() if view.routes] == ["b.gate"]
    assert views["b.experts.2.up_proj"].family == "b.experts.*.up_proj"
    assert views["b.experts.2.up_proj"].entrance == (block.experts.before_first, 2)
    assert views["b.shared"].family is None
    targets = [view for view in views.values() if not view.routes]
    stages = observe_stages(targets, lambda: block(torch.randn(1, WIDTH)))  # one token: three experts have none
    groups = [[stage.name for stage in group] for group in independent_groups(stages)]
    assert sorted(groups) == sorted([["up_proj+gate_proj"] * COUNT, ["down_proj"] * COUNT, ["shared"]])
    assert sorted(stage.rows for stage in stages) == [0] * 6 + [1] * 3
    assert all(stage.orderly for stage in stages)


def test_lists_of_experts_are_found_as_well():
    block = Block(listed())
    views = find_linears(block, "b")
    assert views["b.experts.3.1"].family == "b.experts.*.1"
    assert [name for name, view in views.items() if view.routes] == ["b.gate"]
    targets = [view for view in views.values() if not view.routes]
    stages = observe_stages(targets, lambda: block(torch.randn(1, WIDTH)))
    assert [len(group) for group in independent_groups(stages)].count(COUNT) == 2
    assert not all(stage.orderly for stage in stages)  # the first expert's last linear runs before the second's first


def test_a_list_without_a_router_is_no_mixture():
    block = nn.ModuleDict({"layers": listed(), "norm": nn.LayerNorm(WIDTH)})
    assert all(view.family is None and not view.routes for view in find_linears(block).values())
