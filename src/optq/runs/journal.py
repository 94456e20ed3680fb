# SPDX-License-Identifier: Apache-2.0
"""The output folder as a journal: every finished block is a file, so a run that dies goes on where it was.

A block's file is written under a temporary name, flushed to the disk, and renamed: it is whole or not there. A
description of the run, written first, makes sure that what is found belongs to the same model, settings and data.

The activations between blocks are not stored. A run that goes on sends the calibration data once more through the
blocks that are done, with the weights that their files stand for. These are the very numbers with which the first run
went on, so the blocks that follow get the same inputs and the checkpoint the same bytes.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from optq.calibration import Calibration, bytes_of
from optq.checkpoint import PackedWeight, find_quantized_linears, read_headers
from optq.compat import transformers as compat
from optq.config.gptq import GPTQConfig
from optq.errors import CheckpointError, OutputError, RankError, counted
from optq.events import Started, read_events
from optq.files.output import write_index, write_whole
from optq.version import __version__

logger = logging.getLogger(__name__)

DESCRIPTION = "run.json"
"""What the run is: another one does not go on here."""

WRITTEN = "written.json"
"""What the model wrote to be calibrated on: a run that goes on uses the same."""

RUN_FILES = (DESCRIPTION, WRITTEN)  # gone at the end
FORMAT = 1  # of the journal
BLOCK_FILE = "block-{index:05}.safetensors"


class Journal:
    """The files of a run's finished blocks.

    Args:
        folder: where they are; it exists.
        model: whose blocks they are.
        blocks: names, in order.
        checkpoint_format: of the packed tensors.
    """

    def __init__(self, folder: Path, model: Any, blocks: Iterable[str], checkpoint_format: str) -> None:
        self._folder = folder
        self._model = model
        self._format = checkpoint_format
        self._files = {name: folder / BLOCK_FILE.format(index=index) for index, name in enumerate(blocks)}
        self.written: set[str] = set()
        """The tensors, by their names in the model, that the files hold."""

    @property
    def finished(self) -> list[str]:
        """The blocks whose files exist, up to the first that is missing."""
        done = []
        for name, file in self._files.items():
            if not file.exists():
                break
            done.append(name)
        return done

    def open(self, description: dict[str, Any]) -> None:
        """Begin, or go on if the folder holds a part of the same run.

        Raises:
            OutputError: it holds a part of another one; the differences are listed.
        """
        description = json.loads(json.dumps(description, default=str))
        path = self._folder / DESCRIPTION
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differences = _differences(found, description)
            if differences:
                raise OutputError(
                    f"{self._folder.parent} holds {counted(len(self.finished), 'finished block')} of another run: "
                    f"{'; '.join(differences[:6])}{' …' if len(differences) > 6 else ''}. Go on with the same model, "
                    "settings and data, or name another folder, or delete this one."
                )
            return
        for file in self._files.values():
            file.unlink(missing_ok=True)
        write_whole(path, lambda target: target.write_text(json.dumps(description, indent=2), encoding="utf-8"))

    def recorded(self, name: str) -> dict[str, PackedWeight] | None:
        """The packed linears of a block that a former run has finished, by name, or None.

        Raises:
            OutputError: its file is damaged.
        """
        if name not in self.finished:
            return None
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = compat.renamed({key: opened.get_tensor(key) for key in opened.keys()}, self._model)  # noqa: SIM118
            headers = compat.renamed(read_headers([str(file)]), self._model)
        except (SafetensorError, CheckpointError) as error:
            raise OutputError(f"{file} is damaged ({error}). Delete it and run again: its block is redone.") from error
        self.written |= tensors.keys()
        return {
            linear: PackedWeight(
                **{part: tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")},
                bits=found.bits,
                checkpoint_format=self._format,
            )
            for linear, found in find_quantized_linears(headers).items()
        }

    def write(self, name: str) -> None:
        """Write a finished block's tensors.

        Raises:
            OutputError: the disk is full, or the like; what was written before is whole.
        """
        state = self._model.get_submodule(name).state_dict()
        tensors = {f"{name}.{key}": tensor.contiguous() for key, tensor in state.items()}
        self.written |= tensors.keys()
        named = compat.named_as_on_disk(self._model, tensors)
        write_whole(self._files[name], lambda target: save_file(named, target, metadata={"format": "pt"}))

    def final_names(self, rest: Path) -> dict[str, str]:
        """Final names of the blocks' files and of `rest`, the file with all other tensors; writes their index."""
        shards = [*self._files.values(), rest]
        finals = {
            shard.name: f"model-{number:05}-of-{len(shards):05}.safetensors" for number, shard in enumerate(shards, 1)
        }
        tensors = {}
        for shard in shards:
            with safe_open(shard, framework="pt") as opened:
                tensors[finals[shard.name]] = list(opened.keys())
        write_index(self._folder, tensors, sum(shard.stat().st_size for shard in shards))
        return finals


def has_finished_blocks(folder: Path) -> bool:
    return (folder / BLOCK_FILE.format(index=0)).exists()


def is_worth_keeping(folder: Path) -> bool:
    """Whether a run that goes on here would save anything."""
    return has_finished_blocks(folder) or (folder / WRITTEN).exists()


