# SPDX-License-Identifier: Apache-2.0
"""`QuantLinear`: a linear layer whose weight stays packed, and whose product is made by a kernel of the table."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optq.checkpoint import PackedWeight, QuantizedTensors, pack_codes
from optq.kernels import Kernel, Prepared, choose_kernel, matmul
from optq.scheme import trivial_groups

from .grouped import GroupedExperts
from .siblings import Joined, Siblings, find_siblings


class QuantLinear(nn.Module):
    """y = x Wᵀ + bias with a packed W.

    The tensors of the checkpoint are buffers under their names on disk, and saving writes back the bytes that were
    read. What the kernel wants is derived from them once, by `prepare`, and is not saved. It holds all codes, so from
    then on the words on disk, by far the largest buffer, are on the meta device, and are made again from the kernel's
    codes, bit for bit, for whoever asks.

    Args:
        packed: the weight; its tensors may be on the meta device.
        bias: (out,) or None.
        backend: which kernels may be chosen, a key of `optq.kernels.BACKENDS`.
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
        self._kernel: Kernel | None = None
        self._prepared: Prepared | None = None
        self._prepared_for: tuple[torch.device, torch.dtype] | None = None
        self.siblings: Joined | None = None

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

    @property
    def packed(self) -> PackedWeight:
        """The tensors as on disk."""
        return PackedWeight(
            qweight=self._words(),
            qzeros=self.qzeros,
            scales=self._own_scales(),
            g_idx=self.g_idx,
            bits=self.bits,
            checkpoint_format=self.checkpoint_format,
        )

    @property
    def kernel_name(self) -> str | None:
        """The kernel that was chosen, or None before `prepare`."""
        return self._kernel.name if self._kernel else None

    @property
    def prepared_for(self) -> tuple[torch.device, torch.dtype] | None:
        """The device and the dtype of activations that the kernel was chosen for."""
        return self._prepared_for

    @property
    def only_multiplies(self) -> bool:
        """Whether calling it is no more than the product and the bias."""
        return True

    def prepare(self, dtype: torch.dtype) -> None:
        """Choose the kernel for this device and activations of `dtype`, and derive what it wants."""
        packed = self.packed
        self._kernel = choose_kernel(packed, dtype, self.backend)
        self._prepared = self._kernel.prepare(packed)
        self._prepared_for = (self.scales.device, dtype)
        # Some models look at a linear's weight for its dtype or device. Who computes with this one gets NaN.
        nothing = torch.full((), torch.nan, dtype=dtype, device=self.scales.device)
        self.weight = nothing.expand(self.out_features, self.in_features)
        self.qweight = packed.qweight if self._prepared.codes is packed.qweight else packed.qweight.to("meta")
        if self.siblings is not None and not self._is_offloaded():
            self.siblings.prepared(self, self._kernel, self._prepared, self._prepared_for)

    def products(self) -> list[tuple[str, Prepared, torch.dtype]]:
        """What this layer multiplies by, alone or for its siblings: kernel, weight, dtype of the activations."""
        if self._kernel is None or self._prepared is None or self._prepared_for is None:
            return []
        joint = None if self.siblings is None else self.siblings.joint_of(self)
        weights = [self._prepared] if joint is None else [self._prepared, joint]
        return [(self._kernel.name, weight, self._prepared_for[1]) for weight in weights]

    def take_prepared(self, prepared: Prepared) -> None:
        """Read this from now on, in the place of what `prepare` made: the same in a memory that others share."""
        self._prepared = prepared
        self.scales = prepared.scales

    def _words(self) -> Tensor:
        """qweight as on disk."""
        if self.qweight.device.type != "meta" or self._kernel is None or self._prepared is None:
            return self.qweight
        return pack_codes(self._kernel.unpack(self._prepared, 0, self.out_features), self.bits)

    def _own_scales(self) -> Tensor:
        """The scales in memory of their own: those of joined siblings are views of all of theirs."""
        is_view = self.siblings is not None and self.scales.untyped_storage().nbytes() > self.scales.nbytes
        return self.scales.clone(memory_format=torch.contiguous_format) if is_view else self.scales

    def _restore(self) -> None:
        """Be as before `prepare`."""
        self.qweight, self.scales = self._words(), self._own_scales()
        if self.siblings is not None:
            self.siblings.part(self)
        self._kernel = self._prepared = self._prepared_for = None

    def fill_trivial_groups(self, group_width: int) -> None:
        """Give g_idx its value where a checkpoint leaves it out: runs of `group_width` neighbouring columns."""
        self.g_idx = trivial_groups(self.in_features, group_width, self.g_idx.device)

    def forward(self, x: Tensor) -> Tensor:
        if self._prepared_for != (x.device, x.dtype):
            self.prepare(x.dtype)
        assert self._kernel is not None
        assert self._prepared is not None
        if self.siblings is None:
            output = matmul(x, self._kernel, self._prepared)
        else:
            output = self.siblings.output_of(self, x, self._kernel, self._prepared)
        if self._is_offloaded():  # else what was derived of the buffers would stay where there is no room for it
            self._kernel = self._prepared = self._prepared_for = None
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the buffers for each call and takes them away after it."""
        hook = self.__dict__.get("_hf_hook")
        return getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weight dequantized."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed.columns(0, self.out_features).T.to(dtype).contiguous())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Follow moves between devices but not casts: model.bfloat16() must not round the stored scales."""
        self._restore()
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}qweight"] = self._words()
        destination[f"{prefix}scales"] = self._own_scales()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.scales.shape[0]}, bias={self.bias is not None}, kernel={self.kernel_name}"
        )


def join_siblings(model: nn.Module) -> None:
    """Let the layers of a model that may read the same input be multiplied as one; before they are prepared."""
    for layers in find_siblings(model, QuantLinear):
        Siblings(layers)


def join_experts(
    experts: Sequence[nn.Module], firsts: Sequence[str], last: str, passed: Sequence[nn.Module]
) -> GroupedExperts | None:
    """Let the layers of a mixture's experts be multiplied as one, or two; before they are prepared.

    None if not all of them are packed, or some do more than multiply. For the arguments see `GroupedExperts`.
    """
    layers = [getattr(expert, name) for expert in experts for name in (*firsts, last)]
    if not all(isinstance(layer, QuantLinear) and layer.only_multiplies for layer in layers):
        return None
    return GroupedExperts(experts, firsts, last, passed)
