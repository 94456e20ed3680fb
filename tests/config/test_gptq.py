# SPDX-License-Identifier: Apache-2.0
import copy
import enum
import json
import math
import shutil
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import optq
from conftest import rewritten
from optq import GPTQConfig
from optq.config.fields import FIELDS
from optq.errors import ConfigError, KernelError


def test_is_transformers_own_class_by_name_and_type():
    config = GPTQConfig(bits=4)
    assert isinstance(config, transformers.GPTQConfig)
    assert type(config).__name__ == "GPTQConfig"


def test_keys_that_are_not_known_survive():
    written = {
        "bits": 4,
        "group_size": 32,
        "quant_method": "gptq",
        "is_marlin_format": False,
        "offload": {"a": 1},
        "mse": 2.4,
    }
    found = GPTQConfig.from_dict(written).to_dict()
    assert written.items() <= found.items()


def test_a_checkpoint_of_others_does_not_claim_our_settings():
    found = GPTQConfig.from_dict({"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert not {"grid", "static_groups"} & set(found.to_dict())
    ours = found.for_checkpoint({"tokens": 1}, [], {}).to_dict()
    assert {"grid": "weighted", "static_groups": True}.items() <= ours.items()


def test_json_holds_no_tokenizer_and_no_text():
    config = GPTQConfig(bits=4, tokenizer=object(), dataset=["a secret text"], log_file="run.jsonl")
    written = json.dumps(config.to_dict())
    assert "secret" not in written
    assert "tokenizer" not in written
    assert "log_file" not in written
    assert json.loads(config.to_json_string()) == json.loads(written)
    assert GPTQConfig(bits=4, dataset="wikitext2").to_dict()["dataset"] == "wikitext2"
    for dataset in ("some/file.txt", "self", "math", "wikitext2:0.5,c4:0.5", {"wikitext2": 1}):  # refused by others
        assert "dataset" not in GPTQConfig(bits=4, dataset=dataset).to_dict()


def test_json_is_what_readers_require():
    written = GPTQConfig(bits=4, group_size=64).to_dict()
    expected = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    assert expected.items() <= written.items()
    assert "modules_in_block_to_quantize" not in written


def test_equality_is_by_value():
    assert GPTQConfig(bits=4) == GPTQConfig(bits=4)
    assert GPTQConfig(bits=4) != GPTQConfig(bits=8)
    assert GPTQConfig(bits=4) != GPTQConfig(bits=4, backend="reference")


def test_configs_found_on_the_hub_are_read():
    for found in (
        {"bits": 4, "damp_percent": 0, "format": None},
        {"bits": 4, "damp_percent": None, "checkpoint_format": "gptq_v2", "dataset": "ptb"},
        {"bits": 8, "pack_dtype": "torch.int32", "backend": None},
    ):
        config = GPTQConfig.from_dict({"quant_method": "gptq", **found})
        assert config.scheme_for("any").bits == found["bits"]
    assert GPTQConfig.from_dict({"bits": 4, "damp_percent": 0}).to_dict()["damp_percent"] == 0  # as it was


@pytest.mark.parametrize("named", ["marlin", "exllama_v2", "triton", "auto_trainable", "", 3, None])
def test_kernels_that_a_file_names_are_other_tools(saved, probe_ids, tmp_path, caplog, named):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    with rewritten(tmp_path / "config.json") as written:
        written["quantization_config"] |= {"backend": named, "kernel": "marlin"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.model.layers[0].mlp.up_proj.kernel_name == "reference"
    assert ("left aside" in caplog.text) == (named not in ("auto_trainable", None))
    assert optq.inspect(tmp_path).bits_per_weight


@pytest.mark.parametrize("kind", [GPTQConfig, transformers.GPTQConfig])
def test_a_kernel_that_is_asked_for_in_python_is_known_or_refused_by_name(saved, kind):
    class Backend(str, enum.Enum):
        AUTO_TRAINABLE = "auto_trainable"

    def loaded(backend):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # transformers', that the rest is the file's
            return AutoModelForCausalLM.from_pretrained(saved, quantization_config=kind(bits=4, backend=backend))

    for backend in ("auto_trainable", "AUTO", None, "reference", Backend.AUTO_TRAINABLE):
        assert loaded(backend).model.layers[0].mlp.up_proj.kernel_name == "reference"
    assert loaded("auto_trainable").config.quantization_config.backend == "auto"
    for backend in ("marlin", "exllama_v2", "nonsense"):
        with pytest.raises(KernelError, match=rf"backend='{backend}' was asked for; allowed are auto, cpu, .*triton"):
            loaded(backend)


def test_the_stock_class_is_taken_over():
    stock = transformers.GPTQConfig(bits=3, group_size=32, dataset=["text"], desc_act=True, sym=False)
    config = GPTQConfig.from_stock(stock)
    assert isinstance(config, GPTQConfig)
    assert (config.bits, config.group_size, config.desc_act, config.sym) == (3, 32, True, False)
    assert config.dataset == ["text"]
    assert config.batch_size is None
    assert GPTQConfig.from_stock(config) is config


def test_a_dict_of_fields_is_a_config_everywhere(tiny_llama, token_rows):
    fields = {"bits": 4, "group_size": 32, "quant_method": "gptq", "dataset": token_rows}
    assert optq.plan(tiny_llama, fields).linears == optq.plan(tiny_llama, GPTQConfig(**fields)).linears
    assert optq.check(tiny_llama, fields) == ()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert optq.quantize(model, {**fields, "effort": "fast"}).model.layers[0].mlp.up_proj.bits == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "NoneType was passed as the config; allowed are a GPTQConfig"),
        ("gptq", "str was passed"),
        (transformers.BitsAndBytesConfig(load_in_8bit=True), "BitsAndBytesConfig was passed"),
        (transformers.AwqConfig(), "quant_method='awq'"),
        ({"bits": 4, "quant_method": "fp8"}, "quant_method='fp8'"),
        ({"group_size": 32}, "no 'bits'"),
    ],
)
def test_what_is_no_config_of_ours_is_refused_by_name(tiny_llama, tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        optq.plan(tiny_llama, config)
    with pytest.raises(ConfigError, match=message):
        optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_share_the_calibration_data_but_nothing_else():
    config = GPTQConfig(bits=4, dataset=["text"], dynamic={"-:.*k_proj": {}})
    copied = copy.deepcopy(config)
    assert copied.dataset is config.dataset
    copied.dynamic["-:other"] = {}
    assert list(config.dynamic) == ["-:.*k_proj"]


def test_dynamic_overrides_or_excludes_and_the_first_match_counts():
    config = GPTQConfig(
        bits=4,
        dynamic={
            r"-:.*layers\.0\.mlp.*": {},
            r"+:.*mlp.*": {"bits": 8, "group_size": 64},
            r".*k_proj": {"sym": False},
        },
    )
    assert config.scheme_for("model.layers.0.mlp.up_proj") is None
    assert config.scheme_for("model.layers.1.mlp.up_proj").bits == 8
    assert config.scheme_for("model.layers.1.mlp.up_proj").group_size == 64
    assert config.scheme_for("model.layers.1.self_attn.k_proj").symmetric is False
    assert config.scheme_for("model.layers.1.self_attn.q_proj").bits == 4


def test_modules_in_block_to_quantize_restricts():
    config = GPTQConfig(
        bits=4, modules_in_block_to_quantize=[["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]
    )
    assert config.scheme_for("model.layers.0.self_attn.k_proj") is not None
    assert config.scheme_for("model.layers.0.self_attn.v_proj") is None


@pytest.mark.parametrize(
    ("desc_act", "static_groups", "act_order"),
    [(False, True, "static"), (True, True, "desc_act"), (False, False, "none")],
)
def test_orders(desc_act, static_groups, act_order):
    config = GPTQConfig(bits=4, desc_act=desc_act, static_groups=static_groups)
    assert config.scheme_for("any").act_order == act_order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "damp_percent": 2}, "fraction"),
        ({"bits": 4, "grid": "best"}, "'minmax', 'weighted'"),
        ({"bits": 4, "format": "exllama"}, "gptq_v2"),
        ({"bits": 4, "pack_dtype": "int64"}, "int32"),
        ({"bits": 4, "batch_size": 0}, "batch_size"),
        ({"bits": 4, "dynamic": {"-:(": {}}}, "regular expression"),
        ({"bits": 4, "dynamic": {".*": {"bits": 7}}}, "bits=7"),
    ],
)
def test_impossible_configs_say_what_is_allowed(changes, message):
    with pytest.raises(ConfigError, match=message):
        GPTQConfig(**changes)


