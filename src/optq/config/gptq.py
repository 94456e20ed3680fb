# SPDX-License-Identifier: Apache-2.0
"""`GPTQConfig`: what users write and what config.json holds, and its only translation into `LayerScheme`s.

A subclass of transformers' class of the same name, because transformers compares class names when it merges configs.
Unlike it, ours keeps keys it does not know, reads configs from other tools, compares by value, and never writes
tokenizers or calibration texts to disk.
"""

import copy
import inspect
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import transformers
from accelerate.utils import convert_file_size_to_int
from transformers.utils.quantization_config import QuantizationMethod

from optq.calibration import SELF, mixture
from optq.checkpoint import CHECKPOINT_FORMATS
from optq.device.memory import free_bytes
from optq.errors import ConfigError
from optq.evaluation import GOOD_PERPLEXITY_RATIO
from optq.kernels import known_backend
from optq.readers import FUSED_NAMES, kind_of
from optq.scheme import BITS, SERVED_GROUP_SIZES, ActOrder, GridFit, LayerScheme
from optq.version import __version__

logger = logging.getLogger(__name__)

DEFAULT_DAMPING = 0.1
STOCK_DATASETS = ("wikitext2", "c4", "c4-new")  # all that transformers' own class takes in a config.json

Effort = Literal["fast", "default", "max"]
QualityGate = Literal["warn", "raise", "off"]
Serving = Literal["vllm"]


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """What an effort switches on."""

    propagation: float
    refinement: int
    polish: int


ACTIVATION_SHARE = 0.4  # of what is free, for what waits between blocks

EFFORTS: dict[str, _Pieces] = {
    "fast": _Pieces(propagation=0.0, refinement=0, polish=0),
    "default": _Pieces(propagation=0.5, refinement=2, polish=0),
    "max": _Pieces(propagation=0.5, refinement=2, polish=3),
}

RUN_ONLY = (
    "target_bits_per_weight",
    "target_size_gib",
    "serving",
    "quality_gate",
    "max_perplexity_ratio",
    "tokenizer",
    "dataset",
    "backend",
    "batch_size",
    "pad_token_id",
    "max_input_length",
    "cache_block_outputs",
    "model_seqlen",
    "num_samples",
    "packing",
    "seed",
    "calibrate_all_experts",
    "device",
    "activation_memory",
    "log_file",
    "journal_folder",
    "base",
)
"""Fields that say how to run, not what the checkpoint is: never written to config.json."""


OVERRIDES = ("bits", "group_size", "sym", "desc_act", "damp_percent")
"""What an entry of `dynamic` may change."""

SWITCHES = ("desc_act", "sym", "true_sequential", "packing", "calibrate_all_experts", "lm_head")
"""Fields that are true or false; None, as some files say, is the default."""

OPEN_SWITCHES = ("static_groups", "act_group_aware")
"""The same, but None is a value of its own."""

NOT_DECISIVE = (
    *("tokenizer", "dataset", "backend", "device", "activation_memory", "log_file", "journal_folder", "base"),
    *("quality_gate", "max_perplexity_ratio"),  # whether rows are held out shows in the data
)
"""Fields that a run may change when it goes on: the checkpoint gets the same bytes."""


