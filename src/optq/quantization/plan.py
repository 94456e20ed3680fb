# SPDX-License-Identifier: Apache-2.0
"""What will be done to which linear, decided and checked before any work."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from optq.errors import ConfigError
from optq.model import LinearView, find_linears, is_linear
from optq.scheme import SERVED_GROUP_SIZES, LayerScheme

logger = logging.getLogger(__name__)

NOTABLE_SHARE = 0.02
EXCLUDED, ROUTES = "excluded by the configuration", "it routes tokens to experts"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear that will be quantized, and its scheme."""

    view: LinearView
    scheme: LayerScheme


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which linears of which blocks will be quantized and how, checked before the work.

    Args:
        blocks: name and module, in order.
        targets: per block, its linears to quantize.
        skipped: name of each linear of a block that is left as it is, with the reason.
        head: the name of the output head, if that is the last of `blocks`.
    """

    blocks: dict[str, nn.Module]
    targets: dict[str, tuple[Target, ...]]
    skipped: dict[str, str]
    head: str | None = None

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """The targets of all blocks."""
        return tuple(target for targets in self.targets.values() for target in targets)

    @property
    def widest(self) -> int:
        """The largest in_features of a linear that will be quantized."""
        return max(target.view.shape[1] for target in self.all_targets)

    @property
    def propagates(self) -> bool:
        """Whether any layer compensates the errors of earlier ones, so that the original model must run as well."""
        return any(target.scheme.propagation > 0 for target in self.all_targets)

    def without_head(self) -> "Plan":
        """A copy of the plan without the output head: it is no block, and not quantized."""
        blocks = {name: block for name, block in self.blocks.items() if name != self.head}
        targets = {name: targets for name, targets in self.targets.items() if name != self.head}
        return replace(self, blocks=blocks, targets=targets, head=None)


def plan_quantization(
    blocks: dict[str, nn.Module], scheme_for: Callable[[str], LayerScheme | None], head: str | None = None
) -> Plan:
    """Decide what happens to every linear of `blocks`, which may be on the meta device.

    Args:
        scheme_for: name of a linear -> its scheme, or None to leave it alone.
        head: the name of the output head, if that is the last of `blocks`.
    Raises:
        ConfigError: a group size does not fit a layer, or nothing is left to quantize.
    """
    targets: dict[str, tuple[Target, ...]] = {}
    skipped: dict[str, str] = {}
    ragged: dict[int, set[int]] = {}
    for block_name, block in blocks.items():
        skipped |= _other_weights(block_name, block)
        chosen = []
        for name, view in find_linears(block, block_name).items():
            out_features, in_features = view.shape
            scheme = scheme_for(name)
            if view.routes:
                skipped[name] = ROUTES
            elif scheme is None:
                skipped[name] = EXCLUDED
            elif reason := scheme.why_not_packed(in_features, out_features):
                skipped[name] = reason
            elif reason := scheme.why_not_grouped(in_features):
                raise ConfigError(
                    f"{name}: {reason}. Choose another group_size, or leave this layer in full precision with "
                    f"dynamic={{'-:{name}': {{}}}}."
                )
            else:
                chosen.append(Target(view=view, scheme=scheme))
                if in_features % scheme.group_width(in_features):
                    ragged.setdefault(scheme.group_size, set()).add(in_features)
        targets[block_name] = tuple(chosen)
    if not any(targets.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ConfigError(f"No linear layer is left to quantize ({len(skipped)} skipped; {reasons or 'none found'}).")
    unasked: dict[tuple[str, str], list[str]] = {}
    for name, reason in skipped.items():
        if reason not in (EXCLUDED, ROUTES):
            unasked.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    for (_, reason), names in unasked.items():
        more = f" and {len(names) - 1} more of that name" if len(names) > 1 else ""
        logger.warning("%s%s stays in full precision: %s.", names[0], more, reason)
    for group_size, widths in ragged.items():
        logger.warning(
            "group_size=%d does not divide in_features %s: the last group of each row is narrower. vLLM does not read "
            "such a checkpoint; it would accept group_size %s.",
            group_size,
            ", ".join(map(str, sorted(widths))),
            ", ".join(str(size) for size in (*SERVED_GROUP_SIZES, -1) if all(width % size == 0 for width in widths)),
        )
    return Plan(blocks=blocks, targets=targets, skipped=skipped, head=head)


def _other_weights(block_name: str, block: nn.Module) -> dict[str, str]:
    """What holds a good part of a block's weights and is no linear layer, with that part in words."""
    total = sum(parameter.numel() for parameter in block.parameters())
    found = {}
    for module_name, module in block.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if isinstance(module, nn.Linear) and not is_linear(module):
            found[f"{block_name}.{module_name}"] = (
                f"{type(module).__name__} computes something else than the product with its weight"
            )
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1 and parameter.numel() > NOTABLE_SHARE * total:
                found[f"{block_name}.{name}"] = (
                    f"it is a parameter of shape {tuple(parameter.shape)} and no linear layer, with "
                    f"{parameter.numel() / total:.0%} of its block's weights"
                )
    return found
