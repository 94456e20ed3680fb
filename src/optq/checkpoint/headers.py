# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint as its files' headers tell them: names, shapes and dtypes, without the data."""

import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optq.errors import CheckpointError
from optq.scheme import BITS, PACKED_WORD_BITS

from .layout import TENSOR_NAMES


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Shape and dtype of a tensor in a file, read without its data.

    Args:
        name: as it is in the file.
        file: which holds it; "" for a tensor that is in none.
        transposed: the file holds a matrix of which this is the transpose.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""
    file: str = ""
    transposed: bool = False

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.file else self.name


@dataclass(frozen=True, kw_only=True)
class QuantizedTensors:
    """The headers of one quantized linear's tensors, and the bits that follow from their shapes."""

    name: str
    headers: dict[str, TensorHeader]  # by the last part of the tensor's name; "g_idx" and "bias" may be absent
    bits: int

    @property
    def in_features(self) -> int:
        return self.headers["qweight"].shape[0] * PACKED_WORD_BITS // self.bits

    @property
    def out_features(self) -> int:
        return self.headers["qweight"].shape[1]

    @property
    def groups(self) -> int:
        return self.headers["scales"].shape[0]

    @property
    def file(self) -> str:
        """The file that holds the packed codes."""
        return self.headers["qweight"].file


_SAFETENSORS_DTYPES = {
    **{"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F4": torch.float4_e2m1fn_x2},
    **{"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16, "U32": torch.uint32},
    **{"I64": torch.int64, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64},
}

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

PACKED_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": SCALE_DTYPES,
    "g_idx": (torch.int32, torch.int64),
    "bias": SCALE_DTYPES,
}
"""What each tensor of a packed linear may be."""


def open_whole(file: str | os.PathLike[str]) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or no file.
    """
    if os.path.lexists(file) and not os.path.isfile(file):  # opening a pipe waits for someone to write into it
        raise CheckpointError(f"{os.fspath(file)} is no file, or a link to none. Copy or download it again.")
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"The checkpoint lacks the file {os.fspath(file)}, which its index or config names. Copy or download it "
            "again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{os.fspath(file)} is no whole safetensors file: {error}. It may be cut short, or a pointer of Git LFS; "
            "copy or download it again."
        ) from error


def read_headers(files: Iterable[str], *, pickled: bool = False) -> dict[str, TensorHeader]:
    """Read shape (...) and dtype of every tensor in `files`, by tensor name, without the data.

    Args:
        pickled: read files that torch.save wrote (.bin, .pt), too: their tensors only, as torch's weights_only does.
    Raises:
        CheckpointError: a file is missing, damaged or not safetensors, or it is pickled and holds more than tensors;
            or a tensor is in two files, or of a dtype that is not known.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        for header in _headers_of(os.fspath(file), pickled):
            if header.name in headers:
                raise CheckpointError(
                    f"{header.name} is in two files of the checkpoint, {headers[header.name].file} and {file}, and "
                    "nothing says which is meant. Files of another checkpoint may lie among them; remove these, or "
                    "download all again into an empty folder."
                )
            headers[header.name] = header
    return headers


