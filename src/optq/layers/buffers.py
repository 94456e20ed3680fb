# SPDX-License-Identifier: Apache-2.0
"""The buffers of a packed layer: the tensors of the checkpoint, or what a kernel has made of them.

The tensors are buffers under their names on disk, and saving writes back the bytes that were read. What a kernel wants
is derived from them once and is not saved. It holds all codes, so from then on `codes` is the buffer in the place of
the words on disk, by far the largest. Of `qweight` its shape stays, on the meta device; the words are made again from
the codes, bit for bit, when they are asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optq.checkpoint import TENSOR_NAMES, PackedWeight, pack_codes
from optq.kernels import CHANGING, Held, Prepared
from optq.scheme import trivial_groups

from .fused_projections import FusedWeights

Self = TypeVar("Self", bound="PackedBuffers")


class PackedBuffers(nn.Module):
    """The tensors of a packed linear, as buffers of a module.

    Args:
        packed: the weight; its tensors may be on the meta device.
        bias: (out,) or None.
    Attributes:
        held: the one value that tells what the layer holds: a kernel and codes in its order; None while it holds the
            words on disk, so before `QuantLinear.prepare`, and always while accelerate offloads its buffers.
        fused: what lies in one memory with it, if something does.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    weight: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.bits = packed.bits
        self.checkpoint_format = packed.checkpoint_format
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.held: Held | None = None
        self.fused: FusedWeights | None = None

    def packed(self) -> PackedWeight:
        """The tensors as on disk; qweight (in · bits / 32, out) is repacked if a kernel has laid out the codes."""
        return self._packed_with(self._words())

    def _packed_with(self, qweight: Tensor) -> PackedWeight:
        return PackedWeight(
            qweight=qweight,
            qzeros=self.qzeros,
            scales=self._own_scales(),
            g_idx=self.g_idx,
            bits=self.bits,
            checkpoint_format=self.checkpoint_format,
        )

    def take_prepared(self, prepared: Prepared) -> None:
        """Use `prepared` from now on: the layer's own weight, as a view of memory shared with other layers."""
        assert self.held is not None
        self.held = replace(self.held, prepared=prepared)
        shared = {"scales": prepared.scales, "codes": prepared.codes}
        self._buffers = {name: shared.get(name, buffer) for name, buffer in self._buffers.items()}

    def _words(self) -> Tensor:
        """qweight as on disk."""
        words, held = self.qweight, self.held  # in this order: another thread may be having them laid out
        if words.device.type != "meta" or held is None:
            return words
        return pack_codes(held.kernel.unpack(held.prepared, 0, self.out_features), self.bits)

    def _own_scales(self) -> Tensor:
        """The scales in memory of their own: those of fused layers are views of all of theirs."""
        is_view = self.fused is not None and self.scales.untyped_storage().nbytes() > self.scales.nbytes
        return self.scales.clone(memory_format=torch.contiguous_format) if is_view else self.scales

    def _restore(self) -> None:
        """Be as before `prepare`."""
        with CHANGING:
            others = {name: buffer for name, buffer in self._buffers.items() if name not in ("qweight", "codes")}
            self._buffers = {"qweight": self._words(), **others, "scales": self._own_scales()}
            self.__dict__.pop("qweight", None)
            self._non_persistent_buffers_set.discard("codes")
            if self.fused is not None:
                self.fused.part(self)
            self.held = None

    def _put_away(self, codes: Tensor) -> None:
        """Let the kernel's codes take the place of the words on disk among the buffers; of these the shape is kept.

        Every step leaves a layer that another thread can read.
        """
        self.__dict__["qweight"] = self.qweight.to("meta")
        self._non_persistent_buffers_set.add("codes")
        self._buffers = {
            **{name: buffer for name, buffer in self._buffers.items() if name != "qweight"},
            "codes": codes,
        }

    def take_bias(self) -> None:
        """Turn the bias from a buffer into a parameter, which can be trained."""
        bias = self._buffers.get("bias")
        if bias is not None:
            self._buffers = {name: buffer for name, buffer in self._buffers.items() if name != "bias"}
            self.register_parameter("bias", nn.Parameter(bias, requires_grad=False))

    def _bias_memory(self) -> tuple[torch.dtype, int] | None:
        return None if self.bias is None else (self.bias.dtype, self.bias.data_ptr())

    def fill_trivial_groups(self, group_width: int) -> None:
        """Set g_idx, which the checkpoint lacks, to runs of `group_width` neighbouring columns."""
        self.g_idx = trivial_groups(self.in_features, group_width, self.g_idx.device)

    def _show(self, dtype: torch.dtype, device: torch.device) -> None:
        """Some models look at a linear's weight for its dtype or device. Who computes with this one gets NaN."""
        self.weight = torch.full((), torch.nan, dtype=dtype, device=device).expand(self.out_features, self.in_features)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices but not casts: model.bfloat16() must not round the stored scales.

        What has been derived stays if nothing moves.
        """
        was_shared = self.g_idx.is_shared()
        moved = fn(self.g_idx)
        if moved is self.g_idx and moved.is_shared() == was_shared:
            bias = self._bias_memory()
            with CHANGING:  # another thread may be having the words laid out
                packed = {id(buffer) for name, buffer in self._buffers.items() if name != "bias"}
                super()._apply(lambda tensor: tensor if id(tensor) in packed else fn(tensor), recurse)
            if self.fused is not None and self._bias_memory() != bias:
                self.fused.bias_changed()
        else:
            self._restore()
            scales = self.scales
            super()._apply(fn, recurse)
            if self.scales.dtype != scales.dtype:
                self.scales = scales.to(self.scales.device)
        if hasattr(self, "weight"):
            shown = fn(torch.empty((), dtype=self.weight.dtype, device=self.weight.device))
            self._show(shown.dtype, shown.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}qweight"] = words = self._words()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}qweight"] = words
        destination[f"{prefix}scales"] = self._own_scales()

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers; recurse=False first restores those on disk, such as qweight (in · bits / 32, out).

        Callers that ask a single layer for its buffers, such as accelerate, are about to move or to take them away.
        """
        if not recurse and self.held is not None:
            self._restore()
        return super().named_buffers(prefix, recurse, remove_duplicate)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name in TENSOR_NAMES):  # and not only those of an adapter
            self._restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.fused is not None:
            self.fused.bias_changed()
