# SPDX-License-Identifier: Apache-2.0
"""Which programs read a checkpoint, and why not: a table of readers, each a predicate on the facts about one linear.

Sources: vLLM's auto_gptq.py, moe_wna16.py, gptq_utils.py, marlin_utils.py, int_wna16.py and its kernels marlin.py and
cpu.py, read in every version of the table, and runs of 0.32 on a CPU; SGLang's gptq.py, its schemes and
marlin_utils.py, read in 0.5.20 and 0.5.23; GPTQModel 7.6 and runs of it. docs/interop.md says which were tried.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from .errors import ConfigError, counted
from .scheme import PACKED_WORD_BITS, LayerScheme

FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What servers make of linears that read the same input, and of which: so these need one scheme."""

GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # of its torch kernel, which runs everywhere

MARLIN_TILES = ((64, 128), (128, 64))
"""Of what the outputs and inputs of a part are multiples on servers' GPU kernel; either pair will do."""

VLLM_CPU_TILE = 32  # the same, of vLLM's CPU kernel

NAMED = 3  # kinds of linears of which a reason is told


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantized linear, with the facts by which readers accept or refuse it.

    Args:
        split: how tensor parallelism splits it, as in a model's base_model_tp_plan: "colwise…", "rowwise…", or None.
        checkpoint_format: "gptq" or "gptq_v2".
        by_gptqmodel: whether GPTQModel wrote it.
        head_width: outputs per attention head, of a linear that makes queries, keys or values; 0 of others.
        fused_outputs: of the linear that a server makes of this one and others, see `FUSED_NAMES`; 0 if it does not.
    """

    name: str
    out_features: int
    in_features: int
    scheme: LayerScheme
    split: str | None = None
    checkpoint_format: str = "gptq"
    by_gptqmodel: bool = False
    fused_outputs: int = 0
    head_width: int = 0

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def of_an_expert(self) -> bool:
        return ".experts.*." in self.kind

    @property
    def leads_out(self) -> bool:
        """Whether this is the last linear (down) of an expert."""
        return self.name.endswith((".down_proj", ".w2"))

    @property
    def widths(self) -> tuple[int, int]:
        """(hidden size of the layer, intermediate size of the expert), of an expert's linear."""
        return (self.out_features, self.in_features) if self.leads_out else (self.in_features, self.out_features)

    def why_not_divided(self, parts: int, outputs: int, inputs: int) -> str | None:
        """Why parts for so many GPUs have other shapes than multiples of these numbers, or None."""
        for size, what, way, tile in (
            (self.fused_outputs or self.out_features, "outputs", "colwise", outputs),
            (self.in_features, "inputs", "rowwise", inputs),
        ):
            count = parts if (self.split or "").startswith(way) else 1
            if size % (count * tile):
                fused = " with what is fused to it" if way == "colwise" and self.fused_outputs else ""
                return f"{size} {what}{fused}{_in(count)} are no multiples of {tile}"
        return None


def pattern_of(parent: str, children: list[str]) -> str:
    """A regular expression for linears of one parent module, and for what servers make of them."""
    # vLLM asks by the name of the fused layer.
    fused = [whole for whole, parts in FUSED_NAMES.items() if set(parts) <= set(children)]
    names = "|".join(map(re.escape, (*children, *fused)))
    return rf"^{re.escape(parent)}\.(?:{names})$" if parent else f"^(?:{names})$"


