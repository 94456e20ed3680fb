# SPDX-License-Identifier: Apache-2.0
"""The driver on tiny models: what it computes, and what it leaves behind when it fails."""

import json

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForCausalLM

from conftest import VOCABULARY, waiting_forwards
from optq.calibration import Sampling, prepare_calibration
from optq.errors import CalibrationError, ConfigError, ModelError
from optq.evaluation import Comparer
from optq.events import BlockQuantized, BlockReconstructed, LinearQuantized, Quality, RunLog, Unreached, to_dict
from optq.gptq import round_to_nearest
from optq.layers import QuantLinear
from optq.model import find_blocks, find_linears
from optq.quantization import stage_solver
from optq.quantization.driver import quantize_model
from optq.quantization.plan import plan_quantization
from optq.quantization.run import Run
from optq.scheme import LayerScheme

SCHEME = LayerScheme(bits=4, group_size=32)
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def calibrate(rows, **changes):
    settings = {"vocabulary": VOCABULARY, "window": 64, **changes}
    return prepare_calibration(rows, lambda: pytest.fail("no text, no tokenizer"), Sampling(**settings))


def plan(model, scheme_for=lambda name: SCHEME):
    return plan_quantization(find_blocks(model), scheme_for)


def weights(model):
    """Dense values of every quantized linear, by name."""
    return {
        name: module.packed().columns(0, module.out_features).T
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


def footprint(model):
    """What must be as before when a run ends."""
    return (
        {
            name: (module.training, set(module._forward_pre_hooks), set(module._forward_hooks))
            for name, module in model.named_modules()
        },
        [("forward" in block.__dict__) for block in model.model.layers],
        {name: (parameter.device, parameter.dtype) for name, parameter in model.named_parameters()},
        model.config.use_cache,
    )


def mean_error(model, original, ids):
    with torch.no_grad():
        return float((model(ids).logits - original).square().mean())


def test_quantized_outputs_are_closer_than_rounding_to_nearest(tiny_llama, model, token_rows, probe_ids):
    original = model(probe_ids).logits.detach()
    nearest = AutoModelForCausalLM.from_pretrained(tiny_llama)
    scheme = LayerScheme(bits=3, group_size=32, damping=0.01)
    for block in find_blocks(nearest).values():
        for view in find_linears(block).values():
            view.write(round_to_nearest(view.weight, scheme).decode())
    quantize_model(model, plan(model, lambda name: scheme), calibrate(token_rows), Run(device=CPU))
    assert len(weights(model)) == 14
    assert mean_error(model, original, probe_ids) < 0.8 * mean_error(nearest, original, probe_ids)


def test_sequential_and_joint_calibration_differ_after_the_first_stage(tiny_llama, token_rows):
    results = {}
    for sequential in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize_model(model, plan(model), calibrate(token_rows), Run(sequential=sequential, device=CPU))
        results[sequential] = weights(model)
    same = {name: torch.equal(results[True][name], results[False][name]) for name in results[True]}
    assert same["model.layers.0.self_attn.q_proj"]
    assert not same["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("reconstruction_passes", [0, 1])
def test_what_finds_no_room_to_wait_inside_a_block_is_run_anew_with_the_same_bytes(
    tiny_llama, token_rows, monkeypatch, caplog, reconstruction_passes
):
    results = []
    for room in (2**40, 0, 1_000_000):  # for all micro-batches, none, and one
        monkeypatch.setattr("optq.quantization.block.free_bytes", lambda device, room=room: 2 * room)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with caplog.at_level("INFO", logger="optq"):
            quantize_model(
                model,
                plan(model),
                calibrate(token_rows, batch_size=4),
                Run(reconstruction_passes=reconstruction_passes, device=CPU),
            )
        results.append(model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
    said = [message.partition(": ")[2] for message in caplog.messages if "micro-batches at once" in message]
    batches = len(calibrate(token_rows, batch_size=4).batches)
    assert said == [f"memory for {room} of {batches} micro-batches at once." for room in (0, 0, 1, 1)]


def test_padding_changes_nothing(tiny_llama, token_rows):
    """Samples of unequal length in one padded micro-batch, or each alone."""
    rows = [{"input_ids": row["input_ids"][: 20 + 4 * (index % 4)]} for index, row in enumerate(token_rows)]
    results = {}
    for batch_size in (1, 8):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        calibration = calibrate(rows, batch_size=batch_size)
        assert any(batch.attention_mask is not None for batch in calibration.batches) is (batch_size > 1)
        quantize_model(model, plan(model), calibration, Run(device=CPU))
        results[batch_size] = weights(model)
    for name, alone in results[1].items():
        # float32 sums in another order may flip a code that sits on an edge; counting padding would change them all.
        assert (alone != results[8][name]).float().mean() < 0.02, name


@pytest.mark.parametrize("reconstruction_passes", [0, 2])
def test_runs_are_reproducible_bit_for_bit(tiny_llama, token_rows, reconstruction_passes):
    results = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        calibration = calibrate(token_rows, batch_size=4)
        quantize_model(model, plan(model), calibration, Run(reconstruction_passes=reconstruction_passes, device=CPU))
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_flags_hooks_and_devices_are_as_before(model, token_rows):
    model.train()
    model.model.layers[0].mlp.eval()
    model.config.use_cache = True
    before = footprint(model)
    quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU))
    after = footprint(model)
    assert {name: after[0][name] for name in before[0]} == before[0]
    assert after[1] == before[1]
    assert after[3] == before[3]
    assert set(after[2]) < set(before[2])  # only quantized weights are gone
    assert not waiting_forwards()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_flags_hooks_and_devices_are_as_before_after_a_failure(model, token_rows, monkeypatch, error):
    model.train()
    before = footprint(model)
    solved = []

    def failing_solve(weight, *arguments, **keywords):
        solved.append(weight.shape)
        if len(solved) == 3:
            raise error("in the middle of a block")
        return original_solve(weight, *arguments, **keywords)

    original_solve = stage_solver.solve
    monkeypatch.setattr(stage_solver, "solve", failing_solve)
    with pytest.raises(error):
        quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU))
    assert footprint(model) == before
    assert not waiting_forwards()


