# SPDX-License-Identifier: Apache-2.0
"""Take the place of transformers' own GPTQ quantizer.

`register_quantizer("gptq")` refuses names that are taken, so the tables are assigned; they are read at call time,
which covers transformers' own `GPTQConfig` and checkpoints from the Hub as well.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto

from .config import GPTQConfig

if TYPE_CHECKING:
    from .quantizer import OptqHfQuantizer


def make_quantizer(quantization_config: Any, **kwargs: Any) -> "OptqHfQuantizer":
    """Stands in for the class in transformers' table, which only calls it.

    Registration happens while transformers is still importing itself; the class needs parts that come later.
    """
    from .quantizer import OptqHfQuantizer

    return OptqHfQuantizer(quantization_config, **kwargs)


def register() -> None:
    """Idempotent."""
    auto.AUTO_QUANTIZER_MAPPING["gptq"] = make_quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig
