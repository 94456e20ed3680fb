# SPDX-License-Identifier: Apache-2.0
"""What a GPU's memory and tensor cores do in a microsecond, by what its driver says. Rough: how they compare matters.

Williams et al., "Roofline" (2009).
"""

from dataclasses import dataclass
from functools import cache

import torch

# Multiplications of 16-bit numbers that a processor's tensor cores do in a cycle, by compute capability.
PRODUCTS_PER_CYCLE = {(8, 0): 1024, (8, 6): 512, (8, 7): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (12, 0): 512}
COPY_SHARE = 0.85  # of the memory's clock times its width, for large copies
DENSE_BYTES = 4.5  # for each 4-bit weight that is dequantized: it is read, written in 16 bits, and read again
FUSED_SHARE = 0.4  # of the tensor cores' speed, for a product that takes codes apart; dense products get close to it
WHOLE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """One processor of a GPU, of which there are `processors`.

    Args:
        weights: of 4 bits, that memory brings to it in a microsecond.
        products: multiplications of its tensor cores in a microsecond.
    """

    processors: int
    weights: float
    products: float

    def dense_from(self) -> int:
        """Rows of activations from which dequantizing a weight and multiplying densely is faster.

        Where the time that is lost by moving dequantized weights is what the tensor cores gain by it.
        """
        moving, gain = 2 * DENSE_BYTES / self.weights, (1 / FUSED_SHARE - 1) / self.products
        return max(WHOLE_ROWS, int(moving / gain) // WHOLE_ROWS * WHOLE_ROWS)


H200 = Roofline(processors=132, weights=63_300, products=4_055_000)


@cache
def roofline(device: torch.device) -> Roofline:
    """A GPU's; an H200's with 16 processors where no driver says anything, as in the interpreter."""
    if device.type != "cuda":
        return Roofline(processors=16, weights=H200.weights, products=H200.products)
    found = torch.cuda.get_device_properties(device)
    count = found.multi_processor_count
    cycles = getattr(found, "clock_rate", 0) / 1000  # in a microsecond
    moved = 2 * getattr(found, "memory_clock_rate", 0) / 1000 * getattr(found, "memory_bus_width", 0) / 8  # bytes
    per_cycle = PRODUCTS_PER_CYCLE.get((found.major, found.minor), 0)
    if torch.version.hip is not None or not cycles * moved * per_cycle:
        return Roofline(processors=count, weights=H200.weights, products=H200.products)
    return Roofline(processors=count, weights=COPY_SHARE * 2 * moved / count, products=per_cycle * cycles)
