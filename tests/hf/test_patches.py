# SPDX-License-Identifier: Apache-2.0
"""What optq changes in other libraries: all of it is listed, goes in beside others' changes, and can be taken back."""

import functools
import inspect
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers import auto

import optq
from optq import patching
from optq.errors import OptqError

METHODS = [
    (PreTrainedConfig, "get_config_dict"),
    (PreTrainedModel, "from_pretrained"),
    (auto.AutoHfQuantizer, "merge_quantization_configs"),
    (auto.AutoHfQuantizer, "supports_quant_method"),
]


@pytest.fixture(autouse=True)
def registered():
    optq.register()
    yield
    optq.unregister()
    optq.register()


def present():
    return [inspect.getattr_static(holder, name) for holder, name in METHODS]


def is_ours(table=auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
    return table["gptq"] is optq.GPTQConfig


def test_all_of_it_can_be_taken_back_and_put_in_again():
    ours = present()
    assert is_ours()
    optq.unregister()
    stock = present()
    assert not is_ours()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers")
    assert not any(one is other for one, other in zip(ours, stock, strict=True))
    assert patching.installed() == []
    optq.unregister()  # nothing is left to be taken back
    assert present() == stock
    optq.register()
    assert is_ours()
    assert not any(one is other for one, other in zip(present(), stock, strict=True))
    optq.unregister()
    assert present() == stock


def test_registering_again_changes_nothing():
    before, listed = present(), patching.installed()
    optq.register()
    assert present() == before
    assert patching.installed() == listed


@pytest.mark.parametrize(("holder", "name"), METHODS)
def test_ours_goes_around_what_another_library_has_wrapped(holder, name):
    """Tracers and retry decorators do, with functools.wraps, so that nothing can be told from an attribute."""
    optq.unregister()
    raw = inspect.getattr_static(holder, name)

    @functools.wraps(raw.__func__)
    def theirs(*args, **kwargs):
        return raw.__func__(*args, **kwargs)

    setattr(holder, name, type(raw)(theirs))
    try:
        optq.register()
        assert inspect.getattr_static(holder, name).__func__.__wrapped__ is theirs
        optq.unregister()
        assert inspect.getattr_static(holder, name).__func__ is theirs
    finally:
        setattr(holder, name, raw)


def test_what_another_library_puts_around_ours_stays_and_ours_hands_calls_on(tiny_llama, tmp_path):
    """Taking ours out of the middle must not take theirs away."""
    raw, calls = inspect.getattr_static(PreTrainedConfig, "get_config_dict"), []

    def theirs(cls, *args, **kwargs):
        calls.append(args)
        return raw.__func__(cls, *args, **kwargs)

    PreTrainedConfig.get_config_dict = classmethod(theirs)
    try:
        old = tmp_path / "old"
        AutoConfig.from_pretrained(tiny_llama).save_pretrained(old)
        (old / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
        assert hasattr(AutoConfig.from_pretrained(old), "quantization_config")
        optq.unregister()
        asked = len(calls)
        assert not hasattr(AutoConfig.from_pretrained(old), "quantization_config")
        assert len(calls) > asked
    finally:
        PreTrainedConfig.get_config_dict = raw


def test_a_callable_that_is_no_class_method_is_wrapped_as_well(tiny_llama):
    optq.unregister()
    raw = inspect.getattr_static(PreTrainedConfig, "get_config_dict")
    PreTrainedConfig.get_config_dict = functools.partial(raw.__func__, PreTrainedConfig)
    try:
        optq.register()
        assert AutoConfig.from_pretrained(tiny_llama).model_type == "llama"
    finally:
        optq.unregister()
        PreTrainedConfig.get_config_dict = raw


def test_without_it_a_checkpoint_is_transformers_own_affair_and_a_loaded_model_goes_on(saved, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(saved)
    before = model(probe_ids).logits
    optq.unregister()
    assert (model(probe_ids).logits == before).all()
    with pytest.raises((ImportError, NameError, ValueError, RuntimeError)) as refused:
        AutoModelForCausalLM.from_pretrained(saved)
    assert not isinstance(refused.value, OptqError)


def test_the_page_lists_every_change():
    page = (Path(__file__).parents[2] / "docs/architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([A-Za-z_.]+)` ", page, re.MULTILINE))
    done = {name.partition("[")[0] for name in patching.installed()}
    assert done <= listed
    assert {"PreTrainedModel.from_pretrained", "AUTO_QUANTIZER_MAPPING"} <= done
