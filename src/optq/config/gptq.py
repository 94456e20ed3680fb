# SPDX-License-Identifier: Apache-2.0
"""`GPTQConfig`: what users write and what config.json holds.

A subclass of transformers' class of the same name, because transformers compares class names when it merges configs.
Unlike it, ours keeps what a file says that it does not know, reads configs from other tools, compares by value, and
never writes tokenizers or calibration texts to disk.
"""

import copy
import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.utils.quantization_config import QuantizationMethod

from optq.calibration import SELF, mixture
from optq.checkpoint import CHECKPOINT_FORMATS
from optq.errors import ConfigError, found_in
from optq.kernels import known_backend
from optq.readers import NAMES, settings_refused
from optq.scheme import BITS, LayerScheme
from optq.version import __version__

from .activation_memory import limits
from .dynamic import OVERRIDES, checked_rules, dynamic_rules, rules_of_file
from .field import kind_of_value, short
from .fields import BUDGETS, FIELDS, read_file, refuse_unknown, with_preset
from .origin import writers_of, zero_format_of
from .schemes import Schemes

logger = logging.getLogger(__name__)

STOCK_DATASETS = ("wikitext2", "c4", "c4-new")  # all that transformers' own class takes in a config.json
DATA = ("dataset", "tokenizer")  # shared by copies, and never shown


