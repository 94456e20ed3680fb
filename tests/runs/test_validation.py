# SPDX-License-Identifier: Apache-2.0
"""What can be refused is refused before a weight is read; what fails after the work does not cost the work."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers.integrations.accelerate
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.api import quantize as api
from optq.errors import ConfigError, KernelError, OptqError, OutputError, QualityError
from optq.hf.quantizer import OptqHfQuantizer


@pytest.fixture
def config(token_rows):
    def make(**settings):
        return GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, **settings})

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test as soon as transformers has read weights."""

    def read(*arguments, **settings):
        pytest.fail("weights were read")

    monkeypatch.setattr(OptqHfQuantizer, "_process_model_after_weight_loading", read)


@pytest.fixture
def everywhere(tiny_llama, tmp_path):
    """everywhere(config, **kwargs) -> what each way to quantize says; none of them leaves a folder."""

    def ask(config, **kwargs):
        errors = []
        for way in (
            lambda: AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, **kwargs),
            lambda: optq.quantize(tiny_llama, config, output_dir=tmp_path / "out", **kwargs),
            lambda: optq.plan(tiny_llama, config, **kwargs),
        ):
            with pytest.raises(OptqError) as caught:
                way()
            errors.append(caught.value)
        assert not list(tmp_path.glob("out/*"))
        return errors

    return ask


ABSENT = ["cuda", 0, "mps", {"": 0}, {"model": "cuda:7", "": "cpu"}, torch.device("cuda", 3), {"": "disk"}, "meta"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a device that the test wants absent")
@pytest.mark.parametrize("device_map", ABSENT, ids=str)
def test_a_device_that_is_not_there_is_refused_by_all(everywhere, config, no_weights, device_map):
    for error in everywhere(config(), device_map=device_map):
        assert isinstance(error, ConfigError)
        assert "this machine has cpu" in str(error)


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "float8_e4m3fn", torch.float64])
def test_a_dtype_in_which_nothing_is_computed_is_refused_by_all(everywhere, config, no_weights, dtype):
    for error in everywhere(config(), dtype=dtype):
        assert isinstance(error, ConfigError)
        assert f"dtype={dtype!r}" in str(error)
        assert "float32, bfloat16, float16 or auto" in str(error)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on an accelerator Triton runs")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "triton"}, "runs on cuda and xpu devices, the layer is on cpu"),
        ({"backend": "cpu_int8", "bits": 8, "group_size": -1, "sym": False}, "symmetric zeros only"),
        ({"backend": "cpu_int4", "target_bits_per_weight": 4.5}, "these have 8"),
    ],
)
def test_a_kernel_that_will_not_run_is_refused_by_all(everywhere, config, no_weights, settings, reason):
    for error in everywhere(config(**settings), dtype=torch.bfloat16):
        assert isinstance(error, KernelError)
        assert reason in str(error)


def test_a_kernel_that_will_run_is_not_refused(tiny_llama, config):
    settings = config(backend="cpu_int8", bits=8, group_size=-1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.kernel_name == "cpu_int8"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"meta": {"tags": {"a"}}}, "meta={'tags'"),
        ({"meta": {"loss": float("nan")}}, "meta={'loss'"),
        ({"meta": {"mean": torch.ones(2)}}, "meta={'mean'"),
        ({"meta": {"of": [{1: "a"}]}}, "meta={'of'"),
        ({"owner": object()}, "owner=<object"),  # these two, as only a file may say them
        ({"dynamic": {"+:.*down_proj": {"bits": 8, "note": b"x"}}}, "dynamic={"),
    ],
)
def test_what_config_json_cannot_hold_is_refused_by_all(everywhere, config, no_weights, settings, named):
    for error in everywhere(GPTQConfig.from_dict({**dict(config()), "dataset": config().dataset, **settings})):
        assert isinstance(error, ConfigError)
        assert str(error).startswith(named)


def test_what_was_assigned_later_is_checked_as_well(everywhere, config, no_weights):
    settings = config()
    settings.group_size = 0
    assert all("group_size=0" in str(error) for error in everywhere(settings))


PIPE = pytest.param("pipe", marks=pytest.mark.skipif(sys.platform == "win32", reason="no pipes among files"))


@pytest.mark.parametrize("place", ["missing/run.jsonl", ".", "file/run.jsonl", "x" * 300, "a\0b", PIPE])
def test_a_log_that_cannot_be_written_is_refused_by_all(everywhere, config, no_weights, tmp_path, place):
    (tmp_path / "file").touch()
    if place == "pipe":
        os.mkfifo(tmp_path / place)
    for error in everywhere(config(log_file=str(tmp_path / place))):
        assert isinstance(error, ConfigError)
        assert "log_file=" in str(error)


