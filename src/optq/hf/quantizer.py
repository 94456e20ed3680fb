# SPDX-License-Identifier: Apache-2.0
"""The transformers quantizer behind quant_method "gptq": quantizes while loading, and loads what is quantized.

transformers builds the model on the meta device and calls *before*; reads the weights; then calls *after*. When
quantizing, *before* plans and checks everything that can fail early, and *after* does the work. When loading, *before*
puts an empty `QuantLinear` wherever the checkpoint has packed words, and *after* lets each choose its kernel.
"""

import copy
import json
import logging
import math
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

from optq.calibration import Calibration, accepted
from optq.checkpoint import find_quantized_linears, read_headers
from optq.compat import transformers as compat
from optq.compat.call import DTYPE, name_told, told, where_told
from optq.config.gptq import GPTQConfig
from optq.config.metadata import ambiguity, check_label, zeros_are_ambiguous, zeros_contradict
from optq.device.memory import release_free_memory
from optq.device.placement import execution_device, working_dtype
from optq.distributed import ALONE, join
from optq.errors import CalibrationError, CheckpointError, QualityError, counted
from optq.evaluation import Comparison, is_good, judge
from optq.events import Dequantized, Gate, RunLog
from optq.files.legacy import UNPICKLE
from optq.files.source import forget_nested_quantization
from optq.integrations import tensor_parallel as parallel
from optq.integrations.tensor_parallel import ParallelLinear
from optq.kernels import tune
from optq.layers import QuantLinear, fuse_experts, fuse_projections
from optq.model import LINEAR_TYPES, ROLES, Experts, find_fused_experts, put_fused, put_split
from optq.quantization.activations import ActivationStore
from optq.quantization.bit_allocation import allocate
from optq.quantization.driver import quantize_model
from optq.quantization.plan import Plan
from optq.readers import kind_of
from optq.runs.journal import Journal, check_same, described
from optq.runs.own_text import why_not_loaded_again, write_own_text
from optq.runs.preparation import budget_of, prepare, prepare_data
from optq.runs.validation import check_dtype, check_kernels, check_placement, check_request
from optq.scheme import LayerScheme
from optq.torch_state import default_torch_state, leave_inference_mode

