# SPDX-License-Identifier: Apache-2.0
"""Whole models on a "cuda" device that is not there: docs/testing.md says what that proves, and what not."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for GPUs and has their hooks"),
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("g++"), reason="no g++ to build the fake device with"
    ),
]

ROUNDED = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 0.02}
"""Relative difference of logits: both sides have the same weights, and round sums elsewhere."""

WAITS_PER_LINEAR, WAITS_PER_BLOCK = 30, 26  # of a block, three are of each stage's round of refinement
"""How often quantizing may wait for the device: for each linear, and besides."""

REMEDIES = (
    "every stage of a block takes a forward of its own",
    "what waits between blocks waits elsewhere",
    "micro-batches run in 2 parts",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake_accelerator")
    built = subprocess.run(
        [sys.executable, HERE / "accelerator.py", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if built.returncode and "pybind11" in built.stdout:
        pytest.skip("this build of torch has no headers to build the fake device with")
    assert built.returncode == 0, built.stdout
    return folder / "fake_cuda.so"


@pytest.fixture(scope="module")
def travel(library, tmp_path_factory):
    """Send tiny models on their way, all in one process: what each of them saw."""

    def on(*journeys):
        return arrived(start(library, tmp_path_factory.mktemp("journey"), journeys), len(journeys))

    return on


def start(library, folder, journeys, **environment):
    return subprocess.Popen(
        [sys.executable, HERE / "journey.py", library, folder, json.dumps(journeys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


def arrived(process, count):
    printed, said = process.communicate()
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(found) == count, said[-3000:]
    return found


@pytest.fixture(scope="module")
def together(library, tmp_path_factory):
    """What each of two processes with a device of its own saw of a model that they quantized together."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        start(
            library,
            tmp_path_factory.mktemp(f"rank{rank}"),
            [{"model": "small llama", "present": rank, "used": False}],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            **meeting,
        )
        for rank in range(2)
    ]
    return [arrived(process, 1)[0] for process in processes]


