# SPDX-License-Identifier: Apache-2.0
"""`QuantLinear`: a linear layer whose weight stays packed, and whose product is made by a kernel of the table."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optq.checkpoint import PackedWeight, QuantizedTensors
from optq.kernels import CHANGING, Held, Kernel, Prepared, as_in_no_mode, autocast_dtype, choose_kernel, matmul

from .buffers import PackedBuffers
from .fused_experts import FusedExperts
from .fused_projections import FusedProjections, find_fusable


class QuantLinear(PackedBuffers):
    """A linear layer y = x Wᵀ + bias with a packed weight W.

    It may be called by several threads at once, each with its own dtype: a forward reads `held`, one value, and what
    that is exchanged for stays right as well. Do not move, cast or load a layer while another thread calls it.

    Args:
        packed: the weight; its tensors may be on the meta device.
        bias: (out,) or None.
        backend: which kernels may be chosen, a key of `optq.kernels.BACKENDS`.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, backend: str = "auto") -> None:
        super().__init__(packed, bias)
        self.backend = backend

    @classmethod
    def empty(
        cls, tensors: QuantizedTensors, checkpoint_format: str, backend: str, dtype: torch.dtype
    ) -> "QuantLinear":
        """A layer on the meta device, shaped as a checkpoint's headers say: qweight (in · bits / 32, out), …

        Args:
            dtype: of the bias.
        """
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
    def kernel_name(self) -> str | None:
        """The kernel that has laid out the codes, or None before `prepare`."""
        held = self.held
        return None if held is None else held.kernel.name

    @property
    def only_multiplies(self) -> bool:
        """Whether a call does no more than multiply by the weight and add the bias."""
        return True

    def prepare(self, dtype: torch.dtype) -> None:
        """Choose the kernel for this device and activations of `dtype`, and lay out the codes for it."""
        with CHANGING:
            if self.held is not None and self.held.kernel.name != self._chosen(dtype).name:
                self._restore()
            self.held_for(dtype)
            self._show(dtype, self.scales.device)

    # No graph can hold a choice. Where one is still to be made, it breaks here, and is whole the next time.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def held_for(self, dtype: torch.dtype) -> Held:
        """What activations of `dtype` are multiplied by on the layer's device; derived now if it has not been.

        Raises:
            KernelError: no kernel that `backend` allows can multiply them.
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

    def products(self) -> list[tuple[str, Prepared, torch.dtype]]:
        """The products of this layer, its own and the joined one: kernel, weight, dtype of activations."""
        held = self.held
        if held is None:
            return []
        joint = None if self.fused is None else self.fused.joint_of(self)
        weights = [held.prepared] if joint is None else [held.prepared, joint]
        dtypes = [dtype for dtype, product in held.products.items() if product.name == held.kernel.name]
        return [(held.kernel.name, weight, dtype) for dtype in dtypes for weight in weights]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype, or in autocast's where that is on."""
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
        """An `nn.Linear` with the dequantized weight (out, in), and the bias, in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed().columns(0, self.out_features).T.to(dtype).contiguous())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.scales.shape[0]}, bias={self.bias is not None}, kernel={self.kernel_name}"
        )


def fuse_projections(model: nn.Module) -> None:
    """Join the weights of layers that may read the same input, such as q, k and v; call it before `prepare`."""
    for layers in find_fusable(model, QuantLinear):
        FusedProjections(layers)


def fuse_experts(
    experts: Sequence[nn.Module], firsts: Sequence[str], last: str, passed: Sequence[nn.Module]
) -> FusedExperts | None:
    """Join the weights of a mixture's experts; call it before `prepare`. For the arguments see `FusedExperts`.

    None if some of the linears are not packed, or do more than multiply.
    """
    layers = [getattr(expert, name) for expert in experts for name in (*firsts, last)]
    if not all(isinstance(layer, QuantLinear) and layer.only_multiplies for layer in layers):
        return None
    return FusedExperts(experts, firsts, last, passed)
