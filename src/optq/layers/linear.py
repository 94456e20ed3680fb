# SPDX-License-Identifier: Apache-2.0
"""`QuantLinear`: a linear layer whose weight stays packed, and whose product is made by a kernel of the table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optq.checkpoint import TENSOR_NAMES, PackedWeight, QuantizedTensors, pack_codes
from optq.kernels import CHANGING, Held, Kernel, Prepared, as_in_no_mode, autocast_dtype, choose_kernel, matmul
from optq.scheme import trivial_groups

from .fused_experts import FusedExperts
from .fused_projections import FusedProjections, FusedWeights, find_fusable


class QuantLinear(nn.Module):
    """y = x Wᵀ + bias with a packed W.

    The tensors of the checkpoint are buffers under their names on disk, and saving writes back the bytes that were
    read. What the kernel wants is derived from them once, by `prepare`, and is not saved. It holds all codes, so from
    then on `codes` is the buffer in the place of the words on disk, by far the largest. Of `qweight` its shape stays,
    on the meta device; the words are made again from the codes, bit for bit, for whoever asks.

    It may be called by several threads at once, each with its own dtype: a forward reads `held`, one value, and what
    that is exchanged for stays right as well. Only moving, casting and loading want a layer that nobody is calling.

    Args:
        packed: the weight; its tensors may be on the meta device.
        bias: (out,) or None.
        backend: which kernels may be chosen, a key of `optq.kernels.BACKENDS`.
    Attributes:
        held: what it multiplies by; None before `prepare`, and always while accelerate offloads its buffers.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, backend: str = "auto") -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.bits = packed.bits
        self.checkpoint_format = packed.checkpoint_format
        self.backend = backend
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("qzeros", packed.qzeros)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("g_idx", packed.g_idx)
        self.register_buffer("bias", bias)
        self.held: Held | None = None
        self.fused: FusedWeights | None = None

    @classmethod
    def empty(
        cls, tensors: QuantizedTensors, checkpoint_format: str, backend: str, dtype: torch.dtype
    ) -> "QuantLinear":
        """A layer on the meta device, shaped as the headers of a checkpoint say; `dtype` is the bias's."""
        shape_of = {part: header.shape for part, header in tensors.headers.items()}
        packed = PackedWeight(
            qweight=torch.empty(shape_of["qweight"], dtype=torch.int32, device="meta"),
            qzeros=torch.empty(shape_of["qzeros"], dtype=torch.int32, device="meta"),
            # In the dtype on disk: transformers casts what it reads to the dtype of the buffer that it fills.
            scales=torch.empty(shape_of["scales"], dtype=tensors.headers["scales"].dtype, device="meta"),
            g_idx=torch.empty((tensors.in_features,), dtype=torch.int32, device="meta"),
            bits=tensors.bits,
            checkpoint_format=checkpoint_format,
        )
        bias = torch.empty(shape_of["bias"], dtype=dtype, device="meta") if "bias" in shape_of else None
        layer = cls(packed, bias, backend)
        # While it loads, transformers initialises what a checkpoint lacks, and some models reach for a linear's weight
        # then. It gets this one, without memory, until `prepare`.
        layer.weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
        return layer

    def packed(self) -> PackedWeight:
        """The tensors as on disk. Where a kernel has laid the codes out in its own order, they are packed anew."""
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

    @property
    def kernel_name(self) -> str | None:
        """The kernel that has laid out the codes, or None before `prepare`."""
        held = self.held
        return None if held is None else held.kernel.name

    @property
    def only_multiplies(self) -> bool:
        """Whether calling it is no more than the product and the bias."""
        return True

    def prepare(self, dtype: torch.dtype) -> None:
        """Choose the kernel for this device and activations of `dtype`, and derive what it wants."""
        with CHANGING:
            if self.held is not None and self.held.kernel.name != self._chosen(dtype).name:
                self._restore()
            self.held_for(dtype)
            self._show(dtype, self.scales.device)

    # No graph can hold a choice. Where one is still to be made, it breaks here, and is whole the next time.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def held_for(self, dtype: torch.dtype) -> Held:
        """What activations of `dtype` are multiplied by where the layer is; derived now if it has not been.

        Raises:
            KernelError: no kernel that may be chosen can multiply them.
        """
        device = self.scales.device
        with CHANGING, as_in_no_mode(device):
            held = self.held
            if held is not None and held.device == device:
                if dtype in held.products:  # since another thread was here, or the activations are elsewhere
                    return held
                if (further := held.also_for(dtype, self._chosen(dtype))) is not None:
                    self.held = further
                    return further
            return self._derive(dtype, device)

    def _derive(self, dtype: torch.dtype, device: torch.device) -> Held:
        if self.held is not None and self.held.device != device:  # its buffers were moved one by one
            self._restore()
        words = self._words().to(device)
        packed = self._packed_with(words)
        kernel = choose_kernel(packed, dtype, self.backend)
        derived = Held.of(kernel, kernel.prepare(packed), dtype)
        if self._is_offloaded():  # nothing of it may stay
            return derived
        self.held = derived  # before the words go: whoever finds them gone looks here
        if derived.prepared.codes is not words:
            self._put_away(derived.prepared.codes)
        if not hasattr(self, "weight") or self.weight.device != device:
            self._show(dtype, device)
        if self.fused is not None:
            self.fused.prepared(self, derived)
        return derived

    def _chosen(self, dtype: torch.dtype) -> Kernel:
        """The kernel for these activations. Of the words it is told the shape only: to make them again takes long."""
        return choose_kernel(self._packed_with(self.qweight), dtype, self.backend)

    def _show(self, dtype: torch.dtype, device: torch.device) -> None:
        """Some models look at a linear's weight for its dtype or device. Who computes with this one gets NaN."""
        self.weight = torch.full((), torch.nan, dtype=dtype, device=device).expand(self.out_features, self.in_features)

    def products(self) -> list[tuple[str, Prepared, torch.dtype]]:
        """What this layer multiplies by, alone or for others as well: kernel, weight, dtype of the activations."""
        held = self.held
        if held is None:
            return []
        joint = None if self.fused is None else self.fused.joint_of(self)
        weights = [held.prepared] if joint is None else [held.prepared, joint]
        dtypes = [dtype for dtype, product in held.products.items() if product.name == held.kernel.name]
        return [(held.kernel.name, weight, dtype) for dtype in dtypes for weight in weights]

    def take_prepared(self, prepared: Prepared) -> None:
        """Read this from now on, in the place of what `prepare` made: the same in a memory that others share."""
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
        """Let the bias be a parameter, which can be trained, and no buffer."""
        bias = self._buffers.get("bias")
        if bias is not None:
            self._buffers = {name: buffer for name, buffer in self._buffers.items() if name != "bias"}
            self.register_parameter("bias", nn.Parameter(bias, requires_grad=False))

    def _bias_memory(self) -> tuple[torch.dtype, int] | None:
        return None if self.bias is None else (self.bias.dtype, self.bias.data_ptr())

    def fill_trivial_groups(self, group_width: int) -> None:
        """Give g_idx its value where a checkpoint leaves it out: runs of `group_width` neighbouring columns."""
        self.g_idx = trivial_groups(self.in_features, group_width, self.g_idx.device)

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        if dtype is None:
            return self._product(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x.to(dtype))

    def _product(self, x: Tensor) -> Tensor:
        held = self.held
        if held is None or held.device != x.device or (kernel := held.products.get(x.dtype)) is None:
            held = self.held_for(x.dtype)
            kernel = held.products[x.dtype]
        if self.fused is None:
            output = matmul(x, kernel, held.prepared)
        else:
            output = self.fused.output_of(self, x, kernel, held.prepared)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the buffers for each call and takes them away after it."""
        hook = self.__dict__.get("_hf_hook")
        return getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight dequantized."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed().columns(0, self.out_features).T.to(dtype).contiguous())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
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
        """Who asks this layer for its own is about to move them or to take them away, as accelerate does."""
        if not recurse and self.held is not None:
            self._restore()
        return super().named_buffers(prefix, recurse, remove_duplicate)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(f"{prefix}{name}" in state_dict for name in TENSOR_NAMES):  # and not only those of an adapter
            self._restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.fused is not None:
            self.fused.bias_changed()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.scales.shape[0]}, bias={self.bias is not None}, kernel={self.kernel_name}"
        )


def fuse_projections(model: nn.Module) -> None:
    """Let the layers of a model that may read the same input be multiplied as one; before they are prepared."""
    for layers in find_fusable(model, QuantLinear):
        FusedProjections(layers)


def fuse_experts(
    experts: Sequence[nn.Module], firsts: Sequence[str], last: str, passed: Sequence[nn.Module]
) -> FusedExperts | None:
    """Let the layers of a mixture's experts be multiplied as one, or two; before they are prepared.

    None if not all of them are packed, or some do more than multiply. For the arguments see `GroupedExperts`.
    """
    layers = [getattr(expert, name) for expert in experts for name in (*firsts, last)]
    if not all(isinstance(layer, QuantLinear) and layer.only_multiplies for layer in layers):
        return None
    return FusedExperts(experts, firsts, last, passed)
