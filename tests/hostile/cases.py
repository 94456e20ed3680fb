# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as a stranger, a broken disk or a bad script may leave them: kinds of damage, done to a good one."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
LINEAR = "model.layers.1.mlp.down_proj"
"""The packed linear that is damaged; its weight is (64, 96), in groups of 32."""
PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Case:
    """One kind of damage.

    Args:
        damage: does it to a folder with the checkpoint, which is in two files with an index; of AWQ it is in one.
        named: what an error has to name, one of these.
        verbs: what is tried. Loading a checkpoint that says it is of another method, or whose config transformers
            refuses before it asks anyone, is not ours.
        form: the format of the good checkpoint.
    """

    group: str
    name: str
    damage: Callable[[Path], None]
    named: tuple[str, ...]
    verbs: tuple[str, ...] = ("load", "inspect", "convert")
    form: str = "gptq"


def cases() -> list[Case]:
    """All of them."""
    return [
        *_of("files", _files()),
        *_of("headers of safetensors", _headers()),
        *_of("index", _index()),
        *_of("dtypes", _dtypes()),
        *_of("shapes", _shapes()),
        *_of("missing and strange tensors", _tensors()),
        *_of("values", _values()),
        *_of("quantization_config", _quantization()),
        *_of("dynamic", _dynamic()),
        *_of("config.json", _config()),
        *_of("what else config.json says", _said()),
        *_of("AWQ", _others(AWQ), "awq"),
        *_of("compressed-tensors", _others(COMPRESSED), "compressed-tensors"),
        *_of("GGUF", _gguf(), "gguf"),
    ]


Damages = Iterator[tuple[str, Callable[[Path], None], tuple[str, ...]]]


def _of(group: str, damages: Damages, form: str = "gptq") -> Iterator[Case]:
    for name, damage, named in damages:
        if form != "gptq":
            yield Case(group, name, damage, named, ("convert",), form)
            continue
        is_others = name.startswith("quant_method is ") and "missing" not in name
        verbs = ("inspect", "convert") if is_others or (group == "config.json" and "0000" not in name) else Case.verbs
        yield Case(group, name, damage, named, verbs)


# What damages are made of


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / index[tensor]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], tensor: str = f"{LINEAR}.scales") -> None:
    """Change the tensors of the file that holds `tensor`, and let the index say so."""
    file = shard_of(folder, tensor)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    before = set(tensors)
    change(tensors)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(set(tensors) - before, file.name)
    (folder / INDEX).write_text(json.dumps(index))


