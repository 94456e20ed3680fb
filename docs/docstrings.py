# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe, which reads docstrings for the site: it asks for an empty line between their sections."""

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"\n(?=(?:Args|Returns|Raises|Cost):)")


class SectionsApart(Extension):
    """Puts the empty line there, as ours have none."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
