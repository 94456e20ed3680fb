# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: every process holds a part of each packed linear, and computes with it alone.

transformers keeps a table of styles, such as "colwise", and a plan per model that says which module is split in which
style. Its styles split parameters named weight; here each of them learns what to do with a packed linear, and leaves
all other modules to what it was before. Sliced reading is transformers' own: a tensor that is to be split is announced
to it as a DTensor, so that a process reads its part of the file only.

    outputs (colwise): qweight, qzeros, scales by their last dimension, bias; g_idx is whole
    inputs (rowwise):  qweight by its first dimension; of scales and qzeros the groups of the part's columns; the bias
                       is added by the first process alone, as the parts are summed

All that depends on transformers' internals for this is here, and was read in 5.17, 5.20 and 5.23.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from optq.checkpoint import groups_of_columns
from optq.errors import ConfigError, counted
from optq.layers import QuantLinear
from optq.model import Experts
from optq.patching import put
from optq.readers import FUSED_NAMES, kind_of, why_not_in_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a tensor-parallel style splits a linear.

    Args:
        splits: "outputs" or "inputs".
        takes_all: every process gets the whole input, else its part of it.
        gives_all: every process returns the whole output; else, of split outputs, its part, and of split inputs, a
            summand.
    """

    splits: str
    takes_all: bool
    gives_all: bool


SUMMAND, SUMMED = "optq_summand", "optq_summed"
"""Our own styles: of an expert's last linear, and of all experts of a layer, whose outputs are summed once."""

WAYS = {
    "colwise": Way(splits="outputs", takes_all=True, gives_all=False),
    "colwise_rep": Way(splits="outputs", takes_all=True, gives_all=True),
    "colwise_gather_output": Way(splits="outputs", takes_all=True, gives_all=True),
    "rowwise": Way(splits="inputs", takes_all=False, gives_all=True),
    "rowwise_rep": Way(splits="inputs", takes_all=True, gives_all=True),
    "rowwise_split_input": Way(splits="inputs", takes_all=True, gives_all=True),
    SUMMAND: Way(splits="inputs", takes_all=False, gives_all=False),
}
"""By the name of the style."""

WHOLE = ("mla_kv_a_proj", "replicated_with_grad_allreduce", "replicate", "local_params")
"""Styles that leave a linear whole in every process."""

SPLIT_BY = {"outputs": {"qweight": 1, "qzeros": 1, "scales": 1, "bias": 0}, "inputs": {"qweight": 0}}
"""The tensors that are read in part, and by which dimension they are split."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shard of a linear that this process has.

    Args:
        group: the processes that share it.
        rank, size: this one among them.
        groups: with split inputs, the whole weight's group of each of the shard's groups, (local groups,) int64.
        group_count: of the whole weight.
    """

    way: Way
    group: Any
    rank: int
    size: int
    groups: Tensor | None = None
    group_count: int = 0


