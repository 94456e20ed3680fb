# SPDX-License-Identifier: Apache-2.0
"""optq registers by itself in processes that never import it, and costs them nothing. Each test is a fresh process.

Importing transformers and torch takes seconds, so a process is asked all that can be asked of it.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from conftest import rewritten

# transformers imports `accelerate` and others lazily, so a process that only loads a checkpoint is a fair user.
WHICH = """
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print(AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__module__)
"""
# Of PEFT's table, once `import peft` has filled it.
TUNER = """
import peft
print(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__module__)
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


@pytest.fixture(scope="module")
def of_autogptq(checkpoint, tmp_path_factory):
    """The same in files as AutoGPTQ wrote them."""
    folder = tmp_path_factory.mktemp("old") / "old-GPTQ"
    shutil.copytree(checkpoint, folder)
    with rewritten(folder / "config.json") as config:
        stated = config.pop("quantization_config")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": stated["bits"], "group_size": 32, "sym": True}))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    return folder


def test_checkpoints_load_in_a_process_that_never_imports_optq_with_neither_triton_nor_datasets_nor_optimum(
    of_autogptq, checkpoint
):
    code = """
import sys
for name in ("triton", "datasets", "optimum"):
    sys.modules[name] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(type(model.model.layers[0].mlp.up_proj).__module__, "peft" in sys.modules)
import optq
model.dequantize()
config = optq.GPTQConfig(bits=4, group_size=32, dataset=[{"input_ids": [5, 6, 7, 8]}])
assert {*dir(optq)} == {*optq.__all__, "__version__"}
print(sorted(optq.__all__), optq.QuantLinear.__name__, [*optq.kernels.KERNELS][-1])
"""
    *loaded, used = run(code, str(of_autogptq), str(checkpoint)).splitlines()
    assert loaded == 2 * ["optq.layers.linear False"]
    assert "QuantLinear reference" in used


@pytest.mark.long
def test_whatever_is_imported_first():
    """torch, and then a checkpoint is loaded: tests/api/test_push.py; transformers first, then optq: conftest.py.
    `import transformers` by itself decides nothing, since that loads nothing that optq waits for."""
    assert run(f"import transformers.quantizers.auto, optq{WHICH}") == OURS


@pytest.mark.long
def test_peft_knows_packed_layers_whatever_is_imported_first():
    """PEFT itself first: tests/integrations/test_peft.py."""
    pytest.importorskip("peft")
    first = "import transformers.modeling_utils, peft"
    assert run(f"{first}{TUNER}{WHICH}").split() == ["optq.integrations.peft", OURS]


@pytest.mark.long
def test_it_can_be_switched_off_until_optq_is_imported():
    """What is loaded by then is found, PEFT too."""
    peft, tuner = ("import peft", TUNER) if find_spec("peft") else ("", "print('optq.integrations.peft')")
    found = run(f"{peft}{WHICH}import optq\n{tuner}{WHICH}", OPTQ_AUTOLOAD="0")
    assert found.split() == [THEIRS, "optq.integrations.peft", OURS]


def test_importing_optq_first_imports_nothing_heavy_and_is_enough():
    code = """
import sys
before = set(sys.modules)
import optq
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"torch", "transformers", "triton", "datasets", "optimum", "accelerate", "numpy", "safetensors"}))
optq.convert
"""
    assert run(f"{code}{WHICH}").split() == ["[]", OURS]


def test_importing_torch_is_not_slowed_and_imports_no_optq_with_torchs_own_switch():
    """The entry point's own time, not a difference of two noisy imports."""
    code = """
import sys
import time
import torch
print("optq" in sys.modules)
for _ in range(3):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("optq", "optq_autoload")]:
        del sys.modules[name]
    started = time.perf_counter()
    from optq_autoload import autoload
    autoload()
    print(time.perf_counter() - started)
"""
    imported, *seconds = run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").split()
    assert imported == "False"
    assert min(map(float, seconds)) < 0.005
