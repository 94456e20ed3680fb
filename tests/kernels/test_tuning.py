# SPDX-License-Identifier: Apache-2.0
"""Tuning without a GPU: times are invented, everything else is real; programs run in Triton's interpreter."""

import json
import logging
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch
from test_kernels import IN, packed_weight
from transformers import AutoModelForCausalLM

from optq.errors import OutputError
from optq.kernels import tilings, triton_gpu, tune, tuning
from optq.kernels.tilings import TILINGS, Problem, problem_of

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="times are invented here")

OUT = 96


class Layer(torch.nn.Module):
    def __init__(self, kernel="triton"):
        super().__init__()
        self.weight = triton_gpu.prepare(packed_weight(4, 64, True, out=OUT))
        self.kernel = kernel

    def products(self):
        return [(self.kernel, self.weight, torch.float16)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTQ_CACHE", str(tmp_path))
    monkeypatch.setattr(tilings, "tuned", lambda device: tilings.remembered(device))
    monkeypatch.setattr(tilings.tuned, "cache_clear", lambda: None, raising=False)
    return tmp_path / "optq" / "tilings.json"


@pytest.fixture
def only_few_rows(monkeypatch):
    """The interpreter is slow."""
    monkeypatch.setattr(tilings, "untuned", lambda device: (replace(TILINGS[0], most_rows=3),))


FASTEST = {"rows": 8, "outputs": 32, "warps": 2, "stages": 3, "programs_per_processor": 8}


def is_fastest(tiling):
    return all(getattr(tiling, name) == value for name, value in FASTEST.items())


def seconds(x, layers, tiling):
    if tiling.warps == 4:
        raise OutOfResources(2**20, 2**17, "shared memory")  # no RuntimeError
    return 1.0 if is_fastest(tiling) else 2.0


@pytest.mark.usefixtures("only_few_rows")
def test_the_fastest_tiling_is_remembered_and_used(cache, monkeypatch):
    monkeypatch.setattr(tuning, "_seconds", seconds)
    layer, x = Layer(), torch.randn(3, IN).half()
    expected = triton_gpu.matmul(x, layer.weight)
    words = problem_of(layer.weight, torch.float16).words
    assert tune(torch.nn.Sequential(layer, Layer("reference"))) == {words: {"up to 3 rows": 0.5}}
    assert cache.exists()
    assert list(cache.parent.iterdir()) == [cache]
    used = []
    launch = triton_gpu._launch
    monkeypatch.setattr(triton_gpu, "_launch", lambda *given: used.append(given[2]) or launch(*given))
    torch.testing.assert_close(triton_gpu.matmul(x, layer.weight), expected, rtol=1e-2, atol=1e-2)
    assert [is_fastest(tiling) for tiling in used] == [True]
    assert tune(layer) == {words: {"up to 3 rows": 1.0}}  # of what is remembered


@pytest.mark.usefixtures("only_few_rows", "cache")
def test_a_tiling_with_another_result_or_hardly_any_gain_is_not_taken(monkeypatch):
    monkeypatch.setattr(tuning, "_seconds", seconds)
    product = triton_gpu.product
    monkeypatch.setattr(
        triton_gpu, "product", lambda x, weight, tiling: product(x, weight, tiling) * (1 + is_fastest(tiling))
    )
    assert list(tune(Layer()).values()) == [{"up to 3 rows": 1.0}]
    monkeypatch.setattr(triton_gpu, "product", product)
    monkeypatch.setattr(tuning, "_seconds", lambda x, layers, tiling: 0.98 if is_fastest(tiling) else 1.0)
    assert list(tune(Layer()).values()) == [{"up to 3 rows": 1.0}]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("dense_from", "most"), [(300, 256), (96, 64), (10_000, 1024)])
def test_the_rows_from_which_dequantizing_is_faster_are_measured_and_used(dense_from, most, monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda default: [default])
    monkeypatch.setattr(
        tuning, "_seconds", lambda x, layers, tiling: 1.0 if tiling is None else 0.5 + 0.5 * (len(x) >= dense_from) * 2
    )
    layer = Layer()
    tune(layer)
    known = tilings.remembered(torch.device("cpu"))[problem_of(layer.weight, torch.float16)]
    assert known[-1].most_rows == most
    dense, product_of_dense = [], triton_gpu.product_of_dense
    monkeypatch.setattr(triton_gpu, "product_of_dense", lambda x, _: dense.append(len(x)) or product_of_dense(x, _))
    for rows in (65, most, most + 1):
        if rows < 300:  # the interpreter is slow
            triton_gpu.matmul(torch.randn(rows, IN).half(), layer.weight)
    assert dense == [rows for rows in (65, most, most + 1) if most < rows < 300]


