# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import optq
from conftest import rewritten
from optq.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, mixed_config, tmp_path_factory):
    return optq.quantize(tiny_llama, mixed_config, output_dir=tmp_path_factory.mktemp("inspected") / "out")


@pytest.fixture
def changeable(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)

    def change(label=None, **tensors):
        if label:
            with rewritten(folder / "config.json") as config:
                config["quantization_config"] |= label
        for file in folder.glob("*.safetensors"):
            held = load_file(file)
            for name in held:
                for last, function in tensors.items():
                    if name.endswith(f".{last}"):
                        held[name] = function(held[name])
            save_file(held, file, metadata={"format": "pt"})
        return optq.inspect(folder)

    return change


def test_what_a_checkpoint_holds_is_told_from_its_headers(checkpoint):
    found = optq.inspect(checkpoint)
    kinds = {
        (kind.rpartition(".")[2], out, columns, scheme.bits): n
        for (kind, out, columns, scheme), n in found.linears.items()
    }
    assert kinds[("q_proj", 64, 64, 4)] == kinds[("up_proj", 96, 64, 4)] == 2
    assert kinds[("down_proj", 64, 96, 8)] == 2
    assert found.dense == {"model.layers.*.self_attn.o_proj.weight": 2}
    assert found.contradictions == ()
    assert found.refused["vllm"] == ()
    files = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert found.size_gib == pytest.approx(files / 2**30)


def test_bits_per_weight_are_those_of_the_plan_the_log_and_the_card(tiny_llama, mixed_config, checkpoint):
    # Per block: 2·64·64 + 2·32·64 of attention without o_proj, 2·64·96 of the MLP, and down_proj in 8 bits; one scale
    # of 16 bits and one zero per 32 weights.
    four, eight = 64 * 64 + 2 * 32 * 64 + 2 * 64 * 96, 64 * 96
    expected = (four * (4 + 20 / 32) + eight * (8 + 24 / 32)) / (four + eight)
    assert optq.inspect(checkpoint).bits_per_weight == pytest.approx(expected)
    events = [json.loads(line) for line in (checkpoint / "quantization_log.jsonl").read_text().splitlines()]
    assert [e["bits_per_weight"] for e in events if e["event"] == "block"] == [pytest.approx(expected, abs=1e-4)] * 2
    assert f"{expected:.2f} bits per weight" in (checkpoint / "README.md").read_text()
    assert optq.plan(tiny_llama, mixed_config).bits_per_weight == pytest.approx(expected)


def test_a_dense_model_is_inspected_too(tiny_llama):
    found = optq.inspect(tiny_llama)
    assert found.config is None
    assert found.linears == {}
    assert sum(found.dense.values()) == 14
    assert found.bits_per_weight == 32


def test_a_label_of_the_other_format_is_noticed(changeable):
    found = changeable({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}).contradictions
    assert len(found) == 6  # one per kind of quantized linear
    (bits8,) = (text for text in found if "down_proj" in text)
    assert "every stored zero is 127" in bits8
    assert "Correct checkpoint_format to 'gptq'" in bits8


def test_zeros_that_are_not_in_the_middle_contradict_sym(changeable):
    found = changeable(qzeros=lambda words: words + 1).contradictions
    assert found
    assert "Correct sym to false" in found[0]


def test_groups_in_activation_order_contradict_desc_act_false(changeable):
    found = changeable(g_idx=lambda groups: groups.flip(0)).contradictions
    assert found
    assert "Correct desc_act to true" in found[0]


def test_readers_say_what_they_refuse(changeable):
    refused = changeable({"desc_act": True}).refused
    assert "desc_act=True" in refused["vllm"][0]
    assert refused["gptqmodel"] == refused["transformers"] == ()


def test_splitting_over_gpus_is_checked(checkpoint):
    found = optq.inspect(checkpoint, tensor_parallel=2)
    assert any("96 inputs in 2 parts" in reason for reason in found.refused["vllm"])


def test_answers_are_for_a_version_if_one_is_named(checkpoint):
    assert optq.inspect(checkpoint, versions={"vllm": "0.29.0"}).refused["vllm"] == ()
    with pytest.raises(ConfigError, match=r"'0\.19' of vllm was asked for.*known of 0\.30"):
        optq.inspect(checkpoint, versions={"vllm": "0.19"})
    with pytest.raises(ConfigError, match="server='tgi'"):
        optq.inspect(checkpoint, versions={"tgi": "3"})


def test_packed_tensors_without_a_config_are_refused(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    with rewritten(folder / "config.json") as config:
        del config["quantization_config"]
    with pytest.raises(CheckpointError, match=r"nothing about quantization.*Add its quantization_config"):
        optq.inspect(folder)


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "fp8", ["gptq"]])
def test_another_format_is_named(tiny_llama, tmp_path, method):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    with rewritten(tmp_path / "config.json") as config:
        config["quantization_config"] = {"quant_method": method}
    with pytest.raises(
        CheckpointError, match=rf"config.json says quant_method=.*{method[0]}.*awq, compressed-tensors"
    ):
        optq.inspect(tmp_path)


def test_pickled_weights_are_refused(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*unpickling"):
        optq.inspect(tmp_path)


def test_verify_lists_all_that_is_wrong_at_once(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(saved / "model.safetensors")
    first, second = sorted(name for name in tensors if name.endswith("scales"))[:2]
    tensors[first][0, 0], tensors[second][0, 0] = float("nan"), 0
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=first):
        optq.inspect(tmp_path)
    wrong = optq.inspect(tmp_path, verify=True).contradictions
    for name in (first, second, "model.norm.weight"):
        assert any(name in sentence for sentence in wrong)
    assert optq.inspect(saved, verify=True).contradictions == ()
