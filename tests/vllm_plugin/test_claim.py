# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints the plugin takes from vLLM: those that it refuses or would read wrong, and no others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from optq.vllm.claim import why_not_by_itself

ENTRY = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def entry_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def why(folder, reader="vllm", version="0.32.0"):
    return why_not_by_itself(str(folder), entry_of(folder), reader, version)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


def relabelled(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.99.0"])
def test_what_vllm_reads_right_stays_with_it(saved, version):
    assert why(saved, version=version) is None


def test_a_fused_linear_of_which_some_is_dense_is_claimed(copied):
    tensors = load_file(copied / "model.safetensors")
    relabelled(copied, dynamic={"-:.*q_proj": {}})
    for name in [name for name in tensors if "q_proj" in name]:
        del tensors[name]
    for layer in {name.split(".self_attn")[0] for name in tensors if "k_proj" in name}:
        tensors[f"{layer}.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert "fuses q_proj, k_proj, v_proj" in why(copied)


def test_a_label_that_hides_the_order_of_columns_is_claimed(copied):
    """vLLM drops g_idx: it would answer nonsense."""
    tensors = load_file(copied / "model.safetensors")
    for name in tensors:
        if name.endswith(".g_idx"):
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert "its groups are not runs of neighbouring columns" in why(copied)


def test_an_order_that_only_a_later_layer_has_is_found(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] = tensors["model.layers.1.mlp.up_proj.g_idx"].flip(0).contiguous()
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj" in why(copied)


def test_zeros_that_a_label_makes_wrong_are_none_of_its_business(copied):
    """vLLM does not look at the zeros of symmetric weights: it serves them right."""
    relabelled(copied, checkpoint_format="gptq_v2")
    assert why(copied) is None


@pytest.mark.parametrize("index", ["none", '{"weight_map": 3}', "[]", '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none_is_for_vllm_to_say(index, copied, caplog):
    (copied / "model.safetensors").rename(copied / "other.safetensors")
    (copied / "model.safetensors.index.json").write_text(index)
    assert why(copied) is None
    assert "leaves this checkpoint to vLLM" in caplog.text


def test_what_a_damaged_file_holds_is_for_vllm_to_say(copied, caplog):
    (copied / "model.safetensors").write_bytes(b"none")
    assert why(copied) is None
    assert "leaves this checkpoint to vLLM" in caplog.text
    assert "model.safetensors" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reader", "reason"),
    [
        ({}, "vllm", None),
        ({"bits": 3}, "vllm", "3 bits"),
        ({"bits": 8}, "vllm", None),
        ({"bits": 8}, "vllm-cpu", "8 bits"),
        ({"sym": False}, "vllm", "asymmetric"),
        ({"desc_act": True}, "vllm", "desc_act"),
        ({"group_size": 96}, "vllm", "group_size=96"),
        ({"dynamic": {"+:.*down_proj": {"bits": 2}}}, "vllm", "2 bits"),
        ({"dynamic": {"-:.*down_proj": {}}}, "vllm", None),
    ],
)
@pytest.mark.parametrize("place", [None, "nobody/has-downloaded-this"])
def test_without_files_the_config_decides(changes, reader, reason, place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = why_not_by_itself(place, {**ENTRY, **changes}, reader, "0.32.0")
    assert found is None if reason is None else reason in found
