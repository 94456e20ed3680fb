# SPDX-License-Identifier: Apache-2.0
"""What the modes of torch around a call mean to a packed linear: autocast for its input, and none for its weight.

A dense linear under autocast casts its input, and returns that dtype. A packed one does the same. What happens inside
of it is its kernel's business: there, autocast would round what is meant to be float32, and refuses to join tensors in
a 16-bit dtype other than its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the input x (..., in) of a linear; None where autocast is off."""
    if not torch._C._is_any_autocast_enabled():  # takes a third of what asking for a device does
        return None
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # graphs of torch 2.11 cannot ask if it is available
        return None
    if x.dtype == torch.float64 or not x.is_floating_point():  # torch leaves them alone, too
        return x.dtype
    return torch.get_autocast_dtype(kind)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def as_in_no_mode(device: torch.device) -> Iterator[None]:
    """Switch off inference mode, gradients and autocast while tensors are derived from a weight that stays in use.

    Tensors made in inference mode could not be saved for a later backward.
    """
    with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
        yield