from .bases import check_dense, check_parts, method_of
from .streaming import StreamedBlocks, why_not_streamed

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
        base = self.quantization_config.base
        # To transformers, pre_quantized says that tensors of the checkpoint are no weights yet.
        self._quantizes = not self.pre_quantized or base is not None
        self._base = compat.dequantizer(base) if base is not None else None
        self.log: RunLog | None = None
        self.quality: Comparison | None = None
        self._ranks = ALONE
        self._placement = compat.Placement()
        self._element_sizes: dict[str, float] = {}
        self._asked_dtypes: dict[str, torch.dtype] = {}
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
        if not self._quantizes:
            return
        if self._plan is not None:  # transformers shows the map that it has made of "auto"
            return
        self._ranks = join()
        self._placement = compat.asked_placement(kwargs.get("device_map"))
        folder = self._placement.offload_folder
        check_request(self.quantization_config, self._placement.device_map, folder)
        for dtype in told(DTYPE).values():
            check_dtype(dtype)

    def update_device_map(self, device_map: Any) -> Any:
        """While quantizing, load to the CPU: blocks visit the accelerator one by one. The result goes where asked."""
        if not self._quantizes:
            return device_map
        return None if device_map is None else {"": "cpu"}

    @default_torch_state(device=False)
    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:  # then transformers leaves some tensors in the dtype of the file
            self._asked_dtypes = compat.asked_dtypes(model)
        if not self._quantizes:
            self._insert_empty_layers(model, checkpoint_files or [])
            return
        parallel.refuse_to_quantize(model)
        config = self.quantization_config
        self._files = checkpoint_files or []
        check_parts(model.config, config.base, name_told())
        if self._base is None:
            check_dense(self._files)
        prepared = prepare(model, config, where_told())
        if config.own_text and (reason := why_not_loaded_again(self._files)):
            raise CalibrationError(
                f"The model cannot write its own calibration data: {reason}. Pass dataset= with {accepted()}."
            )
        self._plan, self._experts = prepared.plan, prepared.experts
        self._element_sizes = _element_sizes(self._plan, self._experts)
        asked, placed = self._placement, config.journal_folder is None
        if placed:
            check_placement(model, self._plan, compat.automatic_map(model, asked, self), asked.offload_folder)
        check_kernels(model, self._plan, config, asked.device_map, placed=placed)
        blocks = {name: block for name, block in self._plan.blocks.items() if name != self._plan.head}
        if reason := why_not_streamed(model, blocks, checkpoint_files or []):
            logger.info("The whole model is read into memory: %s.", reason)
        else:
            self._streamed = StreamedBlocks(model, blocks, checkpoint_files or [], self._experts, self._base)
            self._streamed.leave()
        if prepared.calibration is not None:
            self._take(prepared.calibration)

    def _take(self, calibration: Calibration) -> None:
        assert self._plan is not None
        self._calibration = calibration
        for weakness in calibration.weak_for(self._plan.widest):
            logger.warning("Weak calibration data: %s.", weakness)

    @default_torch_state()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        leave_inference_mode(model)
        compat.cast(model, self._asked_dtypes)
        if not self._quantizes:
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
        check_same(ranks.all_gather(description))
        if config.journal_folder is not None:
            self.journal = Journal(Path(config.journal_folder), model, self._plan.blocks, config.format)
            ranks.broadcast(partial(self.journal.open, description))
        log_file = Path(config.log_file) if config.log_file and ranks.is_first else None
        self.log = RunLog(log_file, bar=ranks.is_first, run=json.loads(json.dumps(description, default=str)))
        if self._streamed is not None:
            self._streamed.come_back()
        else:
            for experts in self._experts.values():
                experts.take_weights()
        put_split(model, self._experts)
        if self._base is not None:
            compat.forget_dequantizing(model)
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
            if config.base is not None:
                logger.info("The model is stored in %s, and dequantized as it is read.", method_of(config.base))
            if config.has_budget:
                self._plan = allocate(
                    model,
                    self._plan,
                    self._calibration,
                    lambda view: config.candidates_for(view.name, *view.shape),
                    budget_of(model, config, self._plan),
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
                reconstruction_passes=config.reconstruction_passes,
                checkpoint_format=config.format,
                backend=config.backend,
                device=config.device,
                log=self.log,
                source=self._streamed,
                sink=self.journal,
                store=store,
                ranks=ranks,
            )
            if config.base is not None:
                self.log.emit(Dequantized(quant_method=method_of(config.base)))
            if self.quality is not None:
                limit = config.max_perplexity_ratio
                self.log.emit(Gate(green=is_good(self.quality, limit), max_perplexity_ratio=limit))
            held_out = self._calibration.truly_held_out
            self._record(model)
            self._quantizes, self.pre_quantized = False, True  # from here on it is like a loaded checkpoint
            if self.journal is None:  # else its blocks are on the disk, and not in memory
                self._place(model)
            if self.quality is not None:
                self._judge(model, config, held_out=held_out)

    def _place(self, model: Any) -> None:
        """Make the finished model ready where it was asked for. What fails here costs the place, not the work."""
        try:
            compat.dispatch(model, self._placement, self)
            self._prepare_layers(model)
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            logger.warning(
                "The model is quantized, but could not be made ready where device_map=%r and backend=%r ask for it: "
                "%s: %s. It is returned as it is; save it with save_pretrained(), and load it as there is room.",
                self._placement.device_map,
                self.quantization_config.backend,
                type(error).__name__,
                error,
            )

    def _judge(self, model: Any, config: GPTQConfig, *, held_out: bool) -> None:
        """The gate, when the work is safe: its error says where that is."""
        assert self.quality is not None
        try:
            judge(self.quality, config.max_perplexity_ratio, held_out=held_out, strict=config.quality_gate == "raise")
        except QualityError as error:
            if self.journal is None:
                refused = QualityError(f"{error} The quantized model is the attribute `model` of this error.")
                refused.model = model
            else:
                folder = Path(config.journal_folder or "").parent
                goes_on = (
                    "the same call with quality_gate='warn' writes the checkpoint from them; " * self.quality.finite
                )
                refused = QualityError(
                    f"{error} The finished blocks are kept in {folder}: {goes_on}deleting the folder gives them up."
                )
            raise refused from None

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

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes per weight, for a device_map such as "auto" that is made before the work."""
        parent = param_name.rpartition(".")[0]  # a linear, or experts that are going to be split into linears
        return self._element_sizes.get(parent, float(param.element_size()))

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Every kernel is one operator to a graph, so `generate` may compile the model for a static cache.

        With experts only if they are multiplied at once: else which of them run depends on the data.
        """
        return all(
            experts.grouped_gemm is not None and experts.grouped_gemm.are_fused for experts in self._experts.values()
        )

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
            self._calibration.info,
            left_out,
            {name: scheme for name, scheme in planned.items() if name in done},
            self._plan.head,
        )
        model.config.quantization_config = self.quantization_config
        forget_nested_quantization(model.config)  # of the base
        compat.make_generation_config_savable(model)
        for experts in self._experts.values():
            experts.every_token = False
        self._element_sizes = {}  # from here on, tensors have their own
        self._plan = self._calibration = self._streamed = self._base = None  # free the calibration data

    def _insert_empty_layers(self, model: Any, checkpoint_files: list[str]) -> None:
        config = self.quantization_config
        pickled = model.config.__dict__.pop(UNPICKLE, False) and self._weights_only
        on_disk = read_headers(checkpoint_files, pickled=pickled)
        headers = compat.renamed(on_disk, model)
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
                f"{type(model).__name__}. The checkpoint was made for another architecture."
            )
        self._packed = list(fitting)
        if config.lm_head and not any(kind_of(name) == name for name in fitting):  # left out: this model has no head
            self.quantization_config = config = copy.copy(config)
            config.lm_head = False
            model.config.quantization_config = config
        dtype = model.dtype
        layer_type = ParallelLinear if parallel.wants_parallel(model) else QuantLinear
        for name, tensors in fitting.items():
            scheme = config.scheme_for(name)
            check_label(tensors, scheme)
            if "g_idx" not in tensors.headers:
                self._without_g_idx.add(name)
            model.set_submodule(name, layer_type.empty(tensors, config.zero_format, config.backend, dtype))
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
        if self._base is not None:
            based: list[Any] = self._base.update_weight_conversions(weight_conversions, *args, **kwargs)
            return based
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *args, **kwargs)
        if not self._quantizes and self._experts:
            conversions = compat.without_fusing_experts(conversions)
        return conversions if self._quantizes else compat.without_converting(conversions, self._packed)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of a model that does not say in which dtype it is once it is dequantized, bfloat16."""
        return torch.bfloat16 if self._base is not None and dtype.itemsize == 1 else dtype

    def _doubt_labels(self, model: Any) -> None:
        """Warn where the first layer of a kind has zeros that its label does not explain, or any has unclear ones."""
        config = self.quantization_config
        layers = {name: x for name, x in _quantized_layers(model).items() if x.qzeros.device.type != "meta"}
        firsts = {kind_of(name): (name, layer) for name, layer in reversed(layers.items())}
        for name, layer in firsts.values():
            scheme = config.scheme_for(name)
            if scheme is not None:
                for contradiction in zeros_contradict(name, scheme, config.zero_format, layer.qzeros):
                    logger.warning(contradiction)
        unclear = [n for n, x in layers.items() if zeros_are_ambiguous(x.bits, config.zero_format, x.qzeros)]
        if unclear:
            logger.warning("%s", ambiguity(unclear))

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
        fuse_projections(model)
        for experts in self._experts.values():
            experts.grouped_gemm = fuse_experts(*experts.linears()) if experts.layout.routed else None
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


def _element_sizes(plan: Plan, experts: Iterable[str]) -> dict[str, float]:
    """Bytes per weight of the linears to be quantized, and of the experts that some of these are in, by name."""
    found: dict[str, float] = {}
    for target in plan.all_targets:
        bits = target.scheme.stored_bits(*target.view.shape)
        names = [name for name in experts if target.view.name.startswith(f"{name}.")] if target.view.family else []
        found |= dict.fromkeys((target.view.name, *names), bits / (8 * math.prod(target.view.shape)))
    return found


def _quantized_layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