def _headers_of(file: str, pickled: bool) -> Iterable[TensorHeader]:
    if file.endswith(".safetensors"):
        with open_whole(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                part = tensors.get_slice(name)
                dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{file}: {name} is of dtype {part.get_dtype()}, which is not known.")
                yield TensorHeader(shape=tuple(part.get_shape()), dtype=dtype, name=name, file=file)
    elif pickled:
        yield from _headers_of_pickle(file)
    else:
        raise CheckpointError(
            f"{file}: only .safetensors files are read; unpickling a file from elsewhere can run its code. "
            "AutoModelForCausalLM.from_pretrained(..., use_safetensors=False) reads nothing but tensors "
            "from it, if weights_only stays True; save_pretrained() then writes safetensors."
        )


@contextmanager
def reader_of(headers: Iterable[TensorHeader]) -> Iterator[Callable[[TensorHeader], Tensor]]:
    """Open the files of some tensors of safetensors files; what is given reads one, shape (...), by its header."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(open_whole(file)) for file in sorted({x.file for x in headers})}

        def read(header: TensorHeader) -> Tensor:
            stored: Tensor = opened[header.file].get_tensor(header.name)
            return stored.T if header.transposed else stored

        yield read


def _headers_of_pickle(file: str) -> Iterable[TensorHeader]:
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} is refused, since it holds more than tensors: {error}") from error
    return [TensorHeader(shape=tuple(x.shape), dtype=x.dtype, name=name, file=file) for name, x in tensors.items()]


def find_quantized_linears(headers: dict[str, TensorHeader]) -> dict[str, QuantizedTensors]:
    """Find the quantized linears of a checkpoint, by module name. Bits follow from the shapes, not from a label.

    Args:
        headers: those of a linear are qweight (in · bits / 32, out), qzeros (groups, out · bits / 32), scales
            (groups, out), and maybe g_idx (in,) and bias (out,).
    Raises:
        CheckpointError: a linear's tensors are incomplete, or their shapes or dtypes contradict one another.
    """
    linears = {}
    for key in headers:
        name, _, last = key.rpartition(".")
        if last not in ("qweight", "qzeros"):
            continue
        own = {part: headers[f"{name}.{part}"] for part in (*TENSOR_NAMES, "bias") if f"{name}.{part}" in headers}
        missing = [part for part in ("qweight", "qzeros", "scales") if part not in own]
        if missing:
            raise CheckpointError(
                f"{name}: the checkpoint has {last} ({headers[key]}) but not {' and '.join(missing)}. A file of it "
                "may be missing, or of another checkpoint; download it again."
            )
        if f"{name}.weight" in headers:
            raise CheckpointError(
                f"{name}: the checkpoint has packed codes ({headers[f'{name}.qweight']}) and a dense weight "
                f"({headers[f'{name}.weight']}), and nothing says which is meant. Files of another checkpoint may lie "
                "among them; download all again into an empty folder."
            )
        if name not in linears:
            linears[name] = QuantizedTensors(name=name, headers=own, bits=_bits_of(name, own))
    return linears


def _bits_of(name: str, headers: dict[str, TensorHeader]) -> int:
    """qzeros is (groups, out · bits / 32) and scales (groups, out), so their widths tell the bits.

    Raises:
        CheckpointError: dtypes or shapes are those of no packed linear.
    """
    for part, header in headers.items():
        if header.dtype not in PACKED_DTYPES[part]:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in PACKED_DTYPES[part])
            raise CheckpointError(
                f"{name}.{part} is of dtype {str(header.dtype).removeprefix('torch.')} ({header}); of a packed linear "
                f"it is {allowed}. The tensor was written by something that is no GPTQ quantizer, or was cast."
            )
    shapes = {part: header.shape for part, header in headers.items()}
    matrices = [shapes[part] for part in ("qweight", "qzeros", "scales")]
    if all(len(shape) == 2 and math.prod(shape) for shape in matrices):
        (rows, out_features), (groups, words), (scaled_groups, scaled) = matrices
        bits = words * PACKED_WORD_BITS // scaled
        in_features = rows * PACKED_WORD_BITS // bits if bits in BITS else 0
        if (
            in_features * bits == rows * PACKED_WORD_BITS
            and out_features * bits == words * PACKED_WORD_BITS
            and scaled == out_features
            and scaled_groups == groups <= in_features
            and shapes.get("g_idx", (in_features,)) == (in_features,)
            and shapes.get("bias", (out_features,)) == (out_features,)
        ):
            return bits
    raise CheckpointError(
        f"{name}: tensor shapes {shapes} ({headers['qweight'].file or 'no file'}) fit no GPTQ layout of "
        f"{', '.join(map(str, BITS))} bits: qweight (in*bits/32, out), qzeros (groups, out*bits/32), scales "
        "(groups, out), g_idx (in,), bias (out,)."
    )