def kind_of(name: str) -> str:
    """The name of a tensor or module with * for numbers, which is the same in all blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def split_of(name: str, plan: Mapping[str, str]) -> str | None:
    """How a tensor-parallel plan splits the linear `name`, such as "colwise"; None if it does not."""
    return next((way for pattern, way in plan.items() if fnmatch(name, f"*{pattern}")), None)


def _in(parts: int) -> str:
    return f" in {parts} parts" if parts > 1 else ""


def refusals(
    reader: str,
    linears: Collection[Linear],
    tensor_parallel: int = 1,
    dense: Iterable[str] = (),
    version: str | None = None,
) -> tuple[str, ...]:
    """Why a reader refuses a checkpoint: every reason once, with its kinds of linears; empty if it reads them all.

    Args:
        tensor_parallel: over how many GPUs it splits the model.
        dense: names of the linears that are not quantized.
        version: see `rules_of`.
    Raises:
        ConfigError: no such reader, or no such version of it, is in the table.
    """
    rules = rules_of(reader, version)
    kinds_of: dict[str, dict[str, None]] = {}
    for kind, reason in _why_not_fused(linears, dense) if rules.fuses else ():
        kinds_of.setdefault(reason, {})[kind] = None
    for linear in _fused(linears) if rules.fuses else linears:
        for reason in rules.why_not(linear, tensor_parallel):
            kinds_of.setdefault(reason, {})[linear.kind] = None
    every = {linear.kind for linear in linears}
    return tuple(sorted(f"{_in_words(list(kinds), every)}: {reason}" for reason, kinds in kinds_of.items()))


def _in_words(kinds: list[str], every: Collection[str]) -> str:
    """Some of the kinds of linears, and how many there are."""
    if len(kinds) > 1 and set(kinds) == set(every):
        return "all linears"
    return ", ".join(kinds[:NAMED]) + (
        f" and {counted(len(kinds) - NAMED, 'more kind')}" if len(kinds) > NAMED else ""
    )


def _served_as(name: str) -> str:
    """The name of the linear that a server makes of this one and others; all experts of a layer are one."""
    layer, expert, _ = name.partition(".experts.")
    if expert and kind_of(name).count(".experts.*."):
        return f"{layer}.experts"
    parent, _, part = name.rpartition(".")
    return next((f"{parent}.{fused}" for fused, parts in FUSED_NAMES.items() if part in parts), name)


def _fused(linears: Iterable[Linear]) -> Iterator[Linear]:
    """The linears with the widths of the fused ones that a server makes of them."""
    linears = list(linears)
    outputs: Counter[str] = Counter()
    for linear in linears:
        outputs[_served_as(linear.name)] += linear.out_features
    for linear in linears:
        fused = not linear.of_an_expert and outputs[_served_as(linear.name)] != linear.out_features
        yield replace(linear, fused_outputs=outputs[_served_as(linear.name)]) if fused else linear


def _why_not_fused(linears: Iterable[Linear], dense: Iterable[str]) -> Iterator[tuple[str, str]]:
    schemes: dict[str, LayerScheme | None] = dict.fromkeys(dense)
    schemes |= {linear.name: linear.scheme for linear in linears}
    served: dict[str, dict[str, LayerScheme | None]] = {}
    for name, scheme in schemes.items():
        served.setdefault(_served_as(name), {})[name] = scheme
    for one, found in served.items():
        if len({scheme and (scheme.bits, scheme.group_size, scheme.symmetric) for scheme in found.values()}) > 1:
            parts = {name.rpartition(".")[2]: None for name in found}
            how = {
                f"{name.rpartition('.')[2]} {f'{scheme.bits}-bit' if scheme else 'not'}": None
                for name, scheme in found.items()
            }
            yield kind_of(one), f"it fuses {', '.join(parts)}, which are quantized differently: {', '.join(how)}"


def _listed(reason: str | None) -> list[str]:
    return [] if reason is None else [reason]


def _why_not_vllm(linear: Linear, parts: int) -> list[str]:
    reasons = linear.scheme.not_served(linear.in_features)
    # Of shapes nothing can be said before there are bits and groups that it knows.
    plain = replace(linear.scheme, symmetric=True, act_order="static")
    return reasons if plain.not_served(linear.in_features) else [*reasons, *_listed(_why_not_in_shape(linear, parts))]


def _why_not_in_shape(linear: Linear, parts: int) -> str | None:
    codes_per_word = 32 // linear.scheme.bits
    whole = codes_per_word if linear.scheme.group_size == -1 else linear.scheme.group_size
    if not linear.of_an_expert:
        return linear.why_not_divided(parts, codes_per_word, whole)  # its GPU kernel pads what is no tile
    hidden, width = linear.widths
    if linear.scheme.group_size == -1 and hidden % 128:
        return f"experts {hidden} wide without groups; use group_size=128, 64 or 32, or a multiple of 128"
    smallest = min(whole, 32)  # parts that cut groups run on a kernel that can halve them, down to 32
    if width % (parts * smallest):
        return f"experts with {width} features inside{_in(parts)}, which are no multiples of {smallest}"
    return None


def _why_not_vllm_with_desc_act(linear: Linear, parts: int) -> list[str]:
    """Refusals of the vLLM versions that still read desc_act=True, which they do not pad."""
    if linear.scheme.act_order != "desc_act" or linear.scheme.group_size == -1:
        return _why_not_vllm(linear, parts)
    if reasons := _why_not_vllm(replace(linear, scheme=replace(linear.scheme, act_order="static")), parts):
        return reasons
    if linear.of_an_expert:
        reason = _why_not_marlin_experts(linear, parts)
    else:
        reason = linear.why_not_divided(parts, *MARLIN_TILES[0])
    return _listed(reason and f"desc_act=True with {reason}")


def _why_not_marlin_experts(linear: Linear, parts: int) -> str | None:
    (hidden, width), whole = linear.widths, max(64, linear.scheme.group_size)
    if hidden % 128:
        return f"experts {hidden} wide, which is no multiple of 128"
    return (
        f"experts with {width} features inside{_in(parts)}, no multiples of {whole}"
        if width % (parts * whole)
        else None
    )


def _why_not_vllm_on_cpus(linear: Linear, parts: int) -> list[str]:
    reasons = _why_not_vllm(linear, parts)
    if linear.scheme.bits == 8:
        reasons.append("8 bits; its CPU kernel has 4")
    if linear.of_an_expert:
        reasons.append("mixtures of experts; its CPU kernel for them is for other processors")
    return reasons or _listed(linear.why_not_divided(parts, VLLM_CPU_TILE, VLLM_CPU_TILE))


def _why_not_sglang(linear: Linear, parts: int) -> list[str]:
    scheme = replace(linear.scheme, act_order="static")  # it reads desc_act=True
    if reasons := scheme.not_served(linear.in_features):
        return reasons
    if linear.of_an_expert:
        return _listed(_why_not_marlin_experts(linear, parts))
    if scheme.group_size != -1 and (reason := linear.why_not_divided(parts, 1, scheme.group_size)):
        return [reason]
    tiles = [linear.why_not_divided(parts, *tile) for tile in MARLIN_TILES]
    return _listed(tiles[0] if all(tiles) else None)


def _why_not_gptqmodel(linear: Linear, parts: int) -> list[str]:
    reasons = []
    if not linear.scheme.symmetric and linear.checkpoint_format == "gptq" and not linear.by_gptqmodel:
        reasons.append("asymmetric grids in checkpoint_format 'gptq' of other tools; use format='gptq_v2'")
    if linear.scheme.group_size not in GPTQMODEL_GROUP_SIZES:
        sizes = ", ".join(map(str, GPTQMODEL_GROUP_SIZES[1:]))
        reasons.append(f"group_size={linear.scheme.group_size}; use {sizes} or -1")
    return [*reasons, *_listed("it does not split models over GPUs by tensor parallelism" if parts > 1 else None)]


def _why_not_optq(linear: Linear, parts: int) -> list[str]:
    way = linear.split
    if linear.of_an_expert:
        way = "rowwise" if linear.leads_out else "colwise"
    if way == "colwise":
        heads = linear.head_width
        return _listed(why_not_in_parts(linear.out_features, "outputs", parts, linear.scheme.bits, heads))
    if way == "rowwise":
        return _listed(why_not_in_parts(linear.in_features, "inputs", parts, linear.scheme.bits))
    return []  # whole in every process, or so if it has to be


def _why_not_vllm_with_optq(linear: Linear, parts: int) -> list[str]:
    """Refusals of vLLM with the plugin: optq's own, but processes may share heads of keys and values."""
    heads = linear.out_features // linear.head_width if linear.head_width else 0
    if heads and linear.split == "colwise" and heads < parts and not parts % heads:
        return _why_not_optq(linear, heads)
    return _why_not_optq(linear, parts)


