# SPDX-License-Identifier: Apache-2.0
"""Threads, forks and cycles: benchmarks/soak.py and threads.py in short, and many callers of one model."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "benchmarks"), str(Path(__file__).parent / "layers")]
try:
    from test_linear import in_threads

    import soak
    import threads
finally:
    del sys.path[:2]

IDS = torch.arange(4, 12)[None]


@pytest.fixture
def loaded(saved):
    """A model that nobody has called yet."""
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.long
def test_cycles_leave_no_descriptor_thread_or_tensor(tmp_path):
    soak.save_model(tmp_path)
    found = soak.run(tmp_path, 4)
    for what in ("descriptors", "threads", "python_threads", "tensors"):
        assert len({each[what] for each in found[1:]}) == 1, (what, found)


def test_a_leak_is_seen(tmp_path):
    """Negative control: of what is counted above."""
    before, leaked = soak.kept(), (torch.ones(1), (tmp_path / "file").open("w"))
    after = soak.kept()
    leaked[1].close()
    assert (after["tensors"] - before["tensors"], after["descriptors"] - before["descriptors"]) == (1, 1)
    assert soak.slope([1.0, 3.0, 5.0]) == pytest.approx(2)


def test_eight_threads_that_call_a_model_first_get_what_one_would(loaded):
    inputs = [IDS + start for start in range(8)]
    expected = [logits_of(copy.deepcopy(loaded), ids) for ids in inputs]
    found = in_threads([lambda ids=ids: logits_of(loaded, ids) for ids in inputs], times=3)
    for outputs, output in zip(found, expected, strict=True):
        for each in outputs:
            torch.testing.assert_close(each, output, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_threads_generate_what_one_does(loaded):
    expected = [threads.generated(copy.deepcopy(loaded), ids) for ids in threads.prompts()]
    found = threads.run(loaded, expected, 6, lambda done: done >= 2)
    assert found == {"generations": 12, "differences": 0, "errors": 0}
    others = [[], *expected[1:]]  # negative control
    assert threads.run(loaded, others, 1, lambda done: done >= 2)["differences"] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("called", [False, True], ids=["not called yet", "called before"])
def test_forked_workers_compute_what_their_parent_does(loaded, called):
    expected = logits_of(loaded if called else copy.deepcopy(loaded))
    workers = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = 0 if torch.allclose(logits_of(loaded), expected, rtol=1e-5, atol=1e-5) else 2
            finally:
                os._exit(code)
        workers.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in workers] == [0, 0]
