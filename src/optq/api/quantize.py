# SPDX-License-Identifier: Apache-2.0
"""`optq.quantize`: from a model's id or folder to a finished checkpoint folder, without keeping a model object."""

import copy
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from optq.compat.call import where_in
from optq.config.counterparts import why_unknown
from optq.config.gptq import GPTQConfig
from optq.distributed import join
from optq.errors import CheckpointError, ConfigError, OutputError, ReportError
from optq.events import LOG_NAME, FilesWritten
from optq.files.output import (
    PARTIAL,
    complete,
    digest_of_file,
    flush,
    has_result,
    is_begun,
    is_whole,
    open_working_folder,
    place_for,
    read_result,
    refuse_strangers,
    refuse_unfinished,
    reveal,
    scratch,
    settled,
    tidy,
    write_result,
    write_whole,
)
from optq.files.ownership import owned, refuse_irregular
from optq.files.source import (
    absolute,
    check_files,
    companions_folder,
    companions_in,
    copy_companions,
    has_tokenizer,
    model_class_of,
    model_config_of,
    weight_files_of,
)
from optq.hf.bases import check_base
from optq.hf.in_memory import quantize_in_memory, refuse_unless_whole
from optq.hf.loading import made_of
from optq.runs.journal import (
    CALL,
    DESCRIPTION,
    NO_SETTINGS,
    config_of,
    differences_between,
    finished_in,
    hash_of,
    identities_of,
    is_worth_keeping,
    own_files,
    read_description,
)
from optq.runs.preparation import prepare
from optq.runs.validation import check_dtype, check_request
from optq.torch_state import default_torch_state

from .card import card

logger = logging.getLogger(__name__)

Differences = Callable[[dict[str, Any]], list[str]]
"""What this call asks for otherwise than a run, in words."""


@overload
def quantize(
    model: str | os.PathLike[str],
    config: transformers.GPTQConfig | dict[str, Any],
    *,
    output_dir: str | os.PathLike[str],
    **kwargs: Any,
) -> Path: ...


@overload
def quantize(
    model: PreTrainedModel,
    config: transformers.GPTQConfig | dict[str, Any],
    *,
    output_dir: str | os.PathLike[str] | None = None,
) -> PreTrainedModel: ...


