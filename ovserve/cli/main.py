"""The command line and the environment to settings; exit codes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ovserve import __version__
from ovserve.errors import StartupError
from ovserve.logs import configure_logs, fields
from ovserve.server import Server
from ovserve.settings.options import ModelSettings, Option, Settings, options_of
from ovserve.settings.sources import ENVIRONMENT_PREFIX, load_settings, service_variables

__all__ = ["EXIT_OK", "EXIT_STARTUP", "main", "parse_arguments"]

EXIT_OK = 0
EXIT_STARTUP = 2  # the process could not start; one line on standard error says why

log = logging.getLogger(__name__)

_DESCRIPTION = """An image-edit server: OpenAI's images API over OpenVINO GenAI. Without options it serves the built-in model on
http://127.0.0.1:8000. Every option can also be written with hyphens, stand in the environment as OVSERVE_NAME, or in the
TOML file that --config names; several models are [[model]] tables in that file."""


def _spellings(name: str, option: Option) -> list[str]:
    names = (name, *option.aliases)
    return list(dict.fromkeys(f"--{spelled}" for each in names for spelled in (each, each.replace("_", "-"))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ovserve", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ovserve {__version__}")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with options and [[model]] tables.")
    # Options of the one model are only known by their long names here: --name would not say whose.
    for title, table in (("server", Settings), ("the model", ModelSettings)):
        group = parser.add_argument_group(title)
        for name, (entry, option) in options_of(table).items():
            unit = f" ({option.unit})" if option.unit else ""
            choices = f" One of {', '.join(option.choices)}." if option.choices else ""
            default = "" if entry.default in (None, "") else f" Default: {entry.default}."
            text = f"{option.text}{choices}{default}{unit}".replace("%", "%%")
            group.add_argument(
                *_spellings(name, option), dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=text
            )
    return parser


def parse_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Make the settings. Raises SettingsError; argparse itself ends the process on a misspelt flag, with code 2."""
    flags = vars(_parser().parse_args(arguments))
    config = flags.pop("config", None) or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG") or None
    return load_settings(flags, environment, Path(config) if config else None)


def _open_standard_streams() -> None:
    """Open those of 0, 1 and 2 that are closed on /dev/null.

    The interpreter has no `sys.stdout` then, faulthandler no stderr in any worker, and the next file or socket would get the number.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open(2) takes the lowest free number
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - it lives as long as the process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; the process's exit code."""
    _open_standard_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        settings = parse_arguments(arguments, os.environ)
        configure_logs(settings.log_level, settings.log_format)
        if foreign := service_variables(os.environ):
            log.info("variables of a Kubernetes Service are no options", extra=fields(ignored=", ".join(foreign)))
        return _end(Server(settings, lambda: parse_arguments(arguments, os.environ)).run())
    except StartupError as error:
        with contextlib.suppress(OSError):  # the exit code tells it too
            print(f"ovserve: {error}", file=sys.stderr)
        return _end(EXIT_STARTUP)


def _end(code: int) -> int:
    """The exit code. Where a worker has outlived SIGKILL the process ends here: multiprocessing joins every child at exit, for good."""
    if left := multiprocessing.active_children():
        log.error("ending without workers that do not end", extra=fields(workers=", ".join(each.name for each in left)))
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code
