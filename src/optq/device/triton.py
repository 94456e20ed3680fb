# SPDX-License-Identifier: Apache-2.0
"""Where Triton programs run, and why they do not elsewhere."""

import os
import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch

DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda too
OLDEST_CAPABILITY = (8, 0)  # for older GPUs Triton makes products without tensor cores, from registers that spill


def why_no_triton(device: torch.device) -> str | None:
    """Why no Triton program runs there, in words, or None."""
    if device.type not in DEVICES:
        return f"runs on GPUs, the layer is on {device}"
    if find_spec("triton") is None:
        return "needs the package triton; install it with `pip install triton`"
    if os.name == "posix" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launcher with a C compiler, and there is none; install gcc, or name one in CC"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            oldest = ".".join(map(str, OLDEST_CAPABILITY))
            return f"needs compute capability {oldest} or newer, this GPU has {'.'.join(map(str, capability))}"
    return None


def current(device: torch.device) -> Any:
    """A context in which Triton launches on `device`."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: a driver may refuse then what it does at any other time."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def in_words(error: Exception) -> str:
    """Name an error that a compiler or a driver raised, with the beginning of its message, if it has one."""
    said = (str(error).strip() or "without a message").splitlines()[0][:200]
    return f"{type(error).__name__}: {said}"
