# SPDX-License-Identifier: Apache-2.0
"""Changes to other libraries, each with its undo. What is changed stands in `optq.hf.patches`.

A function may be wrapped by others before and after us. Ours is put around whatever is there; taking it back restores
what was there if ours is the outermost, and else makes ours hand every call on.
"""

import inspect
from collections.abc import Callable, MutableMapping
from functools import wraps
from typing import Any

_UNDO: dict[tuple[int, Any], tuple[str, Callable[[], None]]] = {}
"""By what is changed, the object's identity and the key or name in it: what it is called, and how it is undone."""


def wrap(
    holder: type,
    name: str,
    kind: Any,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Replace a class method or static method by `make(the present one)`. Does nothing the second time.

    Args:
        kind: classmethod or staticmethod.
        make: gets and returns the function inside, whose first argument is the class if it is a class method.
    """
    if (id(holder), name) in _UNDO:
        return
    present = inspect.getattr_static(holder, name)
    original: Callable[..., Any]
    if isinstance(present, (classmethod, staticmethod)):
        original = present.__func__
    elif kind is classmethod:  # what another library has put there is called without the class

        @wraps(present)
        def original(cls: type, /, *args: Any, **kwargs: Any) -> Any:
            return present(*args, **kwargs)
    else:
        original = present
    ours, active = make(original), True

    @wraps(original)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return (ours if active else original)(*args, **kwargs)

    placed = kind(outer)
    setattr(holder, name, placed)

    def undo() -> None:
        nonlocal active
        active = False
        if inspect.getattr_static(holder, name) is placed:
            setattr(holder, name, present)

    _UNDO[id(holder), name] = (f"{holder.__name__}.{name}", undo)


def put(table: MutableMapping[Any, Any], key: Any, value: Any, table_name: str) -> None:
    """Set an entry of a library's table; the one that was there comes back with `undo_all`."""
    was_there, before = key in table, table.get(key)
    if before is value:
        return
    table[key] = value

    def undo() -> None:
        if table.get(key) is not value:  # somebody else's by now
            return
        if was_there:
            table[key] = before
        else:
            del table[key]

    _UNDO.setdefault((id(table), key), (f"{table_name}[{key!r}]", undo))


def assign(module: Any, name: str, value: Any) -> None:
    """Set a name of a module; the value that was there comes back with `undo_all`."""
    put(vars(module), name, value, module.__name__)


def installed() -> list[str]:
    """The changes to other libraries that are in effect, in words."""
    return [name for name, _ in _UNDO.values()]


def undo_all() -> None:
    """Undo all changes, the latest first."""
    for _, undo in reversed(list(_UNDO.values())):
        undo()
    _UNDO.clear()
