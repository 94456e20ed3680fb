# SPDX-License-Identifier: Apache-2.0
"""Sizes of memory as people write them."""

import re
from numbers import Integral
from typing import Any

SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?(|[KMGT])(I?)B", re.IGNORECASE)


def bytes_of(size: Any) -> int:
    """Convert "8GiB", "8GB" or "8192MiB", in either case, or a whole number of bytes.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(size, bool) and isinstance(size, Integral) and int(size) >= 0:
        return int(size)
    found = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise ValueError(f"{size!r} is no size such as '8GiB'")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
