# SPDX-License-Identifier: Apache-2.0
"""What the fields mean for each linear: the only translation of a config into `LayerScheme`s."""

import copy
from dataclasses import dataclass
from typing import Any

from optq.readers import kind_of
from optq.scheme import ActOrder, LayerScheme

from .dynamic import OVERRIDES, choices_of, matching
from .fields import BUDGETS, DEFAULT_DAMPING, Fields


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """What an effort switches on."""

    propagation: float
    refinement: int
    polish: int


EFFORTS: dict[str, _Pieces] = {
    "fast": _Pieces(propagation=0.0, refinement=1, polish=0),
    "default": _Pieces(propagation=0.5, refinement=3, polish=0),
    "max": _Pieces(propagation=0.5, refinement=3, polish=3),
}


class Schemes(Fields):
    """The fields, and the `LayerScheme` of each linear that follows from them."""

    def candidates_for(self, name: str, out_features: int, in_features: int) -> list[LayerScheme]:
        """The schemes that a budget may choose from for one linear; only one if `dynamic` names it."""
        base = self.scheme_for(name)
        assert base is not None  # it is planned
        if matching(self.dynamic, name) is not None:
            return [base]
        return list(choices_of(base, self.serving, out_features, in_features))

    @property
    def has_budget(self) -> bool:
        return any(getattr(self, name) is not None for name in BUDGETS)

    def scheme_for(self, name: str) -> LayerScheme | None:
        """The scheme of the linear `name` of the model, or None if it is not quantized."""
        is_restricted = self.modules_in_block_to_quantize is not None and kind_of(name) != name  # not the head
        if is_restricted and not name.endswith(tuple(f".{entry}" for entry in self.listed_modules)):
            return None
        pattern = matching(self.dynamic, name)
        if pattern is None or self.dynamic is None:
            return self._base_scheme()
        return None if pattern.startswith("-:") else self._scheme_with(self.dynamic[pattern])

    def all_schemes(self) -> list[LayerScheme]:
        """All schemes that linears may have, whatever their names."""
        rules = [rule for pattern, rule in (self.dynamic or {}).items() if not pattern.startswith("-:")]
        return [self._base_scheme(), *map(self._scheme_with, rules)]

    @property
    def listed_modules(self) -> list[str]:
        """The entries of `modules_in_block_to_quantize` as one flat list."""
        groups = self.modules_in_block_to_quantize or []
        return [entry for group in groups for entry in ([group] if isinstance(group, str) else group)]

    @property
    def act_order(self) -> ActOrder:
        if self.desc_act:
            return "desc_act"
        if self.static_groups is False:
            return "none"
        return "group_aware" if self.act_group_aware else "static"

    @property
    def _pieces(self) -> _Pieces:
        return EFFORTS[self.effort or "default"]

    @property
    def reconstruction_passes(self) -> int:
        return self._pieces.polish if self.polish is None else self.polish

    def _base_scheme(self) -> LayerScheme:
        return LayerScheme(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.sym,
            act_order=self.act_order,
            grid=self.grid or "weighted",
            damping=DEFAULT_DAMPING if self.damp_percent is None else self.damp_percent,
            propagation=self._pieces.propagation if self.propagation is None else self.propagation,
            refinement=self._pieces.refinement if self.refinement is None else self.refinement,
        )

    def _scheme_with(self, override: dict[str, Any]) -> LayerScheme:
        """The base scheme with one entry of `dynamic` applied."""
        merged = copy.copy(self)
        for key in OVERRIDES:
            if key in override:
                setattr(merged, key, override[key])
        return merged._base_scheme()
