# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written by GPTQModel 7.6.0, against dense reference logits made without optq.

They are not part of the repository: the tests look for them beside it and are skipped elsewhere.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optq import QuantLinear

PEERS = Path(__file__).parents[3] / "shared/peer-checkpoints"
NAMES = (
    "gm-2b-g32-sym",
    "gm-3b-g32-sym",
    "gm-4b-dynamic",
    "gm-4b-g32-asym",
    "gm-4b-g32-asym-v2",
    "gm-4b-g32-desc_act",
    "gm-4b-g64-sym",
    "gm-8b-gm1-sym",
    "gm-moe-4b-g32",
)

pytestmark = pytest.mark.skipif(not PEERS.is_dir(), reason="GPTQModel's checkpoints are not beside the repository")


def worst_error(model, reference) -> float:
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits.float()
    return float((logits - reference["logits"]).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dense_reference(name):
    reference = load_file(PEERS / "reference" / f"{name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(PEERS / name, dtype=torch.float32)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert worst_error(model, reference) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_no_more_error_than_it_adds_to_the_dense_model(name, dtype):
    """The dense model in bfloat16 is itself up to 0.035 away: the bound follows it.

    Also for float16, whose activations the CPU kernels round to bfloat16.
    """
    reference = load_file(PEERS / "reference" / f"{name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(PEERS / name, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(PEERS / name, dtype=torch.float32).dequantize().bfloat16()
    assert worst_error(model, reference) < max(3e-2, 1.5 * worst_error(dense, reference))


@pytest.mark.parametrize("name", NAMES)
def test_saving_writes_back_the_same_tensors_and_keys(name, tmp_path):

    AutoModelForCausalLM.from_pretrained(PEERS / name).save_pretrained(tmp_path)
    before, after = load_file(PEERS / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for key in before:
        if key.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
            assert torch.equal(before[key], after[key]), key
    old = json.loads((PEERS / name / "config.json").read_text())["quantization_config"]
    new = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: value for key, value in old.items() if value is not None}.items() <= new.items()