def test_half_precision_models_are_calibrated_in_float32_and_stay_half(tiny_llama, token_rows):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    seen = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU))
    assert set(seen) == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_log_tells_every_linear(model, token_rows, tmp_path):
    log = RunLog(tmp_path / "log.jsonl", bar=False)
    with log:
        quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU, log=log))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == [json.loads(json.dumps(to_dict(event))) for event in log.events]
    assert [events[0]["event"], events[-1]["event"]] == ["started", "finished"]
    linears = [event for event in events if event["event"] == "linear"]
    assert len(linears) == 14
    for event in linears:
        assert 0 < event["relative_loss"] < 0.1
        assert event["tokens"] == 15 * 48  # one of 16 samples is held out
        assert event["damping"] == SCHEME.damping
        assert {"seconds", "peak_gib", "dead_columns", "bits"} <= set(event)


def test_one_line_tells_a_blocks_loss_and_size(model, token_rows, caplog):
    log = RunLog(bar=False)
    with caplog.at_level("INFO", logger="optq.quantization.report"):
        quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU, log=log))
    blocks = [event for event in log.events if isinstance(event, BlockQuantized)]
    assert [event.block for event in blocks] == ["model.layers.0", "model.layers.1"]
    # 4-bit codes, and per group of 32 a float16 scale and a 4-bit zero
    assert {event.bits_per_weight for event in blocks} == {4 + 20 / 32}
    assert len([record for record in caplog.records if "bits per weight" in record.message]) == 2


def test_a_failure_is_the_last_event(model, token_rows, tmp_path):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    log = RunLog(tmp_path / "log.jsonl", bar=False)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj has weights that are not finite"), log:
        quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU, log=log))
    assert [event.event for event in log.events] == ["failed"]


def test_activations_that_are_not_finite_name_the_block(model, token_rows):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * torch.inf)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1 are not finite"):
        quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU))


def test_activations_that_are_not_finite_inside_a_block_name_the_linears(model, token_rows):
    model.model.layers[0].post_attention_layernorm.weight.data[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.mlp\.gate_proj.*: The inputs of this layer"):
        quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU))


