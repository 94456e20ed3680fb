# SPDX-License-Identifier: Apache-2.0
"""The transformers quantizer behind quant_method "gptq": quantizes while loading, and loads what is quantized.

transformers builds the model on the meta device and calls *before*; reads the weights; then calls *after*. When
quantizing, *before* plans and checks everything that can fail early, and *after* does the work. When loading, *before*
puts an empty `QuantLinear` wherever the checkpoint has packed words, and *after* lets each choose its kernel.
"""

import logging
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import align_module_device
from transformers.quantizers.base import HfQuantizer

from optq.allocation import allocate
from optq.calibration import Calibration, accepted, check_sources
from optq.checkpoint import find_quantized_linears, read_headers
from optq.driver import quantize_model
from optq.errors import CalibrationError, CheckpointError, counted
from optq.evaluation import Comparison, is_good, judge
from optq.kernels import tune
from optq.layers import QuantLinear, join_experts, join_siblings
from optq.memory import GIB, release_free_memory
from optq.model import LINEAR_TYPES, ROLES, ActivationStore, Experts, find_fused_experts, put_fused, put_split
from optq.placement import execution_device, working_dtype
from optq.planning import Plan
from optq.progress import RunLog
from optq.ranks import ALONE, join
from optq.scheme import LayerScheme
from optq.serving import kind_of

from . import compat, parallel
from .config import GPTQConfig
from .journal import Journal, check_same, described
from .labels import check_label, zeros_contradict
from .legacy import UNPICKLE
from .origin import where_told
from .parallel import ParallelLinear
from .preparation import prepare, prepare_data
from .streaming import StreamedBlocks, why_not_streamed
from .writing import why_not_loaded_again, write_own_text

logger = logging.getLogger(__name__)

ONE_EXPERT = re.compile(r"(?P<experts>.+)\.\d+\.(?P<linear>\w+)\.(?P<kind>\w+)$")
"""The name of a tensor of one expert's linear."""

