# SPDX-License-Identifier: Apache-2.0
"""What a stranger's config.json may say is bounded before anything is made of it."""

import time

import pytest

import optq
from conftest import rewritten
from optq.errors import OptqError
from optq.files.config_checks import MOST_ENTRIES, check_model_config

MANY = 2 * MOST_ENTRIES


def stated(**entry):
    return {"quant_method": "gptq", "bits": 4, **entry}


@pytest.mark.parametrize(
    "config",
    [
        {**dict.fromkeys(map(str, range(MANY)), 1), "quantization_config": stated()},
        {"layer_types": ["x"] * MANY, "quantization_config": stated()},
        {"quantization_config": stated(dynamic={"a": dict.fromkeys(map(str, range(MANY)), 1)})},
        {"quantization_config": stated(dynamic={f"^a{n}$": dict.fromkeys("abcdef", 1) for n in range(50_000)})},
        {"quantization_config": stated(modules_in_block_to_quantize=[["x"] * MANY])},
    ],
    ids=["keys", "list", "one rule", "rules", "modules"],
)
def test_as_many_entries_as_nobody_writes_are_refused_at_once(config):
    began = time.process_time()
    with pytest.raises(OptqError, match=f"folder/config.json.* entries besides rules of dynamic; {MOST_ENTRIES}"):
        check_model_config(config, "folder")
    assert time.process_time() - began < 3


def test_as_many_rules_as_a_large_mixture_needs_are_read():
    check_model_config({"quantization_config": stated(dynamic={f"-:^x{n}$": {} for n in range(50_000)})}, "folder")


@pytest.mark.parametrize("name", [5, ["a"], "/a/b.safetensors", "../b.safetensors", "a/b.safetensors"])
def test_weights_are_a_file_beside_it(name):
    with pytest.raises(OptqError, match=r"folder/config.json says transformers_weights=.*name of a file beside it"):
        check_model_config({"quantization_config": stated(), "transformers_weights": name}, "folder")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"vocab_size": 2**62}, {"rms_norm_eps": 5.0}])
@pytest.mark.parametrize("call", [optq.plan, optq.quantize])
def test_sizes_that_nobody_has_are_refused_of_dense_models_as_well(tiny_llama, token_rows, tmp_path, changes, call):
    with (tmp_path / "config.json").open("w") as file:
        file.write((tiny_llama / "config.json").read_text())
    with rewritten(tmp_path / "config.json") as config:
        config |= changes
    asked = {"output_dir": tmp_path / "out"} if call is optq.quantize else {}
    with pytest.raises(OptqError, match=f"config.json says {next(iter(changes))}="):
        call(tmp_path, optq.GPTQConfig(bits=4, dataset=token_rows), **asked)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "nonsense"}, {"vocab_size": -1}, {"dtype": "int8"}, {"num_key_value_heads": 0}]
)
def test_a_config_of_which_no_model_can_be_made_is_named(tiny_llama, token_rows, tmp_path, changes):
    with (tmp_path / "config.json").open("w") as file:
        file.write((tiny_llama / "config.json").read_text())
    with rewritten(tmp_path / "config.json") as config:
        config |= changes
    with pytest.raises(OptqError, match=rf"{tmp_path}/config\.json: "):
        optq.quantize(tmp_path, optq.GPTQConfig(bits=4, dataset=token_rows), output_dir=tmp_path / "out")
