# SPDX-License-Identifier: Apache-2.0
"""The pages: links and their anchors, code and commands in them, and what the site is made of."""

import argparse
import ast
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import optq
import optq.report
from optq import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CALL = r"(?:optimum-cli (export gptq|gptq)|(?:optq|python -m optq)) (.*)"


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for indent, language, text in FENCE.findall(text_of(page)):
        yield language, (textwrap.dedent(text) if indent else text).replace("\\\n", " ")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return set(map(slug, re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)))


def broken_links(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(text_of(file))):
            found.append(target)
    return found


def value_of(name: str) -> object:
    """What `optq.a.b`, or a name of optq's own, stands for; None if there is nothing."""
    value: object = optq
    for part in name.removeprefix("optq.").split("."):
        value = getattr(value, part, None)
    return value


def unknown_keywords(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    if not name.startswith(("optq.", "GPTQConfig")) or (function := value_of(name)) is None:
        return []
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [f"{name}({each.arg}=)" for each in call.keywords if each.arg is not None and each.arg not in parameters]


def missing_names(code: str) -> list[str]:
    """What Python code takes from optq, or passes to it by name, and is not there."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optq") and not node.level:
            module = import_module(node.module)
            found += [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"optq(\.\w+)+", name := ast.unparse(node)):
            found += [name] if value_of(name) is None else []
        elif isinstance(node, ast.Call):
            found += unknown_keywords(node)
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every call of optq in the page's blocks, as `python -m optq` takes them."""
    for language, text in blocks(page):
        for line in text.splitlines() if language in ("", "sh") else ():
            if call := re.match(rf"(?:torchrun .* --no-python )?{CALL}", line):
                yield ["quantize"] * (call[1] == "export gptq") + shlex.split(call[2], comments=True)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands are parsed and not run; their names."""
    found: list[str] = []
    monkeypatch.setattr(cli, "execute", lambda command, _: found.append(command.name) or 0)
    return found


@pytest.fixture
def website(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return import_module("website")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_anchors_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `title`, here\n[a](#a-title-here) [b](#b) [c](c.md) [d](page.md#d) [e](https://e.org/#e)")
    assert broken_links(page) == ["#b", "c.md", "page.md#d"]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_in_pages_compiles_and_names_what_exists(page):
    for language, code in blocks(page):
        if language == "python":
            assert missing_names(code) == [], code


def test_what_is_not_there_is_noticed():
    code = (
        "from optq import GPTQConfig, nothing\noptq.evaluation.none()\nGPTQConfig(bits=4, bit=4)\noptq.plan(m, c, d=1)"
    )
    assert missing_names(code) == ["nothing", "GPTQConfig(bit=)", "optq.evaluation.none"]
    with pytest.raises(SyntaxError):
        missing_names("optq.plan(")


def test_every_command_in_a_block_is_understood(parsed):
    every = [arguments for page in PAGES for arguments in commands(page)]
    for arguments in every:
        if arguments[-1] in ("--help", "--version"):
            with pytest.raises(SystemExit, match="0"):
                cli.main(arguments)
            parsed.append(arguments[-1])
        else:
            cli.main(arguments)
    assert len(parsed) == len(every) > 30
    assert {"quantize", "plan", "inspect", "compare", "convert", "push", "onnx", "report"} <= set(parsed)


@pytest.mark.parametrize("arguments", ["inspect out --verifi", "quantise --model m out", "convert a b --to"])
def test_a_command_that_is_not_understood_is_noticed(parsed, arguments):
    with pytest.raises(SystemExit):
        cli.main(arguments.split())


def test_commands_and_options_within_sentences_exist():
    known = {}
    for name, command in (("export gptq", cli.EXPORT), *((each.name, each) for each in cli.COMMANDS)):
        command.declare(parser := argparse.ArgumentParser())
        known[name] = set(re.findall(r"--[\w-]+", parser.format_help()))
    known["quantize"] = known["export gptq"]
    count = 0
    for page in PAGES:
        for call in re.findall(
            r"`(?:optimum-cli )?(?:gptq|optq|python -m optq) (\w[^`]*)`", FENCE.sub("", text_of(page))
        ):
            verb, *rest = call.split()
            options = [word for word in rest if word.startswith("--")]
            assert verb in known and set(options) <= known[verb], f"{page.name}: {call}"
            count += 1
    assert count > 30


def test_every_page_has_its_place_in_the_site(website):
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    own = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert listed == own | set(website.OUTSIDE.values()) | {"api.md", "options.md"}


def test_links_out_of_the_site_become_words_and_those_between_pages_stay(website):
    page = "[a](cli.md#b) [faq.md](faq.md) [c](../src/c.py) [`d`](../README.md) [e](https://e) [f](#f)\n"
    page += "```\n[g](../g.py)\n```\n![h](h.png)"
    assert website.with_links_of_the_site(page, "docs", None) == (
        '[a](cli.md#b) [Questions](faq.md) <span title="src/c.py">c</span> [`d`](index.md) [e](https://e) [f](#f)\n'
        "```\n[g](../g.py)\n```\n![h](h.png)"
    )
    page = "[docs/cli.md](docs/cli.md) [b](LICENSE) ![i](docs/i.png)"
    assert website.with_links_of_the_site(page, "", "https://host/me/optq/") == (
        "[Command line](cli.md) [b](https://host/me/optq/blob/main/LICENSE) ![i](i.png)"
    )


def test_the_reference_has_every_public_name_and_every_command(website):
    page = website.api()
    for name in {*optq.__all__} - {"kernels"}:
        assert f".{name}\n" in page, name
    assert "::: optq.evaluation.perplexity.perplexity\n" in page and "::: optq.api.evaluate.Evaluation\n" in page
    options = website.commands()
    assert all(f"## gptq {command.name}\n" in options for command in cli.COMMANDS)
    assert "--max-perplexity-ratio X" in options


def test_the_installation_page_lists_every_extra():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs/install.md"), re.MULTILINE)) == set(extras)


def test_the_formula_of_the_solver_page_gives_the_codes_of_the_solver(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    page = import_module("solver")
    weight, hessian = page.layer()
    weight, hessian = weight[:, : page.GROUP], hessian[: page.GROUP, : page.GROUP]
    solved = page.solve(weight, hessian, page.PLAIN)
    course = page.optimal_brain_surgeon(weight, hessian, page.PLAIN)
    assert (course.codes == solved.quantized.codes).float().mean() > 0.999
    error = weight - solved.quantized.decode()
    mean_energy = hessian.diagonal().mean()
    damped = hessian + page.PLAIN.damping * mean_energy * torch.eye(page.GROUP)
    torch.testing.assert_close(course.energy[:, -1].float(), page.output_energy(error, damped), rtol=1e-2, atol=0)
    other = page.solve(weight, hessian, replace(page.PLAIN, act_order="static"))
    assert (course.codes == other.quantized.codes).float().mean() < 0.9


def test_each_step_of_the_solver_page_leaves_less_than_the_one_before(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    losses = list(import_module("solver").relative_losses(3).values())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 50
