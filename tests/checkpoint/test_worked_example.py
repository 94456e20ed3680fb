# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/checkpoint-format.md."""

from pathlib import Path

import torch

from optq.checkpoint import pack
from optq.gptq import round_to_nearest
from optq.scheme import LayerScheme, QuantizedWeight

WEIGHTS = [-4.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 3.5]
CODES = [0, 7, 8, 9, 10, 12, 14, 15]


def test_the_words_of_the_example():
    quantized = QuantizedWeight(
        codes=torch.tensor([CODES] * 8, dtype=torch.uint8),
        scales=torch.full((8, 1), 0.5),
        zeros=torch.full((8, 1), 8, dtype=torch.int16),
        group_of_column=torch.zeros(8, dtype=torch.int32),
        bits=4,
    )
    assert quantized.decode()[0].tolist() == WEIGHTS
    packed = pack(quantized)
    assert packed.qweight.tolist() == [[-20277136] * 8]
    assert -20277136 % 2**32 == 0xFECA9870
    assert packed.qzeros.tolist() == [[0x77777777]]
    assert packed.scales.view(torch.int16).flatten().tolist() == [0x3800] * 8
    page = (Path(__file__).parents[2] / "docs/checkpoint-format.md").read_text()
    for text in ("0xFECA9870", "-20277136", "2004318071", "  ".join(map(str, CODES))):
        assert text in page


def test_codes_are_values_over_scale_plus_zero():
    nearest = round_to_nearest(torch.tensor([WEIGHTS]), LayerScheme(group_size=-1))
    assert nearest.scales.item() == torch.tensor(8 / 15).half().item()  # min-max spans 2 · 4.0 in 15 steps