class ParallelLinear(QuantLinear):
    """A `QuantLinear` that can be split over tensor-parallel processes; whole until its style has been installed.

    Attributes:
        name: the linear's.
        head_width: outputs of an attention head, for q, k and v: a head is never cut; 0 for other linears.
        part: None while it is whole.
    """

    name = ""
    head_width = 0
    part: Part | None = None

    @property
    def only_multiplies(self) -> bool:
        return self.part is None

    def split(self, mesh: Any, way: Way) -> None:
        """Announce to the loader which slices of the tensors, all on the meta device, this process will read.

        Raises:
            ConfigError: it cannot be split into so many parts.
        """
        from torch.distributed.tensor import Shard, distribute_tensor  # not there in every build of torch

        if reason := self._why_not(mesh.size(), way):
            if way.takes_all and way.gives_all:  # then it does not matter to its neighbours
                if mesh.get_local_rank() == 0:
                    logger.warning("%s is whole in every process: %s.", self.name, reason)
                return
            fewer = [n for n in range(1, mesh.size()) if self._why_not(n, way) is None]
            raise ConfigError(
                f"{self.name}, {self.out_features} x {self.in_features} in {self.bits} bits and "
                f"{counted(len(self.scales), 'group')}, cannot be split over {mesh.size()} processes by its "
                f"{way.splits}: {reason}. Start fewer: "
                f"{' or '.join(map(str, fewer))} would do for this linear."
            )
        for name, dimension in SPLIT_BY[way.splits].items():
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, distribute_tensor(tensor, mesh, [Shard(dimension)], src_data_rank=None))
        self.part = Part(way=way, group=mesh.get_group(), rank=mesh.get_local_rank(), size=mesh.size())

    def _why_not(self, parts: int, way: Way) -> str | None:
        if way.splits == "inputs":
            return why_not_in_parts(self.in_features, "inputs", parts, self.bits)
        return why_not_in_parts(
            self.out_features, "outputs", parts, self.bits, 0 if way.gives_all else self.head_width
        )

    def take_part(self) -> None:
        """Become the layer of this process's shard, once its slices have been read."""
        if self.part is None:
            return
        for name in SPLIT_BY[self.part.way.splits]:
            if (tensor := getattr(self, name)) is not None:  # the loader has made a parameter of it
                delattr(self, name)
                self.register_buffer(name, tensor.detach().to_local())
        if self.part.way.splits == "outputs":
            self.out_features //= self.part.size
            return
        self.in_features //= self.part.size
        start = self.part.rank * self.in_features
        groups, own = groups_of_columns(self.g_idx, start, start + self.in_features)
        self.part = replace(self.part, groups=groups, group_count=len(self.scales))
        self.scales, self.qzeros, self.g_idx = self.scales[groups], self.qzeros[groups], own
        if self.part.rank:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype, with in or out divided by the processes as the style says."""
        part = self.part
        if part is None:
            return super().forward(x)
        if part.way.splits == "outputs":
            output = super().forward(copy_to(x, part.group))
            return gather_from(output, part.group) if part.way.gives_all else output
        output = super().forward(scatter_to(x, part.group) if part.way.takes_all else x)
        return reduce_from(output, part.group) if part.way.gives_all else output

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        if self.part is not None:
            raise ConfigError(
                f"{self.name} cannot be dequantized: this process has a part of it only. Load the model in one "
                "process, without a tensor-parallel plan, and dequantize that."
            )
        return super().dense(dtype)

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather the shards into the tensors on disk, on the CPU, in the first process; the others get an empty dict.

        Every process must call it.

        Args:
            own: this process's shard by name on disk, such as qweight (in · bits / 32, out / processes) int32.
        """
        part = self.part
        assert part is not None
        tensors = {name: tensor.cpu() for name, tensor in own.items()}
        if part.groups is not None:
            tensors["groups"] = part.groups.cpu()
        found: list[Any] | None = [None] * part.size if part.rank == 0 else None
        dist.gather_object(tensors, found, group=part.group, group_dst=0)
        if found is None:
            return {}
        for name, dimension in SPLIT_BY[part.way.splits].items():
            if name in tensors:
                tensors[name] = torch.cat([other[name] for other in found], dimension)
        if tensors.pop("groups", None) is not None:
            for name in ("scales", "qzeros"):
                tensors[name] = tensors[name].new_zeros(part.group_count, tensors[name].shape[1])
                for other in found:
                    tensors[name][other["groups"]] = other[name]
            tensors["g_idx"] = torch.cat([other["groups"][other["g_idx"].long()] for other in found]).int()
        return tensors

    def extra_repr(self) -> str:
        part = self.part
        return super().extra_repr() + (f", part {part.rank} of {part.size} by {part.way.splits}" if part else "")


def wants_parallel(model: Any) -> bool:
    """Whether transformers is about to split the model over processes."""
    return (getattr(_distribution(model), "tp_size", None) or 1) > 1


def _distribution(model: Any) -> Any:
    return getattr(model.config, "distributed_config", None)


def refuse_to_quantize(model: Any) -> None:
    """Raises ConfigError if the model that is about to be quantized is to be split as well."""
    if wants_parallel(model):
        raise ConfigError(
            "A tensor-parallel plan was asked for while quantizing. Leave it out: the processes of torchrun share "
            "the work by themselves. Save the result in the first one, and load that with the plan."
        )


def make_ready(model: Any, experts: Mapping[str, Experts]) -> None:
    """Called before transformers splits the model: register which layers, styles and rules of its plan are packed.

    Raises:
        ConfigError: experts are to be split in a way that is not supported.
    """
    for name, layer in parallel_linears(model).items():
        parent, _, last = name.rpartition(".")
        layer.name = name
        if last in FUSED_NAMES["qkv_proj"]:
            layer.head_width = getattr(model.get_submodule(parent), "head_dim", None) or 0
    _install_styles()
    _plan_experts(model, experts)


def parallel_linears(model: Any) -> dict[str, ParallelLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelLinear)}


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """The state dict, in the first process with packed linears in one piece: qweight (in · bits / 32, out), …

    Every process must call it. Other split modules are left to transformers. None if no packed linear is split.
    """
    split = {name: layer for name, layer in parallel_linears(model).items() if layer.part is not None}
    if not split:
        return None
    state: dict[str, Tensor] = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, source in model.all_tied_weights_keys.items():
        if name in parameters and parameters[name] is parameters.get(source):
            del state[name]  # gathered, it would be a copy, which transformers does not recognise as tied
    for name, layer in split.items():
        keys = {last: f"{name}.{last}" for last in ("qweight", "qzeros", "scales", "g_idx", "bias")}
        own = {last: state[key] for last, key in keys.items() if key in state}
        state |= {keys[last]: tensor for last, tensor in layer.whole(own).items()}
    return state


