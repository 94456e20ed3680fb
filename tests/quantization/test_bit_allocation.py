# SPDX-License-Identifier: Apache-2.0
"""A budget of bits: what is chosen, what it says in the checkpoint, and what comes back."""

import copy
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from optq import GPTQConfig
from optq.calibration import Calibration, MicroBatch
from optq.config.gptq import dynamic_rules
from optq.errors import ConfigError
from optq.events import Allocated, to_dict
from optq.gptq import Hessian, solve
from optq.layers import QuantLinear
from optq.model import find_blocks
from optq.quantization.bit_allocation import Option, choose, measure
from optq.quantization.plan import plan_quantization
from optq.quantization.run import Run
from optq.scheme import LayerScheme


def option(bits, loss):
    return Option(scheme=LayerScheme(), bits=bits, loss=loss)


def test_no_choice_within_the_budget_is_much_better():
    """Against all combinations: convex hulls may miss the optimum by less than one upgrade."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        units = []
        for _ in range(4):
            size, start = (float(value) for value in torch.rand(2, generator=generator) + 0.2)
            units.append([option(int(100 * size * bits), start * 4.0 ** -(bits - 2)) for bits in (2, 3, 4, 8)])
        lows = sum(unit[0].bits for unit in units)
        budget = lows + int(400 * float(torch.rand((), generator=generator)))
        best = min(
            sum(one.loss for one in combination)
            for combination in itertools.product(*units)
            if sum(one.bits for one in combination) <= budget
        )
        chosen = choose(units, budget)
        assert sum(one.bits for one in chosen) <= budget
        assert sum(one.loss for one in chosen) <= best + max(unit[0].loss - unit[1].loss for unit in units)
        assert choose(units, lows - 1) is None


def test_options_that_cost_more_and_lose_more_are_never_chosen():
    units = [[option(10, 1.0), option(20, 2.0), option(30, 0.5)]]
    assert [choose(units, budget)[0].bits for budget in (10, 20, 29, 30, 99)] == [10, 10, 10, 30, 30]


def bits_of(model):
    return {name: layer.bits for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def test_a_budget_is_kept_and_survives_the_round_trip(tiny_llama, token_rows, tmp_path, probe_ids):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, target_bits_per_weight=4.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = 8 * sum(
        tensor.numel() * tensor.element_size()
        for layer in layers
        for tensor in (layer.qweight, layer.qzeros, layer.scales)
    )
    assert 3.5 < stored / weights <= 4.0
    bits = bits_of(model)
    assert len(set(bits.values())) > 1
    for block in range(2):
        for stage in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[f"model.layers.{block}.{name}"] for name in stage}) == 1
    (allocated,) = [to_dict(event) for event in model.hf_quantizer.log.events if isinstance(event, Allocated)]
    assert len(allocated["units"]) == 8
    assert {"2-bit g32", "3-bit g32", "4-bit g32", "8-bit g32"} <= set(allocated["units"][0]["losses"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bits_of(loaded) == bits
    with torch.no_grad():
        assert torch.equal(loaded(probe_ids).logits, model(probe_ids).logits)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not {"target_bits_per_weight", "serving"} & set(written)


def test_more_bits_lose_less(tiny_llama, token_rows, probe_ids):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)(probe_ids).logits.detach()
    errors = []
    for target in (3.0, 4.5, 8.7):
        config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, target_bits_per_weight=target)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        with torch.no_grad():
            errors.append(float((model(probe_ids).logits - original).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_serving_vllm_keeps_to_what_vllm_reads(tiny_llama, token_rows):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, target_bits_per_weight=6.0, serving="vllm")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert set(bits_of(model).values()) == {4, 8}
    assert model.config.quantization_config.sym


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "3 bits; use 4 or 8"),
        ({"bits": 4, "sym": False}, "sym=True"),
        ({"bits": 4, "desc_act": True}, "desc_act"),
        ({"bits": 4, "group_size": 16}, "group_size=16"),
        ({"bits": 4, "dynamic": {"down_proj": {"bits": 2}}}, "2 bits"),
    ],
)
def test_serving_vllm_refuses_what_vllm_does_not_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        GPTQConfig(serving="vllm", **settings)


def test_serving_others_refuses_what_they_do_not_read():
    assert GPTQConfig(bits=4, serving="sglang", desc_act=True).desc_act
    with pytest.raises(ConfigError, match=r"SGLang does not read asymmetric grids.*, nor group_size=16"):
        GPTQConfig(bits=4, serving="sglang", sym=False, group_size=16)
    assert GPTQConfig(bits=2, serving="transformers", sym=False, desc_act=True, group_size=16).bits == 2


def test_an_impossible_budget_says_what_is_possible(tiny_llama, token_rows):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, target_bits_per_weight=1.5)
    with pytest.raises(ConfigError, match=r"1\.500 bits per weight was asked for.*need 2\.5"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    with pytest.raises(ConfigError, match="not both"):
        GPTQConfig(bits=4, target_bits_per_weight=4, target_size_gib=1)


def test_a_size_counts_what_stays_dense(tiny_llama, token_rows):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    linears = sum(
        parameter.numel() for name, parameter in dense.named_parameters() if "proj" in name and parameter.ndim == 2
    )
    rest = sum(parameter.numel() * 2 for parameter in dense.parameters()) - 2 * linears
    target = (rest + linears * 4.2 / 8) / 2**30
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows, target_size_gib=target)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.bfloat16)
    (allocated,) = [to_dict(event) for event in model.hf_quantizer.log.events if isinstance(event, Allocated)]
    assert 3.6 < allocated["bits_per_weight"] <= 4.2


def test_rules_name_the_fused_layers_too():
    base = LayerScheme(bits=4, group_size=64)
    eight = LayerScheme(bits=8, group_size=64)
    attention = {f"model.layers.0.self_attn.{name}_proj": eight for name in "qkv"}
    rules = dynamic_rules({**attention, "model.layers.0.self_attn.o_proj": base}, base)
    (pattern,) = rules
    assert rules[pattern] == {"bits": 8}
    config = GPTQConfig(bits=4, group_size=64, dynamic=rules)
    for name in ("q_proj", "v_proj", "qkv_proj"):
        assert config.scheme_for(f"model.layers.0.self_attn.{name}").bits == 8
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.10.self_attn.q_proj", "xmodel.layers.0.q_proj"):
        assert config.scheme_for(name).bits == 4


def test_padding_counts_for_nothing(tiny_llama):
    """Rows of unequal length are padded; what with must not matter to the measured losses."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(8, 128, (length,), generator=generator).tolist() for length in (96, 40, 64, 96)]
    losses = []
    for pad_token_id in (0, 7):
        config = GPTQConfig(
            bits=4,
            group_size=32,
            dataset=[{"input_ids": row} for row in rows],
            batch_size=4,
            pad_token_id=pad_token_id,
            target_bits_per_weight=4.0,
            quality_gate="off",
        )
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        (allocated,) = [to_dict(event) for event in model.hf_quantizer.log.events if isinstance(event, Allocated)]
        losses.append([list(unit["losses"].values()) for unit in allocated["units"]])
    torch.testing.assert_close(*(torch.tensor(values) for values in losses), rtol=1e-4, atol=1e-9)


