"""The table of subcommands: names, what they do, exit codes. Each has a module of its name with a function `run`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Self

__all__ = ["COMMANDS", "DEFAULT_COMMAND", "Command", "ExitCode", "overview"]


class ExitCode(enum.IntEnum):
    """One exit code; `text` is its meaning, for `--help` and the reference page."""

    OK = 0, "The command did its work. A server was stopped by a signal and finished its jobs."
    ABORTED = 1, "A second signal ended the server at once. Jobs in flight were lost."
    USAGE = 2, "Wrong command line, wrong configuration, or a server that cannot start. Standard error has one line."

    text: str

    def __new__(cls, value: int, text: str) -> Self:
        """Make a member whose value is the number."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        name: the word after `ovserve`, and the module in this package that holds `run(arguments) -> int`.
        text: what it does, one sentence for `--help` and the reference page.
        exit_codes: those that it can end with.
    """

    name: str
    text: str
    exit_codes: tuple[ExitCode, ...]


DEFAULT_COMMAND = "serve"
COMMANDS = {
    command.name: command
    for command in (
        Command("serve", "Start the server. The default.", (ExitCode.OK, ExitCode.ABORTED, ExitCode.USAGE)),
    )
}


def overview() -> str:
    """Return the table as text, the last part of each `--help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "commands:",
        *(f"  {command.name:{width}}  {command.text}" for command in COMMANDS.values()),
        "",
        "exit codes:",
        *(f"  {code:d}  {code.text}" for code in ExitCode),
    ]
    return "\n".join(lines)