class _Style:
    """A style of transformers that treats packed linears and split experts in its own way."""

    def __init__(self, original: Any, name: str = "") -> None:
        self._original, self._name = original, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._original, attribute)

    def install_forward(self, module: Any, mesh: Any, **kwargs: Any) -> Any:
        if not isinstance(module, ParallelLinear | Experts) or self._name in WHOLE:
            return self._original.install_forward(module, mesh, **kwargs)
        if isinstance(module, Experts):
            raise ConfigError(
                f"Experts that are packed one by one cannot be split in the style {self._name!r}. In a tp_plan of "
                f"your own, give them {SUMMED!r}, their first linears 'colwise', and their last ones {SUMMAND!r}."
            )
        if self._name not in WAYS:
            raise ConfigError(
                f"{module.name} is packed and cannot be split in the style {self._name!r}; allowed are "
                f"{', '.join((*WAYS, *WHOLE))}. Give it one of these in tp_plan, or load the model in one process."
            )
        module.split(mesh, WAYS[self._name])
        return module


class _Summand(_Style):
    """The style of an expert's last linear; one that is not packed is split as by the style rowwise."""

    def install_forward(self, module: Any, mesh: Any, **kwargs: Any) -> Any:
        if isinstance(module, ParallelLinear):
            return super().install_forward(module, mesh, **kwargs)
        is_first = mesh.get_local_rank() == 0

        def forward(x: Tensor) -> Tensor:
            bias = module.bias.to_local() if module.bias is not None and is_first else None
            return linear(x, module.weight.to_local(), bias)

        module.forward = forward
        return module


class _Summed(_Style):
    """The style of split experts: sums what the processes return."""

    def install_forward(self, module: Any, mesh: Any, **kwargs: Any) -> Any:
        group, summands = mesh.get_group(), module.forward

        def forward(hidden_states: Tensor, *routing: Tensor) -> Tensor:
            weighted = (copy_to(x, group) if x.is_floating_point() else x for x in routing)
            return reduce_from(summands(hidden_states, *weighted), group)

        module.forward = forward
        return module


def _install_styles() -> None:
    """Put what has learnt about packed linears into transformers' table. Idempotent."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    if SUMMED in ALL_PARALLEL_STYLES:
        return
    originals = dict(ALL_PARALLEL_STYLES)
    ours = {name: _Style(style, name) for name, style in originals.items()}
    ours[SUMMAND], ours[SUMMED] = _Summand(originals["rowwise"], SUMMAND), _Summed(originals["all_reduce"], SUMMED)
    for name, style in ours.items():
        put(ALL_PARALLEL_STYLES, name, style, "ALL_PARALLEL_STYLES")


def _plan_experts(model: Any, experts: Mapping[str, Experts]) -> None:
    """Split the experts that the plan would have split in fused form, each in the way of a dense MLP."""
    distribution = _distribution(model)
    if experts and (
        getattr(distribution, "enable_expert_parallel", False) or (getattr(distribution, "ep_size", None) or 1) > 1
    ):
        raise ConfigError(
            "Packed experts are not divided among processes (expert parallelism). Leave ep_size and "
            "enable_expert_parallel out: tensor parallelism splits every expert."
        )
    plan = model.tp_plan
    for kind, module in {kind_of(name): module for name, module in experts.items()}.items():
        rules = [rule for rule in plan if rule == kind or rule.startswith(f"{kind}.")]
        if not rules:
            continue  # every process has them whole
        if getattr(module.fused, "has_post_expert_norm", False):
            raise ConfigError(f"{kind}: experts with a norm at their end are not split. Load it in one process.")
        for rule in rules:
            del plan[rule]
        plan[kind] = SUMMED
        for role in module.layout.roles:
            plan[f"{kind}.*.{module.names[role]}"] = SUMMAND if role == "down_proj" else "colwise"


def copy_to(x: Tensor, group: Any) -> Tensor:
    """Identity for x (...), which is the same in all processes; the gradient is summed over them."""
    return _exchange(x, group, _same, _sum)


def reduce_from(x: Tensor, group: Any) -> Tensor:
    """Sum x (...) over all processes; the gradient passes unchanged."""
    return _exchange(x, group, _sum, _same)


def gather_from(x: Tensor, group: Any) -> Tensor:
    """Concatenate x (..., width) of all processes: (..., width · processes); the gradient is split."""
    return _exchange(x, group, _join, _cut)


def scatter_to(x: Tensor, group: Any) -> Tensor:
    """This process's part of x (..., width): (..., width / processes); the gradient is gathered."""
    return _exchange(x, group, _cut, _join)


Exchange = Callable[[Tensor, Any], Tensor]


def _exchange(x: Tensor, group: Any, there: Exchange, back: Exchange) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return there(x, group)
    output: Tensor = _Exchanged.apply(x, group, there, back)
    return output


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, there: Exchange, back: Exchange) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad_outputs[0], ctx.group), None, None, None


def _same(x: Tensor, group: Any) -> Tensor:
    return x


def _sum(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _join(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, -1)


def _cut(x: Tensor, group: Any) -> Tensor:
    return x.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)]