def test_a_model_without_the_kernel_is_told_so(cache, caplog):
    with caplog.at_level(logging.WARNING, logger="optq"):
        assert tune(Layer("reference")) == {}
    assert "nothing to tune" in caplog.text
    assert not cache.exists()


@pytest.mark.usefixtures("cache")
def test_a_file_that_is_damaged_or_of_another_version_is_left_out_and_that_is_said(cache, caplog):
    here = torch.device("cpu")
    cache.parent.mkdir()
    cache.write_text("{")
    with caplog.at_level(logging.WARNING, logger="optq"):
        assert tilings.remembered(here) == {}
    assert "cannot be read" in caplog.text
    problem = Problem(bits=3, group_width=32, columns=64, outputs=96, dtype=torch.bfloat16)
    cache.unlink()
    tilings.remember(here, problem, TILINGS)
    assert tilings.remembered(here) == {problem: TILINGS}
    cache.write_text(cache.read_text().replace('"warps"', '"wraps"'))
    assert tilings.remembered(here) == {}
    assert "is not understood" in caplog.text
    with pytest.raises(ValueError, match="does not name"):
        Problem.of("4 bits and more")


HERE, WORDS = "cpu, triton {version}", "3 bits, groups of 32, 64 x 96, bfloat16"
HOSTILE = [[], 3, None, {HERE: []}, {HERE: None}, {HERE: {WORDS: []}}, {HERE: {WORDS: None}}, {HERE: {WORDS: ["x"]}}]
HOSTILE += [
    {HERE: {WORDS: [asdict(TILINGS[0]) | wrong]}}
    for wrong in (
        {"rows": 0},
        {"rows": -8},  # no program would be started, and nothing computed
        {"rows": "8"},
        {"rows": 7},
        {"stages": 1},
        {"most_rows": "8"},
        {"parts": 3},
        {"programs_per_processor": float("nan")},
        {"registers": [1]},
    )
]


@pytest.mark.parametrize("content", [*map(json.dumps, HOSTILE), "[" * 100_000])
def test_nothing_in_the_file_is_taken_that_makes_no_program(content, cache, caplog):
    cache.parent.mkdir()
    cache.write_text(content.replace("{version}", version("triton")))
    with caplog.at_level(logging.WARNING, logger="optq"):
        assert tilings.remembered(torch.device("cpu")) == {}
    assert "is not understood" in caplog.text or "cannot be read" in caplog.text
    tilings.remember(torch.device("cpu"), Problem.of(WORDS), TILINGS)
    assert tilings.remembered(torch.device("cpu")) == {Problem.of(WORDS): TILINGS}


@pytest.mark.usefixtures("only_few_rows")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPTQ_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "_seconds", lambda *given: pytest.fail("it was measured"))
    with pytest.raises(OutputError, match="OPTQ_CACHE"):
        tune(Layer())


@pytest.mark.usefixtures("only_few_rows", "cache")
def test_layers_of_one_shape_on_two_gpus_are_not_timed_together(monkeypatch):
    """A launch on one would read the memory of the other."""
    timed = []
    monkeypatch.setattr(tilings, "kind_of", lambda device: "a GPU")
    monkeypatch.setattr(
        tuning, "_seconds", lambda x, layers, tiling: timed.extend(layer.codes.device for layer in layers) or 1.0
    )
    here, elsewhere = Layer(), Layer()
    elsewhere.weight = replace(elsewhere.weight, codes=elsewhere.weight.codes.to("meta"))
    tune(torch.nn.Sequential(here, elsewhere))
    assert set(timed) == {torch.device("cpu")}


@pytest.mark.parametrize("default", TILINGS, ids=lambda tiling: f"{tiling.most_rows} rows")
def test_every_candidate_computes_the_same(default):
    layer, x = Layer(), torch.randn(20, IN).half()
    expected = triton_gpu.product(x, layer.weight, default)
    shapes = {(tiling.rows, tiling.outputs): tiling for tiling in tuning.candidates(default)}
    assert len(shapes) >= 3
    for tiling in shapes.values():
        found = triton_gpu.product(x, layer.weight, tiling)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("asked", [None, "1"])
def test_loading_tunes_where_it_is_asked_to(saved, asked, cache, monkeypatch, caplog):
    if asked:
        monkeypatch.setenv("OPTQ_AUTOTUNE", asked)
    with caplog.at_level(logging.WARNING, logger="optq"):
        AutoModelForCausalLM.from_pretrained(saved)
    assert ("nothing to tune" in caplog.text) == bool(asked)
    assert not cache.exists()
