# SPDX-License-Identifier: Apache-2.0
"""optq registers by itself in processes that never import it, and costs them nothing. Each test is a fresh process.

Importing transformers and torch takes seconds, so a process is asked all that can be asked of it.
"""

import os
import subprocess
import sys

import pytest

# transformers imports `accelerate` and others lazily, so a process that only loads a checkpoint is a fair user.
WHICH = """
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print(AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__module__)
"""
pytestmark = pytest.mark.slow
OURS, THEIRS = "optq.config.gptq", "transformers.utils.quantization_config"


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


def test_a_checkpoint_loads_in_a_process_that_never_imports_optq_with_neither_triton_nor_datasets_nor_optimum(
    checkpoint,
):
    code = """
import sys
for name in ("triton", "datasets", "optimum"):
    sys.modules[name] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__module__, "peft" in sys.modules)
import optq
model.dequantize()
config = optq.GPTQConfig(bits=4, group_size=32, dataset=[{"input_ids": [5, 6, 7, 8]}])
print(sorted(optq.__all__), optq.QuantLinear.__name__, [*optq.kernels.KERNELS][-1])
"""
    loaded, used = run(code, str(checkpoint)).splitlines()
    assert loaded == "optq.layers.linear False"
    assert "QuantLinear reference" in used


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import transformers, torch",
        "import transformers.modeling_utils",
        "import optq; optq.convert",
        "import optq, torch",
        "import transformers.quantizers.auto, optq",
    ],
)
def test_whatever_is_imported_first(first):
    assert run(f"{first}{WHICH}") == OURS


@pytest.mark.parametrize(
    ("first", "autoload"),
    [("import peft", "1"), ("import transformers.modeling_utils, peft", "1"), ("import peft, optq", "0")],
)
def test_peft_knows_packed_layers_whatever_is_imported_first(first, autoload):
    pytest.importorskip("peft")
    code = f"{first}\nimport peft; print(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__module__){WHICH}"
    assert run(code, OPTQ_AUTOLOAD=autoload).split() == ["optq.integrations.peft", OURS]


@pytest.mark.parametrize("switch", ["OPTQ_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_it_can_be_switched_off_until_optq_is_imported(switch):
    assert run(f"import torch{WHICH}import optq{WHICH}", **{switch: "0"}).split() == [THEIRS, OURS]


def test_importing_optq_imports_nothing_heavy_and_is_enough():
    code = """
import sys
import transformers
before = set(sys.modules)
import optq
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"torch", "triton", "datasets", "optimum", "accelerate", "numpy", "safetensors"}))
"""
    assert run(f"{code}{WHICH}", OPTQ_AUTOLOAD="0").split() == ["[]", OURS]


def test_importing_torch_is_not_slowed():
    """The entry point's own time, not a difference of two noisy imports."""
    code = """
import sys
import time
import torch
for _ in range(3):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("optq", "optq_autoload")]:
        del sys.modules[name]
    started = time.perf_counter()
    from optq_autoload import autoload
    autoload()
    print(time.perf_counter() - started)
"""
    assert min(map(float, run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").split())) < 0.005
