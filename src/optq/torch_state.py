# SPDX-License-Identifier: Apache-2.0
"""What surrounds a call must not change its result: torch's ambient state is set to its defaults while we work.

The default dtype, autocast, inference mode, a default device and reduced-precision float32 products belong to the
caller's own computations. Quantizing, planning, loading and evaluating state their dtypes and devices themselves.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn, overrides
from torch._C._dynamo import eval_frame
from torch.utils import _python_dispatch


@contextmanager
def default_torch_state(*, device: bool = True) -> Iterator[None]:
    """Torch as a new process has it, on this thread; also a decorator. Grad mode and deterministic algorithms stay.

    Args:
        device: also the default device. False inside of transformers' own `torch.device("meta")`.
    """
    dtype = torch.get_default_dtype()
    products: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions, legacy = [backend.fp32_precision for backend in products], _legacy_precision()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device and torch.get_default_device().type != "cpu":  # a device context takes a microsecond per operation
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            if legacy not in (None, "highest"):
                torch.set_float32_matmul_precision("highest")  # else reading the old flags in between would raise
            for backend in products:
                backend.fp32_precision = "ieee"
            yield
        finally:
            torch.set_default_dtype(dtype)
            if legacy not in (None, "highest"):
                torch.set_float32_matmul_precision(legacy)
            for backend, precision in zip(products, precisions, strict=True):
                backend.fp32_precision = precision


def _legacy_precision() -> str | None:
    """What the older one of torch's two interfaces says; None if the caller has used the newer one only."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Torch's state of this thread is the same afterwards, whatever others, who run on it meanwhile, leave it in.

    For coroutines, which change places in the middle of `with torch.no_grad()` and the like: grad and inference mode,
    autocast, the modes that look at every operation, and torch.compile.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", accelerator.type if accelerator is not None else "cpu"}
    cached = torch.is_autocast_cache_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    functions, dispatches = (
        overrides._get_current_function_mode_stack(),
        _python_dispatch._get_current_dispatch_mode_stack(),
    )
    compiler = eval_frame.set_eval_frame(None)  # of a compiled model; it would compile those others as well
    with torch.inference_mode(torch.is_inference_mode_enabled()):  # leaving it restores grad mode as well
        try:
            yield
        finally:
            eval_frame.set_eval_frame(compiler)
            for kind, enabled, dtype in autocast:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(cached)
            _exchange(overrides._get_current_function_mode_stack(), functions, overrides)
            _exchange(_python_dispatch._get_current_dispatch_mode_stack(), dispatches, _python_dispatch)


def _exchange(present: list[Any], wanted: list[Any], stack: Any) -> None:
    """Put other modes on one of torch's stacks of modes, which are public one by one only."""
    if present != wanted:
        for _ in present:
            stack._pop_mode()
        for mode in wanted:
            stack._push_mode(mode)


def leave_inference_mode(model: nn.Module) -> None:
    """Replace tensors that were made in inference mode, which autograd and in-place changes refuse, by normal ones.

    Shared tensors stay shared.
    """
    normal: dict[int, torch.Tensor] = {}
    for module in model.modules():
        held: Any
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in normal:
                    copy = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    normal[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                held[name] = normal[id(tensor)]
