# SPDX-License-Identifier: Apache-2.0
"""A few executions of every target of fuzzing.py, and all that `benchmarks/fuzz.py` ever found."""

import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
try:
    import fuzzing
    import trial
finally:
    sys.path.pop(0)

from conftest import save_tiny_llama, save_tiny_tokenizer
from optq import GPTQConfig

EXECUTIONS = {
    **{"safetensors headers": 300, "GPTQConfig.from_dict": 2000, "dynamic": 2000, "activation_memory": 2000},
    **{"calibration rows": 500, "Parquet": 300, "GGUF": 100, "AWQ": 100, "compressed-tensors": 100},
}
FOUND = [
    ("Parquet", "621ca474d2d869"),
    ("Parquet", "4f99d34fc2c0"),
    ("GGUF", "211eb513b207"),
    ("calibration rows", "a5573efef318390af84a8803d01c35ec6b2699a4"),
    ("calibration rows", "900f2a83b6141e5a6ab392c79c67f453761e"),
    *(("AWQ", data) for data in ("20c109b97f201fcaf497a3fecb72b71c228080a4358526e8", "43232789492997832e")),
    *(
        ("compressed-tensors", data)
        for data in (
            "2f75c043fbc36709d315f2245746d8588c3ac1e62757ae5851a5194d48099473d0f3c5fe4fafc05263d8b1f31d93938e",
            "20c109b97f201fcaf497a3fecb72b71c228080a4358526e8f4114f84692aba1f780141",
            "49dab71a7616cccf625a33e62ed03dbc2ffa68808acb8d475e06adf59e0fa9a635ab5287dc41a942725c4ee5dbf6649fddb2",
            "110a9183e7491dc3c7d0e284bd5a648620517776f525771b",
            "4db11a738cf1c001a40a6a20fe1cbac2dc41cd532f51a4c735c6890f129db5bc2ad2821d91",
            "2f74a770b0b799403ce69ee9ef64665cead74fa6",
            "073cbb2668d98523d8760a3c6b",
        )
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzing")
    dense, scratch = save_tiny_llama(folder / "dense", num_hidden_layers=1), folder / "scratch"
    rows = [{"input_ids": list(range(4, 52))}] * 16
    trial.make_good(dense, folder / "packed", GPTQConfig(bits=4, group_size=32), rows)
    scratch.mkdir()
    return fuzzing.targets(scratch, dense, folder / "packed", save_tiny_tokenizer(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTIONS)
def test_nothing_but_errors_of_optq_comes_of_changed_bytes(targets, name):
    for data in islice(fuzzing.inputs(seed=0), EXECUTIONS[name]):
        targets[name](data)


def test_without_a_change_everything_is_read(targets, monkeypatch):
    """Negative control: what is changed is valid, so errors are those of the changes."""

    def strict(run, named=""):
        run()

    monkeypatch.setattr(fuzzing, "accepted", strict)
    for name in (
        "safetensors headers",
        "GPTQConfig.from_dict",
        "calibration rows",
        "GGUF",
        "AWQ",
        "compressed-tensors",
    ):
        targets[name](b"\1" if name == "safetensors headers" else b"")


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_stays_found(targets, name, data):
    targets[name](bytes.fromhex(data))


def test_an_error_that_names_no_file_is_a_crash():
    def run():
        raise fuzzing.OptqError("something is wrong")

    with pytest.raises(fuzzing.Unnamed):
        fuzzing.accepted(run, "model.safetensors")
