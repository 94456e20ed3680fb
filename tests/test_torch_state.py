# SPDX-License-Identifier: Apache-2.0
"""The caller's ambient torch state changes no result, and is as it was afterwards."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.errors import CalibrationError
from optq.torch_state import default_torch_state, leave_inference_mode


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def rough_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        yield


State = Callable[[], AbstractContextManager[Any]]
STATES: dict[str, State] = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "rough float32 products": rough_products,
    "another seed": seeded,
}
ON_META: State = lambda: torch.device("meta")  # noqa: E731  # from_pretrained refuses it by itself, for every model

states = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


def words(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith(("qweight", "scales", "qzeros"))
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@states
def test_quantizing_gives_the_same_words_and_logits(state, quantized, tiny_llama, token_rows, probe_ids):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    with state():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert same(words(model), words(quantized))
    with torch.no_grad():
        assert torch.equal(model(probe_ids).logits, quantized(probe_ids).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"polish": 1},
        {"desc_act": True, "lm_head": True},
        pytest.param({"target_bits_per_weight": 4.5}, marks=pytest.mark.long),
        pytest.param({"dataset": None}, marks=pytest.mark.long),
    ],
    ids=["polished", "with the head", "within a budget", "on its own text"],
)
def test_so_do_the_other_ways_of_quantizing(settings, tiny_llama, token_rows):
    def run() -> dict[str, torch.Tensor]:
        few = {"dataset": token_rows[:4], "num_samples": 4, "model_seqlen": 16}
        config = GPTQConfig(bits=4, group_size=32, **{**few, **settings})
        return words(AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config))

    expected = run()
    for name in ("float64 by default", "inference mode", "bfloat16 autocast"):
        with STATES[name]():
            assert same(run(), expected), name


@states
def test_loading_gives_the_same(state, quantized, saved, probe_ids):
    with state():
        model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(model(probe_ids).logits, quantized(probe_ids).logits)


def test_planning_gives_the_same(tiny_llama, token_rows):
    def planned() -> tuple[Any, ...]:
        found = optq.plan(tiny_llama, GPTQConfig(bits=4, group_size=32, dataset=token_rows))
        return found.linears, found.memory_gib, found.checkpoint_gib

    expected = planned()
    with default_dtype(torch.float64), torch.inference_mode(), torch.autocast("cpu"), ON_META():
        assert planned() == expected


def test_weights_that_are_read_in_inference_mode_can_be_polished(tiny_llama, token_rows, tmp_path, monkeypatch):
    """Of a model that is read as a whole, also the blocks."""
    monkeypatch.setattr("optq.hf.quantizing.why_not_streamed", lambda *_: "this test wants it")
    config = GPTQConfig(bits=4, group_size=32, polish=1, dataset=token_rows[:4])
    expected = words(AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert same(words(model), expected)
    assert not any(tensor.is_inference() for tensor in model.parameters())


@pytest.fixture(scope="module")
def measured(saved: Path, tiny_llama: Path) -> Callable[[], Any]:
    @cache
    def run(outside: object = None) -> Any:
        (found,) = optq.compare(
            [saved], baseline=tiny_llama, tokenizer=str(tiny_llama), dataset=["abc def " * 16], window=64
        )
        return found.perplexities, found.comparison

    return run


@pytest.mark.parametrize("state", [*STATES.values(), ON_META], ids=[*STATES, "on meta"])
def test_evaluating_gives_the_same(state, measured):
    expected = measured()
    with state():
        assert measured(state) == expected


def test_a_default_device_does_not_reach_what_is_written(saved, tiny_llama, token_rows, tmp_path):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    with ON_META():
        optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert same(written, load_file(saved / "model.safetensors"))


@states
def test_a_loaded_layer_computes_the_same_when_it_is_prepared_there(state, quantized, saved, probe_ids):
    if state is STATES["bfloat16 autocast"] or state is STATES["float16 autocast"]:
        pytest.skip("autocast is asked for another result; tests of training say which")
    model = AutoModelForCausalLM.from_pretrained(saved)
    for module in model.modules():
        if isinstance(module, optq.QuantLinear):
            module._apply(lambda tensor: tensor.clone())  # as a move to another device
    with state(), torch.no_grad():
        found = model(probe_ids).logits
    with torch.no_grad():
        expected = quantized(probe_ids).logits
        assert torch.equal(model(probe_ids).logits, expected)
    if state is not rough_products:  # which some processors then do make, of what is not packed too
        assert torch.equal(found, expected)


@states
def test_the_state_is_as_it_was_also_after_an_error(state, tiny_llama):
    def now() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_default_device(),
        )

    with state():
        before = now()
        with pytest.raises(CalibrationError):
            optq.plan(tiny_llama, GPTQConfig(bits=4, dataset=["x"]))
        assert now() == before


def test_inside_all_is_at_its_defaults():
    with default_dtype(torch.float16), torch.autocast("cpu"), torch.inference_mode(), ON_META(), rough_products():
        with default_torch_state():
            made = torch.ones(2, 2)
            assert (made.dtype, made.device.type, (made @ made).dtype) == (torch.float32, "cpu", torch.float32)
            assert not made.is_inference()
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.ones(2, 2).device.type == "meta"


def test_tensors_of_inference_mode_become_normal_and_stay_shared():
    with torch.inference_mode():
        first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        second.weight = first.weight
        first.register_buffer("count", torch.ones(1))
    model = nn.Sequential(first, second)
    leave_inference_mode(model)
    assert first.weight is second.weight
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


INTERFACES = """
import os
from types import SimpleNamespace

import torch
from optq.gptq.hessian import _fast_products
from optq.torch_state import default_torch_state

products = torch.backends.cuda.matmul
SETTINGS = {
    "untouched": lambda: None,
    "the old flag": lambda: setattr(products, "allow_tf32", True),
    "the old function": lambda: torch.set_float32_matmul_precision("medium"),
    "the new setting": lambda: setattr(products, "fp32_precision", "tf32"),
    "the new setting for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def precisions():
    found = [products.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for read in (lambda: products.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")  # as torch does after some uses of both interfaces
    return found


def check(name):
    SETTINGS[name]()
    before = precisions()
    with default_torch_state():
        inside = precisions()
        with _fast_products(SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)):
            assert products.fp32_precision == "tf32"
        assert precisions() == inside
    assert inside[:2] == ["ieee", "ieee"], inside
    assert "raises" in before or inside[2:] == [False, "highest"], (name, before, inside)
    assert precisions() == before, (name, before, precisions())


for name in SETTINGS:
    if not (child := os.fork()):  # each in a process that has touched none
        check(name)
        print(name, "is well", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="starts processes by forking")
def test_float32_products_are_exact_inside_and_as_they_were_after_by_either_interface():
    """torch has two, and asks of one raise after some uses of the other."""
    ran = subprocess.run([sys.executable, "-c", INTERFACES], capture_output=True, text=True)
    assert ran.stdout.count("is well") == 5, ran.stderr[-2000:]
