# SPDX-License-Identifier: Apache-2.0
"""`LinearView`: any linear layer seen as an (out, in) matrix, whatever kind of module it is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import Experts

LINEAR_TYPES = (nn.Linear, Conv1D)

_is_plain: dict[type, bool] = {}  # subclasses of nn.Linear, and whether they compute what it does


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes the product with its weight, and adds its bias: subclasses are tried out, once."""
    kind = type(module)
    if kind in LINEAR_TYPES or not isinstance(module, nn.Linear):
        return kind in LINEAR_TYPES
    if kind not in _is_plain:
        _is_plain[kind] = _computes_a_product(module)
    return _is_plain[kind]


def _computes_a_product(module: nn.Linear) -> bool:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if not tensors.keys() <= {"weight", "bias"}:
        return False
    x = torch.arange(15, dtype=torch.float32, device="cpu").view(3, 5) - 7
    weight = torch.arange(30, dtype=torch.float32, device="cpu").view(6, 5).cos()
    bias = torch.arange(6, dtype=torch.float32, device="cpu")
    replaced = {"weight": weight, "bias": bias} if "bias" in tensors else {"weight": weight}
    try:
        found = torch.func.functional_call(module, replaced, (x,))
    except Exception:  # its code may do anything, also want its own sizes
        return False
    expected = nn.functional.linear(x, weight, replaced.get("bias"))
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


@dataclass(frozen=True, kw_only=True)
class LinearView:
    """A linear layer of a model, seen as an (out, in) matrix.

    Args:
        name: the module's name in the model.
        module: `nn.Linear`, or transformers' `Conv1D`, which stores its weight transposed.
        family: for an expert's linear, the name that it shares with its counterparts in the layer's other experts.
        entrance: for an expert's linear, the module that the inputs of all experts' counterparts pass before any of
            these runs, and the expert's place among them; None if there is none.
        routes: it decides which tokens go to which expert.
    """

    name: str
    module: nn.Module
    family: str | None = None
    entrance: tuple[nn.Module, int] | None = None
    routes: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight as (out, in), sharing storage with the module."""
        return self.as_rows(self.parameter.detach())

    @property
    def parameter(self) -> nn.Parameter:
        """The module's own weight."""
        parameter: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return parameter

    def as_rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape of the module's own weight, such as its gradient, as (out, in), sharing storage."""
        return tensor.T if isinstance(self.module, Conv1D) else tensor

    @property
    def bias(self) -> Tensor | None:
        """The bias, (out,), detached, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
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
    families, routers = _find_mixtures(module)
    entrances = {
        linear: (entrance, place)
        for experts in module.modules()
        if isinstance(experts, Experts)
        for linear, entrance, place in experts.entrances()
    }
    views = {}
    for name, child in module.named_modules():
        if is_linear(child):
            full_name = ".".join(part for part in (prefix, name) if part)
            family = families.get(name)
            views[full_name] = LinearView(
                name=full_name,
                module=child,
                family=None if family is None else f"{prefix}.{family}",
                entrance=entrances.get(child),
                routes=name in routers,
            )
    return views


def _find_mixtures(module: nn.Module) -> tuple[dict[str, str], set[str]]:
    """The family of each expert's linear, and the routers, by name.

    Experts are `Experts`, or the members of a list or dictionary beside which something has one output per member.
    """
    families: dict[str, str] = {}
    routers: set[str] = set()
    for name, parent in module.named_modules():
        for child_name, child in parent.named_children():
            if not (count := _expert_count(child)):
                continue
            path = ".".join(part for part in (name, child_name) if part)
            beside = {
                found: linear
                for found, linear in parent.named_modules(prefix=name)
                if _outputs(linear) == count and not found.startswith(f"{path}.")
            }
            if not beside and not isinstance(child, Experts):
                continue
            routers |= beside.keys()
            for found in child.named_modules(prefix=path):
                _, *rest = found[0].removeprefix(f"{path}.").split(".")
                if is_linear(found[1]) and found[0] != path:
                    families[found[0]] = ".".join((path, "*", *rest))
    return families, routers


def _expert_count(module: nn.Module) -> int:
    """How many experts a module may be made of; 0 if it is no such thing."""
    if isinstance(module, Experts):
        return module.layout.count
    members = list(module.children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
    return len(members) if len(members) > 1 and len({type(member) for member in members}) == 1 else 0


def _outputs(module: nn.Module) -> int | None:
    """out_features of a linear, also of one that only has the weight of one."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.ndim != 2:
        return None
    return weight.shape[1 if isinstance(module, Conv1D) else 0]
