# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: transformers keeps those of a layer in two tensors; here each has its own linears.

So an expert's linears are like any others: found, calibrated on the tokens that are routed to them, solved, packed,
and saved under the names that checkpoints with one tensor per expert have for them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optq.errors import ModelError

ROLES = ("gate_proj", "up_proj", "down_proj")
FUSED = {f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")}
"""The tensors that hold all experts of a layer."""
CHECKED_TOKENS = 16
CHECKED_ERROR = 0.02  # of the largest output: bfloat16, with sums in another order


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a fused module stores its experts.

    Args:
        count: number of experts.
        gated: `gate_up_proj` holds two linears; else `up_proj` holds one.
        transposed: a weight is (in, out).
        interleaved: the outputs of gate and up alternate; else all of gate come first.
        biased: the linears have biases.
        routed: the forward is told which token goes where; else it gets all tokens of the first expert, then all of
            the second, and so on.
    """

    count: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    routed: bool

    @property
    def roles(self) -> tuple[str, ...]:
        return ROLES if self.gated else ROLES[1:]

    def split(self, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        """Split one expert's fused weights or biases into those of its linears, in the order of `roles`.

        Args:
            up: gate and up, (2 · inside, hidden), without a gate (inside, hidden), transposed if `transposed`; or a
                bias, with the outputs only.
            down: (hidden, inside), or (inside, hidden) if `transposed`; or its bias, (hidden,).
        Returns:
            Weights (out, in) or biases (out,), as views.
        """
        if self.transposed and up.ndim == 2:
            up, down = up.T, down.T
        if not self.gated:
            return up, down
        if self.interleaved:
            return up[0::2], up[1::2], down
        half = up.shape[0] // 2
        return up[:half], up[half:], down

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up, both (..., inside) -> (..., 2 · inside), in the order of the fused weight's outputs."""
        return torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)


def find_layout(module: nn.Module) -> Layout | None:
    """The layout of fused experts in `module`; None if it holds none."""
    own = dict(module.named_parameters(recurse=False))
    if not own.keys() <= FUSED:
        return None
    gated = "gate_up_proj" in own
    up, down = own.get("gate_up_proj" if gated else "up_proj"), own.get("down_proj")
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or up.shape[0] != down.shape[0]:
        return None
    width = 2 if gated else 1
    straight = up.shape[1] == width * down.shape[2] and up.shape[2] == down.shape[1]
    turned = up.shape[2] == width * down.shape[1] and up.shape[1] == down.shape[2]
    if not straight and not turned:
        return None
    return Layout(
        count=up.shape[0],
        gated=gated,
        transposed=getattr(module, "is_transposed", not straight),
        interleaved=not getattr(module, "is_concatenated", True),
        biased="down_proj_bias" in own,
        routed=len(inspect.signature(module.forward).parameters) > 1,
    )


class Expert(nn.Module):
    """One expert's linears."""


