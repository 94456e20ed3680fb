# SPDX-License-Identifier: Apache-2.0
"""The few instructions of PTX that the Triton programs are written in, read and carried out on numpy arrays.

Triton's interpreter refuses assembly. With this in its place, what runs on a GPU is tested without one: the strings
themselves, instruction by instruction, each result rounded to the dtype that the instruction names.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray  # int32


def _numbers(words: Words, dtype: torch.dtype) -> Tensor:
    """int32 (...) -> the two numbers in each, (..., 2) float64."""
    return torch.from_numpy(words.copy()).view(dtype).view(*words.shape, 2).double()


def _words(numbers: Tensor, dtype: torch.dtype) -> Words:
    return numbers.to(dtype).view(torch.int32)[..., 0].numpy()


def _in_halves(formula: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Words]:
    return lambda *arguments: _words(formula(*(_numbers(words, dtype) for words in arguments)), dtype)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "fma.rn.f16x2": _in_halves(lambda a, b, c: a * b + c, torch.float16),
    "fma.rn.bf16x2": _in_halves(lambda a, b, c: a * b + c, torch.bfloat16),
}


def run(assembly: str, *operands: Words) -> Words:
    """$0, given $1, $2, … of one shape."""
    registers: dict[str, Words] = {f"${at}": operand for at, operand in enumerate(operands, 1)}
    body = re.sub(r"\.reg \.b32 [^;]*;", "", assembly.strip(" {}"))
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, arguments = line.split(maxsplit=1)
        target, *sources = (argument.strip() for argument in arguments.split(","))
        values = [registers[source] if source in registers else _literal(source, operands[0]) for source in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers["$0"]


def _literal(text: str, like: Words) -> Words:
    return np.full(like.shape, np.uint32(int(text, 16)).astype(np.int32), dtype=np.int32)