PREPARED_AT_ONCE = 16
"""Layers, until the heap pages that their words and the kernels' packing have left free are handed back."""


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
        self.quantization_config: GPTQConfig
        self.pre_quantized: bool
        self.log: RunLog | None = None
        self.quality: Comparison | None = None
        self._ranks = ALONE
        self._device_map: Any = None
        self._plan: Plan | None = None
        self._calibration: Calibration | None = None
        self._streamed: StreamedBlocks | None = None
        self._files: list[str] = []
        self.journal: Journal | None = None
        self._experts: dict[str, Experts] = {}
        self._packed: list[str] = []  # names of linears
        self._without_g_idx: set[str] = set()
        self._weights_only = True

    def validate_environment(self, *args: Any, weights_only: bool = True, **kwargs: Any) -> None:
        """Refuse, before anything is downloaded, what can never be quantized."""
        self._weights_only = weights_only
        if self.pre_quantized:
            return
        self._ranks = join()
        check_sources(self.quantization_config.calibration_data)
        execution_device(self.quantization_config.device)

    def update_device_map(self, device_map: Any) -> Any:
        """While quantizing, load to the CPU: blocks visit the accelerator one by one. The result goes where asked."""
        if self.pre_quantized:
            return device_map
        self._device_map = device_map
        return None if device_map is None else {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._insert_empty_layers(model, checkpoint_files or [])
            return
        parallel.refuse_to_quantize(model)
        config = self.quantization_config
        self._files = checkpoint_files or []
        prepared = prepare(model, config, where_told())
        if config.own_text and (reason := why_not_loaded_again(self._files)):
            raise CalibrationError(
                f"The model cannot write its own calibration data: {reason}. Pass dataset= with {accepted()}."
            )
        self._plan, self._experts = prepared.plan, prepared.experts
        blocks = {name: block for name, block in self._plan.blocks.items() if name != self._plan.head}
        if reason := why_not_streamed(model, blocks, checkpoint_files or []):
            logger.info("The whole model is read into memory: %s.", reason)
        else:
            self._streamed = StreamedBlocks(model, blocks, checkpoint_files or [], self._experts)
            self._streamed.leave()
        if prepared.calibration is not None:
            self._take(prepared.calibration)

    def _take(self, calibration: Calibration) -> None:
        assert self._plan is not None
        self._calibration = calibration
        for weakness in calibration.weak_for(self._plan.widest):
            logger.warning("Weak calibration data: %s.", weakness)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._complete_layers(model)
            self._doubt_labels(model)
            self._prepare_layers(model)
            return
        assert self._plan is not None  # *before* ran
        config, ranks = self.quantization_config, self._ranks
        if self._calibration is None:
            # Not in *before*: there, transformers holds back the initialisation of whatever model is loaded.
            write = partial(write_own_text, model, self._files, config, ranks=ranks)
            self._take(prepare_data(model, config, where_told(), write))
        assert self._calibration is not None
        description = described(self._files, config.settings(), self._calibration, model.dtype)
        check_same(ranks.gathered(description))
        if config.journal_folder is not None:
            self.journal = Journal(Path(config.journal_folder), model, self._plan.blocks, config.format)
            ranks.from_first(partial(self.journal.open, description))
        log_file = Path(config.log_file) if config.log_file and ranks.is_first else None
        self.log = RunLog(log_file, bar=ranks.is_first)
        if self._streamed is not None:
            self._streamed.come_back()
        else:
            for experts in self._experts.values():
                experts.take_weights()
        put_split(model, self._experts)
        planned = [target.view.name for target in self._plan.all_targets]
        compat.keep_unconverted(model, planned)
        if self._plan.head is not None:
            compat.untie_head(model)
        device = execution_device(config.device)
        on_device, in_memory = config.activation_limits(device, ranks.size)
        store = ActivationStore(
            device,
            working_dtype(device),
            on_device=on_device,
            in_memory=in_memory,
            folder=Path(config.journal_folder) if config.journal_folder is not None else None,
        )
        with self.log:
            if config.has_budget:
                self._plan = allocate(
                    model,
                    self._plan,
                    self._calibration,
                    lambda view: config.candidates_for(view.name, *view.shape),
                    self._budget(model),
                    device=config.device,
                    log=self.log,
                    source=self._streamed,
                    ranks=ranks,
                )
            self.quality = quantize_model(
                model,
                self._plan,
                self._calibration,
                sequential=config.true_sequential,
                polish_passes=config.polish_passes,
                checkpoint_format=config.format,
                backend=config.backend,
                device=config.device,
                log=self.log,
                source=self._streamed,
                sink=self.journal,
                store=store,
                ranks=ranks,
            )
            if self.quality is not None:
                limit = config.max_perplexity_ratio
                self.log.emit("gate", green=is_good(self.quality, limit), max_perplexity_ratio=limit)
                judge(
                    self.quality,
                    limit,
                    held_out=self._calibration.probes_held_out,
                    strict=config.quality_gate == "raise",
                )
        self._record(model)
        self.pre_quantized = True  # from here on it is like a loaded checkpoint
        if self.journal is None:  # else its blocks are on the disk, and not in memory
            compat.dispatch(model, self._device_map, self)
            self._prepare_layers(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
        for name, layer in _quantized_layers(model).items():
            with align_module_device(layer):  # offloaded ones come back
                dense = layer.dense(wanted)
            model.set_submodule(name, dense)
        for experts in self._experts.values():
            experts.return_weights()
        put_fused(model, self._experts)
        self._experts = {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What is still to be saved: with a journal, all but the blocks; of a split model, its whole linears."""
        if self.journal is None:
            return parallel.whole_state(model), {}
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
        return all(experts.grouped is not None and experts.grouped.are_joined for experts in self._experts.values())

    def _budget(self, model: Any) -> float:
        """How many bits the planned linears may take."""
        assert self._plan is not None
        config = self.quantization_config
        planned = [target.view for target in self._plan.all_targets]
        if config.target_bits_per_weight is not None:
            return config.target_bits_per_weight * sum(view.weight.numel() for view in planned)
        assert config.target_size_gib is not None
        quantized = {id(view.parameter) for view in planned}
        dense = sum(
            parameter.numel() * parameter.element_size()
            for parameter in model.parameters()  # each once, however often it is tied
            if id(parameter) not in quantized
        )
        return 8 * (config.target_size_gib * GIB - float(dense))

    def _record(self, model: Any) -> None:
        """Make the model's config say what the checkpoint will be."""
        assert self._plan is not None
        assert self._calibration is not None
        config = self.quantization_config
        planned = {target.view.name: target.scheme for target in self._plan.all_targets}
        done = _quantized_layers(model)
        asked_for = [name for name in self._plan.skipped if config.scheme_for(name) is not None]
        left_out = [*asked_for, *(name for name in planned if name not in done)]
        self.quantization_config = config.for_checkpoint(
            self._calibration.recipe, left_out, {name: scheme for name, scheme in planned.items() if name in done}
        )
        model.config.quantization_config = self.quantization_config
        compat.make_generation_config_savable(model)
        for experts in self._experts.values():
            experts.every_token = False
        self._plan = self._calibration = self._streamed = None  # free the calibration data

    def _insert_empty_layers(self, model: Any, checkpoint_files: list[str]) -> None:
        config = self.quantization_config
        pickled = model.config.__dict__.pop(UNPICKLE, False) and self._weights_only
        headers = compat.renamed(read_headers(checkpoint_files, pickled=pickled), model)
        self._split_experts(model, headers)
        found = find_quantized_linears(headers)
        self._packed = list(found)
        if not found:
            raise CheckpointError(
                f"{model.config.name_or_path} says that it is quantized with GPTQ, but none of its tensors is named "
                "*.qweight. It is not a GPTQ checkpoint, or its config.json belongs to another one."
            )
        modules = dict(model.named_modules())
        strangers = [name for name in found if not isinstance(modules.get(name), LINEAR_TYPES)]
        if strangers:
            raise CheckpointError(
                f"{counted(len(strangers), 'quantized tensor')} of the checkpoint, such as {strangers[0]}, "
                f"{'belongs' if len(strangers) == 1 else 'belong'} to no linear layer of "
                f"{type(model).__name__}. The checkpoint was made for another architecture."
            )
        dtype = model.dtype
        layer_type = ParallelLinear if parallel.wants_parallel(model) else QuantLinear
        for name, tensors in found.items():
            scheme = config.scheme_for(name)
            check_label(tensors, scheme)
            if "g_idx" not in tensors.headers:
                self._without_g_idx.add(name)
            model.set_submodule(name, layer_type.empty(tensors, config.format, config.backend, dtype))
        if layer_type is ParallelLinear:
            parallel.make_ready(model, self._experts)

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
        self._experts = {
            # GPTQModel gives them transformers' names whatever the original has.
            name: Experts(fused, ROLES if linears[name] <= set(ROLES) else compat.expert_names(model, name))
            for name, fused in find_fused_experts(model).items()
            if name in linears
        }
        put_split(model, self._experts)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """While a checkpoint is read, experts that were split stay split."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *args, **kwargs)
        if self.pre_quantized and self._experts:
            conversions = compat.without_fusing_experts(conversions)
        return compat.without_converting(conversions, self._packed) if self.pre_quantized else conversions

    def _doubt_labels(self, model: Any) -> None:
        """Warn where the first layer of a kind has zeros that its label does not explain."""
        firsts = {kind_of(name): (name, layer) for name, layer in reversed(_quantized_layers(model).items())}
        for name, layer in firsts.values():
            scheme = self.quantization_config.scheme_for(name)
            if scheme is not None and layer.qzeros.device.type != "meta":
                for contradiction in zeros_contradict(name, scheme, self.quantization_config.format, layer.qzeros):
                    logger.warning(contradiction)

    def _complete_layers(self, model: Any) -> None:
        """Fill in a g_idx that the checkpoint left out; then drop what belongs to other processes."""
        for name, layer in _quantized_layers(model).items():
            if name in self._without_g_idx:  # left uninitialised by the loader
                scheme = self.quantization_config.scheme_for(name) or LayerScheme(
                    group_size=self.quantization_config.group_size
                )
                layer.fill_trivial_groups(scheme.group_width(layer.in_features))
            if isinstance(layer, ParallelLinear):
                layer.take_part()

    def _prepare_layers(self, model: Any) -> None:
        """Let every layer choose its kernel."""
        join_siblings(model)
        for experts in self._experts.values():
            experts.grouped = join_experts(*experts.linears()) if experts.layout.routed else None
        kernels: dict[str, int] = {}
        for number, layer in enumerate(_quantized_layers(model).values()):
            if number % PREPARED_AT_ONCE == 0:
                release_free_memory()
            if layer.scales.device.type != "meta":  # offloaded layers choose when they are called
                layer.prepare(model.dtype)
                kernels[layer.kernel_name or ""] = kernels.get(layer.kernel_name or "", 0) + 1
        release_free_memory()
        if os.environ.get("OPTQ_AUTOTUNE") == "1":
            tune(model)
        logger.info(
            "Kernels: %s.", ", ".join(f"{name} ({counted(count, 'layer')})" for name, count in kernels.items())
        )


def _quantized_layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
