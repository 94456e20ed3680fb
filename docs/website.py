# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: pages that are made while the site is built, and links that lead out of docs/.

The reference of Python's names and of the commands is made from the package itself, so that it cannot grow stale.
"""

import argparse
import dataclasses
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages of the site, and their names there."""

FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(([^()\s]+)\)")
HELP_COLUMNS = 100
MEMBERS = {"optq.GPTQConfig": ("from_dict", "from_stock", "to_dict"), "optq.QuantLinear": ("kernel_name", "dense")}
"""What classes have that is for users."""


def with_links_of_the_site(page: str, folder: str, repository: str | None) -> str:
    """The Markdown of a page that lies in `folder` of the repository ("" or "docs") with the links that the site has.

    A link whose text is the name of a page gets the page's title for it. A file that is no page is linked to in the
    repository; as long as no address of it is known, its name is shown when the pointer rests on the link's text.
    """

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return found[0]
        path = os.path.normpath(os.path.join(folder, path))
        site = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is not None and site.endswith((".md", ".png")):
            text = title_of(path) if text in (path, site) and site.endswith(".md") else text
            return f"[{text}]({site}{'#' * bool(anchor)}{anchor})"
        if repository:
            return f"[{text}]({repository.rstrip('/')}/blob/main/{path})"
        return f'<span title="{path}">{text}</span>'

    parts, end = [], 0
    for fence in FENCED.finditer(page):
        parts += [LINK.sub(link, page[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(link, page[end:])])


def title_of(path: str) -> str:
    """The first heading of a page of the repository."""
    return (ROOT / path).read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def commands() -> str:
    """The help of every command, as a page."""
    from optq.cli import COMMANDS, EXPORT

    parts = [
        "# Options of every command\n\nMade from the commands' own help; [cli.md](cli.md) says what they are for.\n"
    ]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(HELP_COLUMNS)
    try:
        for name, command in (("export gptq", EXPORT), *((f"gptq {each.name}", each) for each in COMMANDS)):
            parser = argparse.ArgumentParser(prog=f"optimum-cli {name}")
            command.declare(parser)
            parts.append(f"## {name}\n\n```text\n{parser.format_help()}```\n")
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(parts)


def returned(function: Any) -> Iterator[type]:
    """The package's own dataclasses among what `function` returns."""
    hint = typing.get_type_hints(function).get("return")
    for kind in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("optq."):
            yield kind


def documented(value: Any, heading: str, members: tuple[str, ...] = ()) -> str:
    """What mkdocstrings replaces by the docstring of `value`, under `heading`, and by those of some of its members."""
    assert all(hasattr(value, member) for member in members), f"{heading} has not all of {members}"
    options = f"heading: {heading}\n      members: [{', '.join(members)}]"
    return f"::: {value.__module__}.{value.__qualname__}\n    options:\n      {options}\n"


def api() -> str:
    """Every public name, what the functions among them return, and the errors, as a page."""
    import optq
    import optq.errors
    import optq.report

    public = {f"optq.{name}": getattr(optq, name) for name in optq.__all__ if name not in ("kernels", "OptqError")}
    public |= {"optq.kernels.explain": optq.kernels.explain, "optq.report.report": optq.report.report}
    functions = [value for value in public.values() if not isinstance(value, type)]
    kinds = dict.fromkeys(kind for function in functions for kind in returned(function))
    errors = [kind for kind in vars(optq.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    parts = [
        "# Python\n",
        "All that `optq.__all__` names, made from the docstrings. Every field of `GPTQConfig` is in "
        "[configuration.md](configuration.md).\n",
        "## Functions and classes\n",
        *(documented(public[name], name, MEMBERS.get(name, ())) for name in sorted(public, key=str.lower)),
        "## What they return\n",
        *(documented(kind, kind.__name__) for kind in kinds),
        "## Errors\n",
        *(documented(kind, kind.__name__) for kind in errors),
    ]
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here, and those that lie outside of docs/."""
    from mkdocs.structure.files import File

    made = {"api.md": api(), "options.md": commands()}
    for source, name in OUTSIDE.items():
        made[name] = with_links_of_the_site((ROOT / source).read_text(encoding="utf-8"), "", config.repo_url)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Give the pages of docs/ the site's links."""
    return with_links_of_the_site(markdown, "docs", config.repo_url)
