# SPDX-License-Identifier: Apache-2.0
"""Starting a Triton program again without Triton looking at its arguments again.

To find the compiled program, Triton's launcher asks every argument for its type, its alignment and its value, which
takes several times as long as starting it. While few tokens are made at a time, the processor that starts the programs
is what a GPU waits for.
"""

from collections.abc import Mapping
from typing import Any


class Memo(dict[Any, Any]):
    """A cache of launches that belongs to this process and its devices: copies and pickles of it are empty."""

    def __reduce__(self) -> tuple[type["Memo"], tuple[()]]:
        return Memo, ()


class Program:
    """A Triton program for arguments of one kind.

    Args:
        function: a function with the decorator `triton.jit`.
        grid: number of programs that run, in up to three dimensions.
        options: Triton's own, such as num_warps.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], options: Mapping[str, int]) -> None:
        self.function, self._grid, self._options = function, (*grid, 1, 1)[:3], options
        self._compiled: Any = None

    @property
    def has_run(self) -> bool:
        """Whether it was compiled and started."""
        return self._compiled is not None

    def __call__(self, *arguments: Any) -> None:
        """Start it.

        Args:
            arguments: all of the function's, in its order. From the second call on, tensors must be like those of the
                first in dtype, and in whether they are aligned to 16 bytes; and everything else equal.
        """
        if self._compiled is None:
            self._compiled = self.function[self._grid](*arguments, **self._options)  # None in the interpreter
        else:
            self._compiled[self._grid](*arguments)
