# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a layer's squared output error: the mean of x·xᵀ over the calibration tokens.

Linears that read the same input share one. LeCun et al., "Optimal Brain Damage" (NeurIPS 1989); Frantar et al.,
"OPTQ" (arXiv:2210.17323), eq. 1. The factor 2 of the second derivative cancels everywhere and is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optq.device.memory import all_finite
from optq.distributed import Ranks
from optq.errors import CalibrationError

EXACT_IN_TF32 = (torch.float16, torch.bfloat16)  # its 10 bits of fraction hold theirs
UPPER_STRIPS = 8  # computing the upper triangle in 8 strips costs 56 % of the full product
NARROWEST_STRIP = 144  # columns; narrower ones cost more per product than they save


def _rows(inputs: Tensor, keep: Tensor | None) -> Tensor:
    """(tokens, features) float32, without the tokens that `keep` leaves out."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows if keep is None else rows[keep.reshape(-1)]


@contextmanager
def _fast_products(inputs: Tensor) -> Iterator[None]:
    """On NVIDIA's GPUs, multiply 16-bit inputs on the tensor cores: as exact, since sums stay float32, and faster.

    Differences of such inputs lose what is below 2⁻¹⁰ of each, which is far below what calibration data determines.
    """
    if inputs.device.type != "cuda" or inputs.dtype not in EXACT_IN_TF32:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """Per row w of `weight` (out, in), wᵀHw: the mean square of its outputs on calibration data; (out,) float32."""
    return ((weight @ hessian) * weight).sum(1)


class _TokenMean:
    """A running float32 sum of one (rows, features) product per token.

    Args:
        features: width of the inputs.
        device: where the sum lives and the products are made.
        rows: width of what they are multiplied with; by default as many.
    """

    def __init__(self, features: int, device: torch.device | str, rows: int | None = None) -> None:
        self.features = features
        self.tokens = 0
        self._sum = torch.zeros(rows or features, features, dtype=torch.float32, device=device)

    def all_reduce(self, ranks: Ranks) -> None:
        """Add what the other processes have summed."""
        ranks.all_reduce(self._sum)
        self.tokens = int(ranks.all_reduce_numbers(self.tokens)[0])


class Hessian(_TokenMean):
    """The mean of x·xᵀ over calibration tokens: half the Hessian of a linear's squared output error."""

    def __init__(self, features: int, device: torch.device | str) -> None:
        super().__init__(features, device)
        self._support = 0

    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            inputs: (..., features), any float dtype.
            keep: bool, one entry per token (any shape with as many entries as `inputs` has rows); False entries,
                such as padding, are left out.
        """
        rows = _rows(inputs, keep)
        self.tokens += rows.shape[0]
        features = rows.shape[1]
        strip = max(-(-features // UPPER_STRIPS), NARROWEST_STRIP)
        for start in range(0, features, strip):
            stop = min(start + strip, features)
            with _fast_products(inputs):
                self._sum[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def support(self, others: list["Hessian"], tokens: int) -> None:
        """Add the mean over other Hessians' tokens, weighted as so many tokens; they do not count as `tokens`."""
        weight = tokens / sum(other.tokens + other._support for other in others)
        for other in others:
            self._sum.add_(other._sum, alpha=weight)
        self._support += tokens

    def mean(self) -> Tensor:
        """The (features, features) float32 mean over all tokens added so far; symmetric.

        Raises:
            CalibrationError: no token was added, or the sum is not finite.
        """
        if self.tokens + self._support == 0:
            raise CalibrationError("No calibration token reached this layer, so there is nothing to fit it to.")
        upper = self._sum.triu()
        mean = (upper + upper.triu(1).T) / (self.tokens + self._support)
        if not all_finite(mean):
            raise CalibrationError(
                "The inputs of this layer are not finite (NaN or infinity) on the calibration data."
            )
        return mean


class Drift(_TokenMean):
    """How far what a linear computes has drifted from the original model, as a mean of products with its inputs x̃.

    It is E[(W x + h - W x̃ - h̃) x̃ᵀ], with x and h of the original model: x the linear's inputs (Arai & Ichikawa,
    "Quantization Error Propagation", arXiv:2504.09629), h the residual stream that its outputs are added to (LoaQ,
    arXiv:2509.06297). Linears that share x have E[(x - x̃) x̃ᵀ] in common, from which each makes its own.

    Args:
        features: width of the inputs.
        device: where the sum lives and the products are made.
        weight: W, (out, features), any float dtype; None for what several linears have in common.
    """

    def __init__(self, features: int, device: torch.device | str, weight: Tensor | None = None) -> None:
        super().__init__(features, device, rows=None if weight is None else weight.shape[0])
        self._weight = None if weight is None else weight.float()

    def add(
        self,
        originals: Tensor,
        inputs: Tensor,
        residuals: tuple[Tensor, Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> None:
        """Add a batch: the same tokens seen by the original model and by the quantized one.

        Args:
            originals, inputs: x and x̃, (..., features), any float dtype.
            residuals: h and h̃, (..., out), any float dtype; only with a weight. None: there is no such stream.
            keep: as in `Hessian.add`.
        """
        rows = _rows(inputs, keep)
        self.tokens += rows.shape[0]
        drift = _rows(originals, keep) - rows
        with _fast_products(inputs):
            if self._weight is not None:
                drift = drift @ self._weight.T
                if residuals is not None:
                    drift += _rows(residuals[0], keep) - _rows(residuals[1], keep)
            self._sum.addmm_(drift.T, rows)

    def of_outputs(self, weight: Tensor, part: int = 0, parts: int = 1) -> Tensor:
        """The (out, features) float32 mean over all tokens, for the linear of this weight (out, features).

        Args:
            part, parts: only one of so many parts of the rows, as `tensor_split` makes them.
        """
        mean = self._sum / max(self.tokens, 1)
        if self._weight is not None:
            return mean.tensor_split(parts)[part]
        return weight.tensor_split(parts)[part].float() @ mean
