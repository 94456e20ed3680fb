# SPDX-License-Identifier: Apache-2.0
"""Stages: the linears of a block that read the same input, found by watching one forward of the block.

q, k and v share an input, and so do gate and up; o and down have their own. Each stage needs one Hessian.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .linears import LinearView


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The linears of a block that read the same input, and so share a Hessian.

    Args:
        views: in the order in which the block calls them.
        calls: calls of the first of them per forward of the block.
        rows: rows of the input while the stages were observed.
        residual: the module whose input, the residual stream, the output of the stage's only linear is added to; None
            if there is none, or it is not known.
    """

    views: tuple[LinearView, ...]
    calls: int
    rows: int
    residual: nn.Module | None = None

    @property
    def in_features(self) -> int:
        return self.views[0].shape[1]

    @property
    def family(self) -> tuple[str, ...] | None:
        """The names that an expert's stage shares with those of the layer's other experts; None for other stages."""
        families = [view.family for view in self.views if view.family is not None]
        return tuple(families) if len(families) == len(self.views) else None

    @property
    def stop(self) -> tuple[nn.Module, int | None]:
        """The module whose call shows the inputs of the stage's family, and the stage's index in them or None."""
        return self.views[0].entrance or (self.views[0].module, None)

    @property
    def orderly(self) -> bool:
        """Whether every forward reaches the stage's group once, before it has run any of it."""
        return self.calls == 1 and (self.family is None or self.views[0].entrance is not None)

    @property
    def name(self) -> str:
        return "+".join(view.name.rpartition(".")[2] for view in self.views)


class _StageReached(Exception):
    """Ends a block's forward once the last input that is wanted has been seen."""


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input (..., in) of a linear that is called with these arguments."""
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


@contextmanager
def _watching(modules: list[nn.Module], seen: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call `seen(module, input)` before each forward of one of the modules."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen(module, first_input(args, kwargs))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe_stages(views: list[LinearView], run: Callable[[], Any]) -> list[Stage]:
    """Group `views` by the tensor they read while `run` executes the block once, in order of execution.

    Linears that `run` never calls are in no stage, but for those of experts: what no token was routed to this time is
    grouped as in an expert that had some.
    """
    view_of = {view.module: view for view in views}
    # Inputs are kept alive: otherwise a freed tensor's address could be taken for another's.
    inputs: dict[tuple[object, ...], Tensor] = {}
    members: dict[tuple[object, ...], list[LinearView]] = {}
    calls: dict[nn.Module, int] = {}

    def seen(module: nn.Module, x: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if calls[module] == 1:
            # The same memory, unchanged in between: two views of one tensor count as one input.
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            inputs.setdefault(key, x)
            members.setdefault(key, []).append(view_of[module])

    with _watching(list(view_of), seen):
        run()
    stages = [
        Stage(
            views=tuple(group), calls=calls[group[0].module], rows=inputs[key].numel() // max(inputs[key].shape[-1], 1)
        )
        for key, group in members.items()
    ]
    return _with_idle_experts(stages, views)


def _with_idle_experts(stages: list[Stage], views: list[LinearView]) -> list[Stage]:
    """Add the stages of experts that no token was routed to, beside those of their family."""
    completed: list[Stage] = []
    stage_of = {stage.views: stage for stage in stages}
    for family in dict.fromkeys(stage.family or stage for stage in stages):
        if isinstance(family, Stage):
            completed.append(family)
            continue
        # The counterparts of each view, expert by expert.
        columns = [[view for view in views if view.family == name] for name in family]
        completed += [stage_of.get(row, Stage(views=row, calls=1, rows=0)) for row in zip(*columns, strict=True)]
    return completed


def independent_groups(stages: list[Stage]) -> list[list[Stage]]:
    """Group stages that do not depend on one another, those of one family; in the order of execution."""
    groups: dict[object, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(stage.family or stage, []).append(stage)
    return list(groups.values())


def feed_stages(
    stages: list[Stage],
    run: Callable[[], Any],
    feed: Callable[[Stage, tuple[Tensor, Tensor | None]], None],
    *,
    to_the_end: bool = False,
) -> Any:
    """Hand the inputs of `stages` to `feed(stage, (input, residual))` while `run` executes the block.

    An input is (..., in), the residual stream (..., out), or None where the stage has none. Unless `to_the_end`, the
    forward is cut off as soon as the last of these inputs has been seen, and None returned instead of what `run`
    returns.
    """
    stage_of = {stage.views[0].module: stage for stage in stages}
    due = {stage.views[0].module: stage.calls for stage in stages}
    residuals: dict[nn.Module, Tensor | None] = {
        stage.residual: None for stage in stages if stage.residual is not None
    }

    def seen(module: nn.Module, x: Tensor) -> None:
        if module in residuals:
            residuals[module] = x
        if module not in due:
            return
        stage = stage_of[module]
        feed(stage, (x, None if stage.residual is None else residuals[stage.residual]))
        due[module] -= 1
        if not to_the_end and not any(due.values()):
            raise _StageReached

    with _watching(list({**due, **residuals}), seen), suppress(_StageReached):
        return run()
    return None
