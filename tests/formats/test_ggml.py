# SPDX-License-Identifier: Apache-2.0
"""Against llama.cpp's own quantizer and reader in Python."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from optq.errors import CheckpointError
from optq.formats.gguf import GGML_SCHEMES, from_ggml


def stored(weight: np.ndarray, kind: str) -> np.ndarray:
    return quantize(weight.astype(np.float32), gguf.GGMLQuantizationType[kind])


@given(
    kind=st.sampled_from(["Q4_0", "Q8_0"]),
    rows=st.sampled_from([8, 24]),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_every_weight_is_what_llama_cpp_reads(kind, rows, blocks, seed):
    data = stored(np.random.default_rng(seed).normal(size=(rows, 32 * blocks)), kind)
    packed = from_ggml(torch.from_numpy(data), GGML_SCHEMES[kind])
    expected = dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.equal(packed.columns(0, rows).T, torch.from_numpy(expected))


def test_every_byte_of_q8_0_is_a_code():
    """Also -128, which the quantizer does not use."""
    data = np.zeros((8, 34 * 8), dtype=np.uint8).reshape(8, 8, 34)
    data[..., :2] = np.array([0.5], dtype=np.float16).view(np.uint8)
    data[..., 2:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    expected = dequantize(data.reshape(8, -1), gguf.GGMLQuantizationType.Q8_0)
    packed = from_ggml(torch.from_numpy(data.reshape(8, -1)), GGML_SCHEMES["Q8_0"])
    assert torch.equal(packed.columns(0, 8).T, torch.from_numpy(expected))
    assert expected.min() == -64


def test_q4_1_is_exact_with_a_zero_and_refused_without():
    weight = np.tile(np.arange(16).repeat(2) - 5, (8, 1)) * 0.25
    kind, scheme = gguf.GGMLQuantizationType.Q4_1, GGML_SCHEMES["Q4_1"]
    packed = from_ggml(torch.from_numpy(stored(weight, "Q4_1")), scheme)
    assert packed.zeros().unique().tolist() == [5]
    assert torch.equal(packed.columns(0, 8).T, torch.from_numpy(dequantize(stored(weight, "Q4_1"), kind)))
    weight[3] += 0.125
    with pytest.raises(CheckpointError, match="1 of 8 blocks of Q4_1 have no zero"):
        from_ggml(torch.from_numpy(stored(weight, "Q4_1")), scheme)
    # A zero outside of 0 … 15 is none.
    with pytest.raises(CheckpointError, match="8 of 8 blocks"):
        from_ggml(torch.from_numpy(stored(weight.clip(0, 1) + 8, "Q4_1")), scheme)


def test_blocks_of_zeros_only_are_zeros():
    for kind, scheme in GGML_SCHEMES.items():
        packed = from_ggml(torch.from_numpy(stored(np.zeros((8, 64)), kind)), scheme)
        assert packed.columns(0, 8).abs().max() == 0


def test_outputs_that_do_not_fill_words_are_refused():
    with pytest.raises(CheckpointError, match="out_features 6 is not a multiple of 8"):
        from_ggml(torch.from_numpy(stored(np.ones((6, 32)), "Q4_0")), GGML_SCHEMES["Q4_0"])
