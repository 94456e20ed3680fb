# SPDX-License-Identifier: Apache-2.0
"""The output folder as a journal: every finished block is a file, so a run that dies goes on where it was.

A block's file is written in a scratch folder, flushed to the disk, and renamed: it is whole or not there. A
description of the run, written first, makes sure that what is found belongs to the same model, settings and data.
Beside every block lies a record: a checksum of its file, without which it is not used, and one of each tensor that it
was made of. The record names the description as well, so that this can be damaged without work being lost. Both have a
checksum of themselves. In the end a `Result` tells which files belong to the checkpoint: no others get a final name.

The activations between blocks are not stored. A run that goes on sends the calibration data once more through the
blocks that are done, with the weights that their files stand for. These are the very numbers with which the first run
went on, so the blocks that follow get the same inputs and the checkpoint the same bytes.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from optq.calibration import Calibration, bytes_of
from optq.checkpoint import PackedWeight, find_quantized_linears, open_whole, read_headers
from optq.compat import transformers as compat
from optq.errors import CheckpointError, OutputError, RankError, counted
from optq.events import FilesWritten, Started, read_events
from optq.files.output import (
    Result,
    digest_of_file,
    digest_of_json,
    is_whole,
    read_checked,
    scratch,
    temporary,
    write_checked,
    write_index,
    write_result,
    written_whole,
)
from optq.files.ownership import refuse_irregular
from optq.reading import open_regular, text_of
from optq.version import __version__

logger = logging.getLogger(__name__)

DESCRIPTION = "run.json"
"""What the run is: another one does not go on here."""

CALL = "optq.quantize"
"""What writes journals."""

WRITTEN = "written.json"
"""What the model wrote to be calibrated on: a run that goes on uses the same."""

FORMAT = 3  # of the journal
BLOCK_FILE = "block-{index:05}.safetensors"
BLOCKS, RECORDS = "block-[0-9][0-9][0-9][0-9][0-9].safetensors", "record-[0-9][0-9][0-9][0-9][0-9].json"
REST_FILE = "model.safetensors"
PIECE = 1 << 16  # bytes of a file that are compared at once
"""All tensors of the model that are in no block."""

NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version")
"""What a model's config says that has no part in what the model computes, or is described elsewhere."""


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
        self._description: dict[str, Any] = {}
        self._run = ""  # the digest of its description
        self._digests: dict[Path, str] = {}  # of the files of finished blocks
        self._sources: dict[str, dict[str, str]] = {}  # of the block at hand: digests of its original tensors
        self.written: set[str] = set()
        """The tensors, by their names in the model, that the files hold."""

    def open(self, description: dict[str, Any]) -> None:
        """Begin, or go on if the folder holds a part of the same run.

        Raises:
            OutputError: it holds a part of another one; the differences are listed.
        """
        self._description = description = json.loads(json.dumps(description, default=str))
        self._run = digest_of_json(description)
        path = self._folder / DESCRIPTION
        found, blocks = read_description(self._folder), finished_blocks(self._folder)
        if differences := [] if found is None else _differences(found, description):
            raise OutputError(
                f"{self._folder.parent} holds {counted(len(blocks), 'finished block')} of another run: "
                f"{'; '.join(differences[:6])}{' …' if len(differences) > 6 else ''}. Go on with the same model, "
                "settings and data, or name another folder, or delete this one."
            )
        if others := [record for record, run in _runs_in(self._folder).items() if run != self._run]:
            raise OutputError(
                f"{self._folder.parent} holds {counted(len(others), 'block')} of another run, and {path} does not "
                f"tell of which ({others[0].name}). Name another folder, or delete this one; nothing was changed."
            )
        if found is None:
            write_checked(path, description)

    def recorded(self, name: str) -> dict[str, PackedWeight] | None:
        """The packed linears of a block that a former run has finished, by name; None without its file, undamaged.

        Args:
            name: of a block with its original tensors.
        Raises:
            OutputError: it was made of other tensors, which are named.
        """
        sources = {key: digest_of(tensor) for key, tensor in self._model.get_submodule(name).state_dict().items()}
        self._sources = {name: sources}
        file = self._files[name]
        refuse_irregular(file)
        if not file.exists():
            return None
        record = read_checked(record_file(file))
        if record is None or not is_whole(file, record["file"]):
            logger.warning("%s is damaged: it is not what was written. The block is quantized again.", file)
            return None
        if changed := _differences(record["source"], sources):
            raise OutputError(
                f"{self._folder.parent} holds a part of a run of other weights: in {name}, {'; '.join(changed[:3])}"
                f"{' …' if len(changed) > 3 else ''} (checksums). Go on with the weights that it was begun with, or "
                "name another folder, or delete this one."
            )
        with open_whole(file) as opened:
            tensors = compat.renamed({key: opened.get_tensor(key) for key in opened.keys()}, self._model)  # noqa: SIM118
        headers = compat.renamed(read_headers([str(file)]), self._model)
        self.written |= tensors.keys()
        self._digests[file] = record["file"]
        return {
            linear: PackedWeight(
                **{part: tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")},
                bits=found.bits,
                checkpoint_format=self._format,
            )
            for linear, found in find_quantized_linears(headers).items()
        }

    def write(self, name: str) -> None:
        """Write the tensors of a finished block, which `recorded` has been asked for before.

        Raises:
            OutputError: the disk is full, or the like; what was written before is whole.
        """
        state = self._model.get_submodule(name).state_dict()
        tensors = {f"{name}.{key}": tensor.contiguous() for key, tensor in state.items()}
        self.written |= tensors.keys()
        named = compat.named_as_on_disk(self._model, tensors)
        file = self._files[name]
        with scratch(self._folder) as work, written_whole(file, work / file.name) as target:
            save_file(named, target, metadata={"format": "pt"})
            self._digests[file] = digest_of_file(target)
            record = {"run": self._run, "file": self._digests[file], "source": self._sources[name]}
            write_checked(record_file(file), record)

    def write_result(self, rest: Path) -> Result:
        """Write the index of all files, with their final names, and what they are, when the blocks are done.

        Args:
            rest: a scratch folder that holds `REST_FILE`, and whatever else belongs to the checkpoint.
        """
        shards = [*self._files.values(), rest / REST_FILE]
        names = dict(zip(shards, _shard_names(len(shards)), strict=True))
        tensors = {}
        for shard, name in names.items():
            with safe_open(shard, framework="pt") as opened:
                tensors[name] = list(opened.keys())
        write_index(rest, tensors, sum(shard.stat().st_size for shard in shards))
        blocks = {file.name: (names[file], digest) for file, digest in self._digests.items()}
        return write_result(rest, CALL, self._description, {REST_FILE: names[rest / REST_FILE]}, blocks)


def finished_blocks(folder: Path) -> list[Path]:
    """The files of the blocks that are done."""
    return sorted(folder.glob(BLOCKS))


def record_file(block: Path) -> Path:
    return block.with_name(block.name.replace("block-", "record-")).with_suffix(".json")


def is_worth_keeping(folder: Path) -> bool:
    """Whether a run that goes on here would save anything."""
    return bool(finished_blocks(folder)) or (folder / WRITTEN).exists()


def own_files(folder: Path, result: Result | None = None) -> list[Path]:
    """What a run has written there besides blocks, in the order in which it may be removed at the end.

    Args:
        result: of a run that has ended; without one, no block is finished.
    """
    if result is None:
        records = sorted(folder.glob(RECORDS))
    else:
        blocks = [Path(place) for place in result.places.values() if Path(place).match(BLOCKS)]
        records = [record_file(folder / block) for block in blocks]
    names = [*(record.name for record in records), WRITTEN, DESCRIPTION]
    return [folder / each for name in names for each in (temporary(name), name)]


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def read_description(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder is; None if that was never written, or is damaged.

    Raises:
        OutputError: an earlier version has written it.
    """
    found = read_checked(folder / DESCRIPTION)
    with suppress(FileNotFoundError, ValueError, RecursionError, AttributeError):  # damaged, which has been said
        stated = json.loads(text_of(folder / DESCRIPTION)) if found is None else found
        if stated.get("journal") in range(1, FORMAT):
            raise OutputError(
                f"{folder.parent} holds a part of a run of an earlier version of optq: journal was "
                f"{stated['journal']} and is {FORMAT}. Go on with that version, or name another folder, or delete "
                "this one."
            )
    return found


def _runs_in(folder: Path) -> dict[Path, str]:
    """Digests of the descriptions of the runs that have recorded blocks in a folder, by record."""
    records = {path: read_checked(path) for path in sorted(folder.glob(RECORDS))}
    return {path: record["run"] for path, record in records.items() if record is not None}


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
    model_files = {
        Path(file).name: _read(digest_of_file, Path(file)) for file in files
    }  # all of them: they decide each word
    described = json.dumps({"model files": model_files, **asked}, sort_keys=True)
    description = json.loads(described)
    if folder is None:
        before = _INTERRUPTED.get(described, [])
        _say_kept(before, asked["samples"])
        samples = write(before, lambda written: _INTERRUPTED.update({described: list(written)}))
        _INTERRUPTED.pop(described, None)
        return samples
    path = Path(folder, WRITTEN)
    before = []
    found = read_checked(path)
    if found is not None:
        differences = _differences(found["description"], description)
        if not differences:
            before = found["samples"]
        elif finished_blocks(Path(folder)):
            raise OutputError(
                f"{Path(folder).parent} holds a part of another run, whose model wrote other calibration data: "
                f"{'; '.join(differences)}. Go on with the same model and settings, or name another folder, or delete "
                "this one."
            )
    _say_kept(before, asked["samples"])
    if len(before) == asked["samples"]:
        return before

    def keep(written: list[list[int]]) -> None:
        write_checked(path, {"description": description, "samples": written})

    samples = write(before, keep)
    keep(samples)
    return samples


def _say_kept(before: list[list[int]], samples: int) -> None:
    if before:
        of = "" if len(before) == samples else f", of {samples},"
        logger.info("Going on with the %s%s that the model has written before.", counted(len(before), "sample"), of)


def finished_in(log: Path) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """The last run that a log tells of, and the checksums of its files, by name; None for what it does not tell."""
    run, files = None, None
    for event in read_events(log):
        if isinstance(event, Started):
            run, files = event.run, None
        elif isinstance(event, FilesWritten):
            files = event.files
    return run, files


def differences_between(run: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Differences between a run and what is asked for, in words.

    Args:
        run: what `described` has returned.
        asked: a part of that.
    """
    asked = json.loads(json.dumps(asked, default=str))
    return _differences({key: value for key, value in run.items() if key in asked}, asked)


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
    model: Any, files: Iterable[str], settings: dict[str, Any], calibration: Calibration, blocks: Iterable[str]
) -> dict[str, Any]:
    """The facts that a run must have in common with the one that it continues.

    Args:
        model: with its weights, but for those of `blocks`, which are compared when their turn comes.
        files: the checkpoint's.
    """
    inside = tuple(f"{name}." for name in blocks)
    outside = {name: tensor for name, tensor in _tensors_of(model).items() if not name.startswith(inside)}
    return {
        "journal": FORMAT,
        "optq": __version__,
        "torch": torch.__version__,
        "model files": identities_of(files),
        "model config": config_of(model),
        "weights": {name: digest_of(tensor) for name, tensor in outside.items() if not tensor.is_meta},
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,  # another one rounds otherwise
        "settings": settings,
        "calibration": hash_of(calibration),
    }


def config_of(model: Any) -> dict[str, Any]:
    """What a model's config says of how it computes, where that is not what its class says by itself."""
    return {key: value for key, value in model.config.to_diff_dict().items() if key not in NO_SETTINGS}


def _tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers that are in a checkpoint, by name; tied ones once."""
    found = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(list(model.state_dict().items()))}
    return dict(reversed(list(found.values())))


def identities_of(files: Iterable[str]) -> dict[str, str]:
    return {Path(file).name: _read(_identity, Path(file)) for file in files}


def _read(summary: Callable[[Path], str], file: Path) -> str:
    """A summary of one of the model's files."""
    try:
        return summary(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Check the disk and its rights.") from error


def _identity(file: Path) -> str:
    """Size and a digest of 64 pieces, the header among them: reading all bytes of a large model would take minutes."""
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with open_regular(file) as stream:
        for start in range(0, max(size, 1), max(size // 64, PIECE)):
            stream.seek(start)
            digest.update(stream.read(PIECE))
    return f"{size} bytes, {digest.hexdigest()}"


def digest_of(tensor: Tensor) -> str:
    """A digest of a tensor of any shape (...) and dtype: of its shape and values."""
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # no copy: it may be large
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(values)
    return digest.hexdigest()


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