@default_torch_state()
def quantize(
    model: str | os.PathLike[str] | PreTrainedModel,
    config: transformers.GPTQConfig | dict[str, Any],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Path | PreTrainedModel:
    """Quantize a model and write a checkpoint folder; the same path as `from_pretrained` and `save_pretrained`.

    A model object is quantized in place, and written if `output_dir` is given. What follows is about ids and folders.

    Every decoder block is read from disk when its turn comes, and written as a file of its own as soon as it is done.
    So the memory needed does not grow with the number of blocks; and a run that was interrupted, even by a power cut,
    goes on from its last finished block when the same call is made again, and ends with the same bytes. The folder
    gets its config.json last, and has the run's events in quantization_log.jsonl and a model card. Processes that
    torchrun or accelerate launch started share the work, and the first one writes.

    Args:
        model: what `from_pretrained` takes; or a model of transformers with its weights in memory, on the CPU or on
            accelerators.
        config: settings of the quantization, with calibration data.
        output_dir: is created; must be empty or hold only what a run of the same model, settings and data has left. A
            finished one is returned as it is. Required for an id or folder.
        kwargs: passed to `from_pretrained`: dtype, revision, token, trust_remote_code, …
    Returns:
        The folder, as an absolute path; or the model object, if it was given one.
    Raises:
        OutputError: the folder holds something else or another run, or what it holds is damaged; or it cannot be
            written.
        ConfigError, CalibrationError, ModelError, SolveError: see `GPTQConfig` and docs/configuration.md.
        CheckpointError: a file of the model is missing or not whole.
    """
    if not isinstance(model, (str, os.PathLike)):
        return _quantize_object(model, config, output_dir, kwargs)
    if output_dir is None:
        raise ConfigError(
            f"optq.quantize({os.fspath(model)!r}, ...) writes a checkpoint: pass output_dir=, a folder that does not "
            "exist or is empty. For a model in memory call from_pretrained(..., quantization_config=config)."
        )
    if "max_shard_size" in kwargs:
        raise ConfigError(
            f"max_shard_size={kwargs['max_shard_size']!r} was asked for; {why_unknown('max_shard_size', ())}"
        )
    source, output = absolute(os.fspath(model)), place_for(output_dir)
    config = _copied(config)
    check_request(config, kwargs.get("device_map"), kwargs.get("offload_folder"), output)
    check_dtype(kwargs.get("dtype"))
    described = model_config_of(source, kwargs)
    model_without_weights(source, kwargs)  # of which nothing is wanted but that there is one
    check_files(source, kwargs)
    _write_folder(source, described, config, output, kwargs)
    return output


def _write_folder(
    source: str, described: PreTrainedConfig, config: GPTQConfig, output: Path, kwargs: dict[str, Any]
) -> None:
    """Make, finish or find the checkpoint folder of a request that was checked; one process at a time holds it."""
    ranks, partial = join(), output / PARTIAL

    def differences(run: dict[str, Any]) -> list[str]:
        return _differences_to(run, source, described, config, kwargs)

    def companions() -> dict[str, str]:
        return {path.name: digest_of_file(path) for path in companions_in(companions_folder(source, kwargs))}

    def finished() -> bool:
        return _is_finished(output, differences, companions)

    if ranks.broadcast(lambda: not is_begun(output) and finished()):
        return
    with ExitStack() as held:
        ranks.broadcast(lambda: _hold(output, held))
        if ranks.broadcast(finished):  # since just now
            ranks.broadcast(lambda: tidy(partial))
            return
        if ranks.broadcast(lambda: _begin(output, differences, companions)):
            if ranks.is_first:  # in the folder that it has made, and may have removed again when others come to check
                config.log_file = config.log_file or str(output / LOG_NAME)
            config.journal_folder = str(partial)
            beside = ranks.broadcast(lambda: companions_folder(source, kwargs))  # now: it may need the network
            try:
                loaded = model_class_of(described).from_pretrained(source, quantization_config=config, **kwargs)
                if ranks.is_first:
                    _write_rest(loaded, beside, partial)
            finally:
                if ranks.is_first and not is_worth_keeping(partial):
                    tidy(partial, own_files(partial))
        ranks.broadcast(lambda: _end(output))


def _quantize_object(
    model: Any,
    config: transformers.GPTQConfig | dict[str, Any],
    output_dir: str | os.PathLike[str] | None,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Quantize a model in memory; its checkpoint appears in the folder as a whole, or not at all."""
    if kwargs:
        raise ConfigError(
            f"optq.quantize was given a model object and {', '.join(kwargs)}: these are arguments of from_pretrained, "
            "for a model's id or folder. Load the model with them."
        )
    refuse_unless_whole(model)
    if output_dir is None:
        return quantize_in_memory(model, config)
    output, ranks = place_for(output_dir), join()
    partial, named = output / PARTIAL, absolute(model.config.name_or_path)
    config = _copied(config)
    if ranks.is_first:
        config.log_file = config.log_file or str(output / LOG_NAME)
    companions = companions_folder(named, {}) if named else None  # before the work: it may need the network
    if not hasattr(config.tokenizer, "save_pretrained") and (companions is None or not has_tokenizer(companions)):
        found_in = f"{str(named)!r} has none" if named else "the model does not say where it came from"
        logger.warning(
            "The checkpoint will be written without a tokenizer: %s%s. Pass it as GPTQConfig(tokenizer=...), or save "
            "it to the folder: tokenizer.save_pretrained(%r).",
            found_in,
            ", and an object does not say in which subfolder its files were" * bool(named),
            str(output),
        )
    with ExitStack() as held:
        ranks.broadcast(lambda: _hold(output, held))
        ranks.broadcast(lambda: _begin_object(output))
        try:
            quantize_in_memory(model, config)
            if ranks.is_first:
                with scratch(partial) as folder:
                    model.save_pretrained(folder)
                    if companions is not None:
                        copy_companions(companions, folder)
                    if hasattr(config.tokenizer, "save_pretrained"):
                        config.tokenizer.save_pretrained(folder)
                    write_result(folder, f"{CALL} of a model object")
                    complete(folder)
        finally:
            if ranks.is_first and not has_result(partial):
                tidy(partial)
        ranks.broadcast(lambda: _end(output))
    return model


def _copied(config: transformers.GPTQConfig | dict[str, Any]) -> GPTQConfig:
    """A copy whose log is the same file wherever the process goes meanwhile."""
    copied = copy.copy(GPTQConfig.from_stock(config))
    if copied.log_file is not None:
        copied.log_file = os.path.abspath(copied.log_file)
    return copied


def _is_finished(output: Path, differences: Differences, companions: Callable[[], dict[str, str]]) -> bool:
    """Whether the folder holds the finished checkpoint of this very run.

    Raises:
        OutputError: it holds that of another one, or one that is damaged.
    """
    log, partial = output / LOG_NAME, output / PARTIAL
    if has_result(partial) or (partial / DESCRIPTION).is_file() or not log.exists():
        return False
    refuse_irregular(log)
    run, files = finished_in(log)
    kept = ("config.json",) if files is None else files
    if run is None or not any((output / name).exists() for name in kept):
        return False
    different = differences(run)
    if files is not None:
        different += [f"{name} is another one" for name, digest in companions().items() if files.get(name) != digest]
    if different:
        raise OutputError(
            f"output_dir={str(output)!r} holds the finished checkpoint of another run: {'; '.join(different[:6])}. "
            "`gptq push` uploads that. Name another folder, or delete this one; nothing was changed."
        )
    if files is None:
        raise OutputError(
            f"{log} does not tell which files the run has written: it was cut short, or an earlier version wrote it. "
            f"Name another folder, or delete {output}; nothing was changed."
        )
    for name, digest in files.items():
        if not is_whole(output / name, digest):
            found = "is not what was written" if (output / name).exists() else "is missing"
            raise OutputError(
                f"{output / name} {found}, so the finished checkpoint there is damaged. Put the file back, or delete "
                f"{output} and repeat the call, or name another folder; nothing was changed."
            )
    return True


def _differences_to(
    run: dict[str, Any], source: str, described: Any, config: GPTQConfig, kwargs: dict[str, Any]
) -> list[str]:
    """Differences between a run that has ended and this call, but for values of weights in large files."""
    model = model_without_weights(source, kwargs)
    calibration = prepare(model, config, where_in(kwargs)).calibration
    asked: dict[str, Any] = {"settings": config.settings(), "model config": config_of(model)}
    if described.dtype is not None or kwargs.get("dtype", "auto") != "auto":
        asked["dtype"] = str(model.dtype)
    if calibration is not None:  # what the model writes follows from the settings
        asked["calibration"] = hash_of(calibration)
    files = weight_files_of(source, described, kwargs, run.get("model files", {}))
    asked["model files"] = identities_of(map(str, files))
    return differences_between(run, asked)


def _hold(output: Path, held: ExitStack) -> None:
    """Hold the output folder until `held` is closed; one that will be refused is not even touched."""
    if not is_begun(output):
        _refuse(output)
    held.enter_context(owned(output))
    refuse_irregular(output / PARTIAL, folder=True)
    refuse_irregular(output / LOG_NAME)


def _begin(output: Path, differences: Differences, companions: Callable[[], dict[str, str]]) -> bool:
    """Claim the output folder for this run; whether there is still anything to quantize."""
    partial = output / PARTIAL
    if has_result(partial):
        result = read_result(partial)
        if result is not None and result.run is None:
            raise OutputError(
                f"{output} holds the results of {result.call}, which only lack their names. Repeat that call, or name "
                "another folder, or delete this one; nothing was changed."
            )
        run = result.run if result is not None else read_description(partial)
        if run is not None and (different := differences(run)):
            raise OutputError(
                f"{output} holds the results of another run, which only lack their names: "
                f"{'; '.join(different[:6])}. Repeat that call, or name another folder, or delete this one."
            )
        if settled(output, (LOG_NAME,), is_own=run is not None, asked=companions()) is not None:
            return False
    _refuse(output)
    open_working_folder(output)
    return True


def _begin_object(output: Path) -> None:
    """Claim the output folder for a model object, of which nothing can be gone on with."""
    if settled(output, (LOG_NAME,)) is not None:
        _end(output)
    _refuse(output)
    refuse_unfinished(output)
    open_working_folder(output)


def _end(output: Path) -> None:
    """Give the files their names, and describe them."""
    partial = output / PARTIAL
    result = read_result(partial)
    if result is None:
        raise OutputError(f"{partial} was changed by somebody else meanwhile. Repeat the call: it goes on from there.")
    if (output / LOG_NAME).exists():  # which has the checksums
        flush(output / LOG_NAME)
    reveal(output, result)
    if (output / LOG_NAME).exists() and not (output / "README.md").exists():  # not if the log was wanted elsewhere
        try:
            write_whole(output / "README.md", card(output))
        except (ReportError, CheckpointError, OSError, RuntimeError) as error:
            if isinstance(error.__cause__ or error, (OSError, RuntimeError)):  # of the disk, or memory
                raise OutputError(
                    f"All files of {output} have their names, but its model card could not be made: {error}. Once it "
                    "can be, the same call makes it."
                ) from error
            logger.warning("%s is finished, but gets no model card: %s", output, error)
    tidy(partial, own_files(partial, result))


def _refuse(output: Path) -> None:
    """Refuse a folder with something else in it."""
    try:
        refuse_strangers(output, (LOG_NAME,))
    except OutputError as error:
        if not is_begun(output) and (output / "config.json").exists() and (output / LOG_NAME).exists():
            raise OutputError(f"{error} This export is finished: `gptq push` uploads it.") from None
        raise


def _write_rest(model: Any, companions: Path, partial: Path) -> None:
    """Add to the blocks' files all that is no block, and what every model's folder has."""
    try:
        with scratch(partial) as folder:
            model.save_pretrained(folder, max_shard_size="1000TB")  # all that is no block: one file
            copy_companions(companions, folder)
            result = model.hf_quantizer.journal.write_result(folder)
            model.hf_quantizer.log.emit(FilesWritten(files=result.files))
            complete(folder)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:  # of the disk, or transformers
        raise OutputError(
            f"All blocks are quantized and kept in {partial.parent}, but what else the checkpoint needs could not be "
            f"written: {error}. Once it can be, the same call goes on from there."
        ) from error


def model_without_weights(source: str, kwargs: dict[str, Any]) -> Any:
    """Build the model on the meta device, with the config and in the dtype that it would be loaded in.

    Raises:
        ModelError: none can be made of its config, or it is quantized in a way that is not read.
    """
    check_dtype(kwargs.get("dtype"))
    model_config = model_config_of(source, kwargs)
    check_base(model_config, source)
    stated = model_config.to_dict()
    for key, value in kwargs.items():  # of the config, which from_pretrained changes like this
        if key in stated and key not in NO_SETTINGS:
            part = getattr(model_config, key)
            if isinstance(part, PreTrainedConfig) and isinstance(value, dict):
                value = type(part)(**part.to_dict() | value)
            setattr(model_config, key, value)
    model_class = model_class_of(model_config)
    dtype = kwargs.get("dtype", "auto")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype) if dtype != "auto" else model_config.dtype or torch.float32
    trusted = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    with made_of(source):
        auto = model_class is AutoModelForCausalLM
        model = AutoModelForCausalLM.from_config(model_config, **trusted) if auto else model_class(model_config)
        model.config.name_or_path = source
        return model.to(dtype)
