# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from other_formats import awq_folder, gptq_weight, grids_of, tensors_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.errors import CheckpointError, ConfigError, OptqError, OutputError

IDS = torch.arange(5, 37)[None]


@pytest.fixture(scope="module", params=[(4, True), (3, False), (2, False), (8, True)], ids=str)
def checkpoint(request, tiny_llama, token_rows, tmp_path_factory):
    bits, sym = request.param
    config = GPTQConfig(bits=bits, sym=sym, group_size=32, effort="fast", dataset=token_rows)
    return optq.quantize(tiny_llama, config, output_dir=tmp_path_factory.mktemp("source") / "out")


def stated_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def restated(folder, target, **changes):
    """A copy of a checkpoint whose quantization_config says something else."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
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
    assert list((tmp_path / "v1").iterdir()) == []


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
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not converted; it may be gptq, awq"),
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
    with pytest.raises(ConfigError, match=r"to='awq' was asked for; allowed are gptq, gptq_v2, dense"):
        optq.convert(checkpoint, output_dir=tmp_path / "out", to="awq")
    with pytest.raises(CheckpointError, match="says nothing of quantization"):
        optq.convert(tiny_llama, output_dir=tmp_path / "out", to="dense")
    with pytest.raises(OutputError, match="is not empty"):
        optq.convert(checkpoint, output_dir=checkpoint, to="dense")
