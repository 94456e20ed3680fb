# SPDX-License-Identifier: Apache-2.0
"""What reads strangers' bytes, each as a function of bytes: they say what is changed in something valid.

An execution may end in an `OptqError`, which names the file where there is one, or without any. All else is a crash.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import optq
from gguf_files import write_gguf
from optq import GPTQConfig
from optq.calibration.encoding import read_for_evaluation
from optq.checkpoint import find_quantized_linears, read_headers
from optq.config.dynamic import checked_rules, matching
from optq.errors import OptqError
from other_formats import awq_folder, compressed_folder, compressed_parts, grids_of

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 4, 4.0, 0.1, -0.5, 32, 2**31, 2**63, 2**64 - 1, 10**30),
    *(float("nan"), float("inf"), "", "4", "false", "gemm", "re:(", "re:.*", "a\0b", "ﬀ" * 9, "x" * 3000),
    *([], [[]], [1, "a", None], {}, {"": {}}, {"-:.*": {"bits": "x"}}, [{"role": "user", "content": 3}]),
)
GROUPS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
PATTERNS = (
    "",
    ".*",
    "-:",
    "+:",
    "(",
    "(a+)+$",
    "(.*)*x",
    "[",
    r"\d+",
    "q_proj",
    "model.layers.0",
    "(?P<a>",
    "a{99}",
    "é",
)


class Unnamed(Exception):
    """An error of optq that does not say in which file it is."""


class Source:
    """The bytes of an execution, as choices; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def has_more(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        size = max(1, (below.bit_length() + 7) // 8)
        part, self._at = self._data[self._at : self._at + size], self._at + size
        return int.from_bytes(part, "little") % max(below, 1)

    def one_of(self, options: Any) -> Any:
        return options[self.number(len(options))]

    def changed_bytes(self, original: bytes, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes, words and lengths changed between two places, at most eight times."""
        content = bytearray(original)
        for _ in range(8):
            if not self.has_more or not content:
                break
            kind, end = self.number(8), min(stop or len(content), len(content))
            place = start + self.number(max(1, end - start))
            if kind < 4:
                content[place : place + 1] = bytes([self.number(256)])
            elif kind < 6:
                content[place : place + 8] = self.one_of(NUMBERS).to_bytes(8, "little")
            elif kind == 6:
                del content[place : place + 1 + self.number(256)]
            else:
                del content[place:]
        return bytes(content)

    def changed(self, original: Any) -> Any:
        """What JSON may hold, with values exchanged, keys renamed or left out, at most four times."""
        content = copy.deepcopy(original)
        for _ in range(4):
            if not self.has_more:
                break
            inside, key = content, None
            while isinstance(inside, (dict, list)) and inside and (key is None or self.number(3)):
                outer, key = inside, self.one_of(sorted(inside) if isinstance(inside, dict) else range(len(inside)))
                inside = outer[key]
            if key is None:
                content = copy.deepcopy(self.one_of(VALUES))
            elif (kind := self.number(6)) == 0:
                del outer[key]
            elif kind == 1 and isinstance(outer, dict):
                outer[str(self.one_of(VALUES))[:50]] = outer.pop(key)
            else:
                outer[key] = copy.deepcopy(self.one_of(VALUES))
        return content


Target = Callable[[bytes], None]


def accepted(run: Callable[[], Any], named: str = "") -> None:
    """Let errors of optq pass that name what they have to."""
    try:
        run()
    except OptqError as error:
        if named not in str(error):
            raise Unnamed(f"{type(error).__name__}: {error}") from error


def targets(scratch: Path, dense: Path, packed: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Target]:
    """All of them, by name.

    Args:
        scratch: an empty folder.
        dense, packed: a tiny llama, and its GPTQ checkpoint in one file or several.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense)
    parts = {name: compressed_parts(grid) for name, grid in grids_of(dense).items()}
    compressed = compressed_folder(dense, scratch / "compressed", parts, GROUPS)
    stated = GPTQConfig(bits=4, group_size=32, dynamic={"-:.*down.*": {}, "+:.*q_proj": {"bits": 8}}).to_dict()
    return {
        "safetensors headers": _headers(scratch, packed),
        "GPTQConfig.from_dict": lambda data: accepted(lambda: GPTQConfig.from_dict(Source(data).changed(stated))),
        "dynamic": _dynamic,
        "activation_memory": _activation_memory,
        "calibration rows": _rows(scratch, tokenizer),
        "Parquet": _parquet(scratch, tokenizer),
        "GGUF": _gguf(scratch, write_gguf(model, scratch / "good.gguf", "Q4_0")),
        "AWQ": _folder(scratch, awq_folder(dense, scratch / "awq", grids_of(dense))),
        "compressed-tensors": _folder(scratch, compressed),
    }


def _headers(scratch: Path, packed: Path) -> Target:
    original = next(iter(sorted(packed.glob("*.safetensors")))).read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:length])

    def run(data: bytes) -> None:
        source, file = Source(data), scratch / "damaged.safetensors"
        if source.number(2):
            file.write_bytes(source.changed_bytes(original, 0, length))
        else:
            changed = json.dumps(source.changed(header)).encode()
            file.write_bytes(len(changed).to_bytes(8, "little") + changed + original[length:])
        accepted(lambda: find_quantized_linears(read_headers([str(file)])), file.name)

    return run