def test_linears_that_are_never_reached_stay_dense_and_are_said(model, token_rows, caplog):
    model.model.layers[0].mlp.spare = nn.Linear(64, 64)
    log = RunLog(bar=False)
    quantize_model(model, plan(model), calibrate(token_rows), Run(device=CPU, log=log))
    assert isinstance(model.model.layers[0].mlp.spare, nn.Linear)
    assert [event.linear for event in log.events if isinstance(event, Unreached)] == ["model.layers.0.mlp.spare"]
    assert "never reaches" in caplog.text


def test_layers_can_have_different_schemes_or_none(model, token_rows):
    def scheme_for(name):
        if name.endswith("k_proj"):
            return LayerScheme(bits=8, group_size=64)
        return None if name.endswith("down_proj") else SCHEME

    quantize_model(model, plan(model, scheme_for), calibrate(token_rows), Run(device=CPU))
    layers = dict(model.named_modules())
    assert layers["model.layers.0.self_attn.q_proj"].bits == 4
    assert layers["model.layers.0.self_attn.k_proj"].bits == 8
    assert isinstance(layers["model.layers.1.mlp.down_proj"], nn.Linear)


def test_a_group_size_that_fits_no_layer_is_refused_before_any_work(model):
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj.*64 is not a multiple of group_size 48"
    ):
        plan(model, lambda name: LayerScheme(group_size=48))


def test_weights_that_are_no_linear_layers_are_said(caplog):
    block = nn.ModuleDict({"good": nn.Linear(64, 32), "other": nn.Module()})
    block["other"].experts = nn.Parameter(torch.zeros(4, 32, 64))
    block["odd"] = type("Odd", (nn.Linear,), {"forward": lambda self, x: x})(64, 64)
    block["other"].scales = nn.Parameter(torch.zeros(2, 1, 8))  # too small to matter
    found = plan_quantization({"b": block}, lambda name: LayerScheme(group_size=32))
    assert found.skipped.keys() == {"b.other.experts", "b.odd"}
    assert "b.odd stays in full precision: Odd computes something else than the product with its weight" in caplog.text
    assert "b.other.experts stays in full precision: it is a parameter of shape (4, 32, 64)" in caplog.text
    assert "57% of its block's weights" in caplog.text


def test_a_ragged_last_group_is_warned_about_once_with_what_vllm_reads(model, caplog):
    plan(model, lambda name: LayerScheme(group_size=64))  # down_proj has 96 inputs
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "in_features 96" in warnings[0]
    assert "group_size 32, -1" in warnings[0]


def test_shapes_without_a_place_in_the_format_are_skipped_and_said(caplog):
    block = nn.ModuleDict({"odd": nn.Linear(64, 20), "good": nn.Linear(64, 32)})
    found = plan_quantization({"b": block}, lambda name: LayerScheme(bits=3, group_size=32))
    assert [target.view.name for target in found.targets["b"]] == ["b.good"]
    assert "b.odd stays in full precision" in caplog.text
    with pytest.raises(ConfigError, match="No linear layer is left"):
        plan_quantization(
            {"b": nn.ModuleDict({"odd": nn.Linear(64, 20)})}, lambda name: LayerScheme(bits=3, group_size=32)
        )


def quality_of(model, reference, calibration):
    """The figures of the gate, computed from outside."""
    comparer = Comparer()
    with torch.no_grad():
        for probe in calibration.held_out:
            inputs = probe.as_model_inputs("cpu")
            comparer.add(reference(**inputs).logits, model(**inputs).logits, probe.next_ids, probe.attention_mask)
    return comparer.result()


