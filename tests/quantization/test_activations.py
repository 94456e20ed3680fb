# SPDX-License-Identifier: Apache-2.0
import gc
import weakref

import psutil
import pytest
import torch
from torch import nn

from optq.device.memory import release_free_memory
from optq.quantization.activations import ActivationStore

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


def numbered(count):
    return [torch.full((2, 3), float(number)) for number in range(count)]


def test_what_comes_next_is_copied_while_the_present_item_is_worked_on(side_stream):
    store = ActivationStore(CPU, on_device=0)
    states = store.take(numbered(4))
    for number, item in enumerate(store.in_turn(states, lambda item: [item])):
        side_stream.events.append(("work", float(number)))
        assert torch.equal(store.fetched(item), torch.full((2, 3), float(number)))
        assert torch.equal(store.fetched(item), item)  # once more: from where it waits
    assert side_stream.events == [
        *[("begin", 1.0), ("work", 0.0)],
        *[("begin", 2.0), ("work", 1.0), ("finish", 1.0)],
        *[("begin", 3.0), ("work", 2.0), ("finish", 2.0)],
        *[("work", 3.0), ("finish", 3.0)],
    ]


def test_a_copy_that_is_not_used_in_its_turn_is_dropped(side_stream):
    store = ActivationStore(CPU, on_device=0)
    states = store.take(numbered(3))
    for number, item in enumerate(store.in_turn(states, lambda item: [item])):
        if number == 2:
            for each in (item, states[1]):  # the latter was due before
                assert torch.equal(store.fetched(each), each)
    assert [event for event in side_stream.events if event[0] == "finish"] == [("finish", 2.0)]


def test_nothing_is_held_after_memory_ran_out_or_the_turn_was_left(side_stream):
    store = ActivationStore(CPU, on_device=0)
    states = store.take(numbered(4))
    turn = store.in_turn(states, lambda item: [item])
    next(turn)
    assert store._coming
    store.forget_ahead()
    assert not store._coming
    next(turn)
    assert torch.equal(store.fetched(states[1]), states[1])
    turn.close()
    assert not store._ahead
    assert not store._coming
    assert ("finish", 1.0) not in side_stream.events


def test_only_what_waits_in_memory_is_copied_ahead(side_stream, tmp_path):
    store = ActivationStore(CPU, on_device=24, in_memory=24, folder=tmp_path)
    states = store.take(numbered(3))  # one on the device, one in memory, one on the disk
    assert (store.here, store.away) == (24, {"memory": 24, "disk": 24})
    assert [torch.equal(store.fetched(item), item) for item in store.in_turn(states, lambda item: [item])] == [
        True
    ] * 3
    assert side_stream.events == [("begin", 1.0), ("finish", 1.0)]


def test_items_are_taken_one_ahead():
    taken = []
    turn = ActivationStore().in_turn((taken.append(number) or number for number in range(3)), lambda item: [])
    assert (next(turn), taken) == (0, [0, 1])
    assert list(turn) == [1, 2]


def test_sums_are_those_of_what_is_alive(states, tmp_path):
    store = ActivationStore(CPU, on_device=3 * SIZE, folder=tmp_path)
    kept = store.take(states)
    store.take(kept)  # nothing counts twice
    assert (store.here, store.away["disk"]) == (3 * SIZE, 2 * SIZE)
    del kept, states[4], states[0]
    assert (store.here, store.away["disk"]) == (2 * SIZE, SIZE)
    assert store.spill()
    assert (store.here, store.away["disk"]) == (0, 3 * SIZE)
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None  # whatever waits
