# SPDX-License-Identifier: Apache-2.0
"""Which programs read a checkpoint, and why not: a table of readers, each a predicate on the facts about one linear.

Sources: vLLM 0.32, its auto_gptq and Marlin code, and runs of it on a CPU; SGLang's gptq and gptq_marlin
configurations; GPTQModel 7.6. docs/interop.md says which of these were tried.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from .scheme import LayerScheme

FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What servers make of linears that read the same input, and of which: so these need one scheme."""

GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # of its torch kernel, which runs everywhere

MARLIN_OUT, MARLIN_IN = 64, 128  # what vLLM's GPU kernel wants out_features and in_features of a part to divide by


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What readers look at.

    Args:
        split: how tensor parallelism splits it, as in a model's base_model_tp_plan: "colwise…", "rowwise…", or None.
        checkpoint_format: "gptq" or "gptq_v2".
        by_gptqmodel: whether GPTQModel wrote it.
    """

    name: str
    out_features: int
    in_features: int
    scheme: LayerScheme
    split: str | None = None
    checkpoint_format: str = "gptq"
    by_gptqmodel: bool = False

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def of_an_expert(self) -> bool:
        return ".experts.*." in self.kind


def kind_of(name: str) -> str:
    """A tensor's or module's name with * for numbers: the same in all blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def split_of(name: str, plan: Mapping[str, str]) -> str | None:
    """How a model's tensor-parallel plan splits the linear of this name."""
    return next((way for pattern, way in plan.items() if fnmatch(name, f"*{pattern}")), None)


def refusals(
    reader: str, linears: Collection[Linear], tensor_parallel: int = 1, dense: Iterable[str] = ()
) -> tuple[str, ...]:
    """What a reader of the table refuses, one reason per kind of linear; empty if it reads them all.

    Args:
        tensor_parallel: over how many GPUs it splits the model.
        dense: names of the linears that are not quantized.
    """
    reasons = [(linear.kind, READERS[reader](linear, tensor_parallel)) for linear in linears]
    if reader in FUSING:
        reasons += _why_not_fused(linears, dense)
    return tuple(sorted({f"{kind}: {reason}" for kind, reason in reasons if reason is not None}))


def _why_not_fused(linears: Iterable[Linear], dense: Iterable[str]) -> Iterator[tuple[str, str]]:
    schemes: dict[str, LayerScheme | None] = dict.fromkeys(dense)
    schemes |= {linear.name: linear.scheme for linear in linears}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for parts in FUSED_NAMES.values():
            found = {part: schemes[f"{parent}.{part}"] for part in parts if f"{parent}.{part}" in schemes}
            if len({scheme and (scheme.bits, scheme.group_size, scheme.symmetric) for scheme in found.values()}) > 1:
                how = (f"{part} {scheme.bits}-bit" if scheme else f"{part} not" for part, scheme in found.items())
                yield (
                    kind_of(parent),
                    f"it fuses {', '.join(found)}, which are quantized differently: {', '.join(how)}",
                )


def _why_not_vllm(linear: Linear, parts: int) -> str | None:
    if reason := linear.scheme.why_not_served(linear.in_features):
        return reason
    if parts == 1 or linear.split is None:
        return None
    if linear.split.startswith("colwise"):
        if linear.out_features % (parts * MARLIN_OUT):
            return f"{linear.out_features} outputs in {parts} parts are no multiples of {MARLIN_OUT}"
        return None
    width = linear.scheme.group_width(linear.in_features)
    if linear.scheme.group_size != -1 and linear.in_features % (parts * width):
        return f"{linear.in_features} inputs in {parts} parts are no multiples of the group size {width}"
    if linear.in_features % (parts * MARLIN_IN):
        return f"{linear.in_features} inputs in {parts} parts are no multiples of {MARLIN_IN}"
    return None


def _why_not_vllm_on_cpus(linear: Linear, parts: int) -> str | None:
    if reason := _why_not_vllm(linear, 1):
        return reason
    if linear.scheme.bits != 4:
        return f"{linear.scheme.bits} bits; its CPU kernel has 4"
    if linear.of_an_expert:
        return "mixtures of experts; its CPU kernel for them is for other processors"
    return None


def _why_not_sglang(linear: Linear, parts: int) -> str | None:
    if linear.checkpoint_format != "gptq":
        return f"checkpoint_format={linear.checkpoint_format!r}; it reads 'gptq'"
    if linear.in_features % (parts * linear.scheme.group_width(linear.in_features)):
        shared = f" in {parts} parts" if parts > 1 else ""
        return f"{linear.in_features} inputs{shared} are no multiples of the group size"
    return None


def _why_not_gptqmodel(linear: Linear, parts: int) -> str | None:
    if not linear.scheme.symmetric and linear.checkpoint_format == "gptq" and not linear.by_gptqmodel:
        return "asymmetric grids in checkpoint_format 'gptq' of other tools; use format='gptq_v2'"
    if linear.scheme.group_size not in GPTQMODEL_GROUP_SIZES:
        return f"group_size={linear.scheme.group_size}; use {', '.join(map(str, GPTQMODEL_GROUP_SIZES[1:]))} or -1"
    return "it does not split models over GPUs by tensor parallelism" if parts > 1 else None


def _why_not_optq(linear: Linear, parts: int) -> str | None:
    return "quantized linears are not split by tensor parallelism yet" if parts > 1 else None


READERS: dict[str, Callable[[Linear, int], str | None]] = {
    "transformers": _why_not_optq,
    "gptqmodel": _why_not_gptqmodel,
    "sglang": _why_not_sglang,
    "vllm": _why_not_vllm,
    "vllm-cpu": _why_not_vllm_on_cpus,
}
"""(linear, GPUs) -> why a reader does not read it, or None. "transformers" means with optq."""

FUSING = ("sglang", "vllm", "vllm-cpu")
"""Readers that make one linear of those in `FUSED_NAMES`."""
