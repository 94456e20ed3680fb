# SPDX-License-Identifier: Apache-2.0
"""Configs that say things of other types than they may."""

import pytest
import torch

from optq.checkpoint.headers import TensorHeader
from optq.errors import CheckpointError
from optq.formats.table import describe

HEADERS = {"a.weight_packed": TensorHeader(shape=(32, 8), dtype=torch.int32)}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group"}


def compressed(groups, **stated):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **stated}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": ["awq"]}, r"quant_method=\['awq'\], and a str was expected"),
        ({"quant_method": "awq", "version": 3}, "version=3, and a str was expected"),
        (compressed([]), r"config_groups=\[\], and a dict was expected"),
        (compressed({"group_0": 3}), "group_0=3, and a dict was expected"),
        (compressed({"group_0": {"targets": "Linear"}}), "targets='Linear', and a list was expected"),
        (compressed({"group_0": {"targets": [3]}}), "a is packed, but is the target of none"),
        (compressed({"group_0": {"targets": ["Linear"], "weights": 3}}), "weights=3, and a dict was expected"),
        (compressed({"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}), "group_size=None is not an integer"),
    ],
)
def test_what_is_of_another_type_is_named(stated, message):
    with pytest.raises(ValueError, match=message):
        describe(stated, HEADERS)


def test_null_says_nothing():
    with pytest.raises(CheckpointError, match="a is packed, but is the target of none"):
        describe(compressed(None), HEADERS)
