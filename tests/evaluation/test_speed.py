# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from optq.evaluation import generation_speed


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_every_token_of_every_run_is_timed(model):
    speed = generation_speed(model, torch.tensor([[5, 6, 7]]), batch=4, new=6, runs=2)
    assert (speed.batch, speed.prompt, speed.new) == (4, 3, 6)
    middle, slow, slowest = speed.step_seconds
    assert 0 < middle <= slow <= slowest
    assert speed.prompt_tokens_per_second == pytest.approx(4 * 3 / speed.first_seconds)


def test_reading_and_writing_are_told_apart(model, monkeypatch):
    """A forward that sleeps for every token it reads slows the prompt down, not the tokens after it."""
    forward = type(model).forward

    def sleepy(self, input_ids, **kwargs):
        time.sleep(0.01 * input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", sleepy)
    speed = generation_speed(model, torch.full((1, 20), 9), new=3, runs=1)
    assert speed.first_seconds > 0.2
    assert 0.01 < speed.step_seconds[0] < 0.1
