# SPDX-License-Identifier: Apache-2.0
"""A mixture's experts as two products: the same results and the same tensors, and no hook or adapter passed over."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from test_linear import in_threads
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optq.checkpoint import pack
from optq.gptq import round_to_nearest, solve
from optq.integrations.tensor_parallel import ParallelLinear
from optq.kernels import triton_gpu
from optq.layers import QuantLinear, fuse_experts
from optq.layers.fused_experts import FusedExperts
from optq.model import Experts
from optq.scheme import LayerScheme

pytestmark = pytest.mark.usefixtures("interpreted_triton")

COUNT, WIDTH, INNER = 5, 64, 32
KINDS = {"gate and up": Qwen3MoeExperts, "biases, interleaved": GptOssExperts, "no gate": NemotronHExperts}
SCHEME = LayerScheme(bits=4, group_size=32)


def mixture(
    kind=Qwen3MoeExperts, scheme=SCHEME, *, joined=True, layer_type=QuantLinear, backend="triton", device="cpu"
):
    """Experts of packed linears, in float16."""
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), COUNT)
    sizes |= dict.fromkeys(("hidden_size", "moe_latent_size"), WIDTH)
    sizes |= dict.fromkeys(("moe_intermediate_size", "intermediate_size"), INNER)
    activation = {"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.7, "swiglu_limit": 7.0}
    fused = kind(SimpleNamespace(**sizes, **activation, num_experts_per_tok=2, _experts_implementation="eager"))
    generator = torch.Generator().manual_seed(0)
    for parameter in fused.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    experts = Experts(fused.eval())
    experts.take_weights()
    for index in range(COUNT):
        for role in experts.layout.roles:
            linear = experts.linear(index, role)
            if scheme.act_order == "desc_act":
                energies = torch.diag(torch.rand(linear.in_features, generator=generator) + 0.1)
                quantized = solve(linear.weight.detach(), energies, scheme).quantized
            else:
                quantized = round_to_nearest(linear.weight.detach(), scheme)
            bias = None if linear.bias is None else linear.bias.detach().clone()
            experts.set_submodule(f"{index}.{role}", layer_type(pack(quantized), bias, backend))
    experts.to(device)
    if joined:
        experts.grouped_gemm = fuse_experts(*experts.linears())
    for layer in layers_of(experts):
        layer.prepare(torch.float16)
    return experts


def layers_of(experts):
    return [module for module in experts.modules() if isinstance(module, QuantLinear)]


def inputs(tokens=7, choices=2):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator).half()
    scores = torch.rand(tokens, COUNT, generator=generator).topk(choices)
    return x, scores.indices, scores.values.half()


AT_ONCE = ["grouped_product"] * 2


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, SCHEME) for name in KINDS),
        ("biases, interleaved", LayerScheme(bits=3, group_size=-1, symmetric=False)),
    ],
)
def test_two_products_give_what_the_experts_linears_do(name, scheme, launches):
    alone, joined = (mixture(KINDS[name], scheme, joined=joined) for joined in (False, True))
    with torch.no_grad():
        for tokens in (1, 40):
            arguments = inputs(tokens)
            expected = alone(*arguments)
            assert "grouped_product" not in launches
            launches.clear()
            # With other rows per product, scales may multiply weights, which are rounded then, instead of sums.
            torch.testing.assert_close(
                joined(*arguments), expected, rtol=4e-3, atol=1e-3 * float(expected.abs().max())
            )
            assert launches == AT_ONCE
            launches.clear()


def test_choices_beyond_the_last_expert_stand_for_none(launches):
    alone, joined = mixture(GptOssExperts, joined=False), mixture(GptOssExperts)
    x, chosen, weights = inputs(12)
    chosen[::3, 0] = COUNT
    chosen[1] = COUNT + 3
    with torch.no_grad():
        expected = alone(x, chosen, weights)
        launches.clear()
        torch.testing.assert_close(joined(x, chosen, weights), expected, rtol=4e-3, atol=4e-3)
        assert not joined(x, torch.full_like(chosen, COUNT), weights).any()
    assert launches == 2 * AT_ONCE


def test_tensors_stay_as_they_were_and_one_memory_holds_all_codes():
    alone, joined = mixture(GptOssExperts, joined=False), mixture(GptOssExperts)
    written, expected = joined.state_dict(), alone.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) and written[key].is_contiguous() for key in expected)
    assert len({tensor.untyped_storage().data_ptr() for tensor in written.values()}) == len(written)
    for roles in (("gate_proj", "up_proj"), ("down_proj",)):
        codes = [joined.linear(index, role).held.prepared.codes for index in range(COUNT) for role in roles]
        assert len({tensor.untyped_storage().data_ptr() for tensor in codes}) == 1
        assert codes[0].untyped_storage().nbytes() == sum(tensor.nbytes for tensor in codes)


class Doubling(torch.nn.Module):
    """Stands for an adapter."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return 2 * self.base_layer(x)


