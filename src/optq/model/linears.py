# SPDX-License-Identifier: Apache-2.0
"""`LinearView`: any linear layer seen as an (out, in) matrix, so that nobody else asks what kind of module it is."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(frozen=True, kw_only=True)
class LinearView:
    """A linear layer of a model.

    Args:
        name: the module's name in the model.
        module: `nn.Linear`, or transformers' `Conv1D`, which stores its weight transposed.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(out, in), sharing storage with the module."""
        return self.as_rows(self.parameter.detach())

    @property
    def parameter(self) -> nn.Parameter:
        """The module's own weight."""
        parameter: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return parameter

    def as_rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape of the module's own weight, such as its gradient, as (out, in)."""
        return tensor.T if isinstance(self.module, Conv1D) else tensor

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        out_features, in_features = self.weight.shape
        return out_features, in_features

    def write(self, values: Tensor) -> None:
        """Give the weight (out, in) values, cast to its dtype.

        In new memory: a loaded weight is a view of the mapped checkpoint file, whose pages, once written to, stay
        allocated until the last weight of the file is gone.
        """
        parameter = self.parameter
        parameter.data = self.as_rows(values).to(parameter.dtype, copy=True).contiguous()


def find_linears(module: nn.Module, prefix: str = "") -> dict[str, LinearView]:
    """The linear layers inside `module`, by name; `prefix` is the module's own name in the model."""
    views = {}
    for name, child in module.named_modules():
        # Exact types: a subclass of nn.Linear may compute something else than a product with its weight.
        if type(child) in LINEAR_TYPES:
            full_name = ".".join(part for part in (prefix, name) if part)
            views[full_name] = LinearView(name=full_name, module=child)
    return views
