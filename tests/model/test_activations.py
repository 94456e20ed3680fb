# SPDX-License-Identifier: Apache-2.0
import gc

import psutil
import pytest
import torch
from torch import nn

from optq.memory import release_free_memory
from optq.model import ActivationStore

CPU = torch.device("cpu")
SIZE = 4 * 100 * 1000 * 4  # bytes of one


@pytest.fixture
def states():
    return [torch.randn(4, 100, 1000, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def test_what_finds_no_room_waits_on_the_disk_and_comes_back_unchanged(states, tmp_path):
    store = ActivationStore(CPU, on_device=2 * SIZE, folder=tmp_path)
    expected = [tensor.clone() for tensor in states]
    store.take((states, {"mask": torch.ones(1, 100)}))
    assert store.away == {"memory": 0, "disk": 3 * SIZE}
    for tensor, values in zip(states, expected, strict=True):
        assert tensor.shape == values.shape
        assert torch.equal(store.fetched(tensor), values)
        with store.at_hand([tensor]):
            assert torch.equal(tensor, values)
        assert torch.equal(tensor, values)
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_room_is_free_again_when_a_tensor_is_gone(states, tmp_path):
    store = ActivationStore(CPU, on_device=2 * SIZE, folder=tmp_path)
    store.take(states)
    states.clear()
    gc.collect()
    assert store.away == {"memory": 0, "disk": 0}
    store.take([torch.ones(400, 1000) for _ in range(2)])
    assert store.away["disk"] == 0


def test_what_is_on_the_disk_is_no_memory_of_the_process(tmp_path):
    store = ActivationStore(CPU, on_device=0, folder=tmp_path)
    before = psutil.Process().memory_info().rss
    kept = [store.take(torch.ones(5_000_000)) for _ in range(20)]
    assert store.away["disk"] == 20 * 20_000_000
    release_free_memory()  # of the tensors that were there before
    assert psutil.Process().memory_info().rss - before < 100_000_000
    assert all(bool((tensor == 1).all()) for tensor in map(store.fetched, kept))


def test_dtypes_are_as_the_block_wants_them():
    store = ActivationStore(CPU, torch.float32)
    states, position = store.take((torch.ones(2, 3, dtype=torch.bfloat16), torch.arange(3)))
    assert states.dtype == torch.float32
    assert position.dtype == torch.int64


def test_small_tensors_and_those_of_the_model_stay(states, tmp_path):
    store = ActivationStore(CPU, on_device=0, folder=tmp_path)
    model = nn.Linear(1000, 1000)
    store.leave_alone(model)
    states, small = torch.ones(10), torch.ones(5)
    store.take((states, small, model.weight))
    assert store.away["disk"] == 40


def test_without_another_place_everything_stays(states):
    store = ActivationStore(CPU, on_device=0)
    store.take(states)
    assert store.away == {"memory": 0, "disk": 0}
    assert not store.spill()


def test_spilling_sends_all_away(states, tmp_path):
    store = ActivationStore(CPU, folder=tmp_path)
    store.take(states)
    assert store.spill()
    assert store.away["disk"] == 5 * SIZE
    assert not store.spill()
    later = torch.ones(4)
    store.take(later)
    assert store.away["disk"] == 5 * SIZE + later.nbytes
