# SPDX-License-Identifier: Apache-2.0
"""The weight of one linear as a server holds it: several linears of a checkpoint side by side, or a part of each.

Servers make one linear of q, k and v. Its parts arrive one tensor at a time; each keeps its own scheme, and parts of
one scheme become one product in the end. Nothing in here imports a server.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from optq.checkpoint import TENSOR_NAMES, PackedWeight, find_quantized_linears, part_of, value_errors, words_of
from optq.checkpoint.headers import PACKED_DTYPES, SCALE_DTYPES, TensorHeader
from optq.errors import CheckpointError, counted
from optq.kernels import Kernel, Prepared, choose_kernel, matmul
from optq.scheme import BITS, PACKED_WORD_BITS, trivial_groups

PARTS = (*TENSOR_NAMES, "weight")
"""Last parts of the names of tensors that may arrive: of a packed linear, or of one that is not."""

ALLOWED: dict[str, tuple[tuple[torch.dtype, ...], int]] = {
    "qweight": (PACKED_DTYPES["qweight"], 2),
    "qzeros": (PACKED_DTYPES["qzeros"], 2),
    "scales": (PACKED_DTYPES["scales"], 2),
    "g_idx": (PACKED_DTYPES["g_idx"], 1),
    "weight": ((*SCALE_DTYPES, torch.float64), 2),
}
"""The dtypes that a tensor may have, and its number of dimensions."""

Origins = Callable[[int], Tensor]
"""Outputs of a linear of the checkpoint -> (own outputs,) int64 on the CPU: which of them each own one is, or -1."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive outputs of a checkpoint's linear that are consecutive in the server's linear as well.

    Args:
        at: the first one's index in the server's linear.
        outputs: their range in the checkpoint's linear.
    """

    at: int
    outputs: slice


def runs_of(origins: Tensor) -> Iterator[Run]:
    """Yield the runs of consecutive outputs in what `Origins` returns, (own outputs,) int64."""
    here = (origins >= 0).nonzero()[:, 0].tolist()
    there = origins[here].tolist()
    breaks = [0, *(n for n in range(1, len(here)) if here[n] != here[n - 1] + 1 or there[n] != there[n - 1] + 1)]
    for start, stop in pairwise([*breaks, len(here)]):
        if stop > start:
            yield Run(at=here[start], outputs=slice(there[start], there[stop - 1] + 1))


@dataclass(kw_only=True)
class _Arrived:
    """What has come of one linear of the checkpoint.

    Args:
        large: qweight (words, outputs), or weight (outputs, inputs), of each run: what is needed of it, on the device.
        others: the rest, by the last part of its name, whole.
    """

    runs: list[Run] = field(default_factory=list)
    large: list[Tensor] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    outputs: int = 0
    bits: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive outputs of the server's linear, and how they are computed.

    Args:
        at: index of the first one.
        outputs: their number.
        kernel: multiplies by `prepared`; None for a part that is not packed.
        weight: (outputs, in), of a part that is not packed.
    """

    at: int
    outputs: int
    kernel: Kernel | None = None
    prepared: Prepared | None = None
    weight: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The part's largest tensor: the dense weight (outputs, in), or the codes in the kernel's layout (...)."""
        tensor = self.weight if self.prepared is None else self.prepared.codes
        assert tensor is not None
        return tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernel is None or self.prepared is None:
            assert self.weight is not None
            return linear(x, self.weight)
        return matmul(x, self.kernel, self.prepared)


class Product(nn.Module):
    """A server's linear: x (..., in) -> (..., out) in x's dtype. Outputs that no part makes are zeros.

    Args:
        parts: in the order of their outputs.
        outputs: number of outputs.
    """

    def __init__(self, parts: Sequence[Part], outputs: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.outputs = outputs
        ends = [0, *(part.at + part.outputs for part in parts)]
        self.gaps = tuple(
            start - end for start, end in zip([*(part.at for part in parts), outputs], ends, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., outputs) in x's dtype, without bias."""
        made = []
        for gap, part in zip(self.gaps, (*self.parts, None), strict=True):
            if gap:
                made.append(x.new_zeros(*x.shape[:-1], gap))
            if part is not None:
                made.append(part(x))
        return made[0] if len(made) == 1 else torch.cat(made, -1)


