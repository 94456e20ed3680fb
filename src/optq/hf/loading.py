# SPDX-License-Identifier: Apache-2.0
"""Load a packed checkpoint: *before* the weights are read, an empty `QuantLinear` is put wherever the checkpoint has
packed words; *after* that, each completes what the checkpoint left out and chooses its kernel.
"""

import copy
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from optq.checkpoint import QuantizedTensors, find_quantized_linears, read_headers
from optq.checkpoint.headers import TensorHeader
from optq.compat import transformers as compat
from optq.compat.call import name_told, told, where_told
from optq.config.gptq import GPTQConfig
from optq.config.metadata import (
    check_label,
    mislabelled,
    unusable,
    vectors_in,
)
from optq.device.memory import release_free_memory
from optq.errors import CheckpointError, ModelError, counted
from optq.files.legacy import UNPICKLE
from optq.files.source import check_files, model_class_of, two_sets_of_weights
from optq.integrations import tensor_parallel as parallel
from optq.integrations.tensor_parallel import ParallelLinear
from optq.kernels import tune
from optq.layers import QuantLinear, fuse_experts, fuse_projections
from optq.model import LINEAR_TYPES, ROLES, Experts, find_fused_experts, put_fused, put_split
from optq.readers import kind_of
from optq.scheme import LayerScheme

from .completeness import check_complete, not_tied

logger = logging.getLogger(__name__)

ONE_EXPERT = re.compile(r"(?P<experts>.+)\.\d+\.(?P<linear>\w+)\.(?P<kind>\w+)$")
"""The name of a tensor of one expert's linear."""

PREPARED_AT_ONCE = 16
"""Layers, until the heap pages that their words and the kernels' packing have left free are handed back."""


