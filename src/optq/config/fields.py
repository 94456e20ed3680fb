# SPDX-License-Identifier: Apache-2.0
"""Every field of `GPTQConfig`, once: its type, default and meaning, and whether config.json has it.

The signature, the checks, what is written, the command line's options, the docstring and the tables of
docs/configuration.md are all made from `Fields`. Imports neither torch nor transformers, so that `--help` appears at
once.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field
from numbers import Number
from typing import TYPE_CHECKING, Any, Literal

from optq.errors import ConfigError

from .activation_memory import activation_bytes
from .counterparts import why_unknown
from .field import Field, is_text, short
from .sizes import bytes_of

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

CHECKPOINT, SEARCH, CALIBRATION, RUNNING = SECTIONS = (
    "What the checkpoint will be",
    "How it is found",
    "Calibration",
    "Running",
)
"""Of docs/configuration.md and of `--help`."""

WITHOUT_EFFECT = "without effect; the stock class has it"

DEFAULT_DAMPING = 0.1

Effort = Literal["fast", "default", "max"]

BUDGETS = ("target_bits_per_weight", "target_size_gib", "fit")
"""Fields of which one may say what all linears take together."""

PRESETS: dict[str, dict[str, Any]] = {
    f"W{bits}A16{'' if sym else '_ASYM'}": {"bits": bits, "group_size": 128, "sym": sym}
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
}
"""What the names of `scheme` stand for. llm-compressor has W4A16, W8A16 and W4A16_ASYM, with the same groups."""


def _is_memory(value: Any) -> bool:
    try:
        activation_bytes(value)
    except (AttributeError, OverflowError, TypeError, ValueError):
        return False
    return True


def _is_size(value: Any) -> bool:
    try:
        return bytes_of(value) > 0
    except ValueError:
        return False


def _are_names(value: Any) -> bool:
    groups = value if isinstance(value, (list, tuple)) else [None]
    entries = [entry for group in groups for entry in (group if isinstance(group, (list, tuple)) else [group])]
    return all(map(is_text, entries))


def _is_object(value: Any) -> bool:
    """Whether it may be an object of any other library, or a name: no number, and no empty text."""
    return is_text(value) if isinstance(value, str) else not isinstance(value, (bool, int, float, complex, bytes))


# What a value has to be where the type does not say it all.
HERE = {"decisive": False, "lenient": True}  # things of this machine, to which what a file says does not matter
DATA = {
    "fits": _is_object,
    "wanted": "it is a name, a path, a list, a dataset, or None: text that the model writes",
    **HERE,
}
TOKENIZER = {
    "fits": lambda value: _is_object(value) and not isinstance(value, (list, tuple, dict, set)),
    "wanted": "it is a tokenizer, the id of a model or a folder, or None for the model's own",
    **HERE,
}
DEVICE = {
    "fits": lambda value: type(value).__name__ == "device" or is_text(value),
    "wanted": "it is a device such as 'cuda:1' or 'cpu', or None for the accelerator, if there is one",
    **HERE,
}
PATH = {
    "fits": lambda value: isinstance(value, os.PathLike) or is_text(value),
    "wanted": "it is a path, or None",
    **HERE,
}
MEMORY = {
    "fits": _is_memory,
    "wanted": "it is a dict with an accelerator's number or 'cpu' as keys, one accelerator at most, and bytes or "
    "sizes such as '8GiB' as values",
    "decisive": False,
}
SIZE = {
    "fits": _is_size,
    "wanted": "it is a size such as '8GiB', '8GB' or '8192MiB'",
}
TRACKERS = {
    "fits": lambda value: (
        is_text(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(is_text, value)))
    ),
    "wanted": "it is the name of a tracker such as 'tensorboard' or 'wandb', several of them, all or none",
    **HERE,
}
FACTS = {
    "fits": lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    "wanted": "it is a dict with text as keys, or None, and goes to config.json",
    "lenient": True,
}
NAMES = {
    "fits": _are_names,
    "wanted": "it is a list of names inside a block, such as ['self_attn.q_proj', 'mlp.down_proj'], or a list of such "
    "lists",
}
RULES = {
    "fits": lambda value: isinstance(value, dict),
    "wanted": "it is a dict of patterns with dicts of settings, such as {'+:.*down_proj': {'bits': 8}}",
}
INT32 = {
    "fits": lambda value: str(value).removeprefix("torch.") == "int32",  # torch.int32 as well
    "wanted": "codes are packed into 'int32' words only",
}
FORMAT = {
    "fits": lambda value: is_text(value) and value.lower() in ("gptq", "gptq_v2", "marlin"),
    "wanted": "allowed are gptq, gptq_v2",
}  # marlin is refused with more words
PRESET = {
    "allowed": tuple(PRESETS),
    "fits": lambda value: isinstance(value, str) and value.upper() in PRESETS,
    "wanted": f"allowed are {', '.join(PRESETS)}: activations stay in 16 bits",
    "decisive": False,  # what it stands for is
}
GPTQ = {"fits": lambda value: str(value).lower() == "gptq", "wanted": "allowed is 'gptq'"}


def declared(section: str, help: str, default: Any = MISSING, unset: str = "", /, **facts: Any) -> Any:
    """Declare a field of `Fields`; `facts` are arguments of `Field`."""
    facts |= {"section": section, "help": help, "default": default, "unset": unset}
    return field(default=default, metadata=facts)


@dataclass(eq=False, repr=False)
class Fields:
    """The fields; positional arguments are in the order of transformers' own class."""

    bits: int = declared(
        CHECKPOINT,
        "bits per weight: 2, 3, 4 or 8",
        None,
        "required, or `scheme`",
        stored=True,
        allowed=(2, 3, 4, 8),  # those of `LayerScheme`, which takes torch to be read
        wanted="allowed are 2, 3, 4, 8, or scheme='W4A16' instead",
    )
    tokenizer: Any = declared(CALIBRATION, "an object, a model id or a folder", None, "the model's", **TOKENIZER)
    dataset: Any = declared(
        CALIBRATION,
        "a file or folder, a list of samples, self: text that the model writes; wikitext2, c4, ptb, code, math, chat, "
        "medical, finance or multilingual, of the Hub; or a mix (`wikitext2:0.5,./my.jsonl:0.5`)",
        None,
        "self",
        options=("--dataset", "--data-path"),
        **DATA,
    )
    group_size: int = declared(
        CHECKPOINT,
        "columns that share a scale and a zero; -1 for whole rows",
        128,
        stored=True,
        least=-1,
        wanted="it is a positive integer, or -1 for whole rows",
    )
    damp_percent: float | None = declared(
        SEARCH,
        "a fraction: of the Hessian's mean diagonal, added to its diagonal",
        DEFAULT_DAMPING,
        stored=True,
        lenient=True,
        above=0,
        below=1,
    )
    desc_act: bool = declared(CHECKPOINT, "store groups in activation order (non-trivial g_idx)", False, stored=True)
    act_group_aware: bool | None = declared(
        CHECKPOINT, "solve whole groups in activation order, and columns inside of them", None, "False", stored=True
    )
    sym: bool = declared(CHECKPOINT, "zeros in the middle of the grid", True, stored=True)
    true_sequential: bool = declared(
        SEARCH, "calibrate later linears of a block on the already quantized earlier ones", True, stored=True
    )
    format: str = declared(CHECKPOINT, "gptq (v1), which all read, or gptq_v2", "gptq", stored=True, **FORMAT)
    meta: dict[str, Any] | None = declared(
        CHECKPOINT,
        "facts for config.json; `quantizer` and `calibration` are added",
        None,
        stored=True,
        **FACTS,
    )
    backend: str | None = declared(
        RUNNING, "which kernels may run: auto, cpu, or a kernel's name", "auto", decisive=False
    )
    model_seqlen: int | None = declared(
        CALIBRATION,
        "longest sequence in tokens",
        None,
        "the model's limit, at most 2048",
        least=1,
        options=("--seq-len", "--max-len"),
    )
    block_name_to_quantize: str | None = declared(
        SEARCH, "the list of blocks, such as `model.layers`", None, "found", stored=True, lenient=True
    )
    module_name_preceding_first_block: list[str] | None = declared(
        RUNNING, WITHOUT_EFFECT, None, stored=True, lenient=True, option=False, **NAMES
    )
    batch_size: int | None = declared(
        CALIBRATION, "sequences per forward", None, "as many as are 2048 tokens; 512 with `polish`", least=1
    )
    pad_token_id: int | None = declared(
        CALIBRATION, "fills up shorter samples; masked, so any id does", None, "the model's, else 0", lenient=True
    )
    max_input_length: int | None = declared(RUNNING, WITHOUT_EFFECT, None, least=1, lenient=True, option=False)
    cache_block_outputs: bool = declared(RUNNING, WITHOUT_EFFECT, True, lenient=True, option=False)
    modules_in_block_to_quantize: list[list[str]] | list[str] | None = declared(
        CHECKPOINT, "names inside a block; all other linears stay dense", None, "all", stored=True, **NAMES
    )

    _: KW_ONLY
    checkpoint_format: str | None = declared(
        CHECKPOINT, "`format`, as other tools call it", None, "`format`", stored=True, decisive=False, option=False
    )
    static_groups: bool | None = declared(  # None until we quantize: a checkpoint of others must not claim ours
        CHECKPOINT,
        "solve columns in activation order while groups keep their layout; else left to right",
        None,
        "True",
        stored=True,
    )
    effort: Effort | None = declared(
        SEARCH, "fast, default or max: how much time may be spent", None, "default", stored=True
    )
    grid: Literal["minmax", "weighted"] | None = declared(
        SEARCH, "weighted: clip a group's span where outputs lose less; minmax: never", None, "weighted", stored=True
    )
    propagation: float | None = declared(
        SEARCH,
        "0 … 1: how much of earlier layers' errors is compensated",
        None,
        "by effort",
        stored=True,
        wanted="it is a fraction from 0 (off) to 1, or None for the default",
    )
    refinement: int | None = declared(
        SEARCH, "rounds of re-fitting scales and codes once a layer is solved", None, "by effort", stored=True, least=0
    )
    polish: int | None = declared(
        SEARCH,
        "passes over the data, at most, in which finished blocks are tuned by gradient",
        None,
        "by effort",
        stored=True,
        least=0,
    )
    num_samples: int | None = declared(
        CALIBRATION, "sequences to use at most", None, "all of a list, 128 of anything else", least=1
    )
    packing: bool = declared(CALIBRATION, "join short samples, so that all sequences are full", False)
    calibrate_all_experts: bool = declared(CALIBRATION, "show every expert of a mixture all tokens", False)
    seed: int = declared(CALIBRATION, "chooses the sequences where there are more", 0)
    quality_gate: Literal["warn", "raise", "off"] = declared(
        RUNNING, "warn, raise or off: if the result is far from the original", "warn", decisive=False
    )  # not decisive, although "off" holds no rows out: that shows in the data
    max_perplexity_ratio: float = declared(
        RUNNING, "how many times the original's perplexity counts as far", 1.25, decisive=False, above=0
    )
    device: Any = declared(
        RUNNING, "where blocks are run and solved, one at a time", None, "the accelerator, if there is one", **DEVICE
    )
    activation_memory: dict[str | int, str | int] | None = declared(
        RUNNING,
        'for what waits between blocks: `{"0": "8GiB", "cpu": "32GiB"}`',
        None,
        "40 % of what is free",
        **MEMORY,
    )
    log_file: os.PathLike[str] | str | None = declared(
        RUNNING, "to which the run's events are appended as JSON lines", None, "one in the output folder", **PATH
    )
    report_to: str | list[str] | None = declared(
        RUNNING,
        "trackers that show the run while it goes on, such as `tensorboard`, `trackio` or `wandb`; all, or none",
        None,
        **TRACKERS,
    )
    scheme: str | None = declared(
        CHECKPOINT,
        "`bits`, `group_size` and `sym` by their usual name, such as W4A16: 4 bits, groups of 128, symmetric",
        None,
        **PRESET,
    )
    target_bits_per_weight: float | None = declared(
        CHECKPOINT, "choose bits for each linear instead, so that they take so many together", None, above=0
    )
    target_size_gib: float | None = declared(CHECKPOINT, "the same, as the size of all weights", None, above=0)
    fit: str | None = declared(
        CHECKPOINT, "the same, so that a server needs no more memory than such as 8GiB, all included", None, **SIZE
    )
    context_length: int | None = declared(
        CHECKPOINT, "tokens of one text whose cache `fit` counts", None, "the model's limit, at most 8192", least=1
    )
    serving: Literal["vllm", "sglang", "transformers"] | None = declared(
        CHECKPOINT,
        "vllm, sglang or transformers: refuse, and do not choose, what it does not read",
        None,
        options=("--for",),
    )
    dynamic: dict[str, dict[str, Any]] | None = declared(
        CHECKPOINT,
        'by layer: `{"-:.*o_proj": {}, "+:.*down_proj": {"bits": 8}}`; the first match counts',
        None,
        stored=True,
        **RULES,
    )
    lm_head: bool = declared(CHECKPOINT, "quantize the output head too", False, stored=True)
    pack_dtype: Any = declared(CHECKPOINT, "nothing but int32", "int32", stored=True, option=False, **INT32)
    quant_method: str = declared(CHECKPOINT, "nothing but gptq", "gptq", stored=True, option=False, **GPTQ)

    unknown: dict[str, Any] = field(init=False, default_factory=dict)  # what a file says besides: is written again
    of_file: bool = field(init=False, default=False)
    journal_folder: str | None = field(init=False, default=None)  # of optq.quantize: for blocks, as they are finished
    base: dict[str, Any] | None = field(init=False, default=None)  # the quantization_config of the model to quantize

    def __new__(cls, /, *args: Any, **given: Any) -> "Self":
        """Refuses names that are no fields; all else is up to the dataclass's own `__init__`."""
        if "quant_method" in given:  # of another method, every name is another
            FIELDS["quant_method"].checked(given["quant_method"])
        with_preset({**dict(zip(FIELDS, args, strict=False)), **given})
        if cls.__init__ is Fields.__init__:  # a class that is derived may have more
            refuse_unknown(given)
        formats = [given[name] for name in ("format", "checkpoint_format") if given.get(name) is not None]
        if len({str(getattr(name, "value", name)).lower() for name in formats}) > 1:
            raise ConfigError(
                f"format={formats[0]!r} and checkpoint_format={formats[1]!r} were asked for, two names of one field. "
                "Pass one of them."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.post_init()

    def post_init(self) -> None:
        """Check every field by itself.

        Raises:
            ConfigError: one does not fit; it is named.
        """
        if self.scheme is not None:
            vars(self).update(with_preset({"scheme": self.scheme}), scheme=None)
        for name, known in FIELDS.items():
            setattr(self, name, known.checked(getattr(self, name)))


FIELDS: dict[str, Field] = {
    name: Field(name=name, annotation=found.type, **found.metadata)
    for name, found in Fields.__dataclass_fields__.items()
    if found.metadata
}
"""In the order of the signature."""


def as_options(fields: Fields) -> list[str]:
    """The options of the command line that ask for the same result; data that has no name is called DATASET."""
    found: list[str] = []
    for name, known in FIELDS.items():
        value = getattr(fields, name)
        if not known.flags or value is None or value == known.default or not (known.decisive or name == "dataset"):
            continue
        flag = known.flags[0]
        if known.kind is bool:
            found.append(flag if value else flag.replace("--", "--no-"))
        elif known.kind in (dict, list):
            found += [flag, json.dumps(value, default=str)]
        else:
            named = isinstance(value, (str, os.PathLike, Number))
            unit = "B" if known.fits is _is_size and isinstance(value, Number) else ""
            found += [flag, f"{value}{unit}" if named else name.upper()]
    return found


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were given, with those that `scheme` stands for in its place.

    Raises:
        ConfigError: there is no such scheme, or one of the others contradicts it.
    """
    rest = {name: value for name, value in given.items() if name != "scheme"}
    scheme = FIELDS["scheme"].checked(given.get("scheme"))
    if scheme is None:
        return rest
    preset = PRESETS[scheme.upper()]
    budgets = dict.fromkeys(BUDGETS)  # they choose the bits
    for name, value in {**preset, **budgets}.items():
        if given.get(name) is not None and given[name] != value:
            said = ", ".join(f"{key}={stated!r}" for key, stated in preset.items())
            raise ConfigError(
                f"scheme={scheme!r} stands for {said}, but {name}={short(given[name])} was asked for as well. Leave "
                "one of them out."
            )
    return rest | preset


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Refuse names that are no fields.

    Raises:
        ConfigError: one is not; says what is near, or what another tool's name is here.
    """
    for name, value in given.items():
        if name not in FIELDS:
            raise ConfigError(f"{name}={short(value)} was asked for; {why_unknown(str(name), FIELDS)}")


def read_file(stated: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a quantization_config into values of fields, converted from JSON, and entries to keep as they are.

    null is a default, and switches may be 0 and 1. What is not needed to read a checkpoint need not make sense.
    """
    values: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in stated.items():
        known = FIELDS.get(name)
        if known is None:
            unknown[name] = value
        elif name == "quant_method" or (name == "format" and stated.get("checkpoint_format")):
            continue
        elif name == "backend":
            if value not in (None, "auto", "auto_trainable"):
                logger.warning(
                    "The quantization_config names the kernel %r, which may be any tool's: it is left aside. To ask "
                    "for one, pass GPTQConfig(..., backend=...) to from_pretrained.",
                    value,
                )
        elif value is None or (value == "" and known.kind is str):
            values |= {name: None} if known.optional else {}
        elif name == "scheme":  # of another tool; the fields say the same of the tensors
            unknown[name] = value
        elif known.lenient and (reason := known.why_refused(value)):
            values |= {name: None} if known.optional else {}
            unknown |= {name: value} if known.stored else {}
            logger.warning("In the quantization_config, %s It is left aside.", reason)
        else:
            values[name] = known.from_json(value)
    if "context_length" in values and values.get("fit") is None:  # of another tool: ours says nothing without `fit`
        unknown["context_length"] = values.pop("context_length")
    return values, unknown