def put(part: str, change: Callable[[torch.Tensor], torch.Tensor], linear: str = LINEAR) -> Callable[[Path], None]:
    """Replace one tensor of a linear by what `change` makes of it."""
    name = f"{linear}.{part}"

    def done(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return lambda folder: edit(folder, done, name)


def edit_all(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of every file; the index is left as it is."""

    def done(folder: Path) -> None:
        for file in sorted(folder.glob("*.safetensors")):
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
            change(tensors)
            save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata={"format": "pt"})

    return done


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: [tensors.pop(name) for name in names] and None, names[0])


def stated(*path: str, value: Any = None, drop: bool = False, file: str = CONFIG) -> Callable[[Path], None]:
    """Write a value into a JSON file, or drop it; what is large is a function that makes it."""

    def done(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        if drop:
            del inside[path[-1]]
        else:
            inside[path[-1]] = value() if callable(value) else value
        (folder / file).write_text(json.dumps(content))

    return done


def written(file: str, content: bytes | str) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data) and None


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [damage(folder) for damage in damages] and None


def raw(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any] | str, bytes]]) -> Callable[[Path], None]:
    """Change the header and the data of the damaged linear's file."""

    def done(folder: Path) -> None:
        file = shard_of(folder, f"{LINEAR}.scales")
        content = file.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header, data = change(json.loads(content[8 : 8 + length]), content[8 + length :])
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return done


def _shard(folder: Path) -> Path:
    return shard_of(folder, f"{LINEAR}.scales")


# The kinds

FILE = (".safetensors",)


def _files() -> Damages:
    def shortened(part: float) -> Callable[[Path], None]:
        return lambda folder: os.truncate(_shard(folder), int(_shard(folder).stat().st_size * part))

    for part in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        yield f"{part:.1%} of a file", shortened(part), FILE
    yield "7 bytes", lambda folder: os.truncate(_shard(folder), 7), FILE
    texts = {
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a page of HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch EXECUTED'\ntR.",
        "an archive": b"PK\x03\x04" + bytes(100),
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
    }
    for name, content in texts.items():
        yield f"{name} instead of a file", lambda folder, c=content: _shard(folder).write_bytes(c) and None, FILE

    def gone(folder: Path) -> None:
        _shard(folder).unlink()

    yield "a file is missing", gone, FILE
    yield "a folder instead of a file", both(gone, strange("mkdir")), FILE
    yield "a pipe instead of a file", both(gone, strange("pipe")), FILE
    yield "a link to nowhere", both(gone, strange("link")), FILE
    yield "a link to itself", both(gone, strange("loop")), FILE
    yield "a device instead of a file", both(gone, strange("zero")), FILE


def strange(what: str) -> Callable[[Path], None]:
    """Put something that is no file where the damaged linear's file was."""
    makers: dict[str, Callable[[Path], Any]] = {
        "mkdir": os.mkdir,
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to(path.parent / "nowhere"),
        "loop": lambda path: path.symlink_to(path),
        "zero": lambda path: path.symlink_to("/dev/zero"),
    }
    return lambda folder: makers[what](_shard(folder))


def _headers() -> Damages:
    key = f"{LINEAR}.scales"

    def entry(**changes: Any) -> Callable[[Path], None]:
        def change(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
            header[key] |= changes
            return header, data

        return raw(change)

    yield "offsets past the end", entry(data_offsets=[0, 2**40]), FILE
    yield "offsets turned around", entry(data_offsets=[200, 100]), FILE
    yield "offsets of another tensor", entry(data_offsets=[0, 384]), FILE
    yield "negative offsets", entry(data_offsets=[-1, 100]), FILE
    yield "a negative dimension", entry(shape=[-1, 64]), FILE
    yield "a huge dimension", entry(shape=[2**62, 64]), FILE
    yield "dimensions whose product overflows", entry(shape=[2**33, 2**33]), FILE
    yield "an unknown dtype", entry(dtype="F13"), FILE
    yield "a dtype that is a number", entry(dtype=5), FILE
    yield "a shape that is text", entry(shape="3, 64"), FILE
    yield "the header is a list", raw(lambda header, data: (json.dumps([header]), data)), FILE
    yield "the header is not JSON", raw(lambda header, data: ("{" * 50, data)), FILE
    yield "the header is nested deeply", raw(lambda header, data: ("[" * 100_000 + "]" * 100_000, data)), FILE
    yield "more data than the header says", raw(lambda header, data: (header, data + bytes(4096))), FILE
    yield (
        "a key twice",
        raw(lambda header, data: (json.dumps(header)[:-1] + f', "{key}": {json.dumps(header[key])}' + "}", data)),
        (*FILE, key),
    )
    yield (
        "the header's length is huge",
        lambda folder: _shard(folder).write_bytes(struct.pack("<Q", 2**63) + _shard(folder).read_bytes()[8:]) and None,
        FILE,
    )
    yield "metadata that are no text", raw(lambda header, data: (header | {"__metadata__": {"format": 1}}, data)), FILE
    yield (
        "no metadata",
        raw(lambda header, data: ({k: v for k, v in header.items() if k != "__metadata__"}, data)),
        FILE,
    )
    yield (
        "metadata of another framework",
        raw(lambda header, data: (header | {"__metadata__": {"format": "tf"}}, data)),
        FILE,
    )


def _index() -> Damages:
    named = (INDEX, ".safetensors")
    for name, content in {
        "is empty": "",
        "is not JSON": "{",
        "is a list": "[]",
        "is null": "null",
        "is binary": b"\xff\xfe\x00\x01",
        "has no weight_map": "{}",
        "has an empty weight_map": '{"weight_map": {}}',
        "has a list as weight_map": '{"weight_map": ["a"]}',
        "is nested deeply": '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
    }.items():
        yield name, written(INDEX, content), named
    key = f"{LINEAR}.scales"
    strange = ("\0.safetensors", "\ud800.safetensors", "\u202e.safetensors")
    for value in (None, 5, ["a"], "", ".", "..", "/etc/passwd", "../outside.safetensors", "\0", "a" * 5000, *strange):
        yield f"names the file {ascii(value)[:30]}", stated("weight_map", key, value=value, file=INDEX), (*named, key)
    yield (
        "names the other file",
        lambda folder: stated("weight_map", key, value=shard_of(folder, "model.norm.weight").name, file=INDEX)(folder),
        (*named, key),
    )
    yield (
        "names a tensor that is nowhere",
        lambda folder: stated("weight_map", "model.layers.0.stranger.qweight", value=_shard(folder).name, file=INDEX)(
            folder
        ),
        (*named, "stranger"),
    )

    def collide(folder: Path) -> None:
        for number, name in enumerate(sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))):
            (folder / str(number)).mkdir()
            os.rename(folder / name, folder / str(number) / "model.safetensors")
            index = (folder / INDEX).read_text().replace(name, f"{number}/model.safetensors")
            (folder / INDEX).write_text(index)

    yield "names two files alike in two folders", collide, named

    def twice(folder: Path) -> None:
        with safe_open(_shard(folder), framework="pt") as opened:
            tensor = opened.get_tensor(key)
        assert shard_of(folder, "model.norm.weight") != _shard(folder)
        edit(folder, lambda tensors: tensors.update({key: tensor * 2}), "model.norm.weight")

    yield "a tensor in two files", twice, (key,)

    def single(folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
        tensors[key] = tensors[key] * 3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    yield "another checkpoint in one file beside it", single, ("model.safetensors",)
    yield "a folder beside it", lambda folder: os.mkdir(folder / "model.safetensors"), ("model.safetensors",)
    yield "a pipe beside it", lambda folder: os.mkfifo(folder / "model.safetensors"), ("model.safetensors",)


def _dtypes() -> Damages:
    wrong = {
        "qweight": (torch.float32, torch.int64, torch.int16, torch.uint8, torch.float16),
        "qzeros": (torch.float32, torch.int64, torch.int8, torch.bool),
        "scales": (torch.int32, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn),
        "g_idx": (torch.float32, torch.int64, torch.int16, torch.bool),
    }
    for part, dtypes in wrong.items():
        for dtype in dtypes:
            yield f"{part} is {dtype}", put(part, lambda tensor, to=dtype: tensor.to(to)), (LINEAR,)
    yield "the embedding is int32", lambda folder: edit(folder, lambda x: x.update({E: x[E].to(torch.int32)}), E), (E,)


E = "model.embed_tokens.weight"
NORM = "model.layers.1.input_layernorm.weight"


def _shapes() -> Damages:
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "without its last row": lambda x: x[:-1],
        "with a row twice": lambda x: torch.cat((x, x[-1:])),
        "without its last column": lambda x: x[..., :-1],
        "transposed": lambda x: x.T if x.ndim > 1 else x[None],
        "flat": lambda x: x.flatten() if x.ndim > 1 else x.reshape(2, -1),
        "with a dimension more": lambda x: x[None],
        "of no elements": lambda x: x[:0],
        "of no columns": lambda x: x[..., :0],
        "a scalar": lambda x: x.flatten()[0],
        "one element": lambda x: x.flatten()[:1],
    }
    for part in PACKED:
        for name, way in ways.items():
            yield f"{part} {name}", put(part, way), (LINEAR,)

    def narrower(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "scales"):
            tensors[f"{LINEAR}.{part}"] = tensors[f"{LINEAR}.{part}"][:, :32]
        tensors[f"{LINEAR}.qzeros"] = tensors[f"{LINEAR}.qzeros"][:, :4]

    def shorter(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.qweight"] = tensors[f"{LINEAR}.qweight"][:8]
        tensors[f"{LINEAR}.g_idx"] = tensors[f"{LINEAR}.g_idx"][:64]
        for part in ("scales", "qzeros"):
            tensors[f"{LINEAR}.{part}"] = tensors[f"{LINEAR}.{part}"][:2]

    yield "all of a linear for fewer outputs", lambda folder: edit(folder, narrower), (LINEAR,)
    yield "all of a linear for fewer inputs", lambda folder: edit(folder, shorter), (LINEAR,)
    for name in (E, NORM, "model.norm.weight"):
        yield (
            f"{name} without its last element",
            lambda folder, n=name: edit(folder, lambda x: x.update({n: x[n][..., :-1]}), n),
            (name,),
        )


def _tensors() -> Damages:
    for part in PACKED[:3]:
        yield f"{part} is missing", without(f"{LINEAR}.{part}"), (LINEAR,)
    yield "g_idx is missing", without(f"{LINEAR}.g_idx"), (LINEAR,)
    yield (
        "g_idx is missing, and desc_act is true",
        both(without(f"{LINEAR}.g_idx"), stated("quantization_config", "desc_act", value=True)),
        (LINEAR,),
    )
    yield "a whole linear is missing", without(*(f"{LINEAR}.{part}" for part in PACKED)), (LINEAR,)
    for name in (E, NORM, "model.norm.weight"):
        yield f"{name} is missing", without(name), (name,)

    def added(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
        return lambda folder: edit(folder, lambda tensors: tensors.update({name: tensor}))

    untied = stated("tie_word_embeddings", value=False)
    yield "no head, and it is not tied", untied, ("lm_head",)
    yield "a head of its own, though tied", added("lm_head.weight", torch.randn(128, 64)), ("lm_head",)
    yield "a bias of zeros that the model lacks", added(f"{LINEAR}.bias", torch.zeros(64)), (LINEAR,)
    yield "a dense weight beside the packed words", added(f"{LINEAR}.weight", torch.zeros(64, 96)), (LINEAR,)
    yield "a stranger's name", added("../../etc/passwd", torch.zeros(1)), ("etc/passwd",)
    yield "an empty name", added("", torch.zeros(1)), (*FILE, "''")
    yield "a name of a thousand dots", added("." * 1000, torch.zeros(1)), (*FILE, "...")
    yield "a name that is one part", added("qweight", torch.zeros(4, 4, dtype=torch.int32)), ("qweight",)
    fitting = [*(f"{LINEAR}.{part}" for part in PACKED)]

    def dense(weight: torch.Tensor) -> Callable[[Path], None]:
        return both(
            lambda folder: edit(folder, lambda tensors: tensors.update({f"{LINEAR}.weight": weight})),
            without(*fitting),
        )

    yield "a dense weight of another shape instead", dense(torch.zeros(64, 32)), (LINEAR,)
    yield "a dense weight without dimensions instead", dense(torch.tensor(1.0)), (LINEAR,)
    yield "a dense weight of integers instead", dense(torch.ones(64, 96, dtype=torch.int8)), (LINEAR,)
    yield (
        "a vector of 4-bit floats",
        added("extra", torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        ("extra",),
    )
    strange = "model.layers.7.mlp.down_proj"
    yield (
        "words of a block that is not there",
        lambda folder: edit(
            folder, lambda x: x.update({f"{strange}.{part}": x[f"{LINEAR}.{part}"] for part in PACKED})
        ),
        (strange,),
    )
    yield (
        "words of a norm",
        lambda folder: edit(
            folder, lambda x: x.update({f"model.norm.{part}": x[f"{LINEAR}.{part}"] for part in PACKED})
        ),
        ("model.norm",),
    )


def _values() -> Damages:
    def at(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor[place] = value
            return tensor

        return change

    for value in (math.nan, math.inf, -math.inf, 0.0):
        yield f"one scale is {value}", put("scales", at((1, 3), value)), (f"{LINEAR}.scales",)
    yield "all scales are 0", put("scales", torch.zeros_like), (f"{LINEAR}.scales",)
    for value in (-1, 3, 2**31 - 1, -(2**31)):
        yield f"a column's group is {value}", put("g_idx", at((40,), value)), (f"{LINEAR}.g_idx",)
    yield "columns change groups", put("g_idx", lambda x: x.flip(0)), (f"{LINEAR}.g_idx", LINEAR)
    yield "all columns are of one group", put("g_idx", torch.zeros_like), (f"{LINEAR}.g_idx", LINEAR)
    yield "a group is a column longer", put("g_idx", at((32,), 0)), (f"{LINEAR}.g_idx", LINEAR)
    desc_act = stated("quantization_config", "desc_act", value=True)
    for value in (-1, 3, 2**31 - 1):
        yield (
            f"with desc_act a column's group is {value}",
            both(desc_act, put("g_idx", at((40,), value))),
            (f"{LINEAR}.g_idx",),
        )
    yield "zeros of another label", put("qzeros", lambda x: x + 0x11111111), (LINEAR,)
    yield "zeros are noise, and sym is true", put("qzeros", lambda x: torch.randint_like(x, 2**31 - 1)), (LINEAR,)
    for name in (NORM, "model.norm.weight"):
        yield (
            f"{name} has a NaN",
            lambda folder, n=name: edit(folder, lambda x: x.update({n: at((3,), math.nan)(x[n].clone())}), n),
            (name,),
        )


WRONG_VALUES = (None, "4", "four", 4.0, 4.5, -4, 0, True, [4], {"a": 4}, math.nan, math.inf, 2**63, 10**400, "")


def _quantization() -> Damages:
    entry = "quantization_config"
    for field in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "damp_percent", "lm_head"):
        for value in WRONG_VALUES:
            if (field, value) == ("group_size", -1):
                continue
            shown = str(value)[:20]
            damage = stated(entry, field, value=value)
            yield f"{field} is {type(value).__name__} {shown}", damage, (field, CONFIG)
    for field in ("bits", "group_size", "sym", "desc_act", "quant_method"):
        yield f"{field} is missing", stated(entry, field, drop=True), (field, CONFIG, "bits")
    for value in (5, [], "gptq", [1], 0, True):
        yield f"is {value!r}", stated(entry, value=value), (entry, CONFIG)
    for bits in (2, 3, 8, 16):
        yield f"bits are {bits}, of words of 4", stated(entry, "bits", value=bits), (LINEAR, "bits", "_proj")
    for size in (16, 64, -1, 96, 2**40):
        yield f"group_size is {size}, of groups of 32", stated(entry, "group_size", value=size), ("group_size",)
    for method in ("awq", "bitsandbytes", "fp8", "nonsense", "", 5):
        yield (
            f"quant_method is {method!r}",
            stated(entry, "quant_method", value=method),
            ("quant_method", CONFIG, str(method), "AWQ"),
        )
    for field in ("modules_in_block_to_quantize", "meta", "backend", "dataset", "tokenizer"):
        for value in (5, "x" * 10_000, [[["q_proj"]]], {"a": {"b": {}}}, [None], "../../etc/passwd"):
            yield f"{field} is {str(value)[:20]}", stated(entry, field, value=value), (field, CONFIG, LINEAR, "_proj")
    yield (
        "a thousand unknown keys",
        lambda folder: [stated(entry, f"key{number}", value=number)(folder) for number in range(1000)] and None,
        (CONFIG,),
    )
    beside = {"bits": 3, "group_size": 32, "desc_act": False, "sym": True}
    yield (
        "quantize_config.json says otherwise",
        written("quantize_config.json", json.dumps(beside)),
        ("quantize_config.json",),
    )


def _dynamic() -> Damages:
    entry = ("quantization_config", "dynamic")
    for value in (5, "x", [], [1], True, {"a": 5}, {"a": [1]}, {"": {}}, {"(": {}}, {"*": {}}, {"+:[": {}}):
        yield f"dynamic is {json.dumps(value)[:30]}", stated(*entry, value=value), ("dynamic",)
    for key, value in {"bits": 4.0, "group_size": "x", "sym": "false", "desc_act": 2, "damp_percent": -1}.items():
        yield f"a rule's {key} is {value!r}", stated(*entry, value={"+:.*down.*": {key: value}}), ("dynamic",)
    slow = {
        "nested repeats": r"(a+|m+|o+|d+|e+|l+|\w|\.)+$^",
        "alternatives that overlap": r"(\w|[a-z]|.)*!",
        "many optional": "(.*)*(.*)*(.*)*(.*)*x!",
        "a back reference": r"((.+)\2*)+!",
    }
    for name, pattern in slow.items():
        yield f"a slow pattern: {name}", stated(*entry, value={f"-:{pattern}": {}}), ("dynamic",)
    yield "counted repeats", stated(*entry, value={"((((a{1,99}){1,99}){1,99}){1,99}){1,99}": {}}), ("dynamic",)
    yield "a pattern of a megabyte", stated(*entry, value={"a" * 2**20: {}}), ("dynamic",)
    yield (
        "100,000 rules",
        stated(*entry, value=lambda: {f"-:.*stranger{number}.*": {} for number in range(100_000)}),
        ("dynamic",),
    )
    yield (
        "a million rules that list names",
        stated(*entry, value=lambda: {f"-:^x{n}$": {} for n in range(10**6)}),
        ("dynamic",),
    )
    yield (
        "as many slow rules as there may be",
        stated(*entry, value=lambda: {f"-:(a|b|ab|[a-z.0-9])*?{number}x": {} for number in range(9999)}),
        ("dynamic",),
    )
    yield (
        "as many long rules",
        stated(*entry, value=lambda: {f"-:{'(?:a|b)?' * 480}{number}": {} for number in range(9999)}),
        ("dynamic",),
    )
    for pattern in ("(?:.{5000}){5000}", "(?:.{65535}){65535}", "(?:(?:.{99}){99}){99}"):
        yield f"repeats of {pattern}", stated(*entry, value={f"-:{pattern}": {}}), ("dynamic",)
    yield (
        "a rule of a million keys",
        stated(*entry, value=lambda: {"a": dict.fromkeys(map(str, range(10**6)), 1)}),
        (CONFIG,),
    )
    keys = {f"k{number}": 1 for number in range(30)}
    yield (
        "rules of thirty keys each",
        stated(*entry, value=lambda: {f"-:^x{n}$": keys for n in range(50_000)}),
        (CONFIG,),
    )
    modules = ("quantization_config", "modules_in_block_to_quantize")
    yield "a million modules", stated(*modules, value=lambda: [[f"a{n}" for n in range(10**6)]]), (CONFIG,)
    yield (
        "a rule that excludes what is packed",
        stated(*entry, value={"-:.*down_proj": {}}),
        ("dynamic", LINEAR, "_proj"),
    )
    yield "a rule of other bits", stated(*entry, value={"+:.*down_proj": {"bits": 8}}), ("dynamic", LINEAR, "_proj")


def _config() -> Damages:
    for name in (5, ["a"], "../model.safetensors"):
        yield (
            f"transformers_weights is {name!r}",
            stated("transformers_weights", value=name),
            ("transformers_weights",),
        )

    def many(folder: Path) -> None:
        keys = dict.fromkeys(map(str, range(10**6)), 1)
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **keys}))

    yield "a million keys", many, (CONFIG,)
    texts: dict[str, bytes | str] = {
        "is empty": "",
        "is not JSON": "{",
        "is a list": "[]",
        "is null": "null",
        "is a number": "5",
        "is binary": b"\xff\xfe\x00\x01",
        "is nested deeply": "[" * 100_000 + "]" * 100_000,
        "has NUL bytes": "{\0}",
    }
    for name, content in texts.items():
        yield name, written(CONFIG, content), (CONFIG,)
    yield "is missing", lambda folder: (folder / CONFIG).unlink(), (CONFIG,)
    yield (
        "begins with a byte order mark",
        lambda folder: (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes()) and None,
        (CONFIG,),
    )
    fields = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
    for field in fields:
        for value in (0, -1, "x", None, 2.5, [], 10**12, 10**30):
            yield f"{field} is {value!r}", stated(field, value=value), (field, CONFIG, LINEAR)
    for field in ("model_type", "architectures", "rope_parameters", "tie_word_embeddings", "dtype", "hidden_act"):
        for value in (5, "nonsense", ["nonsense"], {"a": 1}):
            yield f"{field} is {value!r}", stated(field, value=value), (field, CONFIG, "nonsense")
    code = "import pathlib; pathlib.Path('EXECUTED').touch()\nclass Thing: pass\n"
    yield (
        "names code of its own",
        both(
            written("own.py", code),
            stated("auto_map", value={"AutoConfig": "own.Thing", "AutoModelForCausalLM": "own.Thing"}),
            stated("model_type", value="own"),
        ),
        ("trust_remote_code", CONFIG, "own"),
    )
    yield (
        "num_hidden_layers is 1000000",
        stated("num_hidden_layers", value=10**6),
        ("num_hidden_layers",),
    )
    yield (
        "names another file of weights",
        stated("transformers_weights", value="../../../etc/passwd"),
        (
            "transformers_weights",
            "passwd",
        ),
    )


def _said() -> Damages:
    """What transformers reads without complaint."""
    for value in (math.nan, math.inf, 10.0, -1.0):
        yield f"rms_norm_eps is {value}", stated("rms_norm_eps", value=value), ("rms_norm_eps",)
    yield "rms_norm_eps is 1e400", _as_text("1e-06", "1e400"), ("rms_norm_eps",)
    for value in (math.nan, 0.0, -10_000.0):
        yield f"rope_theta is {value}", stated("rope_parameters", "rope_theta", value=value), ("rope_theta",)
    yield "an attention_dropout that is NaN", stated("attention_dropout", value=math.nan), ("attention_dropout",)
    for part in ("text_config", "decoder", "generator"):
        for value in ({"quantization_config": {"bits": 3}}, {}, "x"):
            yield f"a {part} that is {json.dumps(value)}", stated(part, value=value), (part,)
    yield "meta that is nested deeply", stated("quantization_config", "meta", value=_nested(900)), (CONFIG,)
    yield "nested deeply, but not too deeply to be read", stated("extra", value=_nested(300)), (CONFIG,)
    yield (
        "a rule that is nested deeply",
        stated("quantization_config", "dynamic", value={"a": _nested(300)}),
        (CONFIG,),
    )


def _nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": found}
    return found


def _as_text(old: str, new: str) -> Callable[[Path], None]:
    def done(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new))

    return done