_INTERRUPTED: dict[str, list[list[int]]] = {}
"""Without a folder: what models had written when they were interrupted, by the description, for this process only."""


def kept_samples(
    folder: str | None,
    files: Iterable[str],
    asked: dict[str, Any],
    write: Callable[[list[list[int]], Callable[[list[list[int]]], None]], list[list[int]]],
) -> list[list[int]]:
    """The samples that `write` returns. They are kept in `folder`, or in this process, for a run that goes on.

    Args:
        files, asked: the model's files, and the settings that decide what is written; `samples` is their number.
        write: goes on with the samples that are there; calls its second argument with all samples, after every part.
    Raises:
        OutputError: blocks were finished on samples that were written otherwise.
    """
    described = json.dumps({"model files": identities_of(files), **asked}, sort_keys=True)
    description = json.loads(described)
    if folder is None:
        # On the same files only: what they hold besides their headers may have changed.
        key = described + "".join(f"{file}{Path(file).stat().st_mtime_ns}" for file in files)
        before = _INTERRUPTED.get(key, [])
        _say_kept(before, asked["samples"])
        samples = write(before, lambda written: _INTERRUPTED.update({key: list(written)}))
        _INTERRUPTED.pop(key, None)
        return samples
    path = Path(folder, WRITTEN)
    before = []
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differences = _differences(found["description"], description)
        if not differences:
            before = found["samples"]
        elif has_finished_blocks(Path(folder)):
            raise OutputError(
                f"{Path(folder).parent} holds a part of another run, whose model wrote other calibration data: "
                f"{'; '.join(differences)}. Go on with the same model and settings, or name another folder, or delete "
                "this one."
            )
    _say_kept(before, asked["samples"])
    if len(before) == asked["samples"]:
        return before

    def keep(written: list[list[int]]) -> None:
        content = json.dumps({"description": description, "samples": written})
        write_whole(path, lambda target: target.write_text(content, encoding="utf-8"))

    samples = write(before, keep)
    keep(samples)
    return samples


def _say_kept(before: list[list[int]], samples: int) -> None:
    if before:
        of = "" if len(before) == samples else f", of {samples},"
        logger.info("Going on with the %s%s that the model has written before.", counted(len(before), "sample"), of)


def differences_to(folder: Path, config: GPTQConfig) -> list[str]:
    """Differences between the settings of the run in `folder` and `config`, in words."""
    found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["settings"]
    return _differences(found, json.loads(json.dumps(config.settings(), default=str)))


def differences_to_finished(log: Path, asked: dict[str, Any]) -> list[str] | None:
    """Differences between the run that wrote a log and what is asked for; None if the log does not tell.

    Args:
        asked: a part of what `described` returns.
    """
    runs = [event.run for event in read_events(log) if isinstance(event, Started) and event.run is not None]
    if not runs:
        return None
    found = runs[-1]
    asked = json.loads(json.dumps(asked, default=str))
    return _differences({key: value for key, value in found.items() if key in asked}, asked)


def check_same(descriptions: Sequence[dict[str, Any]]) -> None:
    """Refuse processes that would make different checkpoints together; `descriptions` are theirs, by rank.

    Raises:
        RankError: they differ.
    """
    first, *others = json.loads(json.dumps(descriptions, default=str))
    for rank, other in enumerate(others, start=1):
        if differences := _differences(first, other, "{} is {!r} in the first and {!r} in the other"):
            raise RankError(
                f"Process {rank} was not asked for the same as the first of this run: {'; '.join(differences[:6])}. "
                "Start all with the same model, settings and data; unset WORLD_SIZE if they should not work together."
            )


def described(
    files: Iterable[str], settings: dict[str, Any], calibration: Calibration, dtype: torch.dtype
) -> dict[str, Any]:
    """The facts that a run must have in common with the one that it continues."""
    return {
        "journal": FORMAT,
        "optq": __version__,
        "torch": torch.__version__,
        "model files": identities_of(files),
        "dtype": str(dtype),
        "settings": settings,
        "calibration": hash_of(calibration),
    }


def identities_of(files: Iterable[str]) -> dict[str, str]:
    return {Path(file).name: _identity(Path(file)) for file in files}


def _identity(file: Path) -> str:
    """Size and hash of the header, which names every tensor and its place: reading all bytes would take too long."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, 100_000_000))
    return f"{file.stat().st_size} bytes, header {hashlib.sha256(header).hexdigest()[:16]}"


def hash_of(calibration: Calibration) -> str:
    digest = hashlib.sha256()
    for batch in (*calibration.batches, *calibration.held_out):
        for tensor in (batch.input_ids, batch.attention_mask, batch.next_ids, *(batch.inputs or {}).values()):
            digest.update(b"none" if tensor is None else bytes_of(tensor))
    return digest.hexdigest()[:16]


def _differences(
    found: dict[str, Any], asked: dict[str, Any], told: str = "{} was {!r} and is {!r}", prefix: str = ""
) -> list[str]:
    differences = []
    for key in [*found, *(key for key in asked if key not in found)]:
        before, now = found.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            differences += _differences(before, now, told, f"{prefix}{key}.")
        elif before != now:
            differences.append(told.format(f"{prefix}{key}", before, now))
    return differences