def doubled(module, arguments, output):
    return 2 * output


def hook(experts):
    return experts.linear(1, "down_proj").register_forward_hook(doubled).remove


def global_hook(experts):
    wanted = experts.linear(1, "down_proj")

    def doubled_there(module, arguments, output):
        return 2 * output if module is wanted else None

    return torch.nn.modules.module.register_module_forward_hook(doubled_there).remove


def entrance_hook(experts):
    def second_expert_doubled(module, arguments, output):
        return [2 * x if index == 1 else x for index, x in enumerate(output)]

    return experts.before_last.register_forward_hook(second_expert_doubled).remove


def adapter(experts):
    layer = experts.linear(1, "down_proj")
    experts.set_submodule("1.down_proj", Doubling(layer))
    return lambda: experts.set_submodule("1.down_proj", layer)


def own_forward(experts):
    layer = experts.linear(1, "down_proj")
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)
    return lambda: delattr(layer, "forward")


@pytest.mark.parametrize("change", [hook, global_hook, entrance_hook, adapter, own_forward])
def test_what_happens_in_an_experts_linear_is_not_passed_over(change, launches):
    experts = mixture()
    x = inputs(4)[0]
    chosen = torch.tensor([[1, 2]] * 4)  # what becomes of the second expert's output is seen
    only_it = torch.tensor([[1.0, 0.0]] * 4).half()
    with torch.no_grad():
        before = experts(x, chosen, only_it)
        assert launches == AT_ONCE
        undo = change(experts)
        launches.clear()
        torch.testing.assert_close(experts(x, chosen, only_it), 2 * before, rtol=4e-3, atol=4e-3)
        assert "grouped_product" not in launches
        undo()
        launches.clear()
        assert torch.equal(experts(x, chosen, only_it), before)
        assert launches == AT_ONCE


def test_gradients_every_token_and_many_rows_take_the_experts_one_by_one(launches, monkeypatch):
    experts, (x, chosen, weights) = mixture(), inputs()
    alone = mixture(joined=False)
    gradients = []
    for module in (alone, experts):
        wanted = x.clone().requires_grad_()
        module(wanted, chosen, weights).float().square().sum().backward()
        gradients.append(wanted.grad)
    assert torch.equal(*gradients)
    asked = weights.clone().requires_grad_()
    experts(x, chosen, asked).sum().backward()
    assert asked.grad.any()
    with torch.no_grad():
        experts.every_token = True
        experts(x, chosen, weights)
        experts.every_token = False
        assert experts.grouped_gemm.why_not(14, x) is None
        monkeypatch.setattr(triton_gpu, "MOST_ROWS", 1)
        assert "rows per expert" in experts.grouped_gemm.why_not(14, x)
        experts(x, chosen, weights)
        assert "grouped_product" not in launches
    assert "gradients" in experts.grouped_gemm.why_not(14, x, asked)