# Other formats, of which converting is tried

AWQ = ("qweight", "qzeros", "scales")
COMPRESSED = ("weight_packed", "weight_shape", "weight_scale")


def _others(parts: tuple[str, ...]) -> Damages:
    def part_of(part: str, way: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
        name = f"{LINEAR}.{part}"
        return edit_all(lambda tensors: tensors.update({name: way(tensors[name])}) if name in tensors else None)

    def gone(*names: str) -> Callable[[Path], None]:
        return edit_all(lambda tensors: [tensors.pop(name, None) for name in names])

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        **{str(dtype): lambda x, to=dtype: x.float().to(to) for dtype in OTHER_DTYPES},
        "without its last row": lambda x: x[:-1],
        "flat": lambda x: x.flatten() if x.ndim > 1 else x[None],
        "a scalar": lambda x: x.flatten()[0],
        "of no elements": lambda x: x[:0],
        "transposed": lambda x: x.T if x.ndim > 1 else x[:, None],
    }
    for part in parts:
        for name, way in ways.items():
            yield f"{part} is {name}", part_of(part, way), (f"{LINEAR}.{part}", LINEAR)
        yield f"{part} is missing", gone(f"{LINEAR}.{part}"), (LINEAR,)
    for value in (math.nan, math.inf, 0.0):
        yield f"a scale is {value}", part_of(parts[-1] if "scale" in parts[-1] else "", _with(value)), (LINEAR,)
    yield "a whole linear is missing", gone(*(f"{LINEAR}.{part}" for part in parts)), (LINEAR,)
    for name in (E, NORM, "model.norm.weight"):
        yield f"{name} is missing", gone(name), (name,)
    yield f"{NORM} has a NaN", edit_all(_changed(NORM, _with(math.nan))), (NORM,)
    yield f"{NORM} is int8", edit_all(_changed(NORM, lambda x: x.to(torch.int8))), (NORM,)
    dense = {f"{LINEAR}.weight": torch.zeros(64, 96)}
    yield (
        "a dense weight beside the packed words",
        edit_all(lambda x: x.update(dense) if f"{LINEAR}.{parts[0]}" in x else None),
        (LINEAR,),
    )
    yield "more blocks in config.json", stated("num_hidden_layers", value=3), ("model.layers.2",)
    yield "fewer blocks in config.json", stated("num_hidden_layers", value=1), ("model.layers.1",)
    yield "another width in config.json", stated("hidden_size", value=128), ("model.",)
    yield "not tied, and without a head", stated("tie_word_embeddings", value=False), ("lm_head",)
    if parts is COMPRESSED:
        group = ("quantization_config", "config_groups", "group_0", "targets")
        for targets in (["re:(a+)+$"], ["re:("], ["re:" + "a" * 5000], ["re:(?:.{5000}){5000}"]):
            yield f"targets are {targets[0][:20]}", stated(*group, value=targets), (CONFIG,)
        yield "100,000 targets", stated(*group, value=[f"re:x{number}" for number in range(10**5)]), (CONFIG,)
    for value in (None, "x", 4.5, [4], {"a": 4}, 2**70, math.nan):
        if parts is AWQ:
            if value is not None:
                yield f"bits are {value}", stated("quantization_config", "bits", value=value), (CONFIG,)
            yield f"group_size is {value}", stated("quantization_config", "group_size", value=value), ("group_size",)
        else:
            inside = ("quantization_config", "config_groups", "group_0", "weights")
            for field in ("num_bits", "group_size", "strategy", "type", "symmetric"):
                if (field, value) != ("symmetric", None):
                    yield f"{field} is {value}", stated(*inside, field, value=value), (CONFIG,)


OTHER_DTYPES = (torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn)


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name])}) if name in tensors else None


GGUF = "model.gguf"


def _gguf() -> Damages:
    def patched(key: str, value: float) -> Callable[[Path], None]:
        def done(folder: Path) -> None:
            content = bytearray((folder / GGUF).read_bytes())
            place = content.index(key.encode()) + len(key) + 4
            content[place : place + 4] = struct.pack("<f", value)
            (folder / GGUF).write_bytes(bytes(content))

        return done

    def norm(value: float) -> Callable[[Path], None]:
        def done(folder: Path) -> None:
            from gguf import GGUFReader

            reader = GGUFReader(folder / GGUF, "r+")
            next(tensor for tensor in reader.tensors if "attn_norm" in tensor.name).data[3] = value
            reader.data.flush()

        return done

    for value in (math.nan, math.inf, -math.inf):
        yield f"a norm has {value}", norm(value), (GGUF,)
    for key in ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"):
        for value in (math.nan, math.inf, -1.0):
            yield f"{key} is {value}", patched(key, value), (GGUF,)
    yield "llama.rope.freq_base is 0", patched("llama.rope.freq_base", 0.0), (GGUF,)
