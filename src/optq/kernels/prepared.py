# SPDX-License-Identifier: Apache-2.0
"""`Prepared`: what a kernel makes of a packed weight once and reads at every call; and dense columns of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from optq.checkpoint import PackedWeight
from optq.scheme import trivial_groups

from .launches import Memo

PIECE_BYTES = 2**22  # of float32 weights alive at once: large enough for the product, small enough for a CPU's caches
ALIGNMENT = 64  # outputs: whole tiles of every packing


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A packed weight as one kernel reads it: tensors and integers only, so that a torch operator can take it.

    Args:
        codes: all codes, in the form that the kernel reads fastest; takes the place of the words on disk.
        extras: further tensors that the kernel wants.
        order: (in,) int64, the columns in the order in which the codes lie: groups side by side. None: as they come.
        scales: (groups, out), the dtype on disk.
        zeros: (groups, out) uint8; int16 for 8 bits, where they reach 256. Its strides are those of the scales.
        group_of_column: (in,) int32.
        bits: bits per weight.
        group_width: columns per group, once in order; only the last group may be narrower. 0: groups are uneven.
        memo: the kernel's cache of launches.
    """

    codes: Tensor
    extras: tuple[Tensor, ...]
    order: Tensor | None
    scales: Tensor
    zeros: Tensor
    group_of_column: Tensor
    bits: int
    group_width: int
    memo: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)

    @property
    def in_features(self) -> int:
        return self.group_of_column.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]


def prepared_from(packed: PackedWeight, codes: Tensor, *extras: Tensor) -> Prepared:
    """Combine `codes` and `extras`, in the kernel's own shapes (...), with what every kernel keeps of a weight.

    That is the scales (groups, out), the zeros (groups, out) and the order of columns (in,).
    """
    return Prepared(
        codes=codes,
        extras=extras,
        order=columns_in_order(packed.g_idx),
        scales=packed.scales.contiguous(),
        zeros=packed.zeros().to(torch.int16 if packed.bits == 8 else torch.uint8),
        group_of_column=packed.g_idx,
        bits=packed.bits,
        group_width=group_width(packed.g_idx),
    )


@dataclass(frozen=True, kw_only=True)
class Joint:
    """How to concatenate weights with a common input along their outputs, so that one product serves all.

    Args:
        codes, extras: the dimension of each tensor that runs over outputs.
        multiple: outputs of every weight but the last must be a multiple of it, as so many are interleaved.
    """

    codes: int
    extras: tuple[int, ...] = ()
    multiple: int = 1

    def why_not(self, parts: Sequence[Prepared]) -> str | None:
        """Why these weights cannot be joined, or None."""
        first = parts[0]
        if any(part.out_features % self.multiple for part in parts[:-1]):
            return f"not all have multiples of {self.multiple} outputs"
        for part in parts[1:]:
            if (part.bits, part.group_width) != (first.bits, first.group_width):
                return "they have different bits or groups"
            if not torch.equal(part.group_of_column, first.group_of_column):
                return "their columns belong to different groups"
        return None

    def of(self, parts: Sequence[Prepared]) -> Prepared:
        """Concatenate weights along their outputs into one."""
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts], self.codes),
            extras=tuple(
                torch.cat([part.extras[at] for part in parts], self.extras[at]) for at in range(len(parts[0].extras))
            ),
            scales=torch.cat([part.scales for part in parts], 1),
            zeros=torch.cat([part.zeros for part in parts], 1),
        )

    def split(self, whole: Prepared, sizes: Sequence[int]) -> list[Prepared]:
        """Split a joined weight into views of its parts; `sizes` are their numbers of outputs."""
        starts = [sum(sizes[:position]) for position in range(len(sizes))]
        return [
            replace(
                whole,
                codes=self._narrowed(whole.codes, self.codes, start, size, start == starts[-1]),
                extras=tuple(
                    self._narrowed(tensor, self.extras[at], start, size, start == starts[-1])
                    for at, tensor in enumerate(whole.extras)
                ),
                scales=whole.scales[:, start : start + size],
                zeros=whole.zeros[:, start : start + size],
            )
            for start, size in zip(starts, sizes, strict=True)
        ]

    @staticmethod
    def _narrowed(tensor: Tensor, dim: int, start: int, size: int, is_last: bool) -> Tensor:
        """The last one has the padding as well."""
        return tensor.narrow(dim, start, tensor.shape[dim] - start if is_last else size)


