# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: its config, class and files, of a folder or of a repository on the Hub."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from optq.checkpoint import read_headers
from optq.config.field import short
from optq.config.gptq import GPTQConfig
from optq.errors import CheckpointError, ModelError, OptqError, found_in
from optq.readers import FUSED_NAMES
from optq.reading import text_of

from .config_checks import check_numbers
from .legacy import WHERE, entry_of

logger = logging.getLogger(__name__)

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""Tokenizer, chat template, generation config, custom code and licence: what is carried along."""

ENTRY = "quantization_config"

TOKENIZERS = ("tokenizer*", "*.model", "*.tiktoken", "vocab*", "spiece*", "tekken*", "sentencepiece*")
"""What a tokenizer's files are called; a slow one's may be its vocabulary alone."""

NOT_COMPANIONS = ("config.json", "quantize_config.json", "*.index.json")


def place_of(model: Any) -> str:
    """A model's id on the Hub or its folder, as text.

    Raises:
        ModelError: it is something else, such as a model object.
    """
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    raise ModelError(
        f"A model's id on the Hub or its folder is needed here, not a {type(model).__name__}. Save an object with "
        "save_pretrained() and pass that folder; only optq.quantize and optq.perplexity take the object itself."
    )


def absolute(model: str) -> str:
    """A model's folder as an absolute path, which is the same wherever the process goes; an id as it is."""
    return os.path.abspath(model) if model and os.path.isdir(model) else model


def model_config_of(source: str, kwargs: dict[str, Any], *, as_data: bool = False) -> Any:
    """Read the model's config from a folder or the Hub; only arguments of `kwargs` that say where it is are used.

    Args:
        as_data: never run code of the model: if transformers does not know it, a plain config holds what is written.
    Raises:
        ModelError: there is none, or none that transformers knows.
        OSError: there is no such folder or repository, or it cannot be reached; says which was looked for.
    """
    keys = (*WHERE, "trust_remote_code")
    folder = Path(source, kwargs.get("subfolder") or "")
    if not source.strip() or folder.is_file():
        found = "a file" if source.strip() else "no name"
        raise ModelError(
            f"{source!r} is {found}. Name a model's folder, or its id on the Hub; of GGUF, optq.convert makes one."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, so it is no model. Name a model's folder, or its id on the Hub."
        )
    with _refusing(source):
        written, _ = PreTrainedConfig.get_config_dict(source, **_only(keys, kwargs))
        check_numbers(written, f"{source}/config.json")  # of a dense model, too: of a thousand million blocks, none is
        if as_data and "auto_map" in written and written.get("model_type") not in CONFIG_MAPPING:
            return PreTrainedConfig.from_dict(written)
        return AutoConfig.from_pretrained(source, **_only(keys, kwargs))


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """Name the file, or the folder that is not there, in what transformers says, which may be any error."""
    try:
        yield
    except OptqError:
        raise
    except OSError as error:
        if Path(source).exists():  # it names the file
            raise
        raise OSError(_not_found(source, error)) from error
    except Exception as error:
        raise ModelError(
            f"{source}/config.json: transformers {transformers.__version__} cannot read it: {type(error).__name__}: "
            f"{error}"
        ) from error


def _not_found(source: str, error: OSError) -> str:
    """Why there is no such model: without a network, what transformers says of a wrong path is that there is none."""
    folder = Path(source)
    near = get_close_matches(folder.name, [path.name for path in siblings_of(folder)], n=1)
    hint = f" Did you mean {str(folder.with_name(near[0]))!r}?" if near else ""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return f"There is no folder {source!r}, and a model's id on the Hub is no path.{hint}"
    here = str(Path.cwd())
    return f"There is no folder {source!r} in {here!r}, and of the Hub there is no such model here: {error}{hint}"