@pytest.mark.parametrize("propagation", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [(48,), (48, 31, 20)])
def test_the_gate_compares_with_the_original_model(tiny_llama, model, token_rows, propagation, lengths):
    rows = [{"input_ids": row["input_ids"][: lengths[index % len(lengths)]]} for index, row in enumerate(token_rows)]
    calibration = calibrate(rows)
    scheme = LayerScheme(bits=3, group_size=32, propagation=propagation)
    log = RunLog(bar=False)
    found = quantize_model(model, plan(model, lambda name: scheme), calibration, Run(device=CPU, log=log))
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = quality_of(model, reference, calibration)
    assert found.tokens == expected.tokens > 0
    for name in ("divergence", "agreement", "original_perplexity", "perplexity"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert found.perplexity != found.original_perplexity
    (event,) = [to_dict(event) for event in log.events if isinstance(event, Quality)]
    assert event["held_out"]
    assert event["perplexity_ratio"] == pytest.approx(found.perplexity_ratio, abs=1e-4)


def test_without_probes_nothing_is_compared(model, token_rows):
    calibration = calibrate(token_rows, hold_out=False)
    log = RunLog(bar=False)
    assert quantize_model(model, plan(model), calibration, Run(device=CPU, log=log)) is None
    assert not [event for event in log.events if isinstance(event, Quality)]


def test_propagation_begins_where_inputs_drift(tiny_llama, token_rows):
    results = {}
    for propagation in (0.0, 0.5):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        scheme = LayerScheme(bits=2, group_size=32, propagation=propagation)
        quantize_model(model, plan(model, lambda name, scheme=scheme: scheme), calibrate(token_rows), Run(device=CPU))
        results[propagation] = weights(model)
    same = {name: torch.equal(results[0.0][name], results[0.5][name]) for name in results[0.0]}
    assert [name for name in same if same[name]] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def test_polish_brings_the_model_closer(tiny_llama, token_rows):
    found, logs = {}, {}
    rows = [{"input_ids": row["input_ids"][start:]} for row in token_rows for start in range(4)]
    for passes in (0, 6):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        scheme = LayerScheme(bits=2, group_size=32, symmetric=False)
        logs[passes] = RunLog(bar=False)
        found[passes] = quantize_model(
            model,
            plan(model, lambda name, scheme=scheme: scheme),
            calibrate(rows, batch_size=4),
            Run(reconstruction_passes=passes, device=CPU, log=logs[passes]),
        )
        assert all(parameter.requires_grad for parameter in model.parameters())
    reconstructed = [event for event in logs[6].events if isinstance(event, BlockReconstructed)]
    assert [event.block for event in reconstructed] == ["model.layers.0", "model.layers.1"]
    assert all(event.held_out_loss < event.held_out_loss_before for event in reconstructed)
    assert found[6].divergence < 0.8 * found[0].divergence


@pytest.mark.parametrize("propagation", [0.0, 0.5])
def test_to_see_whether_blocks_are_called_repeatedly_takes_no_forward_of_one(model, token_rows, propagation):
    forwards = [0, 0]
    for index, layer in enumerate(model.model.layers):

        def counting(*_, index=index):
            forwards[index] += 1

        layer.self_attn.register_forward_pre_hook(counting)
    scheme = LayerScheme(bits=4, group_size=32, propagation=propagation)
    quantize_model(model, plan(model, lambda name: scheme), calibrate(token_rows), Run(device=CPU))
    assert forwards[0] == forwards[1] > 0


@pytest.mark.parametrize("settings", [{}, {"reconstruction_passes": 1}])
def test_blocks_that_are_called_repeatedly_are_solved_once_on_all_calls(token_rows, settings):
    """ALBERT's; whether the original model has to run all micro-batches shows at its first block only."""
    torch.manual_seed(0)
    shapes = {"vocab_size": VOCABULARY, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 96}
    model = AlbertForMaskedLM(AlbertConfig(**shapes, num_hidden_layers=3, num_attention_heads=2)).eval()
    log, calibration = RunLog(bar=False), calibrate(token_rows)
    scheme = LayerScheme(bits=4, group_size=32, propagation=0.0)
    found = quantize_model(model, plan(model, lambda name: scheme), calibration, Run(device=CPU, log=log, **settings))
    linears = [to_dict(event) for event in log.events if isinstance(event, LinearQuantized)]
    assert len({event["linear"] for event in linears}) == len(linears) == 6
    assert {event["tokens"] for event in linears} == {3 * calibration.info["tokens"]}
    assert found.tokens > 0
    assert found.divergence < 0.1
