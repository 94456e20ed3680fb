# SPDX-License-Identifier: Apache-2.0
"""How much memory the activations that wait may take.

What needs torch is imported where it is used: the table of fields is read for `--help`, too.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .sizes import bytes_of

if TYPE_CHECKING:
    import torch

SHARE = 0.4  # of what is free, for what waits between blocks

PLACES = r"\d+|cpu|(cuda|xpu|npu|mps|hpu|mlu|musa|sdaa|xla)(:\d+)?"  # numbers are of accelerators

Asked = Mapping[Any, Any]
"""As `{0: "8GiB", "cpu": 5_000_000_000}`: at most one accelerator, and the machine's memory."""


def activation_bytes(asked: Asked | None) -> dict[str | int, int]:
    """`activation_memory` in bytes.

    Raises:
        AttributeError, ValueError: it makes no sense.
    """
    asked = {} if asked is None else asked
    for place, size in asked.items():
        if isinstance(place, bool) or isinstance(size, bool) or not re.fullmatch(PLACES, str(place)):
            raise ValueError(f"{place!r}: {size!r}")
    found = {place: bytes_of(size) for place, size in asked.items()}
    if len(found) > 2 or (len(found) == 2 and "cpu" not in found):
        raise ValueError("one accelerator at most")
    return found


def limits(asked: Asked | None, device: "torch.device", processes: int) -> tuple[float, float]:
    """Bytes on the device, and of the machine's memory, which `processes` share."""
    from optq.device.memory import free_bytes

    known: dict[str | int, float] = {**activation_bytes(asked)}
    in_memory = known.pop("cpu", None)
    if in_memory is None:
        in_memory = SHARE * free_bytes("cpu") / processes
    if device.type == "cpu":
        return in_memory, in_memory
    on_device = next(iter(known.values()), None)
    return SHARE * free_bytes(device) if on_device is None else on_device, in_memory
