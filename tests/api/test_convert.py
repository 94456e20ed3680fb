# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from conftest import rewritten
from optq import GPTQConfig
from optq.errors import CheckpointError, ConfigError, OptqError, OutputError
from other_formats import (
    awq_folder,
    compressed_folder,
    compressed_parts,
    compressed_weight,
    gptq_weight,
    grids_of,
    random_grid,
    tensors_of,
)

IDS = torch.arange(5, 37)[None]


@pytest.fixture(scope="module", params=[(4, True), (3, False), (2, False), (8, True)], ids=str)
def checkpoint(request, tiny_llama, token_rows, tmp_path_factory):
    bits, sym = request.param
    config = GPTQConfig(bits=bits, sym=sym, group_size=32, effort="fast", dataset=token_rows)
    return optq.quantize(tiny_llama, config, output_dir=tmp_path_factory.mktemp("source") / "out")


def test_the_folders_may_be_given_in_their_order(checkpoint, tmp_path):
    assert optq.convert(checkpoint, tmp_path / "out", to="dense") == tmp_path / "out"


def stated_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def restated(folder, target, **changes):
    """A copy of a checkpoint whose quantization_config says something else."""
    shutil.copytree(folder, target)
    with rewritten(target / "config.json") as config:
        config["quantization_config"] |= changes
    return target


def logits_of(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)(input_ids=IDS).logits.detach()


def test_to_the_other_format_and_back_gives_the_same_bytes(checkpoint, tmp_path):
    there = optq.convert(checkpoint, output_dir=tmp_path / "v2", to="gptq_v2")
    back = optq.convert(there, output_dir=tmp_path / "v1", to="gptq")
    for file in checkpoint.glob("*.safetensors"):
        assert (back / file.name).read_bytes() == file.read_bytes()
        # Negative control: on the way, the zeros were other ones.
        assert (there / file.name).read_bytes() != file.read_bytes() or not any(
            "qzeros" in name for name in load_file(file)
        )
    stated = stated_in(there)
    assert stated["checkpoint_format"] == stated["format"] == "gptq_v2"
    assert torch.equal(logits_of(there), logits_of(checkpoint))


def test_dense_weights_are_the_dequantized_ones(checkpoint, tiny_llama, tmp_path):
    dense = optq.convert(checkpoint, output_dir=tmp_path / "dense", to="dense")
    quantized = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    state = tensors_of(dense)
    names = [name for name, module in quantized.named_modules() if isinstance(module, optq.QuantLinear)]
    assert len(names) == 14
    for name in names:
        layer = quantized.get_submodule(name)
        assert torch.equal(state[f"{name}.weight"], layer.dense(torch.float32).weight)
    assert set(state) == set(tensors_of(tiny_llama))
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    torch.testing.assert_close(logits_of(dense), logits_of(checkpoint), rtol=1e-4, atol=1e-4)


def test_everything_else_is_carried_along(checkpoint, tmp_path):
    there = optq.convert(checkpoint, output_dir=tmp_path / "v2", to="gptq_v2")
    assert {path.name for path in there.iterdir()} == {
        path.name for path in checkpoint.iterdir() if path.name not in ("quantization_log.jsonl", "README.md")
    }
    assert (there / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_a_linear_whose_tensors_lie_in_two_files_is_converted(checkpoint, tmp_path):
    """Tools cut checkpoints between any two tensors."""
    parted = tmp_path / "parted"
    parted.mkdir()
    for name in ("config.json", "generation_config.json"):
        (parted / name).write_bytes((checkpoint / name).read_bytes())
    tensors = tensors_of(checkpoint)
    parts = {
        "model-00001-of-00002.safetensors": {name: t for name, t in tensors.items() if not name.endswith("scales")},
        "model-00002-of-00002.safetensors": {name: t for name, t in tensors.items() if name.endswith("scales")},
    }
    for file, held in parts.items():
        save_file(held, parted / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (parted / "model.safetensors.index.json").write_text(json.dumps(index))
    dense = optq.convert(parted, output_dir=tmp_path / "dense", to="dense")
    whole = optq.convert(checkpoint, output_dir=tmp_path / "whole", to="dense")
    expected = tensors_of(whole)
    found = tensors_of(dense)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(logits_of(dense), logits_of(whole))


def test_a_zero_that_the_other_format_cannot_hold_is_refused_and_nothing_is_left(checkpoint, tmp_path):
    """A stored zero of 0 in v2 means 0, which v1 would have to store as -1."""
    v2 = optq.convert(checkpoint, output_dir=tmp_path / "v2", to="gptq_v2")
    for file in v2.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith("qzeros")}
        save_file(tensors, file, metadata={"format": "pt"})
    v2 = restated(v2, tmp_path / "asymmetric", sym=False)
    with pytest.raises(CheckpointError, match=r"proj: a zero would have to be stored as -1.* cannot become 'gptq'"):
        optq.convert(v2, output_dir=tmp_path / "v1", to="gptq")
    assert not (tmp_path / "v1").exists()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            {"checkpoint_format": "gptq_v2", "format": "gptq_v2", "sym": True},
            "the stored zeros are|every stored zero is",
        ),
        ({"bits": 5}, "bits=5 was asked for"),
        ({"group_size": 64}, "says group_size 64"),
        ({"dynamic": {"-:.*k_proj": {}}}, "k_proj is packed, but config.json excludes it"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not converted; it may be gptq, awq, compressed-tensors"),
    ],
)
def test_a_label_that_is_not_true_is_not_carried_on(checkpoint, tmp_path, label, message):
    with pytest.raises(OptqError, match=message):
        optq.convert(restated(checkpoint, tmp_path / "wrong", **label), output_dir=tmp_path / "out", to="dense")
    assert not (tmp_path / "out" / "config.json").exists()


