# SPDX-License-Identifier: Apache-2.0
"""What a fixed seed writes does not change as the code is moved about: digests of tiny models' packed tensors.

Floating-point sums differ in their last bits between processors and versions of torch, so the digests hold for some
kinds of processor and one torch; anywhere, the same call must give the same digest twice.
"""

import hashlib
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    MixtralConfig,
    PreTrainedModel,
    set_seed,
)

import optq
from conftest import tiny_llama_config
from optq import GPTQConfig
from optq.quantization import block_reconstruction

MEASURED_ON = {("x86_64", "AVX2", "2.13.0"), ("x86_64", "AVX512", "2.13.0")}
WITH_GRADIENTS = "max effort"  # hundreds of small steps: one kind of processor only


def llama() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_llama_config())


def mixtral() -> PreTrainedModel:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(MixtralConfig(**small, **heads, dtype="float32"))


def albert() -> PreTrainedModel:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "embedding_size": 32, "max_position_embeddings": 64}
    return AutoModelForMaskedLM.from_config(AlbertConfig(**small, **heads, dtype="float32"))


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    "default effort": (llama, {"bits": 4}, "0fd259af57e35807"),
    "fast effort, asymmetric": (llama, {"bits": 3, "effort": "fast", "sym": False}, "9c9ebd3548b96064"),
    "max effort": (llama, {"bits": 2, "effort": "max", "batch_size": 4}, "5ac7e70d5aa5f4c9"),
    "activation order on disk": (llama, {"bits": 8, "desc_act": True, "format": "gptq_v2"}, "df6f70bedded60af"),
    "groups in activation order": (llama, {"bits": 4, "act_group_aware": True, "grid": "minmax"}, "29c072b0e2f5bf52"),
    "a budget, and the output head": (
        llama,
        {"bits": 4, "target_bits_per_weight": 4.5, "lm_head": True},
        "a814b5ad49e73b17",
    ),
    "a mixture of experts": (mixtral, {"bits": 4}, "a9e9cd3b23ef96da"),
    "a block that is called repeatedly": (albert, {"bits": 4}, "4e430d1ddc698110"),
}


def digest(model: PreTrainedModel) -> str:
    """Of the tensors that quantization made, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"):
            found.update(name.encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def quantized(case: str) -> PreTrainedModel:
    make, settings, _ = CASES[case]
    set_seed(0)
    model = make()
    rows = torch.randint(4, 100, (12, 40), generator=torch.Generator().manual_seed(1)).tolist()
    dataset = [{"input_ids": row} for row in rows]
    return optq.quantize(model, GPTQConfig(group_size=32, dataset=dataset, quality_gate="off", **settings))


@pytest.mark.parametrize("case", CASES)
def test_a_fixed_seed_writes_the_bytes_that_it_wrote_before(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__.partition("+")[0])
    if here not in MEASURED_ON or (case == WITH_GRADIENTS and "AVX512" not in here):
        pytest.skip(f"the digest of {case} was not taken on such a processor: {' '.join(here)}")
    # Gradients in bfloat16 differ from one processor with such instructions to the next.
    monkeypatch.setattr(block_reconstruction, "has_bfloat16_instructions", lambda: False)
    assert digest(quantized(case)) == CASES[case][2]


def test_one_code_changed_changes_the_digest() -> None:
    model = quantized("default effort")
    before = digest(model)
    layer = next(module for module in model.modules() if isinstance(module, optq.QuantLinear))
    layer.scales[0, 0] *= 2
    assert digest(model) != before
    assert digest(quantized("default effort")) == before