class Entrance(nn.Module):
    """An identity module that the inputs of all experts pass together, so that one hook sees them all."""

    def forward(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """inputs: one (tokens of the expert, in) per expert; returned as they are."""
        return inputs


class GroupedProducts(Protocol):
    """The products of all experts' linears at once, for rows that are sorted by expert.

    `starts`, (experts + 1,) int32, holds the first row of each expert, and the end of the last one's rows. `experts`,
    (rows,), holds the expert of each row; outputs of rows with a number beyond the last expert are undefined.
    """

    @property
    def are_fused(self) -> bool: ...

    def why_not(self, rows: int, *tensors: Tensor) -> str | None:
        """Why `rows` rows must be multiplied expert by expert, or None; `tensors`: the input (..., in) and others."""

    def first(self, x: Tensor, starts: Tensor, experts: Tensor) -> list[Tensor]:
        """x (rows, hidden) -> the outputs of each first linear, (rows, inside), up before gate."""

    def last(self, x: Tensor, starts: Tensor, experts: Tensor) -> Tensor:
        """x (rows, inside) -> (rows, hidden)."""


class Experts(nn.Module):
    """The experts of a mixture as separate linears, in the place of transformers' fused module.

    Args:
        fused: the module whose place it takes; it keeps what is not a linear, such as the activation, and stays as it
            is until `take_weights`.
        names: names of the linears gate, up and down of one expert.
    """

    def __init__(self, fused: nn.Module, names: Sequence[str] = ROLES) -> None:
        super().__init__()
        layout = find_layout(fused)
        assert layout is not None
        self.layout = layout
        self.names = dict(zip(ROLES, names, strict=True))
        self._fused = (fused,)  # in a tuple, so that its parameters are not counted as ours
        self.every_token = False  # show all tokens to all experts; what a token is not routed to has no effect
        self.grouped_gemm: GroupedProducts | None = None  # instead of calling the linears, where that is the same
        self._modules |= fused._modules  # not by add_module, which `__getattr__` makes believe that they are there
        weights = layout.split(fused.get_parameter(self._up)[0], fused.get_parameter("down_proj")[0])
        for index in range(layout.count):
            expert = Expert()
            for role, weight in zip(layout.roles, weights, strict=True):
                out_features, in_features = weight.shape
                linear = nn.Linear(in_features, out_features, bias=layout.biased, device="meta", dtype=weight.dtype)
                expert.add_module(self.names[role], linear)
            self.add_module(str(index), expert)
        self.before_first, self.before_last = Entrance(), Entrance()
        self.train(fused.training)

    @property
    def fused(self) -> nn.Module:
        return self._fused[0]

    def __getattr__(self, name: str) -> Any:
        """What the fused module has besides: models look at its counts, and initialise its weights on meta."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_fused", "layout"):  # not there yet, or not in a copy under construction
                raise
            return getattr(self._fused[0], name)

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.layout.gated else "up_proj"

    def linear(self, index: int, role: str) -> nn.Module:
        return self.get_submodule(f"{index}.{self.names[role]}")

    def entrances(self) -> Iterator[tuple[nn.Module, Entrance, int]]:
        """Every linear with the `Entrance` that its input passes, and the index of its expert."""
        for index in range(self.layout.count):
            for role in self.layout.roles:
                entrance = self.before_last if role == "down_proj" else self.before_first
                yield self.linear(index, role), entrance, index

    def linears(self) -> tuple[list[nn.Module], tuple[str, ...], str, tuple[nn.Module, ...]]:
        """The experts; the names of their first linears, in the order of calls, and of the last; the entrances."""
        firsts = tuple(self.names[role] for role in reversed(self.layout.roles[:-1]))
        experts = [self.get_submodule(str(index)) for index in range(self.layout.count)]
        return experts, firsts, self.names["down_proj"], (self.before_first, self.before_last)

    def take_weights(self) -> None:
        """Move the fused weights into the linears.

        Raises:
            ModelError: with them the linears do not compute what the fused module does.
        """
        fused, layout = self.fused, self.layout
        parts = [(fused.get_parameter(self._up), fused.get_parameter("down_proj"), "weight")]
        if layout.biased:
            parts.append((fused.get_parameter(f"{self._up}_bias"), fused.get_parameter("down_proj_bias"), "bias"))
        for up, down, kind in parts:
            for index in range(layout.count):
                for role, values in zip(layout.roles, layout.split(up[index], down[index]), strict=True):
                    parameter = nn.Parameter(values.detach().contiguous(), requires_grad=up.requires_grad)
                    setattr(self.linear(index, role), kind, parameter)
        self._check()
        for name, parameter in fused.named_parameters(recurse=False):
            setattr(fused, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def return_weights(self) -> None:
        """Move the linears' weights, all of them dense, back into the fused module, in their dtype."""
        for kind, end in (("weight", ""), ("bias", "_bias"))[: 1 + self.layout.biased]:
            fused = [self._joined(index, kind) for index in range(self.layout.count)]
            for name, values in zip((self._up, "down_proj"), zip(*fused, strict=True), strict=True):
                setattr(self.fused, f"{name}{end}", nn.Parameter(torch.stack(values), requires_grad=False))

    def _joined(self, index: int, kind: str) -> tuple[Tensor, Tensor]:
        """One expert's weights or biases in the fused form."""
        parts = (getattr(self.linear(index, role), kind).detach() for role in self.layout.roles)
        *firsts, down = (part.T if part.ndim == 2 else part for part in parts)  # weights as (in, out)
        up = self.layout.joined(*firsts) if self.layout.gated else firsts[0]
        return (up, down) if self.layout.transposed or kind == "bias" else (up.T, down.T)

    def _check(self) -> None:
        """Compare with the fused module on a few random tokens."""
        reference = self.fused.get_parameter("down_proj")
        count, width = self.layout.count, reference.shape[2 if self.layout.transposed else 1]
        generator = torch.Generator().manual_seed(0)
        tokens = CHECKED_TOKENS if self.layout.routed else count * 2
        x = torch.randn(tokens, width, generator=generator, device="cpu").to(reference.device, reference.dtype)
        routing: tuple[Tensor, ...] = ()
        if self.layout.routed:
            choices = torch.rand(tokens, count, generator=generator, device="cpu").topk(min(2, count))
            routing = choices.indices.to(x.device), choices.values.to(x.device, x.dtype)
        with torch.no_grad():
            expected, found = self.fused(x, *routing), self(x, *routing)
        error = (found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        if not error <= CHECKED_ERROR and bool(reference.isfinite().all()):  # damaged weights are reported by name
            raise ModelError(
                f"{type(self.fused).__name__} computes something else than its experts' linears would: relative error "
                f"{float(error):.2g}. Its kind of experts is not supported; please report the architecture."
            )

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """The fused module's forward, by separate linears.

        Args:
            hidden_states: (tokens, features).
            routing: the chosen experts and their weights, both (tokens, choices); absent where `routed` is False.
        Returns:
            (tokens, features).
        """
        if not routing:
            # A token that an expert is not to see comes as zeros, and without biases leaves as zeros.
            seen = hidden_states.any(-1) | (self.layout.biased or self.every_token)
            counts = seen.view(self.layout.count, -1).sum(-1).tolist()
            result = torch.zeros_like(hidden_states)
            result[seen] = torch.cat(self._outputs(hidden_states[seen].split(counts)))
            return result
        chosen, weights = routing
        if (
            self.grouped_gemm is not None
            and not self.every_token
            and self.grouped_gemm.why_not(chosen.numel(), hidden_states, weights) is None
        ):
            return self._at_once(self.grouped_gemm, hidden_states, chosen, weights)
        choices = chosen.shape[-1]
        order = chosen.reshape(-1).argsort(stable=True)  # (token, choice) pairs, those of the first expert first
        counts = chosen.reshape(-1).bincount(minlength=self.layout.count)[: self.layout.count].tolist()
        taken = order[: sum(counts)]  # choices beyond the last expert stand for none
        token_of = taken // choices
        if self.every_token:
            every = self._outputs([hidden_states] * self.layout.count)
            outputs = [output[tokens] for output, tokens in zip(every, token_of.split(counts), strict=True)]
        else:
            outputs = self._outputs(hidden_states[token_of].split(counts))
        return self._summed(torch.cat(outputs), taken, hidden_states, chosen, weights)

    def _at_once(
        self, grouped_gemm: GroupedProducts, hidden_states: Tensor, chosen: Tensor, weights: Tensor
    ) -> Tensor:
        """The forward by grouped products: the host never waits for the routing."""
        count = self.layout.count
        experts, order = chosen.reshape(-1).sort(stable=True)
        starts = torch.searchsorted(
            experts, torch.arange(count + 1, dtype=experts.dtype, device=experts.device), out_int32=True
        )
        firsts = grouped_gemm.first(hidden_states[order // chosen.shape[-1]], starts, experts)
        routed = grouped_gemm.last(self._gated(*firsts), starts, experts)
        routed = routed.masked_fill((experts >= count)[:, None], 0)  # choices beyond the last expert stand for none
        return self._summed(routed, order, hidden_states, chosen, weights)

    def _summed(self, routed: Tensor, taken: Tensor, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted and summed by token; `taken` are the (token, choice) pairs that `routed` belongs to."""
        if getattr(self.fused, "has_post_expert_norm", False):
            routed = self.get_submodule("post_expert_norm")(routed)
        result = hidden_states.new_zeros(chosen.numel(), hidden_states.shape[-1])
        result[taken] = (routed * weights.reshape(-1)[taken, None]).to(result.dtype)
        return result.view(*chosen.shape, -1).sum(-2)

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One entry per expert. All experts' first linears run before any second one; those without tokens do not."""
        inputs = self.before_first(inputs)
        inputs = self.before_last([self._between(index, x) if x.shape[0] else x for index, x in enumerate(inputs)])
        return [self.linear(index, "down_proj")(x) if x.shape[0] else x for index, x in enumerate(inputs)]

    def _between(self, index: int, x: Tensor) -> Tensor:
        """What one expert's last linear gets."""
        return self._gated(*(self.linear(index, role)(x) for role in reversed(self.layout.roles[:-1])))

    def _gated(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """What a last linear gets of the first ones' outputs."""
        act: Callable[[Tensor], Tensor] = getattr(self.fused, "act_fn", nn.Identity())
        if gate is None:
            return act(up)
        apply: Callable[[Tensor], Tensor] | None = getattr(self.fused, "_apply_gate", None)
        return act(gate) * up if apply is None else apply(self.layout.joined(gate, up))


def find_fused_experts(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside `module` that hold experts in fused form, by name."""
    return {name: child for name, child in module.named_modules() if find_layout(child) is not None}


def put_split(model: nn.Module, experts: dict[str, Experts]) -> None:
    """Put split experts into the model, in the place of the fused ones."""
    for name, module in experts.items():
        model.set_submodule(name, module)


def put_fused(model: nn.Module, experts: dict[str, Experts]) -> None:
    """Put the fused modules back, so that weights can be read into them."""
    for name, module in experts.items():
        model.set_submodule(name, module.fused)