def test_a_loss_is_what_the_predictions_lose(tiny_llama, token_rows):
    """One linear quantized alone, by hand, loses what was estimated from its block as a whole."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    schemes = [LayerScheme(bits=bits, group_size=32, propagation=0.0) for bits in (2, 3, 4)]
    plan = plan_quantization(find_blocks(model), lambda name: schemes[1])
    ids = torch.tensor([row["input_ids"] for row in token_rows[:8]])
    calibration = Calibration(batches=(MicroBatch(input_ids=ids, attention_mask=None),), info={"tokens": ids.numel()})
    units = measure(model, plan, calibration, lambda view: schemes, Run(device=torch.device("cpu")))
    assert len(units) == 8
    with torch.no_grad():
        original = model(ids[:1]).logits.log_softmax(-1)
        for unit in units:
            worst, rounded = unit.options[0], copy.deepcopy(model)
            linears = [rounded.get_submodule(name) for name in unit.names]
            hessian = Hessian(linears[0].in_features, "cpu")
            hook = linears[0].register_forward_pre_hook(lambda _, inputs, hessian=hessian: hessian.add(inputs[0]))
            rounded(ids)
            hook.remove()
            for linear in linears:
                linear.weight.data = solve(linear.weight.data, hessian.mean(), worst.scheme).quantized.decode()
            found = rounded(ids[:1]).logits.log_softmax(-1)
            divergence = float((original.exp() * (original - found)).sum(-1).mean())
            assert 0.5 * divergence < worst.loss < 2.5 * divergence


def test_linears_that_share_an_input_need_a_scheme_in_common(tiny_llama, token_rows):
    config = GPTQConfig(
        bits=4,
        group_size=32,
        dataset=token_rows,
        target_bits_per_weight=4.5,
        dynamic={r".*q_proj": {"group_size": 16}},
    )
    with pytest.raises(ConfigError, match=r"q_proj.*must have one scheme"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