class GPTQConfig(transformers.GPTQConfig):
    """How to quantize a model, or how a checkpoint was quantized. See docs/configuration.md for every field.

    Args:
        bits: bits per weight: 2, 3, 4 or 8.
        tokenizer: object, model id or folder; by default the one in the model's folder.
        dataset: calibration data: a list of strings, of chats or of dicts with input_ids; a `datasets.Dataset`; a path
            to a .txt/.jsonl/.json/.parquet file or a folder; a name such as "wikitext2"; several paths and names with
            weights, as in "wikitext2:0.7,./my.jsonl:0.3" or a dict; or "self", the default: text that the model writes
            itself. See docs/calibration.md.
        group_size: columns that share a scale and a zero; -1 for whole rows.
        damp_percent: despite its name a fraction: how much of the Hessian's mean diagonal is added to its diagonal.
        desc_act: store groups in activation order (non-trivial g_idx). vLLM no longer reads such checkpoints.
        sym: zeros fixed at the middle of the grid. vLLM reads only symmetric checkpoints.
        true_sequential: calibrate later linears of a block on the already quantized earlier ones.
        static_groups: solve columns in activation order while groups keep their layout, by default; False: left to
            right. Without effect with desc_act=True.
        act_group_aware: with desc_act=False, solve whole groups in activation order, and columns in it inside them.
        effort: "fast", "default" or "max": how much time may be spent; sets the defaults of `propagation`,
            `refinement` and `polish`.
        grid: "weighted", the default, clips every group's span where that costs the outputs less; "minmax" never.
        propagation: 0 … 1, how much of the output error that earlier layers' errors cause is compensated.
        refinement: rounds of re-fitting scales and codes once a layer is solved.
        format: "gptq" (v1, zeros stored minus one) or "gptq_v2"; also accepted as `checkpoint_format`.
        target_bits_per_weight: instead of `bits` everywhere, choose 2, 3, 4 or 8 for every linear so that all together
            take at most so many bits per weight, scales and zeros included, and lose the least.
        target_size_gib: the same, as the size of all of the model's weights.
        serving: "vllm" refuses what vLLM does not read, and lets the two fields above choose only what it reads.
        dynamic: per-layer overrides in GPTQModel's form: {"-:regex": {}} leaves matching layers alone,
            {"+:regex": {"bits": 8, "group_size": 64}} changes their settings; the first match counts.
        lm_head: quantize the output head too, or, of a checkpoint, whether it is. A head tied to the embeddings is
            untied first, and becomes a weight of its own.
        model_seqlen: longest calibration sequence in tokens; by default the model's own limit, at most 2048.
        num_samples: most calibration sequences to use; by default all of a list and 128 of anything else.
        packing: join short samples, each ended by the model's end-of-text token, so that all sequences are full.
        batch_size: calibration sequences per forward; by default as many as fit in 2048 tokens, or in 512 where
            blocks are reconstructed: every forward is a step.
        calibrate_all_experts: of a mixture, show every expert all tokens while calibrating, not only those that are
            routed to it. Slower, and not what the experts see in use; for data that leaves many experts idle.
        seed: chooses which calibration sequences are used when there are more than num_samples.
        polish: passes of block reconstruction over the calibration data, at most: every finished block's scales and
            codes are tuned by gradient.
        quality_gate: "warn" or "raise" if the finished model is too far from the original on held-out calibration
            rows; "off": hold none out and do not compare.
        max_perplexity_ratio: how many times the original's perplexity counts as too far.
        device: where blocks are run and solved, one at a time; by default the accelerator, if there is one.
        activation_memory: how much the hidden states that wait between blocks may take: of the accelerator, such as
            {0: "8GiB"}, and of the machine's memory, {"cpu": "32GiB"}. What finds no room in the first goes to the
            second, and from there, if there is an output folder, to its disk. By default 40 % of what is free.
        log_file: a path to which the run's events are appended as JSON lines.
        backend: a kernel by name, or "auto"; "auto_trainable", as other tools call it, is the same. What a file says
            about it was written for another tool, and is left aside.
        block_name_to_quantize: the list of blocks, such as "model.layers"; found by itself in most models.
        modules_in_block_to_quantize: names inside a block to which quantization is restricted.
    Raises:
        ConfigError: a value is not allowed.
    """

    def __init__(
        self,
        bits: int,
        tokenizer: Any = None,
        dataset: Any = None,
        group_size: int = 128,
        damp_percent: float | None = DEFAULT_DAMPING,
        desc_act: bool = False,
        act_group_aware: bool | None = None,
        sym: bool = True,
        true_sequential: bool = True,
        static_groups: bool | None = None,
        effort: Effort | None = None,
        grid: GridFit | None = None,
        propagation: float | None = None,
        refinement: int | None = None,
        polish: int | None = None,
        format: str | None = None,
        checkpoint_format: str | None = None,
        meta: dict[str, Any] | None = None,
        backend: str | None = "auto",
        model_seqlen: int | None = None,
        num_samples: int | None = None,
        packing: bool = False,
        block_name_to_quantize: str | None = None,
        module_name_preceding_first_block: list[str] | None = None,
        batch_size: int | None = None,
        pad_token_id: int | None = None,
        calibrate_all_experts: bool = False,
        seed: int = 0,
        quality_gate: QualityGate = "warn",
        max_perplexity_ratio: float = GOOD_PERPLEXITY_RATIO,
        device: str | None = None,
        activation_memory: dict[str | int, str | int] | None = None,
        log_file: str | None = None,
        max_input_length: int | None = None,
        cache_block_outputs: bool = True,
        modules_in_block_to_quantize: list[list[str]] | list[str] | None = None,
        target_bits_per_weight: float | None = None,
        target_size_gib: float | None = None,
        serving: Serving | None = None,
        dynamic: dict[str, dict[str, Any]] | None = None,
        lm_head: bool = False,
        pack_dtype: str = "int32",
        quant_method: str | None = None,
        **unknown: Any,
    ) -> None:
        # The parent's __init__ drops what it does not know and refuses what other tools write, so it is not called.
        self.quant_method = QuantizationMethod.GPTQ
        self.bits = bits
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.group_size = group_size
        self.damp_percent = damp_percent
        self.desc_act = desc_act
        self.act_group_aware = act_group_aware
        self.sym = sym
        self.true_sequential = true_sequential
        self.static_groups = static_groups  # None until we quantize: a checkpoint of others must not claim ours
        self.effort = effort
        self.grid = grid
        self.propagation = propagation
        self.refinement = refinement
        self.polish = polish
        self.format = (checkpoint_format or format or "gptq").lower()
        self.meta = meta
        self.backend = backend
        self.model_seqlen = model_seqlen
        self.num_samples = num_samples
        self.packing = packing
        self.block_name_to_quantize = block_name_to_quantize
        self.module_name_preceding_first_block = module_name_preceding_first_block
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.calibrate_all_experts = calibrate_all_experts
        self.seed = seed
        self.quality_gate = quality_gate
        self.max_perplexity_ratio = max_perplexity_ratio
        self.device = device
        self.activation_memory = activation_memory
        self.log_file = log_file
        self.journal_folder: str | None = None  # set by optq.quantize: where finished blocks are written at once
        self.base: dict[str, Any] | None = None  # set by register: the quantization_config of the model to quantize
        self.max_input_length = max_input_length
        self.cache_block_outputs = cache_block_outputs
        self.modules_in_block_to_quantize = modules_in_block_to_quantize
        self.target_bits_per_weight = target_bits_per_weight
        self.target_size_gib = target_size_gib
        self.serving = serving
        self.dynamic = dynamic
        self.lm_head = lm_head
        self.pack_dtype = str(pack_dtype or "int32").removeprefix("torch.")
        self.unknown = unknown
        self.post_init()

    @property
    def backend(self) -> str:
        return str(self.__dict__["backend"])

    @backend.setter  # transformers sets it, too, on the config of a file
    def backend(self, name: Any) -> None:
        name = getattr(name, "value", name) or "auto"  # other tools have an enumeration
        self.__dict__["backend"] = known_backend(
            "auto" if str(name).lower() == "auto_trainable" else str(name).lower()
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """From a file, or a dict that stands for one."""
        config_dict = dict(config_dict)
        backend = config_dict.pop("backend", None)
        if backend not in (None, "auto", "auto_trainable"):
            logger.warning(
                "The quantization_config names the kernel %r, which may be any tool's: it is left aside. To ask for "
                "one, pass GPTQConfig(..., backend=...) to from_pretrained.",
                backend,
            )
        if not isinstance(config_dict.get("meta") or {}, dict):
            logger.warning(
                "The quantization_config says meta=%s, which is no dict of facts: it is left aside.",
                _short(config_dict.pop("meta")),
            )
        if isinstance(rules := config_dict.get("dynamic"), dict):  # null in a file is a rule without settings
            config_dict["dynamic"] = {key: {} if value is None else value for key, value in rules.items()}
        return super().from_dict(config_dict, *args, **kwargs)

    @classmethod
    def from_stock(cls, config: transformers.GPTQConfig | dict[str, Any]) -> "GPTQConfig":
        """Ours from a dict, or from transformers' own class: what is a default there, not a wish, becomes ours.

        Raises:
            ConfigError: it is neither of these, or the config of another method.
        """
        if isinstance(config, cls):
            return config
        if not isinstance(config, (transformers.GPTQConfig, dict)):
            raise ConfigError(
                f"A {type(config).__name__} was passed as the config; allowed are a GPTQConfig, such as "
                'GPTQConfig(bits=4), and a dict of its fields, such as {"bits": 4}.'
            )
        method = (config if isinstance(config, dict) else vars(config)).get("quant_method") or "gptq"
        method = str(getattr(method, "value", method)).lower()
        if method != "gptq":
            raise ConfigError(
                f"The config that was passed says quant_method={method!r}; allowed is 'gptq'. Pass a GPTQConfig, such "
                "as GPTQConfig(bits=4)."
            )
        if isinstance(config, dict):
            if "bits" not in config:
                raise ConfigError(
                    f"The dict that was passed as the config has no 'bits', but {_short(list(config))}; allowed are "
                    f"{', '.join(map(str, BITS))}."
                )
            return cls(**config)
        fields = dict(vars(config))
        for field, default in (("batch_size", 1), ("act_group_aware", True)):
            if fields.get(field) == default:
                del fields[field]
        return cls(**fields)

    def post_init(self) -> None:
        """Check everything that can be checked without a model."""
        for field, allowed in (
            ("effort", (None, *EFFORTS)),
            ("quality_gate", get_args(QualityGate)),
            ("serving", (None, *get_args(Serving))),
        ):
            if getattr(self, field) not in allowed:
                shown = ", ".join(repr(value) for value in allowed if value)
                raise ConfigError(f"{field}={getattr(self, field)!r} was asked for; allowed are {shown}.")
        for field in (*SWITCHES, *OPEN_SWITCHES):
            value = getattr(self, field)
            if value is None and field in SWITCHES:
                value = inspect.signature(type(self).__init__).parameters[field].default
            setattr(self, field, value if value is None else _switch(field, value))
        self._base_scheme()  # LayerScheme validates itself
        if self.format == "marlin":
            raise ConfigError(
                "checkpoint_format 'marlin' is a GPU kernel's own order of the weights, not GPTQ's. Use the model "
                "that it was made from; readers with that kernel reorder it themselves when they load it."
            )
        if self.format not in CHECKPOINT_FORMATS:
            raise ConfigError(f"format={self.format!r} was asked for; allowed are {', '.join(CHECKPOINT_FORMATS)}.")
        if self.pack_dtype != "int32":
            raise ConfigError(f"pack_dtype={self.pack_dtype!r} was asked for; codes are packed into int32 words only.")
        if self.polish is not None and (
            isinstance(self.polish, bool) or not isinstance(self.polish, int) or self.polish < 0
        ):
            raise ConfigError(f"polish={self.polish!r} was asked for; it is a number of passes, 0 or more, or None.")
        try:
            self._activation_bytes()
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise ConfigError(
                f"activation_memory={self.activation_memory!r} was asked for; it is a dict with an accelerator's "
                'number or "cpu" as keys, and bytes or sizes such as "8GiB" as values.'
            ) from error
        for field in ("batch_size", "model_seqlen", "num_samples"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(
                    f"{field}={value!r} was asked for; it is a positive integer, or None for the default."
                )
        for field, may_be_none in (("seed", False), ("pad_token_id", True)):
            value = getattr(self, field)
            if not (value is None and may_be_none) and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{field}={value!r} was asked for; it is an integer{', or None' * may_be_none}.")
        for field in ("target_bits_per_weight", "target_size_gib", "max_perplexity_ratio"):
            value, may_be_none = getattr(self, field), field != "max_perplexity_ratio"
            if not (value is None and may_be_none) and not (_is_number(value) and value > 0):
                raise ConfigError(
                    f"{field}={value!r} was asked for; it is a positive finite number{', or None' * may_be_none}."
                )
        if self.meta is not None and not (
            isinstance(self.meta, dict) and all(isinstance(key, str) for key in self.meta)
        ):
            raise ConfigError(
                f"meta={_short(self.meta)} was asked for; it is a dict with text as keys, or None, and goes to "
                "config.json."
            )
        if self.target_bits_per_weight is not None and self.target_size_gib is not None:
            raise ConfigError("Pass target_bits_per_weight or target_size_gib, not both: they may contradict.")
        self._check_serving(self._base_scheme())
        if not isinstance(self.dynamic or {}, dict):
            raise ConfigError(
                f"dynamic={self.dynamic!r} was asked for; it is a dict of patterns with dicts of settings."
            )
        for pattern, override in (self.dynamic or {}).items():
            if not isinstance(pattern, str) or not isinstance(override, dict):
                raise ConfigError(
                    f"dynamic: {pattern!r}: {override!r} was asked for; the first is a pattern, and the second a dict "
                    f"of settings: {', '.join(OVERRIDES)}; or {{}}."
                )
            try:
                re.compile(pattern_in(pattern))
            except re.error as error:
                raise ConfigError(f"dynamic: {pattern!r} is not a regular expression: {error}.") from error
            for key in {"sym", "desc_act"} & override.keys():
                _switch(f"dynamic: {pattern!r}: {key}", override[key])
            if not pattern.startswith("-:"):
                self._check_serving(self._scheme_with(override))

    def _check_serving(self, scheme: LayerScheme) -> None:
        if self.serving is not None and (reason := scheme.why_not_served()):
            raise ConfigError(f"serving={self.serving!r} was asked for, but vLLM does not read {reason}.")

    def candidates_for(self, name: str, out_features: int, in_features: int) -> list[LayerScheme]:
        """The schemes that a budget may choose from for one linear; only one if `dynamic` names it."""
        base = self.scheme_for(name)
        assert base is not None  # it is planned
        if any(re.match(pattern_in(pattern), name) for pattern in self.dynamic or {}):
            return [base]
        found = []
        for bits in BITS:
            # With two bits, only a grid that need not be centred on zero is of use.
            symmetric = base.symmetric and (bits > 2 or self.serving is not None)
            sizes = (
                (base.group_size,) if self.serving is None else dict.fromkeys((base.group_size, *SERVED_GROUP_SIZES))
            )
            for size in sizes:
                scheme = replace(base, bits=bits, symmetric=symmetric, group_size=size)
                fits = not scheme.why_not_grouped(in_features) and not scheme.why_not_packed(in_features, out_features)
                if fits and not (self.serving is not None and scheme.why_not_served(in_features)):
                    found.append(scheme)
        return found

    @property
    def has_budget(self) -> bool:
        return self.target_bits_per_weight is not None or self.target_size_gib is not None

    def scheme_for(self, name: str) -> LayerScheme | None:
        """How the linear called `name` in the model is quantized; None: not at all."""
        is_restricted = self.modules_in_block_to_quantize is not None and kind_of(name) != name  # not the head
        if is_restricted and not any(name.endswith(f".{entry}") for entry in self.listed_modules):
            return None
        for pattern, override in (self.dynamic or {}).items():
            if re.match(pattern_in(pattern), name):
                return None if pattern.startswith("-:") else self._scheme_with(override)
        return self._base_scheme()

    @property
    def listed_modules(self) -> list[str]:
        """What `modules_in_block_to_quantize` names, whatever groups it makes."""
        groups = self.modules_in_block_to_quantize or []
        return [entry for group in groups for entry in ([group] if isinstance(group, str) else group)]

    @property
    def act_order(self) -> ActOrder:
        if self.desc_act:
            return "desc_act"
        if self.static_groups is False:
            return "none"
        return "group_aware" if self.act_group_aware else "static"

    @property
    def _pieces(self) -> _Pieces:
        return EFFORTS[self.effort or "default"]

    @property
    def reconstruction_passes(self) -> int:
        return self._pieces.polish if self.polish is None else self.polish

    @property
    def by_gptqmodel(self) -> bool:
        """Of a checkpoint: whether GPTQModel wrote it."""
        return any(tool.startswith("gptqmodel") for tool in self._writers)

    @property
    def _writers(self) -> tuple[str, ...]:
        """Of a checkpoint: the tools that wrote it, as "name:version", as far as they say so."""
        wrote = (self.meta or {}).get("quantizer")
        tools = wrote if isinstance(wrote, (list, tuple)) else (wrote,)
        by_auto_round = ("auto-round",) if "autoround_version" in self.unknown else ()
        return (*(tool.lower() for tool in tools if isinstance(tool, str)), *by_auto_round)

    @property
    def zero_format(self) -> str:
        """Of a checkpoint: how zeros are stored, which in v1 depends on the writer; see `checkpoint/zeros.py`."""
        if self.format != "gptq":
            return self.format
        for tool in self._writers:
            if tool.startswith("gptqmodel"):
                version = re.search(r"(\d+)\.(\d+)", tool)
                is_older = version is not None and (int(version[1]), int(version[2])) < (6, 1)
                return "gptq:gptqmodel-6" if is_older else "gptq:gptqmodel"
            if re.match(r"(intel/)?auto[-_]?round", tool):
                return "gptq:auto-round"
        return "gptq"

    @property
    def calibration_data(self) -> Any:
        """The dataset, or what stands for none."""
        return SELF if self.dataset is None else self.dataset

    @property
    def own_text(self) -> bool:
        """Whether the model writes some of its calibration data itself."""
        return any(isinstance(source, str) and source == SELF for source, _ in mixture(self.calibration_data))

    @property
    def _dataset_name(self) -> str | None:
        """The dataset if it is a name that all readers take: what of the calibration data reaches config.json."""
        return self.dataset if isinstance(self.dataset, str) and self.dataset in STOCK_DATASETS else None

    def _base_scheme(self) -> LayerScheme:
        return LayerScheme(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.sym,
            act_order=self.act_order,
            grid=self.grid or "weighted",
            damping=self.damp_percent or DEFAULT_DAMPING,  # some checkpoints on the Hub hold 0 or null
            propagation=self._pieces.propagation if self.propagation is None else self.propagation,
            refinement=self._pieces.refinement if self.refinement is None else self.refinement,
        )

    def _scheme_with(self, override: dict[str, Any]) -> LayerScheme:
        """The base scheme with one entry of `dynamic` applied."""
        merged = copy.copy(self)
        for key in OVERRIDES:
            if key in override:
                setattr(merged, key, override[key])
        return merged._base_scheme()

    def for_checkpoint(
        self, info: dict[str, Any], left_out: list[str], scheme_of: dict[str, LayerScheme], head: str | None = None
    ) -> "GPTQConfig":
        """What the finished checkpoint's config.json says: this config without the means, plus what was done.

        Args:
            info: facts about the calibration.
            scheme_of: what was done to every quantized linear.
            left_out: linears that stayed in full precision although the config asked for them; readers must know.
            head: the name of the output head, if that was to be quantized.
        """
        config = copy.copy(self)
        config.tokenizer = None
        config.dataset = self._dataset_name
        config.unknown = dict(self.unknown)
        scheme = self._base_scheme()
        config.lm_head, config.damp_percent = head in scheme_of, scheme.damping
        if self.act_group_aware is not None:
            config.act_group_aware = self.act_order == "group_aware"
        config.static_groups, config.grid = self.act_order in ("static", "group_aware"), scheme.grid
        config.propagation, config.refinement, config.polish = (
            scheme.propagation,
            scheme.refinement,
            self.reconstruction_passes,
        )
        meta = {key: value for key, value in (self.meta or {}).items() if key != "quantizer"}
        config.meta = {
            **meta,
            "quantizer": [f"optq:{__version__}"],
            "calibration": info,
        }
        if self.base is not None:
            config.meta["dequantized_from"] = self.base["quant_method"]
            config.base = None
        if self.has_budget:
            base = Counter(scheme_of.values()).most_common(1)[0][0]
            config.bits, config.group_size, config.sym = base.bits, base.group_size, base.symmetric
            excluded = {key: value for key, value in (self.dynamic or {}).items() if key.startswith("-:")}
            config.dynamic = {**excluded, **dynamic_rules(scheme_of, base)}
        if left_out:
            # Before the user's own entries, because the first match counts.
            config.dynamic = {**{f"-:^{re.escape(name)}$": {} for name in left_out}, **(config.dynamic or {})}
        return config

    def without_desc_act(self) -> "GPTQConfig":
        """The same, but no linear's groups are in activation order."""
        config = copy.deepcopy(self)
        config.desc_act = False
        for override in (config.dynamic or {}).values():
            override.pop("desc_act", None)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json: names and values that GPTQ readers expect, and keys found but not known."""
        return copy.deepcopy(self.written())

    def written(self) -> dict[str, Any]:
        """The same, but its values are this config's own, also those that cannot be copied."""
        written = {
            key: value for key, value in vars(self).items() if key not in (*RUN_ONLY, "unknown") and value is not None
        }
        if self._dataset_name is not None:
            written["dataset"] = self._dataset_name
        written["quant_method"] = QuantizationMethod.GPTQ.value
        written["checkpoint_format"] = self.format
        return {**self.unknown, **written}

    def settings(self) -> dict[str, Any]:
        """Whatever decides what the checkpoint will be, besides the data."""
        return {key: value for key, value in vars(self).items() if key not in NOT_DECISIVE}

    def activation_limits(self, device: torch.device, processes: int = 1) -> tuple[float, float]:
        """Bytes that activations may take on the device, and of the machine's memory; `processes` share the latter."""
        asked = self._activation_bytes()
        in_memory = asked.pop("cpu", None)
        if in_memory is None:
            in_memory = ACTIVATION_SHARE * free_bytes("cpu") / processes
        if device.type == "cpu":
            return in_memory, in_memory
        on_device = next(iter(asked.values()), None)
        return ACTIVATION_SHARE * free_bytes(device) if on_device is None else on_device, in_memory

    def _activation_bytes(self) -> dict[str | int, float]:
        found = {place: convert_file_size_to_int(size) for place, size in (self.activation_memory or {}).items()}
        if len(found) > 2 or (len(found) == 2 and "cpu" not in found):
            raise ValueError("one accelerator at most")
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of from_pretrained may change about a checkpoint's own config."""
        return {"backend": self.backend, "max_input_length": self.max_input_length}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __repr__(self) -> str:
        """The settings that are not the defaults, short: of data and tokenizers only what they are."""
        shown: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value, default = vars(self).get(name), parameter.default
            if name not in ("self", "quant_method", "unknown", "format") and (
                value is not None if default is None else value != default
            ):
                shown[name] = value
        shown |= {} if self.format == "gptq" else {"format": self.format}
        shown |= self.unknown
        parts = (f"{name}={_kind_of(value) if name in DATA else _short(value)}" for name, value in shown.items())
        return f"{type(self).__name__}({', '.join(parts)})"

    __str__ = __repr__

    def __deepcopy__(self, memo: dict[int, Any]) -> "GPTQConfig":
        """transformers copies configs several times while it loads; the calibration data is shared, not copied."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        for key, value in vars(self).items():
            setattr(copied, key, value if key in ("tokenizer", "dataset") else copy.deepcopy(value, memo))
        return copied

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPTQConfig) and self.to_dict() == other.to_dict() and self.backend == other.backend

    __hash__ = None  # type: ignore[assignment]  # mutable, compared by value


SHORT = 80  # characters
DATA = ("dataset", "tokenizer")


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _switch(field: str, value: Any) -> bool:
    """A truth value; files have 0 and 1 as well."""
    if not isinstance(value, int) or value not in (0, 1):
        raise ConfigError(
            f"{field}={_short(value)} was asked for; allowed are True and False (in a file also 1 and 0)."
        )
    return bool(value)


def _short(value: Any) -> str:
    """A setting in one line; of what is no setting, what it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{_short(key)}: {_short(part)}" for key, part in value.items()) + "}"
    elif isinstance(value, (list, tuple)) and all(isinstance(part, (str, list)) for part in value) and len(value) < 9:
        text = "[" + ", ".join(map(_short, value)) + "]"
    else:
        return _kind_of(value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 1]}…"


