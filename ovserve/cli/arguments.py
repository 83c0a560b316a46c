"""Argument parsers whose errors take one line and name the nearest known flag."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ovserve.cli.commands import ExitCode, overview

__all__ = ["ArgumentParser", "nearest", "report_error", "usage_error"]

_SHOWN_CHARS = 100  # of a wrong argument in a message


def usage_error(message: str) -> NoReturn:
    """Print one line to standard error and end the process with `ExitCode.USAGE`."""
    print(f"ovserve: {message}", file=sys.stderr)
    raise SystemExit(ExitCode.USAGE)


def report_error(message: str, code: ExitCode) -> ExitCode:
    """Print one line to standard error, if it can be written, and return the exit code."""
    with contextlib.suppress(OSError):  # the exit code reports it as well
        print(f"ovserve: {message}", file=sys.stderr)
    return code


def nearest(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean X?" for the known word closest to a wrong one; empty where none is close."""
    found = difflib.get_close_matches(word[:_SHOWN_CHARS], known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations, whose errors take one line."""

    def __init__(self, command: str, description: str) -> None:
        """Make the parser of one subcommand; its help ends with the table of commands and exit codes."""
        super().__init__(
            prog=f"ovserve {command}",
            usage=f"ovserve {command} [options]",
            description=description,
            epilog=overview(),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse(self, arguments: Sequence[str]) -> dict[str, object]:
        """Return the values by name. A wrong command line ends the process: one line, `ExitCode.USAGE`.

        Option names may have hyphens in place of underscores.
        """
        values, unknown = self.parse_known_args([_with_underscores(each) for each in arguments])
        if unknown:
            word = unknown[0].partition("=")[0][:_SHOWN_CHARS]
            if word.startswith("-"):
                self.error(f"unknown option {word}{nearest(word, list(self._option_string_actions))}")
            self.error(f"unexpected argument {word!r}")
        return vars(values)

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and end the process with `ExitCode.USAGE`."""
        # argparse names all spellings of an option: `argument --port/--rest_port: expected one argument`.
        subject, colon, problem = message.removeprefix("argument ").partition(": ")
        if colon and subject.startswith("-"):
            message = f"{subject.partition('/')[0]}: {problem.replace('expected one argument', 'expected a value')}"
        usage_error(message)