# AWQ


@pytest.fixture(scope="module")
def awq(tiny_llama, tmp_path_factory):
    """Every linear of the blocks but one kind and one more, with zeros of 0; and what its weights are."""
    grids = grids_of(tiny_llama, lowest_zero=0)
    left_out = [name for name in grids if name.endswith("o_proj") or name == "model.layers.1.mlp.up_proj"]
    grids = {name: grid for name, grid in grids.items() if name not in left_out}
    assert any((grid.zeros == 0).any() for grid in grids.values())
    return awq_folder(tiny_llama, tmp_path_factory.mktemp("awq") / "awq", grids), grids


def test_awq_becomes_gptq_with_every_weight_the_same(awq, tmp_path):
    folder, grids = awq
    there = optq.convert(folder, output_dir=tmp_path / "v2", to="gptq_v2")
    tensors, before = tensors_of(there), tensors_of(folder)
    for name, grid in grids.items():
        assert torch.equal(gptq_weight(tensors, name, 4, offset=0), grid.weight()), name
        assert not torch.equal(tensors[f"{name}.qweight"], before[f"{name}.qweight"].reshape(-1, grid.codes.shape[0]))
    untouched = [name for name in before if name.rpartition(".")[0] not in grids]
    assert all(torch.equal(tensors[name], before[name]) for name in untouched)
    assert stated_in(there) == stated_in(there) | {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}
    assert optq.inspect(there).contradictions == ()


def test_the_linears_that_awq_left_out_are_excluded_by_rules(awq, tmp_path):
    folder, grids = awq
    there = optq.convert(folder, output_dir=tmp_path / "v2", to="gptq_v2")
    config = GPTQConfig(**stated_in(there))
    assert all(config.scheme_for(name) is not None for name in grids)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        assert config.scheme_for(name) is None
    dense = optq.convert(folder, output_dir=tmp_path / "dense", to="dense")
    torch.testing.assert_close(logits_of(there), logits_of(dense), rtol=1e-4, atol=1e-4)


def test_awq_with_zeros_of_zero_has_no_place_in_v1(awq, tiny_llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"proj: a zero .* as -1, .* cannot become 'gptq'; 'gptq_v2' holds it"):
        optq.convert(awq[0], output_dir=tmp_path / "v1", to="gptq")
    grids = grids_of(tiny_llama, lowest_zero=1)
    without = optq.convert(awq_folder(tiny_llama, tmp_path / "awq", grids), output_dir=tmp_path / "out", to="gptq")
    for name, grid in grids.items():
        assert torch.equal(gptq_weight(tensors_of(without), name, 4, offset=1), grid.weight()), name


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"version": "gemv"}, "version 'gemv' with 4 bits is not read; only 'gemm' with 4 is"),
        ({"group_size": 64}, r"self_attn.* are not those of AWQ's gemm layout with group_size 64|mlp.* are not those"),
        ({"quant_method": "gptq", "sym": False, "desc_act": False}, "fit no GPTQ layout"),
    ],
)
def test_what_is_not_awq_as_it_says_is_refused(awq, tmp_path, stated, message):
    with pytest.raises(CheckpointError, match=message):
        optq.convert(restated(awq[0], tmp_path / "other", **stated), output_dir=tmp_path / "out", to="gptq_v2")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told(checkpoint, tiny_llama, tmp_path):
    with pytest.raises(
        ConfigError, match=r"to='awq' was asked for; allowed are gptq, gptq_v2, compressed-tensors, dense"
    ):
        optq.convert(checkpoint, output_dir=tmp_path / "out", to="awq")
    with pytest.raises(CheckpointError, match="says nothing of quantization"):
        optq.convert(tiny_llama, output_dir=tmp_path / "out", to="dense")
    with pytest.raises(OutputError, match="is not empty"):
        optq.convert(checkpoint, output_dir=checkpoint, to="dense")