def siblings_of(folder: Path) -> list[Path]:
    """The folders beside one, which need not be there."""
    try:
        return [path for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return []


def stated_quantization(model_config: Any) -> GPTQConfig | None:
    """The config of a GPTQ checkpoint from its model's config; None if that states no GPTQ."""
    stated = quantization_entry(model_config)
    if not stated:
        return None
    if (method := stated.get("quant_method")) != "gptq":
        raise CheckpointError(
            f"{model_config.name_or_path}/config.json says quant_method={short(method)}, but the tensors are packed "
            'as GPTQ packs them. Correct it to "gptq", or download the weights again.'
        )
    with found_in(f"{model_config.name_or_path}/config.json: quantization_config"):
        config: GPTQConfig = GPTQConfig.from_dict(stated)
        return config


def quantization_entry(model_config: Any) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint in any format; that of its text model, if only that has one."""
    stated: Any = getattr(model_config, ENTRY, None) or getattr(
        model_config.get_text_config(decoder=True), ENTRY, None
    )
    return None if stated is None else entry_of(stated)


def nested_quantization(model_config: Any, inside: str = "") -> dict[str, Any]:
    """The quantization_config of each part of the model that has one, by the part's name, such as vision_config.

    Args:
        inside: the name of the part that `model_config` is.
    """
    found: dict[str, Any] = {}
    for name, part in parts_of(model_config).items():
        stated = part.get(ENTRY) if isinstance(part, dict) else getattr(part, ENTRY, None)
        if stated is not None:
            found[inside + name] = entry_of(stated)
        found |= nested_quantization(part, f"{inside}{name}.")
    return found


def forget_nested_quantization(model_config: Any) -> None:
    """Remove the quantization_config from the config of every part of the model."""
    for part in parts_of(model_config).values():
        (part if isinstance(part, dict) else vars(part)).pop(ENTRY, None)
        forget_nested_quantization(part)


def parts_of(model_config: Any) -> dict[str, Any]:
    """The configs inside of a config; dicts where transformers knows no class for it."""
    held = model_config if isinstance(model_config, dict) else vars(model_config)
    return {
        name: part
        for name, part in held.items()
        if isinstance(part, PreTrainedConfig)
        or (isinstance(part, dict) and name.endswith("_config") and name != ENTRY)
    }


def parallel_plan_of(model_config: Any) -> Mapping[str, str]:
    """The model's tensor-parallel plan: how linears are split, by patterns of their names."""
    return getattr(model_config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}


def head_width_of(name: str, model_config: Any) -> int:
    """Outputs per attention head of the linear of this name, 0 if it makes no queries, keys or values."""
    if name.rpartition(".")[2] not in FUSED_NAMES["qkv_proj"]:
        return 0
    config = model_config.get_text_config(decoder=True)
    width, heads = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    return getattr(config, "head_dim", None) or (width // heads if width and heads else 0)


def model_class_of(model_config: Any) -> Any:
    """The class that the model's own config names, else the causal language model."""
    if getattr(model_config, "auto_map", None):
        return AutoModelForCausalLM
    named = model_config.architectures
    if not isinstance(named, (list, tuple)) or not named or not isinstance(named[0], str):
        return AutoModelForCausalLM
    return getattr(transformers, named[0], AutoModelForCausalLM)


def companions_folder(source: str, kwargs: dict[str, Any]) -> Path:
    """The folder with the model's files; for a model of the Hub, the companions are fetched into its cache."""
    if Path(source).is_dir():
        return Path(source, kwargs.get("subfolder") or "")
    from huggingface_hub import snapshot_download

    keys = ("revision", "token", "cache_dir", "local_files_only")
    snapshot = snapshot_download(source, allow_patterns=list(COMPANIONS), **_only(keys, kwargs))
    return Path(snapshot, kwargs.get("subfolder") or "")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files, of whatever kind."""
    return bool(files_of(folder, TOKENIZERS))


def copy_companions(source: Path, target: Path) -> None:
    """Copy `COMPANIONS` byte for byte, over what save_pretrained may have written.

    A link that leads out of the model's folder is not followed: with the checkpoint, any file could be published. Nor
    does its content stay that transformers has read, and save_pretrained written, as of generation_config.json.
    """
    own = companions_in(source)
    for path in own:
        shutil.copyfile(path, target / path.name)
    for path in files_of(source, COMPANIONS):
        if path not in own and leads_out(path):
            (target / path.name).unlink(missing_ok=True)


def companions_in(folder: Path) -> list[Path]:
    """The files that are copied from a model's folder."""
    found = []
    for path in files_of(folder, COMPANIONS):
        if any(fnmatch(path.name, pattern) for pattern in NOT_COMPANIONS):
            continue
        if leads_out(path):
            logger.warning("%s is not copied: it is a link to a file outside of the model's folder.", path)
        else:
            found.append(path)
    return found


def leads_out(path: Path) -> bool:
    """Whether a file is a link to one outside of its folder. The Hub's cache keeps a repository's contents apart."""
    folder, target = path.parent.resolve(), path.resolve()
    snapshots = next((each for each in folder.parents if each.name == "snapshots"), None)
    roots = [folder, *([snapshots.parent / "blobs"] if snapshots is not None else [])]
    return not any(target.is_relative_to(root) for root in roots)


def files_of(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The folder's own files, none of them hidden, that match one of the patterns."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name[0] != "." and any(fnmatch(path.name, pattern) for pattern in patterns)
    ]


def weight_files(source: str, model_config: Any, kwargs: dict[str, Any]) -> list[Path]:
    """The safetensors files of a model, those of the Hub in its cache: the ones that transformers reads.

    Raises:
        CheckpointError: it has none.
    """

    def file(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **_only(WHERE, kwargs))
        return None if found is None else Path(found)

    name = getattr(model_config, "transformers_weights", None)
    names = [name or SAFE_WEIGHTS_NAME]
    folder = Path(source, kwargs.get("subfolder") or "")
    if name is None and os.path.lexists(whole := folder / SAFE_WEIGHTS_NAME):
        return [whole]  # whatever it is: who opens it says so
    of_index = name or (SAFE_WEIGHTS_INDEX_NAME if file(SAFE_WEIGHTS_NAME) is None else None)
    index = None if of_index is None else folder / of_index if os.path.lexists(folder / of_index) else file(of_index)
    if index is not None and index.suffix == ".json":
        names = shards_of(index)
    files = {name: file(name) for name in names}
    if missing := [name for name, path in files.items() if path is None]:
        raise CheckpointError(
            f"{source!r} has no {', '.join(missing[:3])}. Weights are read from safetensors files only: unpickling a "
            "file from elsewhere can run its code. Convert the model once, where you trust it: from_pretrained(..., "
            "use_safetensors=False), then save_pretrained()."
        )
    return [path for path in files.values() if path is not None]


def weight_files_of(source: str, model_config: Any, kwargs: dict[str, Any], names: Iterable[str]) -> list[Path]:
    """The files of a model's weights, of whatever kind; of files that are not safetensors those with these names.

    Raises:
        CheckpointError: there are none.
    """
    others = kwargs.get("use_safetensors") is False or kwargs.get("variant") or kwargs.get("gguf_file")
    names = [name for name in names if others or not name.endswith(".safetensors")]
    if not names:
        return weight_files(source, model_config, kwargs)
    found = [
        cached_file(source, name, _raise_exceptions_for_missing_entries=False, **_only(WHERE, kwargs))
        for name in names
    ]
    return [Path(file) for file in found if file is not None]


def two_sets_of_weights(source: str, kwargs: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence if a folder has weights in one file, and an index that names others.

    Args:
        kwargs: of `from_pretrained`; nothing is said if they ask for other files.
    """
    folder = Path(source, kwargs.get("subfolder") or "")
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if kwargs.get("use_safetensors") is False or kwargs.get("variant") or not (whole.is_file() and index.is_file()):
        return
    try:
        if shards_of(index) == [SAFE_WEIGHTS_NAME]:
            return
    except CheckpointError:  # then it names others, or none
        pass
    yield (
        f"{whole} is read, as transformers does, and not the files that {index.name} beside it names; other readers "
        "may read those. Remove what does not belong to this model."
    )


def check_files(source: str, kwargs: dict[str, Any]) -> None:
    """Refuse a folder with weights that are not all there; one without any, and the Hub, are asked nothing.

    Raises:
        CheckpointError: a file is missing or not whole.
    """
    folder = Path(source, kwargs.get("subfolder") or "")
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if kwargs.get("use_safetensors") is False or kwargs.get("variant"):  # others are read
        return
    names: list[str] = []
    if os.path.lexists(whole):  # transformers looks for it first
        names = [SAFE_WEIGHTS_NAME]
    elif index.exists():
        names = shards_of(index)
    read_headers([os.fspath(folder / name) for name in names])


def shards_of(index: Path) -> list[str]:
    """The names of a checkpoint's files, sorted, by its index.

    Raises:
        CheckpointError: the index is damaged, or names a file that is not beside it.
    """
    content = json_object(index)
    homes = content.get("weight_map")
    if not isinstance(homes, dict) or not homes or not isinstance(content.get("metadata"), dict):
        raise CheckpointError(
            f'{index} is no index of a checkpoint: it has {short(content)} instead of "metadata" and a "weight_map" '
            "from tensors to files. Download it again."
        )
    for tensor, file in homes.items():
        if not _is_file_name(file):
            raise CheckpointError(
                f"{index} says that {short(tensor)} is in {short(file)}; allowed are names of .safetensors files in "
                "the same folder. Download it again from where you trust it."
            )
    return sorted(set(homes.values()))


def _is_file_name(file: Any) -> bool:
    """Whether something is a name that a file of weights may have, in UTF-8, as whoever opens it wants."""
    if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
        return False
    return file.isprintable()  # no half of a character, no control character


def json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(text_of(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {short(content)}, and no JSON object. Download it again.")
    return content


def _only(keys: tuple[str, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in keys if key in kwargs}