def test_an_effort_sets_what_is_left_open():
    schemes = {effort: GPTQConfig(bits=4, effort=effort).scheme_for("x") for effort in ("fast", "default", "max")}
    assert schemes["default"] == GPTQConfig(bits=4).scheme_for("x")
    assert schemes["fast"].propagation == 0
    assert schemes["max"].refinement >= schemes["default"].refinement > schemes["fast"].refinement > 0
    assert GPTQConfig(bits=4, effort="max").reconstruction_passes > GPTQConfig(bits=4).reconstruction_passes == 0
    own = GPTQConfig(bits=4, effort="max", refinement=1, propagation=0.25, polish=0)
    assert (own.scheme_for("x").refinement, own.scheme_for("x").propagation, own.reconstruction_passes) == (1, 0.25, 0)
    written = own.for_checkpoint({}, [], {}).to_dict()
    assert {"effort": "max", "refinement": 1, "propagation": 0.25, "polish": 0}.items() <= written.items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effort": "maximal"}, "effort='maximal'.*'fast', 'default', 'max'"),
        ({"quality_gate": "loud"}, "quality_gate='loud'.*'warn', 'raise', 'off'"),
        ({"serving": "tgi"}, "serving='tgi'.*'vllm', 'sglang', 'transformers'"),
        ({"propagation": 1.5}, "propagation=1.5"),
        ({"refinement": -1}, "refinement=-1"),
        ({"polish": -1}, "polish=-1"),
        ({"max_perplexity_ratio": 0}, "max_perplexity_ratio=0"),
        ({"target_bits_per_weight": "4"}, "target_bits_per_weight='4'"),
        ({"target_size_gib": math.inf}, "target_size_gib=inf.*finite"),
        ({"max_perplexity_ratio": math.nan}, "max_perplexity_ratio=nan.*finite"),
        ({"damp_percent": "0.1"}, "damp_percent='0.1'.*a fraction"),
        ({"propagation": math.nan}, "propagation=nan"),
        ({"seed": math.nan}, "seed=nan"),
        ({"activation_memory": {"cpu": "infGiB"}}, "activation_memory"),
        ({"meta": [1]}, r"meta=<list of 1> was asked for; it is a dict"),
        ({"meta": "text"}, "meta='text'"),
        ({"meta": {1: 2}}, "meta={1: 2}"),
    ],
)
def test_impossible_wishes_say_what_is_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        GPTQConfig(bits=4, **settings)