class GPTQConfig(Schemes, transformers.GPTQConfig):
    """How to quantize a model, or how a checkpoint was quantized.

    Names that are no fields are refused; `from_dict`, which reads what a file says, keeps them. docs/configuration.md
    says more of every field.

    Raises:
        ConfigError: a value does not fit, or there is no such field.
        KernelError: `backend` is no kernel's name.
    """

    # The parent's __init__ drops what it does not know and refuses what other tools write, so it is not called.

    @property
    def backend(self) -> str:
        return str(self.__dict__["backend"])

    @backend.setter  # transformers sets it, too, on the config of a file
    def backend(self, name: Any) -> None:
        name = (FIELDS["backend"].checked(name) or "auto").lower()
        self.__dict__["backend"] = known_backend("auto" if name == "auto_trainable" else name)

    @property
    def checkpoint_format(self) -> str:
        return self.format

    @checkpoint_format.setter
    def checkpoint_format(self, name: str | None) -> None:
        self.format = self.format if name is None else name

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a config from a file's dict: keys that are no fields are kept, and written again.

        Args:
            kwargs: fields that are set afterwards, as in Python.
        Returns:
            The config; with `return_unused_kwargs` also those kwargs that are no fields.
        Raises:
            ConfigError: what it says of the tensors makes no sense.
        """
        values, unknown = read_file(config_dict)
        _refuse_without_bits(values)
        rules = values.pop("dynamic", None)
        config = cls(**values)
        config.of_file, config.unknown = True, unknown
        config.dynamic = rules_of_file(rules) if isinstance(rules, dict) else rules
        unused = config.update(**kwargs)
        if not return_unused_kwargs:
            refuse_unknown(unused)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set fields; returns the arguments that are no fields."""
        for name, value in with_preset(kwargs).items():
            if name in FIELDS:
                setattr(self, name, value)
        self.post_init()
        return {name: value for name, value in kwargs.items() if name not in FIELDS}

    @classmethod
    def from_stock(cls, config: transformers.GPTQConfig | dict[str, Any]) -> "GPTQConfig":
        """Convert a dict or transformers' own config; defaults of transformers' class become our defaults.

        Raises:
            ConfigError: it is neither of these, the config of another method, or has something that is no field.
        """
        if isinstance(config, cls):
            return config
        if not isinstance(config, (transformers.GPTQConfig, dict)):
            raise ConfigError(
                f"A {type(config).__name__} was passed as the config; allowed are a GPTQConfig, such as "
                'GPTQConfig(bits=4), and a dict of its fields, such as {"bits": 4}.'
            )
        fields = dict(config if isinstance(config, dict) else vars(config))
        _refuse_without_bits(fields)
        if not isinstance(config, dict):
            stock = {"batch_size": 1, "act_group_aware": True}
            fields = {name: value for name, value in fields.items() if name not in stock or value != stock[name]}
            ours = cls(**{name: value for name, value in fields.items() if name in FIELDS})
            ours.unknown = {name: value for name, value in fields.items() if name not in FIELDS}
            return ours
        refuse_unknown(fields)  # also names that are no text
        return cls(**fields)

    from_dict_optimum = from_dict

    def post_init(self) -> None:
        """Check everything that can be checked without a model.

        Raises:
            ConfigError: something does not fit; the field is named.
        """
        super().post_init()
        self.quant_method, self.pack_dtype = QuantizationMethod.GPTQ, "int32"
        self.format = self.format.lower()
        scheme = self._base_scheme()  # LayerScheme validates itself
        if self.format == "marlin":
            raise ConfigError(
                "checkpoint_format 'marlin' is a GPU kernel's own order of the weights, not GPTQ's. Use the model "
                "that it was made from; readers with that kernel reorder it themselves when they load it."
            )
        if self.format not in CHECKPOINT_FORMATS:
            raise ConfigError(f"format={self.format!r} was asked for; allowed are {', '.join(CHECKPOINT_FORMATS)}.")
        _check_budget(self)
        self._check_serving(scheme)
        self.dynamic = checked_rules(self.dynamic, of_file=self.of_file)
        checked = set()
        for pattern, settings in (self.dynamic or {}).items():
            override = tuple(settings.get(name) for name in OVERRIDES)
            if pattern.startswith("-:") or override in checked:
                continue
            checked.add(override)
            with found_in(f"dynamic: {pattern!r}"):
                self._check_serving(self._scheme_with(settings))

    def _check_serving(self, scheme: LayerScheme) -> None:
        if self.serving is not None and (reasons := settings_refused(self.serving, scheme)):
            named, told = NAMES[self.serving], ", nor ".join(reasons)
            raise ConfigError(f"serving={self.serving!r} was asked for, but {named} does not read {told}.")

    @property
    def by_gptqmodel(self) -> bool:
        """Whether GPTQModel wrote the checkpoint that this config describes."""
        return any(tool.startswith("gptqmodel") for tool in writers_of(self.meta, self.unknown))

    @property
    def zero_format(self) -> str:
        """How the checkpoint that this config describes stores zeros; see `checkpoint/zeros.py`."""
        return zero_format_of(self.format, writers_of(self.meta, self.unknown))

    @property
    def calibration_data(self) -> Any:
        """`dataset`, or the default where it is None: the model's own text."""
        return SELF if self.dataset is None else self.dataset

    @property
    def own_text(self) -> bool:
        """Whether the model writes some of its calibration data itself."""
        return any(isinstance(source, str) and source == SELF for source, _ in mixture(self.calibration_data))

    @property
    def _dataset_name(self) -> str | None:
        """The dataset if it is a name that all readers take: what of the calibration data reaches config.json."""
        return self.dataset if isinstance(self.dataset, str) and self.dataset in STOCK_DATASETS else None

    def for_checkpoint(
        self, info: dict[str, Any], left_out: list[str], scheme_of: dict[str, LayerScheme], head: str | None = None
    ) -> "GPTQConfig":
        """The config of the finished checkpoint: without calibration data and tokenizer, and with what was done.

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
        config.propagation, config.refinement = scheme.propagation, scheme.refinement
        config.polish = self.reconstruction_passes
        meta = {key: value for key, value in (self.meta or {}).items() if key != "quantizer"}
        config.meta = {**meta, "quantizer": [f"optq:{__version__}"], "calibration": info}
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
        """A copy of this config in which no linear's groups are in activation order."""
        config = copy.deepcopy(self)
        config.desc_act = False
        for override in (config.dynamic or {}).values():
            override.pop("desc_act", None)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json: names and values that GPTQ readers expect, and keys found but not known."""
        return copy.deepcopy(self.written(), self._copied_rules())

    def written(self) -> dict[str, Any]:
        """As `to_dict`, but with this config's own values, also those that cannot be copied."""
        written = {name: getattr(self, name) for name, field in FIELDS.items() if field.stored}
        written |= {"dataset": self._dataset_name, "quant_method": QuantizationMethod.GPTQ.value}
        return self.unknown | {name: value for name, value in written.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Settings that, besides the data, decide the bytes of the checkpoint."""
        decisive = {name: getattr(self, name) for name, field in FIELDS.items() if field.decisive}
        return {**decisive, "unknown": self.unknown}

    def activation_limits(self, device: torch.device, processes: int = 1) -> tuple[float, float]:
        """Bytes that activations may take on the device, and of the machine's memory; `processes` share the latter."""
        return limits(self.activation_memory, device, processes)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Settings that an argument of from_pretrained may change in a checkpoint's own config."""
        return {"backend": self.backend, "max_input_length": self.max_input_length}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __repr__(self) -> str:
        """The settings that are not the defaults, short: of data and tokenizers only what they are."""
        shown: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if name != "checkpoint_format" and (
                value is not None if field.default is None else value != field.default
            ):
                shown[name] = value
        shown |= self.unknown
        parts = (f"{name}={kind_of_value(value) if name in DATA else short(value)}" for name, value in shown.items())
        return f"{type(self).__name__}({', '.join(parts)})"

    __str__ = __repr__

    def __deepcopy__(self, memo: dict[int, Any]) -> "GPTQConfig":
        """transformers copies configs several times while it loads; the calibration data is shared, not copied."""
        copied = copy.copy(self)
        memo |= {id(self): copied, **self._copied_rules()}
        for key, value in vars(self).items():
            setattr(copied, key, value if key in DATA else copy.deepcopy(value, memo))
        return copied

    def _copied_rules(self) -> dict[int, Any]:
        """What `copy.deepcopy` is to take for `dynamic`: of tens of thousands of rules it would take seconds."""
        return {id(self.dynamic): {key: dict(rule) for key, rule in self.dynamic.items()}} if self.dynamic else {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPTQConfig) and self.to_dict() == other.to_dict() and self.backend == other.backend

    __hash__ = None  # type: ignore[assignment]  # mutable, compared by value


# That of the dataclass, not of __new__, which takes anything to say what is wrong with it.
GPTQConfig.__signature__ = inspect.Signature([*inspect.signature(GPTQConfig.__init__).parameters.values()][1:])
GPTQConfig.__doc__ = f"{GPTQConfig.__doc__}\n    Args:\n" + "\n".join(
    f"        {field.name}: {field.help} ({field.shown_default})." for field in FIELDS.values()
)


def _refuse_without_bits(stated: dict[str, Any]) -> None:
    if "bits" not in stated and stated.get("scheme") is None:
        raise ConfigError(
            f"The dict that was passed as the config has no 'bits', but {short(list(stated))}; allowed are "
            f"{', '.join(map(str, BITS))}."
        )


def _check_budget(config: GPTQConfig) -> None:
    if len(asked := [name for name in BUDGETS if getattr(config, name) is not None]) > 1:
        raise ConfigError(f"Pass {' or '.join(asked)}, not both: they may contradict.")
    if config.context_length is not None and config.fit is None:
        raise ConfigError(
            f"context_length={config.context_length} was asked for, which says what fit counts, but fit was not "
            "given. How long calibration texts are is told by model_seqlen."
        )
