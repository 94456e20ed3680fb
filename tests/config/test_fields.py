# SPDX-License-Identifier: Apache-2.0
"""Every field declares itself: what follows from the table holds for each of its rows, and so for new ones."""

import copy
import inspect
import json
import math
import pickle
import pydoc
import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from optq import GPTQConfig
from optq.config.dynamic import OVERRIDES
from optq.config.fields import FIELDS, PRESETS, SECTIONS
from optq.errors import ConfigError
from optq.evaluation import VERDICTS
from optq.scheme import GridFit

ROOT = Path(__file__).parents[2]

NUMBERS = (True, False, "4", "", " ", b"4", math.nan, math.inf, -math.inf, 1j, [4], (4,), {4}, {"a": 4}, object())
SWITCHES = (0, 1, 2, 1.0, "true", "False", "", b"", math.nan, [True], {}, object())
TEXTS = ("", " ", b"text", 5, 0, True, False, 1.5, math.nan, ["text"], {"text": 1}, object())
DICTS = ([], ["a"], "", "text", 5, 0, True, False, math.nan, {"a"}, object())
LISTS = ("", "text", {}, {"a": "b"}, 5, 0, True, False, [5], [None], [[5]], [""], [["a"], [True]], object())
WRONG = {
    int: (*NUMBERS, 4.0, 4.5, np.float64(4), np.bool_(True), torch.tensor(4)),
    float: (*NUMBERS, 10**400, "0.1", np.bool_(True), torch.tensor(0.1)),
    bool: SWITCHES,
    str: TEXTS,
    dict: DICTS,
    list: LISTS,
}
WRONG_BY_NAME = {
    "tokenizer": ("", " ", b"x", 5, 0, True, False, 1.5, ["text"], {"a": 1}),
    "dataset": ("", " ", b"x", 5, 0, True, False, 1.5, math.nan),
    "device": ("", 5, 0, True, False, ["cpu"], {"cpu": 1}, object()),
    "log_file": ("", " ", b"x", 5, 0, True, False, ["a"], {"a": 1}, object()),
    "pack_dtype": ("", "int64", 32, 0, True, False, torch.int64, ["int32"]),
    "meta": (*DICTS, {1: 2}, {None: 1}),
    "activation_memory": (
        *({"disk": "1GiB"}, {"gpu": "1GiB"}),
        *({"cpu": "lots"}, {"cpu": -5}, {"cpu": "-5GiB"}, {"cpu": True}, {True: "8GiB"}, {"cpu": None}, {"cpu": 1.5}),
        *(
            {0: "1GiB", 1: "1GiB"},
            {-1: "1GiB"},
            {"cpu": "nanGiB"},
            {"cpu": "infGiB"},
            {"cpu": ""},
            {"": "1GiB"},
            {None: 5},
        ),
        *DICTS,
    ),
    "report_to": ("", " ", [], ["wandb", ""], ["wandb", 1], b"wandb", 5, 0, True, False, {"wandb": 1}, object()),
    "quant_method": (*TEXTS, "awq", "gptq_v2", None),
    "fit": (
        "",
        " ",
        "8",
        "eight GiB",
        "8 GiBs",
        "-8GiB",
        "0GB",
        "8PB",
        b"8GiB",
        0,
        -1,
        True,
        False,
        1.5,
        ["8GiB"],
        {},
    ),
}
OUT_OF_RANGE = {
    "bits": (0, 1, 5, -4, 16, 10**30),
    "group_size": (0, -2, -128),
    "damp_percent": (0, 0.0, -0.1, 1, 2),
    "propagation": (-0.1, 1.5),
    "refinement": (-1,),
    "polish": (-1,),
    "model_seqlen": (0, -1),
    "batch_size": (0, -1),
    "num_samples": (0, -1),
    "max_input_length": (0, -1),
    "context_length": (0, -1),
    "pad_token_id": (1.5,),
    "seed": (2**64, -(2**64)),
    "max_perplexity_ratio": (0, -1),
    "target_bits_per_weight": (0, -4),
    "target_size_gib": (0, -0.5),
    "effort": ("most", "FAST"),
    "grid": ("best",),
    "quality_gate": ("loud",),
    "serving": ("tgi",),
    "scheme": ("W5A16", "W4A8", "FP8", "W4A16_SYM"),
    "format": ("exllama", "marlin"),
    "checkpoint_format": ("exllama", "marlin"),
    "dynamic": ({1: {}}, {"a": []}, {"a": None}, {"(": {}}, {"+:a": {"bits": 5}}, {"+:a": {"bits": 4.0}}, {None: {}}),
}


