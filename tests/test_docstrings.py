# SPDX-License-Identifier: Apache-2.0
"""Docstrings of public functions give the shapes of their tensors, and name arguments that there are."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/optq"

DIMENSIONS = {
    *("batch", "bits", "blocks", "choices", "columns", "count", "experts", "features", "groups", "hidden", "in"),
    *("inside", "length", "longest", "out", "outputs", "rows", "samples", "size", "splits", "stop", "tiles", "tokens"),
    *("vocabulary", "width", "words"),
}
ELLIPSES = ("...", "…")
ARGS = re.compile(r"Args:\n((?: {4}.*\n?)+)")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_shape(text: str) -> bool:
    """Whether what stands in parentheses is a shape: "in, out" or "..., in · bits / 32", but no prose."""
    items = [item.strip() for item in text.split(",")]
    if len(items) == 1:
        return items[0] in ELLIPSES
    return all(
        item in ("", *ELLIPSES) or item.isdigit() or (DIMENSIONS & set(item.split()) and len(item.split()) <= 5)
        for item in items
    )


def names_a_shape(docstring: str) -> bool:
    return any(map(is_shape, re.findall(r"\(([^()]+)\)", docstring)))


def has_tensor(hints: Iterable[ast.expr | None]) -> bool:
    return any(re.search(r"\bTensor\b", ast.unparse(hint)) for hint in hints if hint is not None)


def arguments_of(function: Function) -> list[ast.arg]:
    every = function.args
    found = (*every.posonlyargs, *every.args, every.vararg, *every.kwonlyargs, every.kwarg)
    return [argument for argument in found if argument is not None]


def fields_of(owner: ast.ClassDef) -> dict[str, ast.expr]:
    """Annotations of a class's own fields, and of its constructor's arguments."""
    found = {
        node.target.id: node.annotation
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in owner.body:
        if isinstance(node, Function) and node.name == "__init__":
            found |= {argument.arg: argument.annotation or ast.Constant(None) for argument in arguments_of(node)}
    return found


def with_tensors(body: Iterable[ast.stmt], inside: str = "") -> Iterator[tuple[str, str]]:
    """Name and docstring of public functions that take or return tensors, and of public classes that hold some."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            hints = [hint for name, hint in fields_of(node).items() if not name.startswith("_")]
            yield from with_tensors(node.body, f"{node.name}.")
        else:
            hints = [*(argument.annotation for argument in arguments_of(node)), node.returns]
        if has_tensor(hints):
            yield inside + node.name, ast.get_docstring(node) or ""


def without_shapes(source: str) -> list[str]:
    return [name for name, docstring in with_tensors(ast.parse(source).body) if not names_a_shape(docstring)]


def described(section: str) -> list[str]:
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): ", section, re.MULTILINE)
    return [name for entry in entries for name in entry.split(", ")]


def unknown_arguments(source: str) -> list[str]:
    """What docstrings describe under "Args:", although there is no such argument or field."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function | ast.ClassDef) and (section := ARGS.search(ast.get_docstring(node) or "")):
            own = fields_of(node) if isinstance(node, ast.ClassDef) else {each.arg for each in arguments_of(node)}
            found += [f"{node.name}: {name}" for name in described(section[1]) if name not in own]
    return found


SOURCES = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}


def test_public_functions_with_tensors_give_their_shapes():
    assert len(SOURCES) > 100
    assert {file: missing for file, source in SOURCES.items() if (missing := without_shapes(source))} == {}


def test_docstrings_describe_arguments_that_there_are():
    assert {file: unknown for file, source in SOURCES.items() if (unknown := unknown_arguments(source))} == {}


def test_a_missing_shape_is_noticed():
    source = '''
def with_shape(x: Tensor) -> Tensor:
    """x (..., in) -> (..., out), if all goes well (and it does, mostly)."""

def without_docstring(x: torch.Tensor): ...

def prose() -> dict[str, Tensor]:
    """Weights (of the model, as they are)."""

def no_tensor(headers: QuantizedTensors) -> int: ...

def _private(x: Tensor): ...

class Layer:
    """A layer with bias (out,)."""

    def __init__(self, bias: Tensor): ...

    def forward(self, *x: Tensor):
        """The product."""

class _Private:
    def forward(self, x: Tensor): ...
'''
    assert without_shapes(source) == ["without_docstring", "prose", "Layer.forward"]
    assert without_shapes(source.replace("bias (out,)", "bias"))[-1] == "Layer"


def test_an_unknown_argument_is_noticed():
    source = '''
def round_to(weight, bits):
    """Round.

    Args:
        weight, bit: (out, in), and: how many.
    Raises:
        ValueError: never.
    """

class Grid:
    """A grid.

    Args:
        scales: (out,).
        zero: (out,).
    """

    scales: Tensor
    zeros: Tensor
'''
    assert unknown_arguments(source) == ["round_to: bit", "Grid: zero"]
