# SPDX-License-Identifier: Apache-2.0
"""The transformers quantizer behind quant_method "gptq": quantizes while loading, and loads what is quantized.

transformers builds the model on the meta device and calls *before*; reads the weights; then calls *after*. What is
done there is told by one of two objects: `QuantizingLoad` or `PackedLoad`.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from transformers.quantizers.base import HfQuantizer

from optq.config.gptq import GPTQConfig
from optq.console import shown
from optq.evaluation import Comparison
from optq.events import RunLog
from optq.integrations.tensor_parallel import whole_state
from optq.runs.journal import Journal
from optq.torch_state import default_torch_state, leave_inference_mode

from .loading import PackedLoad
from .quantizing import QuantizingLoad


class OptqHfQuantizer(HfQuantizer):
    """GPTQ for transformers. Not a subclass of its `GptqHfQuantizer`, which needs the package gptqmodel.

    Attributes:
        log: the events of the run that quantized the model, or None for a loaded checkpoint.
        quality: how the quantized model compared with the original at the end of that run, or None.
        journal: where `optq.quantize` has finished blocks written at once, or None.
    """

    requires_calibration = False

    def __init__(self, quantization_config: transformers.GPTQConfig, **kwargs: Any) -> None:
        super().__init__(GPTQConfig.from_stock(quantization_config), **kwargs)
        config: GPTQConfig = self.quantization_config
        self.pre_quantized: bool
        self.log: RunLog | None = None
        self.quality: Comparison | None = None
        self.journal: Journal | None = None
        # To transformers, pre_quantized says that tensors of the checkpoint are no weights yet.
        quantizes = not self.pre_quantized or config.base is not None
        self._load: QuantizingLoad | PackedLoad = QuantizingLoad(config) if quantizes else PackedLoad(config)

    def becomes(self, packed: PackedLoad) -> None:
        """From now on, treat the model as a loaded checkpoint."""
        self._load, self.quantization_config, self.pre_quantized = packed, packed.config, True

    def validate_environment(self, *args: Any, weights_only: bool = True, **kwargs: Any) -> None:
        self._load.validate(kwargs.get("device_map"), weights_only)

    def update_device_map(self, device_map: Any) -> Any:
        return self._load.device_map(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bfloat16 for a dequantized base whose config states an 8-bit dtype; else `dtype`."""
        return torch.bfloat16 if self.quantization_config.base is not None and dtype.itemsize == 1 else dtype

    @default_torch_state(device=False)
    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        with self._shown():
            self._load.before(model, checkpoint_files or [], self)
        self.quantization_config = self._load.config

    @default_torch_state()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        leave_inference_mode(model)
        with self._shown():
            self._load.after(model, self)

    def _shown(self) -> AbstractContextManager[None]:
        """A run shows what it does, unless somebody has configured logging, or wants only errors of transformers."""
        if isinstance(self._load, PackedLoad):
            return nullcontext()
        verbosity = transformers.logging.get_verbosity()
        return shown(logging.INFO if verbosity <= logging.WARNING else verbosity)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        weight_conversions = super().update_weight_conversions(weight_conversions, *args, **kwargs)
        return self._load.weight_conversions(weight_conversions, *args, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes per weight, by which transformers plans a device_map."""
        return self._load.element_size(param_name, param)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        assert isinstance(self._load, PackedLoad)  # transformers asks quantized models only
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
        self._load.dequantize(model, wanted)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The tensors still to be saved: with a journal all but the blocks; of a split model its whole linears."""
        if self.journal is None:
            return whole_state(model), {}
        state = model.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.journal.written}, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Every kernel is one operator to a graph, so `generate` may compile the model for a static cache.

        With experts only if they are multiplied at once: else which of them run depends on the data.
        """
        experts = self._load.experts.values() if isinstance(self._load, PackedLoad) else ()
        return all(one.grouped_gemm is not None and one.grouped_gemm.are_fused for one in experts)