@pytest.mark.long
def test_two_processes_with_a_device_each_make_one_model(together):
    for found in together:
        assert "raised" not in found
        assert found["mismatches"] == []
        assert found["kept_bytes"] == 0
        assert found["linears"] == 7
        assert found["peak"] > 0  # on its own device
    assert together[0]["digest_in_memory"] == together[1]["digest_in_memory"]
    assert [("digest" in found) for found in together] == [True, False]  # the first one writes


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The digest of the tensors that the same call makes on a CPU."""
    sys.path.insert(0, str(HERE))
    try:
        import models
    finally:
        sys.path.remove(str(HERE))

    def digest(model, effort):
        folder = tmp_path_factory.mktemp("on_cpu")
        dense = models.create(model, folder / "dense", torch.float32)
        models.quantized(model, dense, effort, dtype=torch.float32).save_pretrained(folder / "packed")
        return models.digest(folder / "packed")

    return digest


JOURNEYS = {
    "llama, fast": {},
    "llama, default": {"effort": "default"},
    "llama, max, bfloat16": {"effort": "max", "dtype": "bfloat16"},
    "mixture": {"model": "mixture"},
    "mixture, default, bfloat16": {"model": "mixture", "effort": "default", "dtype": "bfloat16"},
    "encoder-decoder": {"model": "encoder-decoder"},
    "vision": {"model": "vision"},
    "desc_act, 3 bits, asymmetric": {"config": {"desc_act": True, "bits": 3, "sym": False}},
    "8 bits, one group per row": {"config": {"bits": 8, "group_size": -1}},
    "pinned memory": {"config": {"activation_memory": {"0": 0}}, "used": False},
    "disk": {"config": {"activation_memory": {"0": 0, "cpu": 0}}, "used": False},
    "second device": {"present": 1},
    "over two devices": {"device_map": "auto"},
}


USED = [name for name, journey in JOURNEYS.items() if journey.get("used", True)]
"""The others end with the bytes of "llama, fast", as a test below says."""


LITTLE_MEMORY = [
    {"effort": "default", "config": {"batch_size": 8}, "used": False, "limit": limit}
    for limit in (0, 0.89, 0.8, 0.74, 0.68, 0.3)
]

FAULTS = {
    "copies_are_not_waited_for": {"config": {"activation_memory": {"0": 0}}},
    "an_event_is_recorded_too_early": {"config": {"activation_memory": {"0": 0}}},
    "memory_is_given_away_while_it_is_read": {"config": {"activation_memory": {"0": 0}}},
    "costs_stay_on_the_host": {},
    "a_layer_looks_at_its_values": {},
    "the_first_device_is_taken_for_the_present_one": {"present": 1},
    "a_block_is_remembered": {},
    "fresh_memory_is_taken_for_zeros": {},
}


@pytest.fixture(scope="module")
def all_seen(travel):
    """Of all journeys, in one process; after those with a fault, one without."""
    faulty = [{**journey, "fault": fault} for fault, journey in FAULTS.items()]
    return travel(*JOURNEYS.values(), *LITTLE_MEMORY, *faulty, {})


@pytest.fixture(scope="module")
def seen(all_seen):
    return dict(zip(JOURNEYS, all_seen, strict=False))


@pytest.mark.parametrize("name", JOURNEYS)
class TestEveryQuantization:
    def test_nothing_raises_and_no_operator_mixes_devices(self, name, seen):
        assert "raised" not in seen[name]
        assert seen[name]["mismatches"] == []

    def test_it_is_quantized_on_the_device(self, name, seen):
        assert seen[name]["started_on"].startswith("cuda")
        assert seen[name]["linears"] > 0

    def test_no_memory_of_the_device_is_kept(self, name, seen):
        assert seen[name]["kept_bytes"] == 0

    def test_quantizing_waits_for_the_device_so_often_and_no_more(self, name, seen):
        found = seen[name]
        waits = sum(times for what, times in found["waits_while_quantizing"].items() if "pinned" not in what)
        blocks = found["events"]["BlockQuantized"]
        assert waits <= WAITS_PER_LINEAR * found["linears"] + WAITS_PER_BLOCK * blocks + 30, found[
            "waits_while_quantizing"
        ]


@pytest.mark.parametrize("name", USED)
class TestEveryUse:
    def test_logits_are_those_of_the_cpu(self, name, seen):
        found, largest = seen[name], ROUNDED[JOURNEYS[name].get("dtype", "float32")]
        assert found["logits_on"] == f"cuda:{JOURNEYS[name].get('present', 0)}"
        for error in ("error", "error_on_cpu", "error_dequantized", "error_in_a_server"):
            assert found[error] <= largest  # and so no NaN

    def test_what_is_saved_from_the_device_is_what_was_loaded(self, name, seen):
        assert seen[name]["digest_again"] == seen[name]["digest"]

    def test_it_moves_there_and_back(self, name, seen):
        assert seen[name]["same_after_moves"]
        device = f"cuda:{JOURNEYS[name].get('present', 0)}"
        assert seen[name]["gradient_on"] == device
        assert seen[name]["dense_on"] == [device]


@pytest.mark.parametrize(
    "name", ["llama, fast", "llama, default", "llama, max, bfloat16", "desc_act, 3 bits, asymmetric"]
)
def test_a_decode_step_never_waits(name, seen):
    assert seen[name]["waits_per_step"] == {}
    mine, exact = seen[name]["tokens"]
    if "bfloat16" not in name:
        assert mine == exact


@pytest.mark.parametrize(
    ("name", "model", "effort"),
    [("llama, fast", "llama", "fast"), ("llama, default", "llama", "default"), ("mixture", "mixture", "fast")],
)
def test_the_bytes_are_those_that_a_cpu_makes(name, model, effort, seen, on_cpu):
    assert seen[name]["digest"] == on_cpu(model, effort)


@pytest.mark.parametrize("name", ["pinned memory", "disk", "second device", "over two devices"])
def test_where_things_are_changes_no_byte(name, seen):
    assert seen[name]["digest"] == seen["llama, fast"]["digest"]


def test_copies_ahead_are_begun_waited_for_and_their_memory_kept(seen):
    counts = seen["pinned memory"]["counts"]
    assert counts["copy begun on a stream"] == counts["wait_event"] == counts["record_stream"] > 0


def test_a_device_map_spreads_the_model(seen):
    assert seen["over two devices"]["homes"] == ["cuda:0", "cuda:1"]


@pytest.fixture(scope="module")
def interpreted(travel):
    pytest.importorskip("triton")
    (found,) = travel({"model": "small llama", "used_in": "float16", "interpreted": True})
    return found


class TestTritonsProgramsOnTheDevice:
    """In the interpreter, from quantizing with the fused loops over columns to generating with the fused product."""

    def test_they_run_and_nothing_takes_their_place(self, interpreted):
        assert "raised" not in interpreted
        assert interpreted["fused_columns_not_run"] is None
        assert interpreted["kernels"] == ["triton"]

    def test_the_fused_loops_write_the_bytes_of_single_operations_on_a_cpu(self, interpreted, on_cpu):
        assert interpreted["digest"] == on_cpu("small llama", "fast")

    def test_the_fused_product_gives_the_logits_and_tokens_of_a_cpu(self, interpreted):
        for error in ("error", "error_on_cpu", "error_dequantized", "error_in_a_server"):
            assert interpreted[error] <= ROUNDED["float16"]
        mine, exact = interpreted["tokens"]
        assert mine == exact

    def test_nothing_is_mixed_waited_for_or_kept(self, interpreted):
        assert interpreted["mismatches"] == []
        assert interpreted["waits_per_step"] == {}
        assert interpreted["kept_bytes"] == 0
        assert interpreted["gradient_on"] == "cuda:0"


@pytest.fixture(scope="module")
def limited(all_seen):
    return all_seen[len(JOURNEYS) :][: len(LITTLE_MEMORY)]


class TestLittleMemory:
    def test_every_remedy_is_reached(self, limited):
        reached = {remedy for found in limited for remedy in found.get("remedies", ())}
        assert set(REMEDIES) <= reached

    def test_none_changes_a_byte(self, limited):
        assert len({found["digest"] for found in limited if "raised" not in found}) == 1

    def test_with_less_it_says_what_to_do(self, limited):
        failed = [found["raised"] for found in limited if "raised" in found]
        assert failed
        assert all("no micro-batch is smaller than one sample" in said for said in failed)


@pytest.fixture(scope="module")
def faulty(all_seen):
    """What a model saw with each fault; after them all, one without."""
    return dict(zip([*FAULTS, None], all_seen[-len(FAULTS) - 1 :], strict=True))


def _is_noticed(found, right):
    """Whether one of the claims above would fail."""
    if "raised" in found or found["mismatches"] or found["kept_bytes"] or found["digest"] != right["digest"]:
        return True
    counts = found["counts"]
    pairs = [counts.get(name, 0) for name in ("copy begun on a stream", "wait_event", "record_stream")]
    return bool(found["waits_per_step"]) or len(set(pairs)) > 1 or not math.isfinite(found["error"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, faulty, seen):
    assert _is_noticed(faulty[fault], seen["llama, fast"])


def test_without_a_fault_nothing_is_noticed(faulty, seen):
    assert not _is_noticed(faulty[None], seen["llama, fast"])
