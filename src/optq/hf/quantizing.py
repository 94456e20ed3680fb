# SPDX-License-Identifier: Apache-2.0
"""Quantize a model while it is loaded: *before* the weights are read, all is planned and checked that can fail early;
*after* that, the work is done, block by block, and the model is placed where it was asked for.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from optq.calibration import Calibration, accepted
from optq.checkpoint import read_headers
from optq.compat import transformers as compat
from optq.compat.call import DTYPE, name_told, told, where_told
from optq.config.fields import as_options
from optq.config.gptq import GPTQConfig
from optq.device.placement import execution_device, working_dtype
from optq.distributed import ALONE
from optq.distributed import join as join_others
from optq.errors import CalibrationError, ModelError, QualityError
from optq.evaluation import Comparison, is_good, judge
from optq.events import Dequantized, Event, Gate, RunLog
from optq.files.source import forget_nested_quantization
from optq.integrations.tensor_parallel import refuse_to_quantize
from optq.layers import QuantLinear
from optq.model import put_split
from optq.quantization.activations import ActivationStore
from optq.quantization.bit_allocation import allocate
from optq.quantization.driver import quantize_model
from optq.quantization.plan import Plan
from optq.quantization.run import Run
from optq.runs.journal import Journal, check_same, described
from optq.runs.own_text import why_not_loaded_again, write_own_text
from optq.runs.preparation import Preparation, prepare
from optq.runs.readers import as_linears, say_readers
from optq.runs.summary import say_summary
from optq.runs.trackers import trackers_of, tracking
from optq.runs.validation import check_dtype, check_kernels, check_placement, check_request

from .bases import check_dense, check_parts, method_of
from .completeness import check_complete
from .loading import PackedLoad
from .streaming import StreamedBlocks, why_not_streamed

logger = logging.getLogger(__name__)


class QuantizingLoad:
    """Loading of a model that is going to be quantized.

    Args:
        config: settings of the quantization.
    """

    def __init__(self, config: GPTQConfig) -> None:
        self.config = config
        self._base = compat.dequantizer(config.base) if config.base is not None else None
        self._ranks, self._placement = ALONE, compat.Placement()
        self._files: list[str] = []
        self._dtypes: dict[str, Any] = {}
        self._sizes: dict[str, float] = {}
        self._decided: Preparation | None = None
        self._streamed: StreamedBlocks | None = None  # None: all blocks are in memory

    def validate(self, device_map: Any, weights_only: bool) -> None:
        """Refuse, before anything is downloaded, what can never be quantized."""
        if self._decided is not None:  # transformers shows the map that it has made of "auto"
            return
        self._ranks = join_others()
        self._placement = compat.asked_placement(device_map)
        check_request(self.config, self._placement.device_map, self._placement.offload_folder)
        for dtype in told(DTYPE).values():
            check_dtype(dtype)

    def device_map(self, asked: Any) -> Any:
        """Place the model on the CPU while it is quantized; the result goes where `asked` says."""
        return None if asked is None else {"": "cpu"}

    def element_size(self, param_name: str, param: Any) -> float:
        """Bytes per weight, for a device_map such as "auto" that is made before the work."""
        parent = param_name.rpartition(".")[0]  # a linear, or experts that are going to be split into linears
        return self._sizes.get(parent, float(param.element_size()))

    def weight_conversions(self, conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """transformers' conversions that dequantize a base which is stored quantized."""
        if self._base is None:
            return conversions
        based: list[Any] = self._base.update_weight_conversions(conversions, *args, **kwargs)
        return based

    def before(self, model: Any, files: list[str], quantizer: Any) -> None:
        """Decide what will be done, and take the blocks out of the model, so that they are not read yet.

        Args:
            model: on the meta device.
            files: the checkpoint's; none of a model that is in memory.
            quantizer: transformers', which asks it for the sizes of elements when it places a model.
        Raises:
            ConfigError, CalibrationError, KernelError, ModelError: whatever can be refused before any work.
        """
        config, self._files = self.config, files
        if self._base is not None:  # then transformers leaves some tensors in the dtype of the file
            self._dtypes = compat.asked_dtypes(model)
        refuse_to_quantize(model)
        check_parts(model.config, config.base, name_told())
        if self._base is None:
            check_dense(files)
        decided = prepare(model, config, where_told())
        if config.own_text and (reason := why_not_loaded_again(files)):
            raise CalibrationError(
                f"The model cannot write its own calibration data: {reason}. Pass dataset= with {accepted()}."
            )
        self._decided, plan = decided, decided.plan
        if files and self._base is None and all(file.endswith(".safetensors") for file in files):
            headers = read_headers(files)
            names = compat.names_in_model(headers, model, fused=False)
            named = {names[key]: header for key, header in headers.items()}
            check_complete(model, named, {}, headers, [target.view.name for target in plan.all_targets])
        self._sizes = _element_sizes(plan, decided.experts)
        asked, placed = self._placement, config.journal_folder is None
        if placed:
            check_placement(model, plan, compat.automatic_map(model, asked, quantizer), asked.offload_folder)
        check_kernels(model, plan, config, asked.device_map, placed=placed)
        if (budget := decided.budget) is not None and budget.parts:
            logger.info("fit=%r, %s", config.fit, budget)
        if budget is None:  # which decides later
            say_readers(
                as_linears(model, plan.all_targets, config.format), plan.skipped, config.serving, finished=False
            )
        blocks = plan.without_head().blocks
        if reason := why_not_streamed(model, blocks, files):
            logger.info("The whole model is read into memory: %s.", reason)
        else:
            self._streamed = StreamedBlocks(model, blocks, files, decided.experts, self._base)
            self._streamed.leave()
        if decided.calibration is not None:
            _warn_of_weakness(decided.calibration, plan)

    def after(self, model: Any, quantizer: Any) -> None:
        """Quantize the model, whose weights are read but for those of blocks that are read when their turn comes.

        Args:
            quantizer: gets the log, the quality and the journal of the run, and ends as that of a packed model.
        Raises:
            CalibrationError, ModelError, SolveError: as of `quantize_model`.
            QualityError: the result is too far from the original, and quality_gate is "raise".
        """
        _check_loaded(model)
        names = trackers_of(self.config.report_to) if self._ranks.is_first else []
        with tracking(names, {"model": model.name_or_path, **self.config.settings()}) as follow:
            self._quantize(model, quantizer, follow)

    def _quantize(self, model: Any, quantizer: Any, follow: Callable[[Event], None]) -> None:
        """As `after`, whose trackers `follow` the events."""
        assert self._decided is not None
        config, ranks, plan, experts = self.config, self._ranks, self._decided.plan, self._decided.experts
        compat.cast(model, self._dtypes)
        if (calibration := self._decided.calibration) is None:
            # Not in *before*: there, transformers holds back the initialisation of whatever model is loaded.
            write = partial(write_own_text, model, self._files, config, ranks=ranks)
            calibration = self._decided.calibration_with(write)
            _warn_of_weakness(calibration, plan)
        description = described(model, self._files, config.settings(), calibration, plan.blocks)
        check_same(ranks.all_gather(description))
        if config.journal_folder is not None:
            quantizer.journal = Journal(Path(config.journal_folder), model, plan.blocks, config.format)
            ranks.broadcast(partial(quantizer.journal.open, description))
        log_file = Path(config.log_file) if config.log_file and ranks.is_first else None
        told = json.loads(json.dumps({**description, "options": as_options(config)}, default=str))
        quantizer.log = RunLog(log_file, bar=ranks.is_first, run=told, follow=follow)
        self._complete(model, self._decided)
        run = self._run(quantizer)
        with run.log:
            if config.base is not None:
                logger.info("The model is stored in %s, and dequantized as it is read.", method_of(config.base))
            if (budget := self._decided.budget) is not None:
                plan = allocate(
                    model,
                    plan,
                    calibration,
                    lambda view: config.candidates_for(view.name, *view.shape),
                    budget.bits,
                    run,
                )
            planned = as_linears(model, plan.all_targets, config.format)
            quality = quantizer.quality = quantize_model(model, plan, calibration, run)
            if config.base is not None:
                run.log.emit(Dequantized(quant_method=method_of(config.base)))
            if quality is not None:
                limit = config.max_perplexity_ratio
                run.log.emit(Gate(green=is_good(quality, limit), max_perplexity_ratio=limit))
            for module in experts.values():
                module.every_token = False
            packed = PackedLoad(self._finished_config(model, plan, calibration), experts)
            quantizer.becomes(packed)
            if quantizer.journal is None:  # else its blocks are on the disk, and not in memory
                packed.place(model, self._placement, quantizer)
            if quality is not None:
                self._judge(model, quality, held_out=calibration.truly_held_out)
            packed_linears = [x for x in planned if isinstance(model.get_submodule(x.name), QuantLinear)]
            dense = {x.name for x in planned} - {x.name for x in packed_linears}
            say_readers(packed_linears, [*plan.skipped, *dense], config.serving, finished=True)
            say_summary(packed_linears, run.log, quality, config.log_file)

    def _complete(self, model: Any, decided: Preparation) -> None:
        """Give the model back its streamed blocks and experts, and forget how its weights were stored."""
        if self._streamed is not None:
            self._streamed.come_back()
        else:
            for module in decided.experts.values():
                module.take_weights()
        put_split(model, decided.experts)
        if self._base is not None:
            compat.forget_dequantizing(model)
        compat.keep_unconverted(model, [target.view.name for target in decided.plan.all_targets])
        if decided.plan.head is not None:
            compat.untie_head(model)

    def _run(self, quantizer: Any) -> Run:
        config, device = self.config, execution_device(self.config.device)
        on_device, in_memory = config.activation_limits(device, self._ranks.size)
        return Run(
            device=device,
            sequential=config.true_sequential,
            reconstruction_passes=config.reconstruction_passes,
            checkpoint_format=config.format,
            backend=config.backend,
            log=quantizer.log,
            source=self._streamed,
            sink=quantizer.journal,
            store=ActivationStore(
                device,
                working_dtype(device),
                on_device=on_device,
                in_memory=in_memory,
                folder=Path(config.journal_folder) if config.journal_folder is not None else None,
            ),
            ranks=self._ranks,
        )

    def _finished_config(self, model: Any, plan: Plan, calibration: Calibration) -> GPTQConfig:
        """What the checkpoint will be; the model's config says so as well."""
        planned = {target.view.name: target.scheme for target in plan.all_targets}
        done = {name for name in planned if isinstance(model.get_submodule(name), QuantLinear)}
        asked_for = [name for name in plan.skipped if self.config.scheme_for(name) is not None]
        finished = self.config.for_checkpoint(
            calibration.info,
            [*asked_for, *(name for name in planned if name not in done)],
            {name: scheme for name, scheme in planned.items() if name in done},
            plan.head,
        )
        model.config.quantization_config = finished
        forget_nested_quantization(model.config)  # of the base
        compat.make_generation_config_savable(model)
        return finished

    def _judge(self, model: Any, quality: Comparison, *, held_out: bool) -> None:
        """The gate, when the work is safe: its error says where that is."""
        config = self.config
        try:
            judge(quality, config.max_perplexity_ratio, held_out=held_out, strict=config.quality_gate == "raise")
        except QualityError as error:
            if config.journal_folder is None:
                refused = QualityError(f"{error} The quantized model is the attribute `model` of this error.")
                refused.model = model
            else:
                goes_on = "the same call with quality_gate='warn' writes the checkpoint from them; " * quality.finite
                refused = QualityError(
                    f"{error} The finished blocks are kept in {Path(config.journal_folder).parent}: {goes_on}deleting "
                    "the folder gives them up."
                )
            raise refused from None


def _check_loaded(model: Any) -> None:
    """Raises ModelError if transformers has left tensors without values; blocks that are read later are not there."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f"{name} has no values after loading; nothing was quantized. Does another thread load a model? "
                "transformers switches the tying of weights off for the whole process while it makes one, so "
                "from_pretrained must not run in two threads at once. Take turns, or processes."
            )


def _warn_of_weakness(calibration: Calibration, plan: Plan) -> None:
    for weakness in calibration.weak_for(plan.widest):
        logger.warning("Weak calibration data: %s.", weakness)


def _element_sizes(plan: Plan, experts: Iterable[str]) -> dict[str, float]:
    """Bytes per weight of the linears to be quantized, and of the experts that some of these are in, by name."""
    found: dict[str, float] = {}
    for target in plan.all_targets:
        bits = target.scheme.stored_bits(*target.view.shape)
        names = [name for name in experts if target.view.name.startswith(f"{name}.")] if target.view.family else []
        found |= dict.fromkeys((target.view.name, *names), bits / (8 * math.prod(target.view.shape)))
    return found