def _kind_of(value: Any) -> str:
    """A name as it is; of anything else its type and how many there are."""
    if isinstance(value, str):
        return _short(value)
    return f"<{type(value).__name__}{f' of {len(value)}' if isinstance(value, Sized) else ''}>"


def dynamic_rules(scheme_of: dict[str, LayerScheme], base: LayerScheme) -> dict[str, dict[str, Any]]:
    """Entries of `dynamic` for the linears whose scheme is not `base`, one per parent module and scheme."""
    members: dict[tuple[str, LayerScheme], list[str]] = {}
    for name, scheme in scheme_of.items():
        if scheme != base:
            parent, _, child = name.rpartition(".")
            members.setdefault((parent, scheme), []).append(child)
    rules = {}
    for (parent, scheme), children in members.items():
        unchanged = _override(base)
        rules[f"+:{pattern_of(parent, children)}"] = {
            key: value for key, value in _override(scheme).items() if value != unchanged[key]
        }
    return rules


def pattern_of(parent: str, children: list[str]) -> str:
    """A regular expression for linears of one parent module, and for what servers make of them."""
    # vLLM asks by the name of the fused layer.
    fused = [whole for whole, parts in FUSED_NAMES.items() if set(parts) <= set(children)]
    names = "|".join(map(re.escape, (*children, *fused)))
    return rf"^{re.escape(parent)}\.(?:{names})$" if parent else f"^(?:{names})$"


def _override(scheme: LayerScheme) -> dict[str, Any]:
    """The settings of a scheme that an entry of `dynamic` may change."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.act_order == "desc_act",
    }


def pattern_in(key: str) -> str:
    """The regular expression of an entry of `dynamic`; a key without a sign means "+"."""
    return key[2:] if key[:2] in ("-:", "+:") else key
