# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as older tools left them: AutoGPTQ and its kin wrote other files than those that transformers looks for.

The quantization is stated in quantize_config.json instead of config.json, and the weights have names such as
gptq_model-4bit-128g.safetensors, which transformers takes from its config's attribute `transformers_weights`.
transformers asks no quantizer about a config without quantization, so both are added where it reads configs. Only
there does it also show whether the caller asks for pickled weights.
"""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from optq.checkpoint import read_headers
from optq.errors import CheckpointError

from .config_checks import check_model_config

logger = logging.getLogger(__name__)

QUANTIZE_CONFIG = "quantize_config.json"

NOT_SETTINGS = ("model_name_or_path", "model_file_base_name", "is_marlin_format")
"""Keys of quantize_config.json about the folder itself."""

UNPICKLE = "optq_reads_pickled_weights"
"""What a config says while a model is loaded with use_safetensors=False."""

WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""What tells where in a repository or folder a file is."""


def complete_config(config: dict[str, Any], source: str, kwargs: Mapping[str, Any]) -> None:
    """Add to what transformers has read of a config what is beside it, and whether pickled weights are asked for.

    Args:
        config: may be changed.
        kwargs: those of `PreTrainedConfig.get_config_dict`.
    """
    if not config or kwargs.get("gguf_file") is not None:
        return
    config.pop(UNPICKLE, None)  # only the caller may ask for that, not a file
    complete(config, source, {key: kwargs[key] for key in WHERE if key in kwargs})
    check_model_config(config, source)
    if kwargs.get("use_safetensors") is False and "quantization_config" in config:
        config[UNPICKLE] = True


def complete(config: dict[str, Any], source: str, where: Mapping[str, Any]) -> None:
    """Add to what config.json says what transformers would miss of an old checkpoint.

    On the Hub only repositories with "gptq" in their name are asked, so that other models cost no request.

    Args:
        config: of config.json; may get `quantization_config` and `transformers_weights`.
        where: `WHERE`, as far as the caller said.
    Raises:
        CheckpointError: a folder has several files that may be the weights; or the quantization_config is no dict.
    """
    stated = config.get("quantization_config")
    if stated is not None:
        entry_of(stated)
    folder = Path(source, where.get("subfolder") or "")
    if not folder.is_dir() and "gptq" not in source.lower():
        return
    file = cached_file(source, QUANTIZE_CONFIG, _raise_exceptions_for_missing_entries=False, **where)
    beside = _settings_in(Path(file)) if file is not None else {}
    if stated is None:
        if "bits" not in beside or beside.get("quant_method", "gptq") != "gptq" or _is_dense(folder):
            return
        marlin = {"checkpoint_format": "marlin"} if beside.get("is_marlin_format") else {}
        settings = {key: value for key, value in beside.items() if key not in NOT_SETTINGS}
        config["quantization_config"] = {"quant_method": "gptq", **settings, **marlin}
    elif entry_of(stated).get("quant_method") != "gptq":
        return
    if folder.is_dir() or is_offline_mode() or where.get("local_files_only"):
        names = [path.name for path in (folder if folder.is_dir() else Path(file or "").parent).iterdir()]
    else:
        listed = HfApi(token=where.get("token")).list_repo_files(source, revision=where.get("revision"))
        names = [name.removeprefix(f"{folder.relative_to(source)}/") for name in listed]
    if "transformers_weights" not in config and (name := unusual_name(names, beside)) is not None:
        config["transformers_weights"] = name


def _settings_in(file: Path) -> dict[str, Any]:
    """What quantize_config.json says; nothing, with a warning, if that is no object of JSON."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        settings = error
    if isinstance(settings, dict):
        return settings
    logger.warning("%s is ignored: it holds no JSON object (%s).", file, settings)
    return {}


def _is_dense(folder: Path) -> bool:
    """Whether a folder's safetensors files hold no packed linear: then quantize_config.json is left from elsewhere."""
    files = [str(path) for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    try:
        return bool(files) and not any(name.endswith(".qweight") for name in read_headers(files))
    except CheckpointError:  # which whoever reads the weights will say
        return False


def entry_of(stated: Any) -> dict[str, Any]:
    """Convert a quantization_config to the dict that config.json has.

    Raises:
        CheckpointError: it is something else.
    """
    if isinstance(stated, dict):
        return stated
    if hasattr(stated, "to_dict"):
        return dict(stated.to_dict())
    raise CheckpointError(
        f"config.json has quantization_config={stated!r}, which says nothing that could be understood; it is a dict "
        'with "quant_method". Correct it, or remove it if the weights are not quantized.'
    )


def unusual_name(names: Collection[str], beside: Mapping[str, Any]) -> str | None:
    """The name of the weights, or of the index of several files, if transformers does not expect it; else None.

    Args:
        names: of the files there are.
        beside: what quantize_config.json says.
    Raises:
        CheckpointError: several may be meant.
    """
    if {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & {*names}:
        return None
    stems = (beside.get("model_file_base_name"), f"gptq_model-{beside.get('bits')}bit-{beside.get('group_size')}g")
    indices = sorted(name for name in names if name.endswith(".safetensors.index.json"))
    found = indices or sorted(name for name in names if name.endswith(".safetensors"))
    named = [name for stem in stems for name in found if name.split(".safetensors")[0] == stem]
    if named or len(found) < 2:
        return next(iter(named or found), None)
    raise CheckpointError(
        f"There is no {SAFE_WEIGHTS_NAME}, but {', '.join(found[:5])}. Say which is the model: "
        'add "transformers_weights": "its name" to config.json.'
    )
