# SPDX-License-Identifier: Apache-2.0
"""Names that are no fields: a slip of the pen gets the nearest name, another tool's name its counterpart."""

import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.config.counterparts import CALLED, NO_FIELD
from optq.config.fields import FIELDS
from optq.errors import ConfigError

MIGRATION = (Path(__file__).parents[2] / "docs/migration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ({"group_szie": 64}, "group_size"),
        ({"Group_Size": 64}, "group_size"),
        ({"group-size": 64}, "group_size"),
        ({"desc_acct": True}, "desc_act"),
        ({"damp_percentage": 0.1}, "damp_percent"),
        ({"num_sample": 5}, "num_samples"),
        ({"target_bits_per_weights": 4.0}, "target_bits_per_weight"),
        ({"qualtiy_gate": "off"}, "quality_gate"),
    ],
)
def test_a_slip_gets_the_nearest_name(given, near):
    with pytest.raises(ConfigError, match=rf"was asked for; there is no such field. Did you mean {near}\?"):
        GPTQConfig(bits=4, **given)
    with pytest.raises(ConfigError, match=near):
        GPTQConfig.from_stock({"bits": 4, **given})
    kept = GPTQConfig.from_dict({"bits": 4, **given})
    assert given.items() <= kept.to_dict().items()


@pytest.mark.parametrize(
    ("setting", "near"),
    [("bit", "bits"), ("groupsize", "group_size"), ("w_bit", "bits"), ("dampp_percent", "damp_percent")],
)
@pytest.mark.parametrize("sign", ["+:", "-:", ""])
def test_a_slip_in_a_rule_gets_the_nearest_setting(setting, near, sign):
    with pytest.raises(ConfigError, match=rf"dynamic: '{re.escape(sign)}a': {setting}=8 was asked for.* {near}\b"):
        GPTQConfig(bits=4, dynamic={f"{sign}a": {setting: 8}})


def test_a_name_that_is_like_none_gets_them_all():
    with pytest.raises(ConfigError, match="5=1 was asked for; there is no such field"):
        GPTQConfig.from_stock({"bits": 4, 5: 1})
    with pytest.raises(ConfigError, match="xyzzy=1 was asked for; there is no such field; there are bits, tokenizer"):
        GPTQConfig(bits=4, xyzzy=1)


def test_another_tools_name_gets_ours():
    for name, called in CALLED.items():
        ours = called.partition(":")[0]
        assert ours in FIELDS and name not in FIELDS
        with pytest.raises(ConfigError, match=rf"{name}=False was asked for.*another tool's name. Here it is {ours}"):
            GPTQConfig(bits=4, **{name: False})


def test_another_tools_name_without_a_counterpart_gets_the_reason():
    for name in NO_FIELD:
        assert name not in FIELDS and name not in CALLED
        with pytest.raises(ConfigError, match=rf"{name}=None was asked for.*no counterpart here: .*Leave it out"):
            GPTQConfig(bits=4, **{name: None})


def test_names_that_the_page_on_migration_lists_are_known():
    """Of its left columns, whatever is no field, function, class or option of a script."""
    cells = re.findall(r"^\| (.*?) \| .* \|$", MIGRATION, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)(?:=[^`(]*)?`", cell)}
    others = {"was", "input_ids", "attention_mask"}  # a heading, and columns of samples
    assert len(names) > 30
    assert names - set(FIELDS) - set(CALLED) - set(NO_FIELD) - others == set()


def test_a_dict_is_python_wherever_it_is_passed(tiny_llama, token_rows):
    fields = {"bits": 4, "quant_method": "gptq", "dataset": token_rows, "group_size": 32}
    said = pytest.raises(ConfigError, match=r"group_szie=64 was asked for.*Did you mean group_size\?")
    with said:
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config={**fields, "group_szie": 64})
    with said:
        optq.plan(tiny_llama, {**fields, "group_szie": 64})
    with said:
        optq.quantize(tiny_llama, {**fields, "group_szie": 64}, output_dir="unused")
    with said:
        optq.check(tiny_llama, {**fields, "group_szie": 64})


def test_a_dict_without_a_slip_is_quantized_by(tiny_llama, token_rows):
    fields = {"bits": 4, "quant_method": "gptq", "dataset": token_rows, "group_size": 32, "effort": "fast"}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=fields)
    assert model.config.quantization_config.effort == "fast"


def test_attributes_of_the_stock_class_that_are_new_to_us_are_no_slips():
    stock = transformers.GPTQConfig(bits=4)
    stock.of_a_later_version = 1
    assert GPTQConfig.from_stock(stock).to_dict()["of_a_later_version"] == 1


def test_a_derived_class_may_have_arguments_of_its_own():
    class Noted(GPTQConfig):
        def __init__(self, bits, note):
            super().__init__(bits)
            self.note = note

    assert Noted(8, note="x").bits == 8
    assert "note" not in Noted(8, note="x").to_dict()
