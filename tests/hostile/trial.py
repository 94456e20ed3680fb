# SPDX-License-Identifier: Apache-2.0
"""What becomes of hostile checkpoints: each is loaded, inspected and converted in a process of its own."""

import contextlib
import json
import logging
import os
import resource
import select
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VERBS = ("load", "inspect", "convert")
SECONDS = 5
"""Longer is called a hang: of a processor's time, whatever else the machine does."""

PATIENCE = 60
"""Seconds after which something that takes no processor's time is called one, too."""

GOOD = ("named error", "named warning", "right")
"""What may come of it; else "raw error", "wrong", "hang", "killed", "code ran" or "large"."""


def logits_of(folder: Path) -> torch.Tensor:
    """Of some tokens, in float32: (1, 24, vocabulary)."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(4, 28)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def make_good(dense: Path, packed: Path, config: Any, rows: list[Any]) -> None:
    """Quantize a tiny model, and save it in two files with an index."""
    import copy

    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = copy.copy(config)
    config.dataset, config.effort, config.quality_gate = rows, "fast", "off"
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(packed, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(dense).save_pretrained(packed)


def make_others(dense: Path, packed: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """The same in other formats, beside the packed one: by format, the folder and its logits."""
    from transformers import AutoModelForCausalLM

    import gguf_files
    import optq
    import other_formats

    folders = {name: packed.parent / name for name in ("awq", "compressed-tensors", "gguf")}
    other_formats.awq_folder(dense, folders["awq"], other_formats.grids_of(dense))
    optq.convert(packed, output_dir=folders["compressed-tensors"], to="compressed-tensors")
    folders["gguf"].mkdir()
    gguf_files.write_gguf(AutoModelForCausalLM.from_pretrained(dense), folders["gguf"] / "model.gguf", "Q4_0")
    found = {"gptq": (packed, logits_of(packed))}
    for name, folder in folders.items():
        there = optq.convert(_source_in(folder), output_dir=packed.parent / f"{name}-dense", to="dense")
        found[name] = folder, logits_of(there)
    return found


def _source_in(folder: Path) -> Path:
    return next(folder.glob("*.gguf"), folder)


def tried(verb: str, folder: Path, named: tuple[str, ...], wanted: torch.Tensor) -> dict[str, Any]:
    """What the verb makes of a folder, in a child of this process."""
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(end)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # of the child alone
            os.write(start, json.dumps(_outcome(verb, folder, named, wanted)).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(start)
    content, deadline = b"", time.monotonic() + PATIENCE
    while select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (part := os.read(end, 65536)):
            break
        content += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(end)
    _, status = os.waitpid(child, 0)
    if content:
        return json.loads(content)
    took_too_long = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
    return {"outcome": "hang" if took_too_long else "killed", "said": f"status {status}"}


def _outcome(verb: str, folder: Path, named: tuple[str, ...], wanted: torch.Tensor) -> dict[str, Any]:
    from optq.errors import OptqError

    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.chdir(folder)
    told = _Records()
    logging.getLogger("optq").addHandler(told)
    said, found, began = "", "right", time.monotonic()
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
            DOING[verb](folder, wanted)
    except Wrong as error:
        warned = " ".join(record.getMessage() for record in told.records)
        found, said = ("named warning", warned) if any(name in warned for name in named) else ("wrong", str(error))
    except BaseException as error:  # whatever it is, it is told
        said = f"{type(error).__name__}: {error}"
        is_named = any(name in said for name in named) and (isinstance(error, OptqError) or str(folder) in said)
        found = "named error" if is_named else "raw error"
        said = said[:500] + ("" if is_named else "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:]))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if (folder / "EXECUTED").exists():
        found = "code ran"
    return {
        "outcome": found,
        "said": said,
        "megabytes": round(grown, 1),
        "seconds": round(time.monotonic() - began, 2),
    }


class _Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Wrong(Exception):
    """It was read, but what came of it is not what it was made from."""


def _compare(found: torch.Tensor, wanted: torch.Tensor) -> None:
    if found.shape != wanted.shape or not bool((found - wanted).norm() <= 1e-4 * wanted.norm()):
        raise Wrong("the logits are others")


def _load(folder: Path, wanted: torch.Tensor) -> None:
    _compare(logits_of(folder), wanted)


def _inspect(folder: Path, wanted: torch.Tensor) -> None:
    """Right if it says what is wrong, or if the checkpoint can be loaded."""
    import optq

    if not optq.inspect(folder, verify=True).contradictions:
        try:
            _load(folder, wanted)
        except Exception as error:
            if "trust_remote_code" in str(error):  # which is the caller's to decide
                return
            raise Wrong(f"nothing was found, but loading says {type(error).__name__}: {error}") from error


def _convert(folder: Path, wanted: torch.Tensor) -> None:
    import optq

    _compare(logits_of(optq.convert(_source_in(folder), output_dir=folder.parent / "dense", to="dense")), wanted)


DOING: dict[str, Callable[[Path, torch.Tensor], None]] = {"load": _load, "inspect": _inspect, "convert": _convert}


def trial(
    case: Any, good: Path, scratch: Path, wanted: torch.Tensor, verbs: tuple[str, ...] = VERBS
) -> dict[str, Any]:
    """Do a case's damage to a copy of the good checkpoint, and see what each verb makes of it."""
    found = {}
    for verb in case.verbs:
        shutil.rmtree(scratch, ignore_errors=True)
        folder = scratch / "checkpoint"
        shutil.copytree(good, folder)
        case.damage(folder)
        found[verb] = tried(verb, folder, case.named, wanted)
        if found[verb]["outcome"] == "named error" and (scratch / "dense").exists():
            found[verb]["outcome"] = "left something"
    shutil.rmtree(scratch, ignore_errors=True)
    return found
