# SPDX-License-Identifier: Apache-2.0
"""`Run`: how and where a model is quantized, whatever the model and its data are."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from optq.checkpoint import PackedWeight
from optq.device.placement import execution_device
from optq.distributed import ALONE, Ranks
from optq.events import RunLog

from .activations import ActivationStore


class BlockSource(Protocol):
    """Reads the tensors of blocks that are not in memory."""

    def read(self, name: str) -> None:
        """Fill a block with its tensors."""

    def drop(self, name: str) -> None:
        """Free a block's tensors again."""


class BlockSink(Protocol):
    """Writes finished blocks at once, and knows those of a former run."""

    def recorded(self, name: str) -> dict[str, PackedWeight] | None:
        """The packed linears of a block that was finished before, by name; None if it was not.

        Asked for every block while it has its original tensors, on the CPU.
        """

    def write(self, name: str) -> None:
        """Write the finished block `name`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a quantization run: where and how a model is quantized.

    Args:
        device: where blocks are run and solved, one at a time; by default the accelerator, if there is one.
        sequential: calibrate later stages of a block on the already quantized earlier ones (true_sequential).
        reconstruction_passes: over the calibration data, at most, to tune each finished block by gradient; 0: none.
        checkpoint_format: "gptq" or "gptq_v2", of the packed tensors.
        backend: the kernel of the packed layers, by name, or "auto".
        log: receives the events of the run.
        source: where the blocks' tensors come from when their turn comes; None: all are in memory.
        sink: where finished blocks go at once. Those that it has already are not solved again. With a source they are
            dropped from memory afterwards. Only that of the first process is asked and written to.
        store: keeps the hidden states between blocks; None: all of them on `device`.
        ranks: the processes that share the run; each is called with the same arguments and ends with the same model.
    """

    device: torch.device = field(default_factory=execution_device)
    sequential: bool = True
    reconstruction_passes: int = 0
    checkpoint_format: str = "gptq"
    backend: str = "auto"
    log: RunLog = field(default_factory=RunLog)
    source: BlockSource | None = None
    sink: BlockSink | None = None
    store: ActivationStore | None = None
    ranks: Ranks = ALONE
