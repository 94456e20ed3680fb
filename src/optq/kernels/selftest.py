# SPDX-License-Identifier: Apache-2.0
"""Trying a kernel on a device before it is used there, because a wrong product looks like any other."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight
from optq.device.triton import in_words, is_capturing
from optq.scheme import trivial_groups

from .prepared import Prepared

logger = logging.getLogger(__name__)

MOST_DIFFERENT = 0.02  # of products that should be the same, of the largest
OUTPUTS, GROUP_SIZE = 96, 128


def why_wrong(
    kernel: str,
    prepare: Callable[[PackedWeight], Prepared],
    products: Iterable[tuple[int, Callable[[Tensor, Prepared], Tensor]]],
    device: torch.device,
    bits: int,
    dtype: torch.dtype,
    columns: int = 256,
) -> str | None:
    """Why a kernel's products with a random weight (OUTPUTS, columns) are wrong, which is logged as well, or None.

    Args:
        products: pairs of a number of rows and a product, which is tried with activations x (rows, columns).
    """
    generator = torch.Generator().manual_seed(0)

    def random_words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, device="cpu").int().to(device)

    groups = -(-columns // GROUP_SIZE)
    packed = PackedWeight(
        qweight=random_words(columns * bits // 32, OUTPUTS),
        qzeros=random_words(groups, OUTPUTS * bits // 32),
        scales=((1 + torch.rand(groups, OUTPUTS, generator=generator, device="cpu")) / 2**bits).half().to(device),
        g_idx=trivial_groups(columns, GROUP_SIZE, device),
        bits=bits,
        checkpoint_format="gptq_v2",
    )
    reason = None
    try:
        prepared, dense = prepare(packed), packed.columns(0, OUTPUTS)
        for rows, multiply in products:
            x = torch.randn(rows, columns, generator=generator, device="cpu").to(device, dtype)
            expected = x.float() @ dense.float()
            if not bool(
                (multiply(x, prepared).float() - expected).abs().max() <= MOST_DIFFERENT * expected.abs().max()
            ):
                reason = f"its products of {bits}-bit codes and {dtype} are wrong on this device"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and a driver that nobody has seen yet may raise anything
        if is_capturing(device):  # when nothing can be tried
            raise
        reason = f"its products do not run on this device ({in_words(error)})"
    if reason is not None:
        logger.warning("%s: the kernel %s is not used: %s.", device, kernel, reason)
    return reason