class PackedLoad:
    """Loading of a packed checkpoint, or of a model that is packed once it has been read.

    Args:
        config: the quantization_config.
        experts: by name, those that are split into linears.
    """

    def __init__(self, config: GPTQConfig, experts: dict[str, Experts] | None = None) -> None:
        self.config = config
        self.experts = experts or {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._packed: list[str] = []  # names of linears
        self._without_g_idx: set[str] = set()
        self._weights_only = True

    def validate(self, device_map: Any, weights_only: bool) -> None:
        """Check the files, and remember whether those that may hold code are refused."""
        self._weights_only = weights_only
        where = {**where_told(), **told(("use_safetensors",))}
        check_files(name_told(), where)
        for contradiction in two_sets_of_weights(name_told(), where):
            logger.warning("%s", contradiction)

    def device_map(self, asked: Any) -> Any:
        return asked

    def element_size(self, param_name: str, param: Any) -> float:
        """Bytes per weight, by which transformers plans a device_map."""
        return float(param.element_size())

    def weight_conversions(self, conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """While the checkpoint is read, experts that were split stay split, and packed words are only renamed."""
        if self.experts:
            conversions = compat.without_fusing_experts(conversions)
        return compat.without_converting(conversions, self._packed)

    def before(self, model: Any, files: list[str], quantizer: Any) -> None:
        """Put empty layers into the model.

        Args:
            model: on the meta device.
            files: the checkpoint's.
        Raises:
            CheckpointError: the checkpoint has none, has them for another model, or contradicts its config.
        """
        self._dtypes = compat.asked_dtypes(model)  # transformers leaves some tensors in the dtype of the file
        pickled = model.config.__dict__.pop(UNPICKLE, False) and self._weights_only
        found, headers = self.put_layers(model, read_headers(files, pickled=pickled), check_values=not pickled)
        if not pickled:
            with torch.device("cpu"):  # the model is being made on the meta device
                for contradiction in (*mislabelled(found.values(), self.config), *not_tied(model, headers)):
                    logger.warning("%s", contradiction)

    def put_layers(
        self, model: Any, on_disk: Mapping[str, TensorHeader], *, check_values: bool = True
    ) -> tuple[dict[str, QuantizedTensors], dict[str, TensorHeader]]:
        """Check the headers of a checkpoint and its small tensors, and put the empty layers into the model.

        Args:
            model: on the meta device.
            on_disk: the headers, by the names of the tensors.
        Returns:
            The packed linears, and all headers, both by their names in the model.
        Raises:
            CheckpointError: as `before`.
        """
        headers = compat.renamed(dict(on_disk), model)
        self._split_experts(model, headers)
        found = find_quantized_linears(headers)
        if not found:
            raise CheckpointError(
                f"{model.config.name_or_path} says that it is quantized with GPTQ, but none of its tensors is named "
                "*.qweight. It is not a GPTQ checkpoint, or its config.json belongs to another one."
            )
        modules = dict(model.named_modules())
        fitting = {name: tensors for name, tensors in found.items() if isinstance(modules.get(name), LINEAR_TYPES)}
        strangers = found.keys() - fitting.keys()
        strangers -= compat.left_out(strangers - modules.keys(), model, on_disk)
        if strangers:
            raise CheckpointError(
                f"{counted(len(strangers), 'quantized tensor')} of the checkpoint, such as {min(strangers)}, "
                f"{'belongs' if len(strangers) == 1 else 'belong'} to no linear layer of "
                f"{type(model).__name__}. The checkpoint was made for another architecture, or "
                f"its config.json states other sizes."
            )
        self._packed = list(fitting)
        if self.config.lm_head and not any(kind_of(name) == name for name in fitting):  # this model has no head
            self.config = copy.copy(self.config)
            self.config.lm_head = False
            model.config.quantization_config = self.config
        check_complete(model, headers, fitting, on_disk)
        for name, tensors in fitting.items():
            check_label(tensors, self.config.scheme_for(name))
        if check_values:
            with torch.device("cpu"):  # the model is being made on the meta device
                for error in unusable(fitting.values(), vectors_in(headers, found), self.config):
                    raise CheckpointError(error)
        dtype, zero_format, backend = model.dtype, self.config.zero_format, self.config.backend
        layer_type = ParallelLinear if parallel.wants_parallel(model) else QuantLinear
        for name, tensors in fitting.items():
            if "g_idx" not in tensors.headers:
                self._without_g_idx.add(name)
            model.set_submodule(name, layer_type.empty(tensors, zero_format, backend, dtype))
        if layer_type is ParallelLinear:
            parallel.make_ready(model, self.experts)
        return fitting, headers

    def _split_experts(self, model: Any, headers: Iterable[str]) -> None:
        """Split the experts that the checkpoint has one by one, if any of them is packed.

        Then also those that are not: transformers' conversions, which would fuse them, hold for all layers.
        """
        found = [match for match in map(ONE_EXPERT.match, headers) if match is not None]
        if not any(match["kind"] == "qweight" for match in found):
            return
        linears: dict[str, set[str]] = {}
        for match in found:
            linears.setdefault(match["experts"], set()).add(match["linear"])
        self.experts = {
            # GPTQModel gives them transformers' names whatever the original has.
            name: Experts(fused, ROLES if linears[name] <= set(ROLES) else compat.expert_names(model, name))
            for name, fused in find_fused_experts(model).items()
            if name in linears
        }
        put_split(model, self.experts)

    def after(self, model: Any, quantizer: Any) -> None:
        """Complete the layers, and let each choose its kernel."""
        compat.cast(model, self._dtypes)
        for name, layer in _quantized_layers(model).items():
            if name in self._without_g_idx:  # left uninitialised by the loader
                scheme = self.config.scheme_for(name) or LayerScheme(group_size=self.config.group_size)
                layer.fill_trivial_groups(scheme.group_width(layer.in_features))
            if isinstance(layer, ParallelLinear):
                layer.take_part()  # drops what belongs to other processes
        self.make_ready(model)

    def make_ready(self, model: Any) -> None:
        """Let every layer choose its kernel; offloaded layers do so when they are called."""
        fuse_projections(model)
        for experts in self.experts.values():
            experts.grouped_gemm = fuse_experts(*experts.linears()) if experts.layout.routed else None
        kernels: dict[str, int] = {}
        for number, layer in enumerate(_quantized_layers(model).values()):
            if number % PREPARED_AT_ONCE == 0:
                release_free_memory()
            if layer.scales.device.type != "meta":
                layer.prepare(model.dtype)
                kernels[layer.kernel_name or ""] = kernels.get(layer.kernel_name or "", 0) + 1
        release_free_memory()
        if os.environ.get("OPTQ_AUTOTUNE") == "1":
            tune(model)
        logger.info(
            "Kernels: %s.", ", ".join(f"{name} ({counted(count, 'layer')})" for name, count in kernels.items())
        )

    def place(self, model: Any, asked: compat.Placement, quantizer: Any) -> None:
        """Make a model that has just been quantized ready where it was asked for.

        What fails here costs the place, not the work: then the model stays as it is, and a warning says why.
        """
        try:
            compat.dispatch(model, asked, quantizer)
            self.make_ready(model)
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            logger.warning(
                "The model is quantized, but could not be made ready where device_map=%r and backend=%r ask for it: "
                "%s: %s. It is returned as it is; save it with save_pretrained(), and load it as there is room.",
                asked.device_map,
                self.config.backend,
                type(error).__name__,
                error,
            )

    def dequantize(self, model: Any, dtype: torch.dtype) -> None:
        """Put dense linears into the places of the packed ones, and fuse the experts again."""
        for name, layer in _quantized_layers(model).items():
            with align_module_device(layer):  # offloaded ones come back
                dense = layer.dense(dtype)
            model.set_submodule(name, dense)
        for experts in self.experts.values():
            experts.return_weights()
        put_fused(model, self.experts)
        self.experts = {}


def check_loadable(described: Any, headers: Mapping[str, TensorHeader], config: GPTQConfig) -> list[str]:
    """Do all that loading a packed checkpoint does before it reads the weights, on a model that is thrown away.

    Args:
        described: the model's config; nothing is done if transformers does not know its class.
        headers: of the checkpoint's tensors, by their names; of another format as `Source` has them.
    Returns:
        What readers may understand in different ways, but for labels of the packed tensors.
    Raises:
        CheckpointError: it cannot be loaded.
        ModelError: no model can be made of its config.
    """
    kind = model_class_of(described)
    if kind is AutoModelForCausalLM and type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return []
    with made_of(described.name_or_path):
        make = kind.from_config if kind is AutoModelForCausalLM else kind
        model = make(copy.deepcopy(described))
    _, named = PackedLoad(config).put_layers(model, headers)
    return list(not_tied(model, named))


@contextmanager
def made_of(source: str) -> Iterator[None]:
    """Where a model is made of a config, on the meta device.

    Raises:
        ModelError: in place of any error: a config of a stranger may break any model in any way.
    """
    try:
        with torch.device("meta"):
            yield
    except Exception as error:
        raise ModelError(
            f"{source}/config.json: no model can be made of it: {type(error).__name__}: {error}. Correct it, or "
            "download it again."
        ) from error


def _quantized_layers(model: Any) -> dict[str, QuantLinear]:
    """The packed linears of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