class ArrivingWeight:
    """Collects the tensors of a linear as a server reads them, and makes a `Product` of them.

    Args:
        name: the linear's, for errors.
        outputs: number of outputs that this process has.
        all_inputs: number of inputs of the checkpoint's linears.
        inputs: the range of them that this process has.
        zero_format: how zeros are stored, see `optq.checkpoint.zeros`.
        group_sizes: those of the config, for linears without g_idx.
        device, dtype: where it multiplies, and which activations.
        padded: outputs that do not arrive are zeros, as in a vocabulary that is rounded up.
    """

    def __init__(
        self,
        name: str,
        *,
        outputs: int,
        all_inputs: int,
        inputs: slice,
        zero_format: str,
        device: torch.device,
        dtype: torch.dtype,
        group_sizes: tuple[int, ...] = (),
        padded: bool = False,
    ) -> None:
        self.group_sizes = group_sizes
        self.name, self.outputs, self.padded = name, outputs, padded
        self.all_inputs, self.inputs = all_inputs, inputs
        self.zero_format, self.device, self.dtype = zero_format, device, dtype
        self._arrived: dict[Hashable, _Arrived] = {}

    def take(self, part: str, tensor: Tensor, which: Hashable, origins: Origins) -> None:
        """Take one tensor of a checkpoint's linear, not yet split.

        Args:
            part: its name, one of `PARTS`.
            tensor: with the shape on disk, such as qweight (in · bits / 32, out) int32 or weight (out, in).
            which: which of the checkpoint's linears that this one is made of.
            origins: number of the checkpoint's outputs -> which of them each own output is, (own outputs,) int64; or
                -1.
        Raises:
            CheckpointError: its shape does not fit the linear, or this process's part would cut words.
        """
        arrived = self._arrived.setdefault(which, _Arrived())
        allowed, dimensions = ALLOWED[part]
        if tensor.dtype not in allowed or tensor.ndim != dimensions or not tensor.numel():
            raise CheckpointError(
                f"{self._of(which)}: {part} is {tensor.dtype} of shape {tuple(tensor.shape)}; allowed are "
                f"{', '.join(map(str, allowed))} of {counted(dimensions, 'dimension')}. The file is damaged, or of "
                "another format."
            )
        if part not in ("qweight", "weight"):
            arrived.others[part] = tensor
            return
        if part == "weight":
            tensor, rows = tensor.T, self.inputs
            fits = len(tensor) == self.all_inputs
        else:
            arrived.bits, rest = divmod(len(tensor) * PACKED_WORD_BITS, self.all_inputs)
            fits = not rest and arrived.bits in BITS
        if not fits:
            raise CheckpointError(
                f"{self._of(which)}: {part} has {len(tensor)} {'inputs' if part == 'weight' else 'rows of words'}, "
                f"which does not fit {self.all_inputs} inputs. It is damaged, or of another model."
            )
        if part == "qweight":
            rows = words_of(self.inputs, arrived.bits, f"{self._of(which)}: inputs")
        arrived.outputs = tensor.shape[1]
        arrived.runs = list(runs_of(origins(tensor.shape[1])))
        dtype = self.dtype if part == "weight" else tensor.dtype
        arrived.large = [
            (cut.T if part == "weight" else cut).to(self.device, dtype, copy=True).contiguous()
            for cut in (tensor[rows, run.outputs] for run in arrived.runs)
        ]

    def product(self) -> Product:
        """Make the linear of all tensors that have arrived.

        Raises:
            CheckpointError: a tensor is missing, or contradicts the others.
            KernelError: no kernel multiplies it here.
        """
        parts = sorted(
            (part for which, arrived in self._arrived.items() for part in self._parts(which, arrived)),
            key=lambda part: part.at,
        )
        product = Product(_joined(parts), self.outputs)
        if any(gap < 0 for gap in product.gaps) or (any(product.gaps) and not self.padded):
            made = ", ".join(f"{part.at} … {part.at + part.outputs}" for part in parts) or "none"
            raise CheckpointError(
                f"{self.name} has {self.outputs} outputs; the checkpoint has weights for these of them: {made}. It is "
                "not whole, or of another model."
            )
        self._arrived.clear()
        return product

    def _parts(self, which: Hashable, arrived: _Arrived) -> Iterator[Part]:
        if not arrived.outputs:
            raise CheckpointError(
                f"{self._of(which)}: the checkpoint has {', '.join(sorted(arrived.others))}, but no qweight."
            )
        if not arrived.others:  # of a packed one, others would have come
            for run, weight in zip(arrived.runs, arrived.large, strict=True):
                yield Part(at=run.at, outputs=weight.shape[0], weight=weight)
            return
        bits, tensors = self._checked(which, arrived)
        for run, qweight in zip(arrived.runs, arrived.large, strict=True):
            # The words are cut already: what they are the rest of does not matter any more.
            whole = PackedWeight(
                qweight=qweight.new_empty(
                    (self.all_inputs * bits // PACKED_WORD_BITS, arrived.outputs), device="meta"
                ),
                **tensors,
                bits=bits,
                checkpoint_format=self.zero_format,
            )
            cut = part_of(whole, run.outputs, self.inputs)
            packed = PackedWeight(
                qweight=qweight,
                qzeros=cut.qzeros.to(self.device).contiguous(),
                scales=cut.scales.to(self.device).contiguous(),
                g_idx=cut.g_idx.to(self.device, torch.int32),
                bits=bits,
                checkpoint_format=self.zero_format,
            )
            kernel = choose_kernel(packed, self.dtype)
            yield Part(at=run.at, outputs=packed.out_features, kernel=kernel, prepared=kernel.prepare(packed))

    def _checked(self, which: Hashable, arrived: _Arrived) -> tuple[int, dict[str, Tensor]]:
        """Bits, and the small tensors by name, once they fit one another."""
        name, tensors = self._of(which), dict(arrived.others)
        headers = {
            f"{name}.{part}": TensorHeader(shape=tuple(tensor.shape), dtype=tensor.dtype)
            for part, tensor in tensors.items()
        }
        words = self.all_inputs * arrived.bits // PACKED_WORD_BITS
        headers[f"{name}.qweight"] = TensorHeader(shape=(words, arrived.outputs), dtype=torch.int32)
        found = find_quantized_linears(headers)[name]
        if found.bits != arrived.bits:
            raise CheckpointError(
                f"{name}: by its rows qweight has {arrived.bits} bits, by qzeros and scales {found.bits}. The file is "
                "damaged; copy or download it again."
            )
        groups = len(tensors["scales"])
        if "g_idx" not in tensors:
            tensors["g_idx"] = trivial_groups(self.all_inputs, self._width_of(groups, name), torch.device("cpu"))
        for error in value_errors(name, tensors["scales"], tensors["g_idx"], None, None):
            raise CheckpointError(error)
        return found.bits, {part: tensors[part] for part in ("qzeros", "scales", "g_idx")}

    def _width_of(self, groups: int, name: str) -> int:
        """The columns of a group, of a linear without g_idx."""
        stated = {self.all_inputs if size == -1 else size for size in self.group_sizes}
        widths = {size for size in stated if -(-self.all_inputs // size) == groups}
        if not widths and self.all_inputs % groups == 0:
            return self.all_inputs // groups
        if len(widths) != 1:
            raise CheckpointError(
                f"{name}: g_idx is missing, and {groups} groups of {self.all_inputs} inputs may be of several widths. "
                "Write the checkpoint again with its g_idx."
            )
        return widths.pop()

    def _of(self, which: Hashable) -> str:
        return self.name if which in ((), None) else f"{self.name} ({which})"


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours that one kernel can multiply at once become one."""
    found: list[list[Part]] = []
    for part in parts:
        if found and _fit(found[-1], part):
            found[-1].append(part)
        else:
            found.append([part])
    return [_one_of(group) for group in found]


def _fit(group: Sequence[Part], part: Part) -> bool:
    kernel, last = part.kernel, group[-1]
    if kernel is None or last.kernel is not kernel or kernel.joint is None or last.at + last.outputs != part.at:
        return False
    return kernel.joint.why_not([other.prepared for other in (*group, part) if other.prepared is not None]) is None


def _one_of(group: Sequence[Part]) -> Part:
    first = group[0]
    if len(group) == 1 or first.kernel is None or first.kernel.joint is None:
        return first
    prepared = first.kernel.joint.of([part.prepared for part in group if part.prepared is not None])
    return Part(at=first.at, outputs=sum(part.outputs for part in group), kernel=first.kernel, prepared=prepared)
