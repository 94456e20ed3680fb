# SPDX-License-Identifier: Apache-2.0
"""Write into every page how to install optq, as `optq.version` says: `python docs/install.py`; --check compares."""

import re
import sys
from pathlib import Path

from optq.version import pip_install

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"""pip install (["']?)(?:\.|optq)(?:\[(?P<extra>[\w,]+)\])?\1(?![\w.\[/-])""")


def with_commands(page: str) -> str:
    return COMMAND.sub(lambda found: pip_install(found["extra"] or ""), page)


if __name__ == "__main__":
    for file in PAGES:
        found = file.read_text(encoding="utf-8")
        if "--check" not in sys.argv:
            file.write_text(with_commands(found), encoding="utf-8")
        elif found != with_commands(found):
            sys.exit(f"{file.name} installs optq otherwise than optq.version says: run python docs/install.py")
