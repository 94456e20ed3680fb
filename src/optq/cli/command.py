# SPDX-License-Identifier: Apache-2.0
"""What a command is, and how one ends: an exit code, and for an error one line that says what to do."""

import argparse
import logging
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from optq import errors
from optq.config.counterparts import why_unknown
from optq.console import AroundBars

DONE, INTERNAL, USAGE, MODEL, QUALITY, RESOURCES, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

EXIT_CODES = {
    DONE: "done",
    INTERNAL: "a defect of optq or of a library: --debug shows where",
    USAGE: "the options or the data cannot be used as they are",
    MODEL: "the model or checkpoint cannot be found, read, quantized, or uploaded",
    QUALITY: "the result is not good enough: the quality gate, or what --fail-above asks for",
    RESOURCES: "the output folder, the disk or the memory do not suffice",
    INTERRUPTED: "interrupted; an export goes on where it was when it is called again",
}

BARS_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""What switches off bars, of the Hub, which transformers' and ours are as well, and of datasets."""

_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ConfigError, USAGE),
    (errors.CalibrationError, USAGE),
    (errors.KernelError, USAGE),
    (errors.ReportError, USAGE),
    (errors.QualityError, QUALITY),
    (errors.OutputError, RESOURCES),
    (errors.OptqError, MODEL),
    (MemoryError, RESOURCES),
    (OSError, MODEL),  # of transformers and huggingface_hub: no such model, no network, no access
    (KeyboardInterrupt, INTERRUPTED),
)
"""The first row that an exception is an instance of counts."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the command line.

    Args:
        examples: what may follow its name, for its help.
        add_arguments: declares its arguments.
        run: does it; returns the exit code.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments and those of every command to `parser`."""
        parser.description = textwrap.fill(self.summary, 80)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        self.add_arguments(parser)
        shared = parser.add_argument_group("output")
        shared.add_argument("--json", action="store_true", help="print JSON, for programs")
        shared.add_argument("--quiet", action="store_true", help="say nothing but results, warnings and errors")
        shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
        _read_options_leniently(parser)
        parser.epilog = "\n".join(
            [
                *["examples:"] * bool(self.examples),
                *(f"  %(prog)s {example}" for example in self.examples),
                *[""] * bool(self.examples),
                "exit codes:",
                *(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()),
            ]
        )


def command(
    name: str, summary: str, add_arguments: Callable[[argparse.ArgumentParser], None], *examples: str
) -> Callable[[Callable[[argparse.Namespace], int]], Command]:
    """Decorate the function that runs a command to make a `Command` of it."""
    return lambda run: Command(name=name, summary=summary, examples=examples, add_arguments=add_arguments, run=run)


def _read_options_leniently(parser: argparse.ArgumentParser) -> None:
    """Have the parser take underscores for hyphens, and say what is near an option that there is not.

    On the parser itself, which optimum-cli makes; no command has commands below it that could take what it leaves.
    """
    parse = parser.parse_known_args
    known = {flag[2:].replace("-", "_"): flag for flag in re.findall(r"--[a-z-]+", parser.format_help())}

    def with_hyphens(argument: str) -> str:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and name[2:] in known
        return f"{known[name[2:]]}{equals}{value}" if is_option else argument

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        found, rest = parse(list(map(with_hyphens, sys.argv[1:] if args is None else args)), namespace)
        for option in (part.partition("=")[0] for part in rest if re.match("--|-[a-z]", part)):
            parser.error(f"{option} was given; {why_unknown(option, known, 'option', known.__getitem__)}")
        return found, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def execute(command: Command, arguments: argparse.Namespace) -> int:
    """Run a command; returns its exit code, whatever happens."""
    _open_standard_streams()
    _log_to_stderr(quiet=arguments.quiet)
    if arguments.quiet:
        os.environ |= dict.fromkeys(BARS_OFF, "1")
    elif not sys.stderr.isatty():
        os.environ.setdefault(BARS_OFF[0], "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: hooks are taken off, files closed
    only_the_first_prints = redirect_stdout(None) if os.environ.get("RANK", "0") != "0" else nullcontext()
    try:
        with only_the_first_prints:
            return command.run(arguments)
    except BaseException as error:  # whatever it is, the user gets a line, and the shell a code
        if isinstance(error, SystemExit):
            raise
        if arguments.debug:
            traceback.print_exc()
        with suppress(OSError):  # the code tells it, too
            print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return exit_code_of(error)


def _open_standard_streams() -> None:
    """Where a daemon was started without them, nothing is read and written; else the next file would get their place,
    and all that libraries in C say."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def exit_code_of(error: BaseException) -> int:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return RESOURCES
    return next((code for kind, code in _CODES if isinstance(error, kind)), INTERNAL)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. The same command goes on where it was, if it was an export."
    words = errors.shortened(" ".join(str(error).split()))  # of other libraries' errors, too
    if exit_code_of(error) != INTERNAL:
        return words or type(error).__name__
    return f"{type(error).__name__}: {words} (a defect of optq or of a library; --debug shows where)"


def _log_to_stderr(quiet: bool) -> None:
    """Log lines without a prefix, written around the progress bars."""
    logger = logging.getLogger("optq")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    logger.handlers = [AroundBars()]