def test_awq_becomes_compressed_tensors_with_every_weight_the_same(awq, tmp_path):
    folder, grids = awq
    there = optq.convert(folder, output_dir=tmp_path / "compressed", to="compressed-tensors")
    for name, grid in grids.items():
        assert torch.equal(compressed_weight(tensors_of(there), name, 4), grid.weight()), name
    assert r"re:^model\.layers\.1\.mlp\.(?:up_proj)$" in stated_in(there)["ignore"]


# compressed-tensors


def same_bytes(one, other):
    files = list(one.glob("*.safetensors"))
    return files and all((other / file.name).read_bytes() == file.read_bytes() for file in files)


def linears_of(tensors, part):
    return [name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")]


def test_to_compressed_tensors_and_back_gives_the_same_bytes(checkpoint, tmp_path):
    there = optq.convert(checkpoint, output_dir=tmp_path / "compressed", to="compressed-tensors")
    before, after, stated = tensors_of(checkpoint), tensors_of(there), stated_in(checkpoint)
    linears = linears_of(after, "weight_packed")
    assert len(linears) == 14
    for name in linears:
        expected = gptq_weight(before, name, stated["bits"], offset=1)
        assert torch.equal(compressed_weight(after, name, stated["bits"]), expected), name
        assert (f"{name}.weight_zero_point" in after) != stated["sym"]
    (group,) = stated_in(there)["config_groups"].values()
    weights = {
        "num_bits": stated["bits"],
        "type": "int",
        "symmetric": stated["sym"],
        "strategy": "group",
        "group_size": 32,
    }
    assert group == {"targets": ["Linear"], "weights": weights}
    assert stated_in(there)["ignore"] == ["lm_head", r"re:^model\.(?:embed_tokens)$"]
    back = optq.convert(there, output_dir=tmp_path / "back", to="gptq")
    assert same_bytes(checkpoint, back)
    assert not same_bytes(checkpoint, optq.convert(there, output_dir=tmp_path / "v2", to="gptq_v2"))
    assert torch.equal(logits_of(back), logits_of(checkpoint))
    dense = optq.convert(there, output_dir=tmp_path / "dense", to="dense")
    assert same_bytes(optq.convert(checkpoint, output_dir=tmp_path / "other", to="dense"), dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_becomes_gptq_with_every_weight_the_same(tiny_llama, tmp_path, bits, group_size, symmetric):
    grids = grids_of(tiny_llama, bits=bits, group_size=group_size, symmetric=symmetric, lowest_zero=0)
    parts = {name: compressed_parts(grid, symmetric=symmetric) for name, grid in grids.items()}
    shared = {"strategy": "channel"} if group_size == -1 else {"group_size": group_size}
    weights = {"num_bits": bits, "symmetric": symmetric, **shared}
    folder = compressed_folder(tiny_llama, tmp_path / "compressed", parts, weights)
    there = optq.convert(folder, output_dir=tmp_path / "v2", to="gptq_v2")
    for name, grid in grids.items():
        assert torch.equal(gptq_weight(tensors_of(there), name, bits, offset=0), grid.weight()), name
    assert optq.inspect(there).contradictions == ()
    back = optq.convert(there, output_dir=tmp_path / "back", to="compressed-tensors")
    assert same_bytes(folder, back)


def test_scales_in_bfloat16_become_the_same_numbers_in_float16(tiny_llama, tmp_path):
    grids = grids_of(tiny_llama, symmetric=True)
    parts = {name: compressed_parts(grid, symmetric=True, dtype=torch.bfloat16) for name, grid in grids.items()}
    folder = compressed_folder(tiny_llama, tmp_path / "in", parts, {"num_bits": 4, "group_size": 32})
    there = tensors_of(optq.convert(folder, output_dir=tmp_path / "v1", to="gptq"))
    for name in grids:
        assert there[f"{name}.scales"].dtype == torch.float16
        assert torch.equal(gptq_weight(there, name, 4, offset=1), compressed_weight(tensors_of(folder), name, 4))
    parts["model.layers.0.mlp.up_proj"]["weight_scale"][0, 0] = 1e-7
    folder = compressed_folder(tiny_llama, tmp_path / "tiny", parts, {"num_bits": 4, "group_size": 32})
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.up_proj: The scales are not representable in float16"):
        optq.convert(folder, output_dir=tmp_path / "out", to="gptq")


def test_mixed_precision_and_what_was_left_out_survive(tiny_llama, token_rows, tmp_path):
    rules = {
        r"-:.*layers\.0.*o_proj": {},
        r"-:.*q_proj": {},
        r"+:.*down_proj": {"bits": 8},
        r"+:.*1.*v_proj": {"bits": 2},
    }
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows, dynamic=rules)
    folder = optq.quantize(tiny_llama, config, output_dir=tmp_path / "mixed")
    there = optq.convert(folder, output_dir=tmp_path / "compressed", to="compressed-tensors")
    groups = stated_in(there)["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [2, 8, 4]
    assert groups["group_1"]["targets"] == [r"re:^model\.layers\.\d+\.mlp\.(?:down_proj)$"]
    assert groups["group_0"]["targets"] == [r"re:^model\.layers\.1\.self_attn\.(?:v_proj)$"]
    assert r"re:^model\.layers\.\d+\.self_attn\.(?:q_proj)$" in stated_in(there)["ignore"]
    assert r"re:^model\.layers\.0\.self_attn\.(?:o_proj)$" in stated_in(there)["ignore"]
    back = optq.convert(there, output_dir=tmp_path / "back", to="gptq")
    assert same_bytes(folder, back)
    before, after = GPTQConfig(**stated_in(folder)), GPTQConfig(**stated_in(back))
    for name in grids_of(tiny_llama):
        one, other = before.scheme_for(name), after.scheme_for(name)
        assert (one and (one.bits, one.group_size, one.symmetric)) == (
            other and (other.bits, other.group_size, other.symmetric)
        ), name
    assert torch.equal(logits_of(back), logits_of(folder))


@pytest.fixture(scope="module")
def act_ordered(tiny_llama, token_rows, tmp_path_factory):
    config = GPTQConfig(bits=4, group_size=32, desc_act=True, effort="fast", dataset=token_rows)
    return optq.quantize(tiny_llama, config, output_dir=tmp_path_factory.mktemp("act-order") / "out")


def test_groups_in_activation_order_are_read_from_old_versions_but_not_written(act_ordered, tiny_llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"model.layers.0.*proj: its groups are not runs .* weight_g_idx"):
        optq.convert(act_ordered, output_dir=tmp_path / "out", to="compressed-tensors")
    tensors, parts = tensors_of(act_ordered), {}
    for name in linears_of(tensors, "qweight"):
        parts[name] = {
            "weight_packed": tensors[f"{name}.qweight"].T.contiguous(),
            "weight_shape": torch.tensor(tiny_llama_shape(tensors, name)),
            "weight_scale": tensors[f"{name}.scales"].T.contiguous(),
            "weight_g_idx": tensors[f"{name}.g_idx"],
        }
    weights = {"num_bits": 4, "group_size": 32, "symmetric": True, "actorder": "group"}
    folder = compressed_folder(tiny_llama, tmp_path / "old", parts, weights)
    back = optq.convert(folder, output_dir=tmp_path / "back", to="gptq")
    assert stated_in(back)["desc_act"] is True
    assert all(torch.equal(tensor, tensors_of(back)[name]) for name, tensor in tensors.items())


def tiny_llama_shape(tensors, name):
    return [tensors[f"{name}.scales"].shape[1], tensors[f"{name}.g_idx"].shape[0]]


# desc_act


def reordered(folder, target, g_idx_of, **changes):
    """A copy that says desc_act, with other groups: `g_idx_of` takes and returns g_idx, qzeros and scales."""
    restated(folder, target, desc_act=True, **changes)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name in linears_of(tensors, "g_idx"):
            parts = [f"{name}.{part}" for part in ("g_idx", "qzeros", "scales")]
            tensors |= zip(parts, g_idx_of(*(tensors[part] for part in parts)), strict=True)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_where_groups_are_trivial_desc_act_is_a_label(checkpoint, tmp_path):
    labelled = restated(checkpoint, tmp_path / "in", desc_act=True, dynamic={"+:.*q_proj": {"desc_act": True}})
    there = optq.convert(labelled, output_dir=tmp_path / "out", to="gptq", without_desc_act=True)
    assert same_bytes(checkpoint, there)
    config = GPTQConfig(**stated_in(there))
    assert not any(
        config.scheme_for(name).act_order == "desc_act" for name in linears_of(tensors_of(there), "qweight")
    )
    # Negative control: it is done on request.
    assert stated_in(optq.convert(labelled, output_dir=tmp_path / "as-it-is", to="gptq"))["desc_act"] is True


def test_runs_of_columns_in_another_order_are_numbered_again(checkpoint, tmp_path):
    def backwards(g_idx, qzeros, scales):
        return g_idx.max() - g_idx, qzeros.flip(0).contiguous(), scales.flip(0).contiguous()

    folder = reordered(checkpoint, tmp_path / "in", backwards)
    there = optq.convert(folder, output_dir=tmp_path / "out", to="gptq", without_desc_act=True)
    assert same_bytes(checkpoint, there)
    assert stated_in(there)["desc_act"] is False
    assert not same_bytes(checkpoint, folder)


def test_groups_that_are_no_runs_stay_desc_act(act_ordered, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"layers.0.*proj: its groups are not runs of 32 .*other layers .* share"
    ):
        optq.convert(act_ordered, output_dir=tmp_path / "out", to="gptq", without_desc_act=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_groups_that_contradict_their_label_are_not_converted(act_ordered, tmp_path):
    wrong = restated(act_ordered, tmp_path / "in", desc_act=False)
    with pytest.raises(CheckpointError, match=r"layers.0.*proj: config.json says desc_act=false, but its groups"):
        optq.convert(wrong, output_dir=tmp_path / "out", to="gptq_v2")


# what is refused of compressed-tensors

NAME = "model.layers.0.mlp.up_proj"


def group(**changes):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **changes}}}


