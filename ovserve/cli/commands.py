"""The table of subcommands: names, what they do, exit codes. Each has a module of its name with a function `run`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Self

__all__ = ["COMMANDS", "DEFAULT_COMMAND", "Command", "ExitCode", "overview"]


class ExitCode(enum.IntEnum):
    """One exit code; `text` is its meaning, for `--help` and the reference page."""

    OK = 0, "The command did its work. A server was stopped by a signal and finished its jobs."
    ABORTED = 1, "A second signal ended the server at once, and jobs in flight were lost; or a bug."
    USAGE = 2, "Wrong command line or wrong configuration. Another start would end in the same way."
    NO_SERVER = 3, "No server answers at the URL, or the connection ended before the picture came."
    REFUSED = 4, "The server answered with an error, which is printed."
    MODELS_FAILED = (
        69,  # EX_UNAVAILABLE
        "No model can be loaded: device or driver missing, too little memory. The server ends at its start.",
    )
    TRANSIENT = (
        75,  # EX_TEMPFAIL of sysexits(3); systemd shows small numbers by the names of LSB scripts
        "The server cannot start because of a fault that may pass: port in use, model directory missing, disk full.",
    )
    CANCELLED = (
        130,
        "The user stopped the command with Ctrl-C; a server stops the job at the next step.",
    )  # 128 + SIGINT

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
        name: the word after `ovserve`, and, with underscores, the module in this package that holds `run(arguments) ->
            int`.
        text: what it does, one sentence for `--help` and the reference page.
        exit_codes: those that it can end with.
    """

    name: str
    text: str
    exit_codes: tuple[ExitCode, ...]


DEFAULT_COMMAND = "serve"
_PICTURE_CODES = (ExitCode.OK, ExitCode.USAGE, ExitCode.NO_SERVER, ExitCode.REFUSED, ExitCode.CANCELLED)
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "serve",
            "Start the server. The default.",
            (ExitCode.OK, ExitCode.ABORTED, ExitCode.USAGE, ExitCode.MODELS_FAILED, ExitCode.TRANSIENT),
        ),
        Command("edit", "Change pictures after a prompt, with a running server.", _PICTURE_CODES),
        Command("generate", "Make a picture from a prompt, with a running server.", _PICTURE_CODES),
        Command("vary", "Make variations of pictures, with a running server.", _PICTURE_CODES),
        Command(
            "check",
            "Read the configuration and the models' directories, start nothing, and print what `serve` would serve.",
            (ExitCode.OK, ExitCode.USAGE),
        ),
        Command(
            "models",
            "Show the models of a running server, load or unload one.",
            (ExitCode.OK, ExitCode.USAGE, ExitCode.TRANSIENT),
        ),
        Command(
            "bench",
            "Measure a running server: pictures per second and the time of a request.",
            (ExitCode.OK, ExitCode.USAGE, ExitCode.NO_SERVER, ExitCode.REFUSED),
        ),
        Command(
            "key",
            "Add a named API key with limits to a file, and print the key once.",
            (ExitCode.OK, ExitCode.USAGE),
        ),
        Command(
            "doctor",
            "Check this machine and say what to do about each problem.",
            (ExitCode.OK, ExitCode.USAGE, ExitCode.MODELS_FAILED),
        ),
        Command(
            "devices",
            "Show the devices that OpenVINO sees, with their memory.",
            (ExitCode.OK, ExitCode.USAGE, ExitCode.MODELS_FAILED),
        ),
        Command(
            "tune",
            "Measure plans of a model (precision, quantisation groups, tiles), and store the fastest one.",
            (ExitCode.OK, ExitCode.USAGE, ExitCode.MODELS_FAILED, ExitCode.CANCELLED),
        ),
        Command(
            "import-ovms",
            "Print the TOML that says the same as a repository of OpenVINO Model Server.",
            (ExitCode.OK, ExitCode.USAGE),
        ),
        Command(
            "completion",
            "Print a script that completes commands and options in bash, zsh or fish.",
            (ExitCode.OK, ExitCode.USAGE),
        ),
        Command(
            "pull",
            "Download a model or an adapter from a hub, and convert the model if necessary.",
            (ExitCode.OK, ExitCode.USAGE, ExitCode.MODELS_FAILED, ExitCode.TRANSIENT, ExitCode.CANCELLED),
        ),
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
