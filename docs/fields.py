# SPDX-License-Identifier: Apache-2.0
"""Write the tables of configuration.md from the fields of `GPTQConfig`: `python docs/fields.py`; --check compares."""

import sys
from pathlib import Path

from optq.config.fields import FIELDS, SECTIONS

PAGE = Path(__file__).with_name("configuration.md")


def table(section: str) -> str:
    """The fields of one section, as Markdown."""
    rows = [
        f"| `{field.name}`{' *checkpoint*' * field.stored} | {field.shown_default} | "
        f"{', '.join(f'`{flag}`' for flag in field.flags) or '–'} | {field.help} |"
        for field in FIELDS.values()
        if field.section == section
    ]
    return "\n".join(["| field | default | on the command line | what it says |", "|---|---|---|---|", *rows])


def with_tables(page: str) -> str:
    """The page with the table of each section in the place of the one below its heading."""
    for section in SECTIONS:
        start = page.index("| field |", page.index(f"## {section}\n"))
        page = page[:start] + table(section) + page[page.index("\n\n", start) :]
    return page


if __name__ == "__main__":
    found = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv:
        PAGE.write_text(with_tables(found), encoding="utf-8")
    elif found != with_tables(found):
        sys.exit("docs/configuration.md is not what the fields say: run python docs/fields.py")