def wrong(name):
    field = FIELDS[name]
    kind = WRONG_BY_NAME.get(name) or WRONG[field.kind]
    return (*kind, *OUT_OF_RANGE.get(name, ()), *(() if field.optional else (None,)))


def refusal(make):
    """The message with which a config is refused, or None."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_that_does_not_fit_is_refused_and_the_field_is_named(name):
    messages = [refusal(lambda value=value: GPTQConfig(**{"bits": 4, name: value})) for value in wrong(name)]
    assert None not in messages, wrong(name)[messages.index(None)]
    for message in messages:
        assert name.removeprefix("checkpoint_") in message
        assert any(said in message for said in ("was asked for", "'marlin'", "no regular expression", "not a regular"))
        assert len(message) < 500 and "\n" not in message


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_assigned_or_passed_as_a_dict_is_checked_as_well(name):
    def assign(value):
        config = GPTQConfig(bits=4)
        setattr(config, name, value)
        config.post_init()

    for value in wrong(name):
        for make in (
            lambda value: assign(value),
            lambda value: GPTQConfig.from_stock({"bits": 4, name: value}),
            lambda value: GPTQConfig.from_dict({"bits": 4}, **{name: value}),
        ):
            assert refusal(lambda make=make, value=value: make(value)), value


RIGHT = {
    "bits": (2, 8, np.int64(4)),
    "tokenizer": ("org/model", Path("folder"), object()),
    "dataset": ("wikitext2", ["text"], [], Path("x.jsonl"), {"wikitext2": 1}, object()),
    "group_size": (-1, 32, np.int32(64)),
    "damp_percent": (0.01, np.float32(0.5), Fraction(1, 8)),
    "propagation": (0, 1, 0.25),
    "refinement": (0, 3),
    "polish": (0, 2),
    "format": ("gptq", "gptq_v2", "GPTQ_V2"),
    "checkpoint_format": ("gptq_v2",),
    "meta": ({}, {"note": [1]}),
    "backend": ("auto", "AUTO_TRAINABLE", "reference"),
    "model_seqlen": (1, 4096),
    "num_samples": (1,),
    "batch_size": (1, 7),
    "pad_token_id": (0, 3),
    "max_input_length": (1,),
    "fit": ("8GiB", "7.5 gb", "8192MiB", 2**33),
    "context_length": (1, 32768),
    "seed": (0, 7),
    "block_name_to_quantize": ("model.layers",),
    "module_name_preceding_first_block": (["model.embed_tokens"],),
    "modules_in_block_to_quantize": (["a"], [["a", "b"], ["c"]], (("a",),), []),
    "max_perplexity_ratio": (1, 0.1),
    "device": ("cpu", torch.device("cuda", 1)),
    "activation_memory": ({}, {0: "8GiB"}, {"0": 0, "cpu": "1.5GB"}, {"cuda:1": 5}),
    "log_file": ("run.jsonl", Path("run.jsonl")),
    "report_to": ("none", "trackio,wandb", ["tensorboard"], ("mlflow", "all")),
    "scheme": ("W4A16",),
    "target_bits_per_weight": (4, 3.5),
    "target_size_gib": (0.5,),
    "dynamic": ({}, {"-:a": {}}, {"+:a": {"bits": 8, "sym": False}}, {"a": {"damp_percent": 0.2}}),
    "pack_dtype": ("int32", "torch.int32", torch.int32),
    "quant_method": ("gptq", transformers.utils.quantization_config.QuantizationMethod.GPTQ),
}

BESIDE = {"context_length": {"fit": "8GiB"}}
"""What a field needs to have an effect."""


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_that_fits_is_taken_as_it_is_and_survives_copies(name):
    field = FIELDS[name]
    kind = (False, True, np.bool_(False)) if field.kind is bool else field.choices
    for value in (*RIGHT.get(name, kind), *([None] if field.optional else [])):
        config = GPTQConfig(**{"bits": 4, **BESIDE.get(name, {}), name: value})
        if value is not None and name not in ("backend", "format", "pack_dtype", "scheme"):
            assert getattr(config, name) == value
        written = json.loads(config.to_json_string())
        written |= {"damp_percent": 0.1} if name == "damp_percent" and value is None else {}  # the default is said
        for again in (GPTQConfig(**config.to_dict()), GPTQConfig.from_dict(written)):
            assert json.loads(again.to_json_string()) == written
        assert copy.deepcopy(config) == config == copy.copy(config)
        if type(value) is not object:
            assert pickle.loads(pickle.dumps(config)) == config


def test_every_field_has_cases():
    assert all(field.kind in (bool, str) or name in RIGHT for name, field in FIELDS.items())
    assert all(field.kind in WRONG or name in WRONG_BY_NAME for name, field in FIELDS.items())


def test_a_check_is_there_where_the_type_does_not_say_it_all():
    for field in FIELDS.values():
        assert field.fits is not None or field.kind in (int, float, bool, str), field.name
        assert field.section in SECTIONS and field.help and (field.decisive or not field.stored or not field.option)


# falsy values


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"seed": 0}, {"seed": 0}),
        ({"refinement": 0, "propagation": 0, "polish": 0, "effort": "max"}, {"refinement": 0, "propagation": 0}),
        ({"static_groups": False}, {"act_order": "none"}),
        ({"modules_in_block_to_quantize": []}, {"listed_modules": []}),
        ({"meta": {}}, {"meta": {}}),
        ({"dynamic": {}}, {"dynamic": {}}),
    ],
)
def test_a_falsy_value_is_a_value(settings, found):
    config = GPTQConfig(bits=4, **settings)
    assert all(getattr(config, name) == value for name, value in found.items())
    if "polish" in settings:
        assert (config.scheme_for("x").refinement, config.scheme_for("x").propagation) == (0, 0)
        assert config.reconstruction_passes == 0
    if settings == {"modules_in_block_to_quantize": []}:
        assert config.scheme_for("model.layers.0.mlp.up_proj") is None


def test_no_damping_is_not_the_default_damping():
    with pytest.raises(ConfigError, match="damp_percent=0 was asked for; it is a fraction above 0"):
        GPTQConfig(bits=4, damp_percent=0)
    with pytest.raises(ConfigError, match=r"dynamic: '\+:a': damp_percent=0 was asked for"):
        GPTQConfig(bits=4, dynamic={"+:a": {"damp_percent": 0}})
    found = GPTQConfig.from_dict({"bits": 4, "damp_percent": 0})  # as some files say, of checkpoints that are done
    assert found.damp_percent is None and found.to_dict()["damp_percent"] == 0


# names for several fields


@pytest.mark.parametrize("name", PRESETS)
def test_a_scheme_is_the_fields_that_its_name_says(name):
    bits, group_size, sym = int(name[1]), 128, not name.endswith("_ASYM")
    for made in (
        GPTQConfig(scheme=name),
        GPTQConfig(scheme=name.lower(), bits=bits, sym=sym),
        GPTQConfig(scheme=name, bits=None, group_size=None, sym=None),  # as scripts pass what they were not given
        GPTQConfig.from_stock({"scheme": name}),
        GPTQConfig.from_dict({"bits": 8, "group_size": 32}, scheme=name),
    ):
        assert (made.bits, made.group_size, made.sym) == (bits, group_size, sym)
        assert made.settings() == GPTQConfig(bits=bits, sym=sym).settings() and "scheme" not in made.to_dict()
    made.update(sym=not sym)
    assert made.sym is not sym  # what is said later holds


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 8},
        {"group_size": 64},
        {"sym": True},
        {"target_bits_per_weight": 4.5},
        {"target_size_gib": 3.0},
        {"fit": 5},
    ],
)
def test_a_scheme_that_another_field_contradicts_is_refused(other):
    ((name, value),) = other.items()
    said = pytest.raises(ConfigError, match=rf"scheme='W4A16_ASYM' stands for bits=4, .*, but {name}={value} was")
    with said:
        GPTQConfig(scheme="W4A16_ASYM", **other)
    with said:
        GPTQConfig.from_stock({"scheme": "W4A16_ASYM", **other})
    with said:
        GPTQConfig(bits=2).update(scheme="W4A16_ASYM", **other)
    with pytest.raises(ConfigError, match="but group_size=32 was"):
        GPTQConfig(4, None, None, 32, scheme="W4A16")


def test_a_scheme_in_a_file_is_another_tools():
    """The fields describe the tensors; a name beside them must not change what is read."""
    found = GPTQConfig.from_dict({"bits": 4, "group_size": 32, "scheme": "W3A16"})
    assert (found.bits, found.group_size) == (4, 32) and found.to_dict()["scheme"] == "W3A16"
    with pytest.raises(ConfigError, match="no 'bits'"):
        GPTQConfig.from_dict({"scheme": "W4A16"})


def test_a_context_length_in_a_file_is_another_tools_unless_it_says_fit_as_well():
    found = GPTQConfig.from_dict({"bits": 4, "context_length": 4096})
    assert found.context_length is None and found.to_dict()["context_length"] == 4096
    assert GPTQConfig.from_dict({"bits": 4, "fit": "8GiB", "context_length": 4096}).context_length == 4096
    with pytest.raises(ConfigError, match="but fit was not given"):
        GPTQConfig.from_dict({"bits": 4}, context_length=4096)


def test_without_bits_the_error_names_the_scheme():
    with pytest.raises(ConfigError, match="bits=None was asked for; allowed are 2, 3, 4, 8, or scheme='W4A16'"):
        GPTQConfig()


def test_one_budget_at_most_is_asked_for():
    for first, second in combinations({"target_bits_per_weight": 4, "target_size_gib": 1, "fit": "1GiB"}.items(), 2):
        with pytest.raises(ConfigError, match=f"Pass {first[0]} or {second[0]}, not both"):
            GPTQConfig(bits=4, **dict([first, second]))


def test_a_context_that_nothing_counts_is_refused():
    with pytest.raises(ConfigError, match="context_length=64 was asked for, which says what fit counts"):
        GPTQConfig(bits=4, context_length=64)


# what is written

SET = {
    "tokenizer": object(),
    "dataset": ["a secret text"],
    "backend": "reference",
    "log_file": "run.jsonl",
    "device": "cpu",
    "activation_memory": {"cpu": "1GiB"},
    "serving": "vllm",
    "quality_gate": "raise",
    "report_to": "wandb",
}


def test_no_field_is_written_unless_it_says_so():
    run_only = [field for field in FIELDS.values() if not field.stored]
    values = {field.name: SET.get(field.name) for field in run_only}
    for field in run_only:
        if field.name not in SET:
            values[field.name] = not field.default if field.kind is bool else 7
    values["target_size_gib"] = None  # contradicts target_bits_per_weight
    values["scheme"] = values["fit"] = values["context_length"] = None  # as well
    config = GPTQConfig(bits=4, **values)
    assert config.to_dict() == GPTQConfig(bits=4).to_dict()
    assert "secret" not in config.to_json_string() and "secret" not in repr(config)
    config.invented, config.journal_folder, config.base = "later", "folder", {"quant_method": "fp8"}
    assert config.to_dict() == GPTQConfig(bits=4).to_dict()
    config.target_bits_per_weight = None  # needs layers
    assert config.for_checkpoint({}, [], {}).to_dict().keys() & values.keys() == set()


def test_what_a_checkpoint_says_is_this_list():
    """New entries reach every reader of config.json: think of them before you add one here."""
    assert {name for name, field in FIELDS.items() if field.stored} == {
        *("bits", "group_size", "damp_percent", "desc_act", "act_group_aware", "sym", "true_sequential", "format"),
        *("meta", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
        *("checkpoint_format", "static_groups", "effort", "grid", "propagation", "refinement", "polish", "dynamic"),
        *("lm_head", "pack_dtype", "quant_method"),
    }


def test_what_may_change_while_a_run_goes_on_is_this_list():
    assert {name for name, field in FIELDS.items() if not field.decisive} == {
        *("tokenizer", "dataset", "backend", "device", "activation_memory", "log_file", "quality_gate"),
        *("max_perplexity_ratio", "checkpoint_format", "scheme", "report_to"),
    }
    changed = GPTQConfig(bits=4, log_file="x", quality_gate="off", backend="reference")
    assert changed.settings() == GPTQConfig(bits=4).settings() != GPTQConfig(bits=4, seed=1).settings()


# signature, docstring and page


def test_the_signature_has_names_types_and_defaults():
    parameters = inspect.signature(GPTQConfig).parameters
    assert list(parameters) == list(FIELDS)
    assert parameters["group_size"].default == 128 and parameters["group_size"].annotation is int
    assert GPTQConfig(4, None, ["text"], 32).dataset == ["text"]
    shown = pydoc.render_doc(GPTQConfig, renderer=pydoc.plaintext)
    assert all(f"{name}: {field.help} (" in GPTQConfig.__doc__ for name, field in FIELDS.items())
    assert "group_size: int = 128" in shown and "columns that share a scale" in shown


def test_positional_arguments_are_in_the_order_of_transformers_own():
    def positional(kind):
        parameters = inspect.signature(kind.__init__).parameters.values()
        return [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]

    assert positional(GPTQConfig) == positional(transformers.GPTQConfig)


def test_the_page_has_the_tables_that_the_fields_make():
    subprocess.run([sys.executable, str(ROOT / "docs/fields.py"), "--check"], check=True)
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert all(f"| `{name}`" in page for name in FIELDS)


def test_the_table_says_what_other_modules_say():
    assert FIELDS["max_perplexity_ratio"].default == VERDICTS["usable"]
    assert FIELDS["grid"].choices == GridFit.__args__
    assert set(OVERRIDES) <= set(FIELDS)


# files


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if name != "bits"])
def test_null_in_a_file_is_the_default(name):
    found = GPTQConfig.from_dict({"bits": 4, name: None})
    default = FIELDS[name].default
    assert getattr(found, name) == (
        None if name == "damp_percent" else "gptq" if name == "checkpoint_format" else default
    )


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ({"device": 0}, False),
        ({"tokenizer": 5}, False),
        ({"log_file": 3}, False),
        ({"max_input_length": "long"}, False),
        ({"cache_block_outputs": "yes"}, False),
        ({"meta": [1]}, True),
        ({"damp_percent": "auto"}, True),
        ({"block_name_to_quantize": ["model.layers", "visual.blocks"]}, True),
    ],
)
def test_what_no_reader_needs_is_left_aside_in_a_file(stated, kept, caplog):
    ((name, value),) = stated.items()
    found = GPTQConfig.from_dict({"bits": 4, **stated})
    assert f"{name}=" in caplog.text and "left aside" in caplog.text
    assert getattr(found, name) in (None, FIELDS[name].default)
    assert found.to_dict().get(name) == (value if kept else None)
    found.post_init()


@pytest.mark.parametrize("name", ["bits", "group_size", "sym", "desc_act", "lm_head", "modules_in_block_to_quantize"])
def test_what_a_reader_needs_has_to_make_sense_in_a_file_too(name):
    with pytest.raises(ConfigError, match=f"{name}='no' was asked for"):
        GPTQConfig.from_dict({"bits": 4, name: "no"})


def test_a_file_without_bits_is_refused():
    with pytest.raises(ConfigError, match="no 'bits'"):
        GPTQConfig.from_dict({"quant_method": "gptq", "group_size": 32})


def test_rules_of_a_file_keep_what_other_tools_say(caplog):
    rules = {"+:.*up_proj": {"bit": 8, "sym": 0}, "+:.*o_proj": {"bits": 8, "group_size": None}}
    found = GPTQConfig.from_dict({"bits": 4, "dynamic": rules})
    assert "'+:.*up_proj' sets 'bit', which has no effect; what can be set is bits" in caplog.text
    assert found.to_dict()["dynamic"] == {"+:.*up_proj": {"bit": 8, "sym": False}, "+:.*o_proj": {"bits": 8}}
    assert found.scheme_for("a.up_proj").symmetric is False and found.scheme_for("a.o_proj").bits == 8
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        again.post_init()
        assert again == found


def test_fields_of_a_file_can_be_set_as_in_python():
    config, unused = GPTQConfig.from_dict({"bits": 4}, return_unused_kwargs=True, sym=False, revision="main")
    assert config.sym is False and unused == {"revision": "main"}
    with pytest.raises(ConfigError, match="Did you mean group_size"):
        GPTQConfig.from_dict({"bits": 4}, group_szie=64)
    assert config.update(group_size=64, post_init=None) == {"post_init": None}
    assert config.group_size == 64 and callable(config.post_init)
