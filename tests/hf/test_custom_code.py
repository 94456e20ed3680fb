# SPDX-License-Identifier: Apache-2.0
"""A model whose code lies in its folder: never run by default, carried along when it is allowed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import optq
from conftest import rewritten, tiny_llama_config
from optq import GPTQConfig, QuantLinear

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class HomemadeConfig(LlamaConfig):
    model_type = "homemade"


class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig
"""


@pytest.fixture
def homemade(tmp_path):
    folder = tmp_path / "homemade"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(folder)
    (folder / "modeling_homemade.py").write_text(CODE)
    with rewritten(folder / "config.json") as config:
        config |= {
            "model_type": "homemade",
            "architectures": ["HomemadeForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_homemade.HomemadeConfig",
                "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
            },
        }
    return folder


@pytest.fixture(autouse=True)
def own_modules_cache(tmp_path, monkeypatch):
    """transformers copies remote code into a cache; not into the user's."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_remote_code_is_not_run_unless_asked(homemade, token_rows, tmp_path):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    with pytest.raises(ValueError, match="trust_remote_code"):
        optq.quantize(homemade, config, output_dir=tmp_path / "out", trust_remote_code=False)


def test_custom_code_goes_along_with_the_checkpoint(homemade, token_rows, tmp_path, probe_ids):
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    output = optq.quantize(homemade, config, output_dir=tmp_path / "out", trust_remote_code=True)
    assert (output / "modeling_homemade.py").read_text() == CODE
    assert optq.inspect(output).bits_per_weight < 8  # runs no code, so it needs no permission
    assert "# out" in (output / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert type(model).__name__ == "HomemadeForCausalLM"
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert torch.isfinite(model(probe_ids).logits).all()