def _dynamic(data: bytes) -> None:
    source = Source(data)
    rules = {source.one_of(PATTERNS) + source.one_of(PATTERNS): source.changed({"bits": 4}) for _ in range(3)}
    name = "model.layers.0.self_attn.q_proj" if source.number(2) else "a" * 60
    accepted(lambda: matching(checked_rules(rules, of_file=bool(source.number(2))), name))


def _activation_memory(data: bytes) -> None:
    source = Source(data)
    sizes = ("8GiB", "1.5 GB", "-1GB", "GB", "1e400GB", "nanGB", "٣GB", "8GiB8", *VALUES)
    asked = {
        source.one_of((0, 1, "cpu", "cuda:0", "cuda", "٣", None, *VALUES[:9])): source.one_of(sizes) for _ in "12"
    }
    accepted(lambda: GPTQConfig(bits=4, activation_memory=asked if source.number(4) else source.one_of(sizes)))


ROWS: list[Any] = [
    "a text",
    {"text": "a text"},
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]},
    {"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        ]
    },
    [{"role": "user", "content": "a question"}],
]


def _rows(scratch: Path, tokenizer: PreTrainedTokenizerFast) -> Target:
    def run(data: bytes) -> None:
        source, suffix = Source(data), "json"
        text = json.dumps(source.changed([ROWS[source.number(len(ROWS))] for _ in range(2)]))
        if source.number(2):
            suffix, text = "jsonl", text[1:-1].replace("}, {", "}\n{")
        file = scratch / f"rows.{suffix}"
        file.write_bytes(source.changed_bytes(text.encode()) if source.number(2) else text.encode())
        accepted(lambda: read_for_evaluation(file, lambda: tokenizer), file.name)

    return run


def _parquet(scratch: Path, tokenizer: PreTrainedTokenizerFast) -> Target:
    import pyarrow as pa
    from pyarrow import parquet

    originals = []
    for column, values in {"text": ["one text", "another"], "input_ids": [[5, 6, 7], [8, 9]]}.items():
        parquet.write_table(pa.table({column: values}), scratch / "good.parquet")
        originals.append((scratch / "good.parquet").read_bytes())

    def run(data: bytes) -> None:
        source, file = Source(data), scratch / "rows.parquet"
        file.write_bytes(source.changed_bytes(source.one_of(originals)))
        accepted(lambda: read_for_evaluation(file, lambda: tokenizer), file.name)

    return run


def _gguf(scratch: Path, good: Path) -> Target:
    from gguf import GGUFReader

    original, start = good.read_bytes(), int(GGUFReader(good).data_offset)

    def run(data: bytes) -> None:
        source, file = Source(data), scratch / "damaged.gguf"
        part = source.one_of(((0, 900), (start - 900, start), (start, None)))
        file.write_bytes(source.changed_bytes(original, *part))
        _convert(file, scratch, file.name)

    return run


def _folder(scratch: Path, good: Path) -> Target:
    """A folder of the format, whose quantization_config, header or data is changed."""
    config = json.loads((good / "config.json").read_text())
    weights = next(good.glob("*.safetensors"))
    original = weights.read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")

    def run(data: bytes) -> None:
        source, folder = Source(data), scratch / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        is_header = source.number(3) == 0
        stated = {**config, "quantization_config": config["quantization_config"]}
        if not is_header:
            stated["quantization_config"] = source.changed(stated["quantization_config"])
        (folder / "config.json").write_text(json.dumps(stated))
        content = source.changed_bytes(original, 0, length) if is_header else original
        (folder / weights.name).write_bytes(content)
        _convert(folder, scratch, folder.name)

    return run


def _convert(source: Path, scratch: Path, named: str) -> None:
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    accepted(lambda: optq.convert(source, output_dir=out, to="gptq_v2"), named)


def inputs(seed: int, longest: int = 64) -> Iterator[bytes]:
    """Bytes without end, for where nothing guides them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = int(torch.randint(4, longest, (1,), generator=generator))
        yield bytes(torch.randint(0, 256, (length,), generator=generator).tolist())