@pytest.mark.parametrize(
    ("parts", "stated", "message"),
    [
        ({}, {"format": "int-quantized"}, "'group_0' has format 'int-quantized'; .* has pack-quantized"),
        ({}, group(input_activations={"num_bits": 8}), "has input_activations"),
        ({}, group(weights={"num_bits": 4, "type": "float", "strategy": "group"}), "has type 'float'; .* has int"),
        ({}, group(weights={"num_bits": 6, "type": "int", "strategy": "group"}), "has num_bits 6; .* 2, 3, 4, 8"),
        ({}, group(weights={"num_bits": 4, "type": "int", "strategy": "tensor"}), "strategy 'tensor'"),
        ({}, {"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme"),
        ({}, group(targets=["re:.*q_proj"]), "up_proj is packed, but is the target of none"),
        ({"weight_shape": None}, {}, "up_proj: the checkpoint has weight_packed but not weight_shape"),
        ({"weight_packed": None}, {}, r"up_proj: the checkpoint has weight_scale \(.*\) but not weight_packed"),
        ({"weight_zero_point": None}, {}, r"up_proj: the shapes are .*'weight_zero_point': None"),
        ({"weight_scale": torch.ones(96, 1).half()}, {}, r"up_proj: the shapes are .*'weight_scale': \(96, 1\)"),
        ({"weight_shape": torch.tensor([96, 60])}, {}, "in_features 60 is not a multiple of 8"),
    ],
)
def test_what_gptq_cannot_hold_of_compressed_tensors_is_refused(tiny_llama, tmp_path, parts, stated, message):
    own = {**compressed_parts(random_grid((96, 64))), **parts}
    own = {part: tensor for part, tensor in own.items() if tensor is not None}
    weights = {"num_bits": 4, "group_size": 32, "symmetric": False}
    folder = compressed_folder(tiny_llama, tmp_path / "in", {NAME: own}, weights, **stated)
    with pytest.raises(CheckpointError, match=message):
        optq.convert(folder, output_dir=tmp_path / "out", to="gptq_v2")
    assert not (tmp_path / "out" / "config.json").exists()


def test_words_of_three_bits_with_gaps_are_refused(tiny_llama, tmp_path):
    parts = compressed_parts(random_grid((96, 64), bits=3))
    parts["weight_packed"] = torch.zeros(96, 7, dtype=torch.int32)  # ten codes in each word
    folder = compressed_folder(
        tiny_llama, tmp_path / "in", {NAME: parts}, {"num_bits": 3, "group_size": 32, "symmetric": False}
    )
    with pytest.raises(CheckpointError, match=r"Before compressed-tensors 0\.18"):
        optq.convert(folder, output_dir=tmp_path / "out", to="gptq_v2")