def test_a_folder_that_cannot_be_made_is_refused(tiny_llama, config, no_weights, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        optq.quantize(tiny_llama, config(), output_dir=tmp_path / "file/out")


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"device_map": {"model.layers.0": "disk", "": "cpu"}}, "Pass offload_folder="),
        ({"device_map": {"model.layers.0": "disk", "": "cpu"}, "offload_folder": "{file}/x"}, "is no folder"),
        ({"device_map": {"model.layers": "cpu", "lm_head": "cpu"}}, "no place to model.embed_tokens.weight"),
        ({"device_map": {"model": "cpu", "lm_head.bias": "cpu"}}, "no place to lm_head.weight"),
    ],
)
def test_a_map_that_could_not_be_followed_is_refused(tiny_llama, config, no_weights, tmp_path, kwargs, said):
    (tmp_path / "file").touch()
    kwargs = {
        key: value if isinstance(value, dict) else value.format(file=tmp_path / "file")
        for key, value in kwargs.items()
    }
    with pytest.raises(ConfigError, match=said):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config(), **kwargs)


@pytest.fixture(scope="module")
def fast(tiny_llama, token_rows):
    """The tiny llama, quantized, on the CPU. Not to be changed."""
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_blocks_go_to_the_disk_after_quantizing(tiny_llama, config, fast, probe_ids, tmp_path, offload_buffers):
    folder = tmp_path / "offload"
    folder.mkdir()
    stale = {"model.layers.0.input_layernorm.weight": {"dtype": "float32", "shape": [64]}}
    (folder / "index.json").write_text(json.dumps(stale))  # what another model has left there
    (folder / "model.layers.0.input_layernorm.weight.dat").write_bytes(bytes(256))
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        quantization_config=config(),
        device_map={"": "cpu", "model.layers.0": "disk"},
        offload_folder=folder,
        offload_buffers=offload_buffers,
    )
    assert model.hf_device_map["model.layers.0"] == "disk"
    assert model.model.layers[0].input_layernorm.weight.is_meta
    assert model.model.layers[0].mlp.up_proj.scales.is_meta == offload_buffers
    expected = fast(probe_ids).logits
    assert torch.equal(model(probe_ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(probe_ids).logits, expected)


def test_a_place_that_fails_does_not_cost_the_work(tiny_llama, config, fast, probe_ids, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise torch.OutOfMemoryError("no room on the device")

    monkeypatch.setattr(transformers.integrations.accelerate, "accelerate_dispatch", full)
    with caplog.at_level(logging.WARNING, "optq"):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_llama,
            quantization_config=config(),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=tmp_path,
        )
    assert "no room on the device" in caplog.text
    assert torch.equal(model(probe_ids).logits, fast(probe_ids).logits)


def test_a_red_gate_keeps_the_model(tiny_llama, config, fast, probe_ids):
    settings = config(quality_gate="raise", max_perplexity_ratio=0.1)
    with pytest.raises(QualityError, match="attribute `model`") as caught:
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings)
    assert torch.equal(caught.value.model(probe_ids).logits, fast(probe_ids).logits)


def test_a_red_gate_keeps_the_folder_and_the_next_call_may_pass_it(tiny_llama, config, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with pytest.raises(QualityError, match="finished blocks are kept in") as caught:
        optq.quantize(tiny_llama, config(quality_gate="raise", max_perplexity_ratio=0.1), output_dir=output)
    assert caught.value.model is None
    assert str(output) in str(caught.value)
    assert optq.quantize(tiny_llama, config(), output_dir=output) == output
    log = [json.loads(line) for line in (output / "quantization_log.jsonl").read_text().splitlines()]
    assert [event["block"] for event in log if event["event"] == "restored"] == ["model.layers.0", "model.layers.1"]


def test_a_full_disk_at_the_end_keeps_the_blocks(tiny_llama, config, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(api, "copy_companions", full)
        with pytest.raises(OutputError, match=r"All blocks are quantized and kept in .*No space left") as caught:
            optq.quantize(tiny_llama, config(), output_dir=output)
    assert str(output) in str(caught.value)
    optq.quantize(tiny_llama, config(), output_dir=output)
    assert Path(output, "config.json").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator other maps are made")
@pytest.mark.parametrize(
    ("max_memory", "said"),
    [
        ({0: "1GB", "cpu": "1GB"}, "this machine has cpu"),
        ({"cpu": "a lot"}, "max_memory={'cpu': 'a lot'} places nothing"),
        ({"cpu": "60KB"}, "Pass offload_folder="),
    ],
)
def test_memory_that_is_not_there_is_refused_before_the_work(tiny_llama, config, no_weights, max_memory, said):
    with pytest.raises(ConfigError, match=said):
        AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=config(), device_map="auto", max_memory=max_memory
        )


def test_what_fits_once_it_is_quantized_is_not_refused(tiny_llama, config):
    # 4 bits of 61440 weights in the blocks, with scales, and 8192 of the embedding in float32: some 72 KB; dense 280.
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=config(), device_map="auto", max_memory={"cpu": "150KB"}
    )
    assert set(model.hf_device_map.values()) == {"cpu"}


def test_a_log_in_the_folder_that_is_going_to_be_made_is_not_refused(tiny_llama, config, tmp_path):
    output = tmp_path / "out"
    optq.quantize(tiny_llama, config(log_file=str(output / "events.jsonl")), output_dir=output)
    assert "finished" in (output / "events.jsonl").read_text()