def why_not_in_parts(size: int, what: str, parts: int, bits: int, head_width: int = 0) -> str | None:
    """Why optq does not give so many processes a part each of a linear's outputs or inputs, or None."""
    codes = PACKED_WORD_BITS // math.gcd(PACKED_WORD_BITS, bits)  # the fewest that fill words: 32 of 3 bits fill three
    if size % (parts * codes):
        return f"{size} {what}{_in(parts)} are no multiples of {codes}, which fill whole words"
    if head_width and size // parts % head_width:
        return f"{counted(size // head_width, 'head')} of {head_width} {what} cannot make {parts} equal parts"
    return None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What certain releases of a reader refuse.

    Args:
        versions: those releases; "0.32" stands for 0.32.1, too.
        why_not: (linear, GPUs) -> every reason for which it is not read.
        fuses: whether it makes one linear of those in `FUSED_NAMES`, and one of all experts of a layer.
    """

    versions: tuple[str, ...]
    why_not: Callable[[Linear, int], list[str]]
    fuses: bool = False


READERS: dict[str, tuple[Rules, ...]] = {
    "transformers": (Rules(versions=("5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23"), why_not=_why_not_optq),),
    "gptqmodel": (Rules(versions=("7.6",), why_not=_why_not_gptqmodel),),
    "sglang": (Rules(versions=("0.5.20", "0.5.21", "0.5.22", "0.5.23"), why_not=_why_not_sglang, fuses=True),),
    "vllm": (
        Rules(versions=("0.30", "0.31", "0.32", "0.33"), why_not=_why_not_vllm, fuses=True),
        Rules(versions=("0.25", "0.26", "0.27", "0.28", "0.29"), why_not=_why_not_vllm_with_desc_act, fuses=True),
    ),
    "vllm-cpu": (Rules(versions=("0.30", "0.31", "0.32"), why_not=_why_not_vllm_on_cpus, fuses=True),),
    "vllm+optq": (Rules(versions=("0.30", "0.31", "0.32"), why_not=_why_not_vllm_with_optq),),
}
"""The newest releases first. "transformers" means with optq; "vllm+optq" is vLLM, also on CPUs, beside which optq is
installed: its plugin, `optq.vllm`, reads what vLLM by itself does not."""


NAMES = {
    "transformers": "transformers with optq",
    "gptqmodel": "GPTQModel",
    "sglang": "SGLang",
    "vllm": "vLLM",
    "vllm-cpu": "vLLM on CPUs",
    "vllm+optq": "vLLM with optq",
}
"""What the readers call themselves."""


def settings_refused(reader: str | None, scheme: LayerScheme) -> list[str]:
    """What a reader refuses of a scheme, whatever the linear's shape; nothing of no reader."""
    if reader == "sglang":
        scheme = replace(scheme, act_order="static")  # it reads desc_act=True
    return scheme.not_served() if reader in ("vllm", "sglang") else []


def rules_of(reader: str, version: str | None = None) -> Rules:
    """The rules of a reader, for this version of it or the newest that is known.

    Raises:
        ConfigError: there is no such row.
    """
    if reader not in READERS:
        raise ConfigError(f"server={reader!r} was asked for; allowed are {', '.join(READERS)}.")
    if version is None:
        return READERS[reader][0]
    known = [(release, rules) for rules in READERS[reader] for release in rules.versions]
    for release, rules in known:
        if version == release or version.startswith(f"{release}."):
            return rules
    raise ConfigError(
        f"version={version!r} of {reader} was asked for; what it refuses is known of "
        f"{', '.join(release for release, _ in known)}. Name the nearest of these, and try the result."
    )
