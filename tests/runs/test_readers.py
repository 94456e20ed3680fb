# SPDX-License-Identifier: Apache-2.0
"""Who reads the result is said before the work and at its end, and can be asked for."""

import logging

import pytest
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.api.check import servable_group_size
from optq.errors import ConfigError
from optq.runs.readers import said_of_readers


def settings(token_rows, **changes):
    return GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows[:4], **changes})


def test_who_will_not_read_it_is_warned_of_before_the_work_and_at_its_end(tiny_llama, token_rows, caplog):
    config = settings(token_rows, desc_act=True, sym=False)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    said = [record.getMessage() for record in caplog.records if "vLLM 0.33" in record.getMessage()]
    assert [line.partition(":")[0] for line in said] == ["Who will read the checkpoint", "The checkpoint is finished"]
    assert all("use sym=True" in line and "desc_act=True; leave it False" in line for line in said)
    assert "--for vllm" in said[0]


@pytest.mark.parametrize("changes", [{}, {"desc_act": True, "serving": "transformers"}])
def test_nothing_is_warned_of_where_it_is_read_by_whom_it_is_for(tiny_llama, token_rows, caplog, changes):
    caplog.set_level(logging.INFO)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings(token_rows, **changes))
    said = [record for record in caplog.records if "vLLM 0.33" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO", "INFO"]


def test_a_model_that_the_server_would_refuse_is_refused_before_the_work(tiny_llama, token_rows, tmp_path):
    config = settings(token_rows, serving="vllm", group_size=64)
    message = (
        r"vLLM does not read .*down_proj: group_size=64, which does not divide 96; use 32 or -1.*group_size=32 would"
    )
    for refused in (
        lambda: optq.plan(tiny_llama, config),
        lambda: AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config),
        lambda: optq.quantize(tiny_llama, config, output_dir=tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()
    assert not list(tmp_path.rglob("*.safetensors"))
    optq.plan(tiny_llama, settings(token_rows, serving="transformers", group_size=64))


def test_the_group_size_that_a_server_reads_is_found(tiny_llama, token_rows):
    config = settings(token_rows, group_size=128)
    assert servable_group_size(tiny_llama, config, "vllm") == 32
    assert servable_group_size(tiny_llama, config, "transformers") == 128
    assert servable_group_size(tiny_llama, config, "sglang") is None


def test_readers_with_the_same_reasons_share_a_sentence():
    refused = {"transformers": (), "vllm": ("a: b",), "sglang": ("a: b",), "gptqmodel": ()}
    first, second, third = said_of_readers(refused)
    assert first.startswith("transformers with optq 5.23 and GPTQModel") and first.endswith(" read it.")
    assert second == "vLLM 0.33 and SGLang 0.5.23 do not: a: b."
    assert "vLLM" in third