def columns_in_order(group_of_column: Tensor) -> Tensor | None:
    """The permutation that sorts columns by group, (in,) int64, given g_idx (in,); None if they are sorted."""
    if bool((group_of_column[1:] >= group_of_column[:-1]).all()):
        return None
    return torch.argsort(group_of_column, stable=True)


def group_width(group_of_column: Tensor) -> int:
    """Columns per group, given g_idx (in,) int32, if only the last group is narrower; 0 for uneven groups."""
    width = int((group_of_column == 0).sum())
    even = width and torch.equal(
        group_of_column.sort().values, trivial_groups(group_of_column.numel(), width, group_of_column.device)
    )
    return width if even else 0


def in_kernels_order(x: Tensor, prepared: Prepared) -> Tensor:
    """Activations x (..., in), columns in the layer's order -> (..., in), columns as the codes lie.

    Raises:
        RuntimeError: x has another number of columns. Programs that are told how many there are would read beyond it.
    """
    if x.shape[-1] != prepared.in_features:
        raise RuntimeError(f"The input has {x.shape[-1]} features, and the layer takes {prepared.in_features}.")
    return x if prepared.order is None else x.index_select(-1, prepared.order)


def in_layers_order(codes: Tensor, order: Tensor | None) -> Tensor:
    """Codes (in, out) with columns in the kernel's order -> (in, out) with columns in the layer's."""
    return codes if order is None else torch.empty_like(codes).index_copy_(0, order, codes)


Unpack = Callable[[Prepared, int, int], Tensor]
"""(prepared, start, stop) -> the codes of outputs start … stop, (in, stop - start) uint8."""


def pieces(prepared: Prepared, unpack: Unpack) -> Iterator[tuple[slice, Tensor]]:
    """Dequantize a weight a few output features at a time.

    Yields:
        A range of outputs, and their dense weight, (in, outputs of the range) float32.
    """
    width = max(ALIGNMENT, PIECE_BYTES // (4 * prepared.in_features) // ALIGNMENT * ALIGNMENT)
    for start in range(0, prepared.out_features, width):
        stop = min(start + width, prepared.out_features)
        # One layout in memory, whosever codes these are: products then agree to the last bit.
        steps = unpack(prepared, start, stop).to(torch.float32, memory_format=torch.contiguous_format)
        zeros, scales = prepared.zeros[:, start:stop].float(), prepared.scales[:, start:stop].float()
        if prepared.order is None and prepared.group_width * prepared.scales.shape[0] == prepared.in_features:
            groups = steps.view(-1, prepared.group_width, stop - start)
            groups.sub_(zeros[:, None]).mul_(scales[:, None])
        else:
            columns = prepared.group_of_column.long()
            steps.sub_(zeros[columns]).mul_(scales[columns])
        yield slice(start, stop), steps


def matmul_dense(x: Tensor, prepared: Prepared, unpack: Unpack) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype, by dequantizing a few output features at a time."""
    dtype = _arithmetic(x)
    inputs = x.to(dtype)
    output = torch.empty(*x.shape[:-1], prepared.out_features, dtype=x.dtype, device=x.device)
    for outputs, weight in pieces(prepared, unpack):
        output[..., outputs] = inputs @ weight.to(dtype)
    return output


def matmul_transposed(gradient: Tensor, prepared: Prepared, unpack: Unpack) -> Tensor:
    """The gradient towards x: gradient (..., out) -> (..., in) in its dtype, by dequantizing piece by piece."""
    dtype = _arithmetic(gradient)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = torch.zeros(*gradient.shape[:-1], prepared.in_features, dtype=wide, device=gradient.device)
    for outputs, weight in pieces(prepared, unpack):
        total += gradient[..., outputs].to(dtype) @ weight.to(dtype).T
    return total.to(gradient.dtype)


def _arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of the product: that of a dense layer, but at least float32 on CPUs without instructions for it."""
    if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and has_bfloat16_instructions()):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


@cache
def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported() for supported in asked if supported is not None)
