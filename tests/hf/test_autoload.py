# SPDX-License-Identifier: Apache-2.0
"""optq registers by itself in processes that never import it, and costs them nothing. Each test is a fresh process."""

import os
import subprocess
import sys

import pytest

# transformers imports `accelerate` and others lazily, so a process that only loads a checkpoint is a fair user.
WHICH = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print(AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__module__)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, token_rows, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    from optq import GPTQConfig

    folder = tmp_path_factory.mktemp("checkpoint")
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config).save_pretrained(folder)
    return folder


def test_a_checkpoint_loads_in_a_process_that_never_imports_optq(checkpoint):
    code = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__module__, "peft" in sys.modules)
"""
    assert run(code, str(checkpoint)) == "optq.layers.linear False"


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import transformers",
        "import transformers, torch",
        "import transformers.modeling_utils",
        "from transformers import AutoModelForCausalLM",
        "import optq",
        "import optq, torch",
        "import transformers.quantizers.auto, optq",
        "import transformers.modeling_utils; import optq",
    ],
)
def test_whatever_is_imported_first(first):
    assert run(f"{first}\nimport transformers.modeling_utils\n{WHICH}") == "optq.config.gptq"


@pytest.mark.parametrize(
    ("first", "autoload"),
    [("import peft", "1"), ("import transformers.modeling_utils, peft", "1"), ("import peft, optq", "0")],
)
def test_peft_knows_packed_layers_whatever_is_imported_first(first, autoload):
    pytest.importorskip("peft")
    code = f"{first}\nimport peft; print(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__module__)"
    assert run(code, OPTQ_AUTOLOAD=autoload) == "optq.integrations.peft"


@pytest.mark.parametrize("switch", ["OPTQ_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_it_can_be_switched_off(switch):
    code = f"import torch, transformers.modeling_utils\n{WHICH}"
    assert run(code, **{switch: "0"}) == "transformers.utils.quantization_config"
    assert run(f"import optq\n{code}", **{switch: "0"}) == "optq.config.gptq"


def test_importing_optq_imports_nothing_heavy():
    code = """
import sys
import transformers
before = set(sys.modules)
import optq
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"torch", "triton", "datasets", "optimum", "accelerate", "numpy", "safetensors"}))
"""
    assert run(code) == "[]"


def test_using_the_library_imports_neither_triton_nor_datasets_nor_optimum(checkpoint):
    code = """
import sys
for name in ("triton", "datasets", "optimum"):
    sys.modules[name] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
import optq
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.dequantize()
config = optq.GPTQConfig(bits=4, group_size=32, dataset=[{"input_ids": [5, 6, 7, 8]}])
print(sorted(optq.__all__), optq.QuantLinear.__name__, [*optq.kernels.KERNELS][-1])
"""
    assert "QuantLinear reference" in run(code, str(checkpoint))


def test_importing_torch_is_not_slowed():
    """The entry point's own time, not a difference of two noisy imports."""
    code = """
import time
import torch
started = time.perf_counter()
from optq_autoload import autoload
autoload()
print(time.perf_counter() - started)
"""
    assert min(float(run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")) for _ in range(3)) < 0.005
