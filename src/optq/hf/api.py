# SPDX-License-Identifier: Apache-2.0
"""`optq.quantize`: from a model's id or folder to a finished checkpoint folder, without keeping a model object."""

import copy
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from optq.errors import OutputError

from .config import GPTQConfig

PARTIAL = ".optq-partial"
"""Where files grow inside the output folder before they get their names."""

LOG_NAME = "quantization_log.jsonl"
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""Tokenizer, chat template, generation config, custom code and licence: what is carried along."""

NOT_COMPANIONS = ("config.json", "quantize_config.json", "*.index.json")
OURS = (PARTIAL, LOG_NAME)


def quantize(
    model_id_or_dir: str | os.PathLike[str],
    config: transformers.GPTQConfig,
    *,
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int = "50GB",
    **kwargs: Any,
) -> Path:
    """Quantize a model and write a checkpoint folder; the same path as `from_pretrained` and `save_pretrained`.

    The folder gets its config.json last, so a folder that a failure left behind is never taken for a finished one. The
    run's events are in quantization_log.jsonl beside the weights.

    Args:
        model_id_or_dir: what `from_pretrained` takes.
        config: how to quantize, with calibration data.
        output_dir: is created; must be empty or hold only what an unfinished run left.
        max_shard_size: largest weight file.
        kwargs: passed to `from_pretrained`: dtype, revision, token, trust_remote_code, …
    Returns:
        The folder.
    Raises:
        OutputError: the folder holds something else, or cannot be written.
        ConfigError, CalibrationError, ModelError, SolveError: see `GPTQConfig` and docs/configuration.md.
    """
    source, output = os.fspath(model_id_or_dir), Path(output_dir)
    _claim(output)
    partial = output / PARTIAL
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    config = copy.copy(GPTQConfig.from_stock(config))
    config.log_file = config.log_file or str(output / LOG_NAME)
    try:
        model = _model_class(source, kwargs).from_pretrained(source, quantization_config=config, **kwargs)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _copy_companions(_snapshot(source, kwargs), partial)
        _reveal(partial, output)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return output


def _claim(output: Path) -> None:
    """Create the folder, or make sure that it is ours to write to."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"output_dir={str(output)!r} is a file; name a folder that does not exist or is empty.")
    strangers = sorted(path.name for path in output.iterdir() if path.name not in OURS) if output.exists() else []
    if strangers:
        shown = ", ".join(strangers[:5]) + (" …" if len(strangers) > 5 else "")
        raise OutputError(
            f"output_dir={str(output)!r} is not empty: it holds {shown}. "
            "Name a folder that does not exist or is empty; nothing was changed."
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG_NAME).unlink(missing_ok=True)


def _model_class(source: str, kwargs: dict[str, Any]) -> Any:
    """The class that the model's own config names, else the causal language model."""
    keys = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")
    model_config = AutoConfig.from_pretrained(source, **{key: kwargs[key] for key in keys if key in kwargs})
    if getattr(model_config, "auto_map", None):
        return AutoModelForCausalLM
    name = (model_config.architectures or [""])[0]
    return getattr(transformers, name, AutoModelForCausalLM)


def _snapshot(source: str, kwargs: dict[str, Any]) -> Path:
    """The folder with the model's files; for a model of the Hub, the companions are fetched into its cache."""
    if Path(source).is_dir():
        return Path(source, kwargs.get("subfolder") or "")
    from huggingface_hub import snapshot_download

    keys = ("revision", "token", "cache_dir", "local_files_only")
    return Path(
        snapshot_download(
            source,
            allow_patterns=list(COMPANIONS),
            **{key: kwargs[key] for key in keys if key in kwargs},
        ),
        kwargs.get("subfolder") or "",
    )


def _copy_companions(source: Path, target: Path) -> None:
    """Carry along `COMPANIONS`, byte for byte, over what save_pretrained may have written."""
    for path in sorted(source.iterdir()):
        wanted = not path.name.startswith(".") and any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
        unwanted = any(fnmatch(path.name, pattern) for pattern in NOT_COMPANIONS)
        if path.is_file() and wanted and not unwanted:
            shutil.copyfile(path, target / path.name)


def _reveal(partial: Path, output: Path) -> None:
    """Give every file its final name, config.json last: a folder without it is no model."""
    names = sorted(path.name for path in partial.iterdir())
    for name in [*(name for name in names if name != "config.json"), "config.json"]:
        with (partial / name).open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial / name, output / name)
