"""The `ovserve` command: choose the subcommand and run it.

An argument list that does not begin with a subcommand's name belongs to the default one: `python -m ovserve --port
9000` is `ovserve serve --port 9000`.

A subcommand's module is imported when it runs, and not before: a process that the console script spawns as a worker
imports this module again, and must not load the front end with it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from ovserve.cli.arguments import nearest, usage_error
from ovserve.cli.commands import COMMANDS, DEFAULT_COMMAND

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code of the process."""
    _open_standard_streams()
    # Workers begin as `python -c`, which would import multiprocessing itself from the current directory first.
    os.environ["PYTHONSAFEPATH"] = "1"
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = DEFAULT_COMMAND, arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
        if name not in COMMANDS:
            usage_error(f"unknown command {name[:100]!r}{nearest(name, list(COMMANDS))}")
    run = importlib.import_module(f"ovserve.cli.{name.replace('-', '_')}").run
    try:
        return int(run(rest))
    finally:
        _flush_standard_streams()


def _flush_standard_streams() -> None:
    """Flush standard output and standard error, and discard what cannot be written.

    The interpreter flushes them at exit, and would turn the exit code into 120 if that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _open_standard_streams() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed, on /dev/null.

    Otherwise `sys.stdout` would be None, faulthandler would have no stderr in a worker, and the next file or socket
    would get the number.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open(2) returns the lowest free number
            with contextlib.suppress(OSError):
                os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - open until the process ends