def test_linears_that_differ_or_are_not_packed_or_split_are_left_alone(launches):
    arguments = inputs()
    dense = mixture()
    dense.set_submodule("3.up_proj", torch.nn.Linear(WIDTH, INNER))
    assert fuse_experts(*dense.linears()) is None
    split = mixture(layer_type=ParallelLinear)
    assert isinstance(split.grouped_gemm, FusedExperts)
    split.linear(2, "down_proj").part = object()
    assert fuse_experts(*split.linears()) is None
    by_energy = mixture(scheme=LayerScheme(bits=4, group_size=32, act_order="desc_act"))
    mixed = mixture(joined=False)
    mixed.set_submodule("4.down_proj", mixture(scheme=LayerScheme(bits=8, group_size=32)).linear(4, "down_proj"))
    mixed.grouped_gemm = fuse_experts(*mixed.linears())
    for experts in (by_energy, mixed):
        with torch.no_grad():
            expected = [experts(*arguments) for _ in range(2)][1]
            assert "differ in bits, groups or order" in experts.grouped_gemm.why_not(14, arguments[0])
            experts.grouped_gemm = None
            assert torch.equal(experts(*arguments), expected)
    assert "grouped_product" not in launches
    joined = mixture()
    assert "the input is on meta" in joined.grouped_gemm.why_not(14, arguments[0].to("meta"))
    assert joined.grouped_gemm.are_fused  # and nothing was prepared anew
    on_cpu = mixture(backend="auto")
    assert "cpu_int4 has no product" in on_cpu.grouped_gemm.why_not(14, arguments[0])


def test_what_is_copied_cast_or_loaded_again_is_right(launches):
    experts, alone, arguments = mixture(GptOssExperts), mixture(GptOssExperts, joined=False), inputs()
    with torch.no_grad():
        expected = experts(*arguments)
        copied = copy.deepcopy(experts)
        file = io.BytesIO()
        torch.save(experts, file)
        file.seek(0)
        for other in (copied, torch.load(file, weights_only=False)):
            assert other.grouped_gemm is not experts.grouped_gemm
            launches.clear()
            assert torch.equal(other(*arguments), expected)
            assert launches == AT_ONCE
            hook(other)
            assert not torch.equal(other(*arguments), expected)
            assert torch.equal(experts(*arguments), expected)
        x, chosen, weights = arguments
        for module in (alone, experts):  # prepared anew for another dtype, and back
            module(x.float(), chosen, weights.float())
        launches.clear()
        assert torch.equal(experts(*arguments), expected)
        assert launches == AT_ONCE
        changed = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
        changed["2.down_proj.bias"] += 1
        changed["1.up_proj.scales"] *= 2
        for module in (alone, experts):
            module.load_state_dict(changed)
        launches.clear()
        found = experts(*arguments)
        assert launches == AT_ONCE
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, alone(*arguments), rtol=4e-3, atol=4e-3)


def test_threads_that_ask_first_and_with_dtypes_of_their_own_join_all_experts_once(launches):
    experts, alone = mixture(GptOssExperts), mixture(GptOssExperts, joined=False)
    x, chosen, weights = inputs()
    asked = [lambda dtype=dtype: experts.grouped_gemm.why_not(14, x.to(dtype)) for dtype in (x.dtype, torch.bfloat16)]
    assert in_threads(asked * 2, times=3) == [[None] * 3] * 4
    with torch.no_grad():
        expected = alone(x, chosen, weights)
        launches.clear()
        torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=4e-3, atol=4e-3)
        assert launches == AT_ONCE
        for module in (experts, alone):
            module.linear(2, "down_proj").bias.mul_(2)
            module.bfloat16()  # nothing moves, but there are other biases now
        assert experts.grouped_gemm.are_fused
        launches.clear()
        with torch.autocast("cpu", torch.float16):
            found = experts(x.float(), chosen, weights)
        assert launches == AT_ONCE
        expected = alone(x, chosen, weights)
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=4e-3, atol=4e-3)


def test_a_graph_holds_two_nodes_for_all_experts_and_no_wait_for_the_device():
    experts, arguments = mixture(GptOssExperts), inputs()
    graphs = []

    def kept(graph, examples):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = experts(*arguments)
        found = torch.compile(experts, fullgraph=True, backend=kept)(*arguments)
    assert torch.equal(found, expected)
    (graph,) = graphs
    nodes = [str(node.target) for node in graph.graph.nodes]
    assert sum("optq.grouped_gemm" in node for node in nodes) == 2
    assert not any("optq.matmul" in node or node in ("item", "tolist") for node in nodes)