def test_group_aware_order_is_a_wish_in_our_class_and_a_default_in_the_stock_one():
    assert GPTQConfig(bits=4, act_group_aware=True).act_order == "group_aware"
    assert GPTQConfig.from_stock(transformers.GPTQConfig(bits=4)).act_order == "static"
    assert GPTQConfig(bits=4, act_group_aware=True, desc_act=True).act_order == "desc_act"


def test_the_representation_is_short_and_holds_no_data(token_rows):
    config = GPTQConfig(
        **{"bits": 3, "group_size": 32, "dataset": ["a private text " * 99] * 9, "tokenizer": object(), "seed": 7},
        **{"dynamic": {"+:.*down_proj": {"bits": 8}}, "lm_head": True, "meta": {"weights": torch.ones(1000)}},
    )
    config.unknown = {"note": "kept"}
    text = repr(config)
    assert text == str(config)
    assert len(text.splitlines()) == 1 and len(text) < 400
    for part in ("bits=3", "group_size=32", "dataset=<list of 9>", "tokenizer=<object>", "seed=7", "lm_head=True"):
        assert part in text
    assert "'bits': 8" in text and "note='kept'" in text
    assert "private" not in text and "tensor(" not in text
    assert repr(GPTQConfig(bits=4)) == "GPTQConfig(bits=4, group_size=128)"
    assert "dataset='wikitext2'" in repr(GPTQConfig(bits=4, dataset="wikitext2"))


@pytest.mark.parametrize("dynamic", [["-:.*o_proj"], {"+:.*o_proj": 8}, {3: {"bits": 8}}])
def test_rules_of_another_form_are_refused(dynamic):
    with pytest.raises(ConfigError, match="dynamic"):
        GPTQConfig(bits=4, dynamic=dynamic)


@pytest.mark.parametrize(
    "field", [field.name for field in FIELDS.values() if field.kind is bool and not field.lenient]
)
@pytest.mark.parametrize("value", ["false", "no", [1], 2, 0.5])
def test_what_is_neither_true_nor_false_is_refused(field, value):
    refused = pytest.raises(ConfigError, match=rf"{field}=.* was asked for; allowed are True and False")
    with refused:
        GPTQConfig(**{"bits": 4, field: value})
    with refused:
        GPTQConfig.from_dict({"bits": 4, field: value})


def test_files_may_say_1_0_or_null():
    config = GPTQConfig.from_dict({"bits": 4, "desc_act": 1, "sym": 0, "true_sequential": None, "lm_head": None})
    assert (config.desc_act, config.sym, config.true_sequential, config.lm_head) == (True, False, True, False)
    with pytest.raises(ConfigError, match=r"dynamic: '\.\*': sym='no' was asked for"):
        GPTQConfig(bits=4, dynamic={".*": {"sym": "no"}})


@pytest.mark.parametrize("meta", [{"quantizer": 5}, {"quantizer": [5, None]}, [1], "text", None])
def test_odd_facts_in_a_file_do_not_matter(meta):
    config = GPTQConfig.from_dict({"bits": 4, "meta": meta})
    assert not config.by_gptqmodel and config.zero_format == "gptq"


def test_a_writers_name_may_be_in_capitals():
    config = GPTQConfig.from_dict({"bits": 4, "meta": {"quantizer": "GPTQModel:v7.0"}})
    assert config.by_gptqmodel and config.zero_format == "gptq:gptqmodel"


@pytest.mark.parametrize("sign", ["+:", "-:", ""])
def test_a_rule_without_a_dict_is_refused(sign):
    with pytest.raises(ConfigError, match=r"None was asked for.*a dict of settings"):
        GPTQConfig(bits=4, dynamic={f"{sign}.*q_proj": None})


def test_a_rule_without_settings_changes_nothing():
    config = GPTQConfig.from_dict({"bits": 4, "dynamic": {"+:.*up_proj": None, "-:.*o_proj": {}}})
    assert config.to_dict()["dynamic"] == {"+:.*up_proj": {}, "-:.*o_proj": {}}
    assert config.scheme_for("model.layers.0.mlp.up_proj") == config.scheme_for("model.layers.0.mlp.down_proj")
    assert config.scheme_for("model.layers.0.self_attn.o_proj") is None
