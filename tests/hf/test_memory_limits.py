# SPDX-License-Identifier: Apache-2.0
"""Runs with little memory end with the same checkpoint; those without enough say so."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.errors import ConfigError
from optq.quantization.activations import ActivationStore
from optq.quantization.runner import BlockRunner


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def remedies(folder):
    log = [json.loads(line) for line in (folder / "quantization_log.jsonl").read_text().splitlines()]
    return [event["remedy"] for event in log if event["event"] == "out_of_memory"]


def config(rows, **settings):
    return GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": rows, **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"effort": "fast"}, {"effort": "max", "bits": 3}, {"target_bits_per_weight": 4.5}]
)
def test_activations_on_the_disk_change_nothing(tiny_llama, token_rows, tmp_path, monkeypatch, settings):
    expected = weights(optq.quantize(tiny_llama, config(token_rows, **settings), output_dir=tmp_path / "whole"))
    sent, send = [], ActivationStore._send_away
    monkeypatch.setattr(ActivationStore, "_send_away", lambda self, x: (sent.append(x.nbytes), send(self, x)))
    limited = config(token_rows, activation_memory={"cpu": 0}, **settings)
    assert weights(optq.quantize(tiny_llama, limited, output_dir=tmp_path / "limited")) == expected
    assert sum(sent) >= 15 * 48 * 64 * 4  # all hidden states of one block at least
    assert not list((tmp_path / "limited").glob("activations*"))


def test_copying_ahead_changes_nothing(tiny_llama, token_rows, tmp_path, monkeypatch, side_stream):
    settings = {"batch_size": 2}
    expected = weights(optq.quantize(tiny_llama, config(token_rows, **settings), output_dir=tmp_path / "whole"))
    assert not side_stream.events
    monkeypatch.setattr(GPTQConfig, "activation_limits", lambda *_: (0, math.inf))
    assert (
        weights(optq.quantize(tiny_llama, config(token_rows, **settings), output_dir=tmp_path / "ahead")) == expected
    )
    begun, used = (sum(kind == name for kind, _ in side_stream.events) for name in ("begin", "finish"))
    assert begun == used  # nothing for nothing
    assert used >= 2 * 7 * 4 * 2  # micro-batches but the first, of both streams, at every stage of both blocks


class Memory:
    """Blocks that run out of memory as a small device would.

    Args:
        samples: that a block can run at once.
        waiting: forwards that can wait inside a block.
        stored: bytes that can wait on the device between blocks.
    """

    def __init__(self, monkeypatch, samples=99, waiting=99, stored=10**9):
        run = BlockRunner.run

        def limited(runner, *arguments):
            forward = runner.forward

            def small(*args, **kwargs):
                states = next(iter((*args, *kwargs.values())))
                held = runner.store.here
                if states.shape[0] > samples or len(runner.paused or ()) > waiting or held > stored:
                    raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")
                return forward(*args, **kwargs)

            runner.forward = small
            try:
                return run(runner, *arguments)
            finally:
                runner.forward = forward

        monkeypatch.setattr(BlockRunner, "run", limited)


def test_micro_batches_are_halved(tiny_llama, token_rows, tmp_path, monkeypatch):
    expected = tensors(optq.quantize(tiny_llama, config(token_rows, batch_size=8), output_dir=tmp_path / "whole"))
    Memory(monkeypatch, samples=2)
    found = optq.quantize(tiny_llama, config(token_rows, batch_size=8), output_dir=tmp_path / "out")
    assert remedies(found) == [
        "what waits between blocks waits elsewhere",
        "micro-batches run in 2 parts",
        "micro-batches run in 4 parts",
    ]
    same = [torch.equal(tensor, expected[name]) for name, tensor in tensors(found).items() if "layers.0" in name]
    assert sum(same) >= len(same) - 2  # a code or two may flip: sums of float32 in another order


def test_polishing_goes_on_in_parts_towards_the_same_loss(tiny_llama, token_rows, tmp_path, monkeypatch):
    """And its gradients are those of whole micro-batches, padding included."""
    ragged = [{"input_ids": row["input_ids"][: 48 - 2 * number]} for number, row in enumerate(token_rows)]
    settings = {"batch_size": 4, "effort": "max", "bits": 3}
    whole = optq.quantize(tiny_llama, config(ragged, **settings), output_dir=tmp_path / "whole")
    Memory(monkeypatch, samples=2)
    found = optq.quantize(tiny_llama, config(ragged, **settings), output_dir=tmp_path / "out")
    assert "micro-batches run in 2 parts" in remedies(found)
    before, after = (
        [
            json.loads(line)["held_out_loss"]
            for line in (folder / "quantization_log.jsonl").read_text().splitlines()
            if '"block_reconstructed"' in line
        ]
        for folder in (whole, found)
    )
    assert after == pytest.approx(before, rel=0.15)  # a few codes differ, and what follows from them


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_forwards_that_find_no_room_inside_a_block_are_run_anew(tiny_llama, token_rows, tmp_path, monkeypatch, effort):
    settings = {"batch_size": 2, "effort": effort}
    expected = weights(optq.quantize(tiny_llama, config(token_rows, **settings), output_dir=tmp_path / "whole"))
    Memory(monkeypatch, waiting=4)
    found = optq.quantize(tiny_llama, config(token_rows, **settings), output_dir=tmp_path / "out")
    assert weights(found) == expected


def test_what_waits_goes_elsewhere_when_memory_runs_out(tiny_llama, token_rows, tmp_path, monkeypatch):
    expected = weights(optq.quantize(tiny_llama, config(token_rows), output_dir=tmp_path / "whole"))
    Memory(monkeypatch, stored=250_000)  # one stream of the data
    found = optq.quantize(tiny_llama, config(token_rows), output_dir=tmp_path / "out")
    assert remedies(found) == ["what waits between blocks waits elsewhere"]
    assert weights(found) == expected


def test_padding_stays_out_of_the_halves(tiny_llama, token_rows, tmp_path, monkeypatch):
    ragged = [{"input_ids": row["input_ids"][: 48 - 3 * number]} for number, row in enumerate(token_rows)]
    whole = optq.quantize(tiny_llama, config(ragged, batch_size=4), output_dir=tmp_path / "whole")
    Memory(monkeypatch, samples=1)
    found = optq.quantize(tiny_llama, config(ragged, batch_size=4), output_dir=tmp_path / "out")
    losses = [
        [json.loads(line) for line in (folder / "quantization_log.jsonl").read_text().splitlines()]
        for folder in (whole, found)
    ]
    for one, other in zip(*([event for event in log if event["event"] == "linear"] for log in losses), strict=True):
        assert other["tokens"] == one["tokens"]
        assert other["relative_loss"] == pytest.approx(one["relative_loss"], rel=0.1)


def test_no_memory_for_a_single_sample_is_an_error_that_says_what_to_do(tiny_llama, token_rows, monkeypatch):
    Memory(monkeypatch, samples=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"layers\.0: no micro-batch is smaller.*smaller model_seqlen"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config(token_rows))


@pytest.mark.parametrize("wrong", [{"cpu": "much"}, {0: "1GiB", 1: "1GiB"}, {"cpu": -1}, "8GiB"])
def test_limits_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"activation_memory=.* was asked for; it is a dict"):
        GPTQConfig(bits=4, activation_memory=wrong)


def test_the_plan_says_what_waits_elsewhere(tiny_llama, token_rows):
    found = optq.plan(tiny_llama, config(token_rows, activation_memory={"cpu": 1000}))
    assert found.memory_gib["activations"] == 1000 / 2**30
    assert found.elsewhere_gib == (2 * 15 * 48 * 64 * 4 - 1000) / 2**30
    assert "activations that wait elsewhere" in str(found)
