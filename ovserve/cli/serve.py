"""`ovserve serve`: settings from the command line, the environment and a file; then the server."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ovserve import __version__
from ovserve.cli.arguments import ArgumentParser, report_error
from ovserve.cli.commands import ExitCode
from ovserve.cli.export import export
from ovserve.cli.modelserver import read_command_line
from ovserve.errors import ModelsFailed, StartupError
from ovserve.hub.environment import SECRETS
from ovserve.logs import configure_logs, fields
from ovserve.server import Server
from ovserve.settings.options import ModelSettings, Settings, options_of
from ovserve.settings.sources import ENVIRONMENT_PREFIX, load_settings, service_variables

__all__ = ["parse_arguments", "run"]

log = logging.getLogger(__name__)

_DESCRIPTION = """Start the server: OpenAI's images API over OpenVINO GenAI. Without options it serves the built-in
model on http://127.0.0.1:8000. An option can be written with underscores or hyphens, as an environment variable
(OVSERVE_PORT for --port), or as a line in the TOML file that --config names. Several models are [[model]] tables in
that file."""


def _parser(command: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(command, description)
    parser.add_argument("--version", action="version", version=f"ovserve {__version__}")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with options and [[model]] tables.")
    for title, table in (("server", Settings), ("the model", ModelSettings)):
        group = parser.add_argument_group(title)
        for name, (entry, option) in options_of(table).items():
            unit = f" ({option.unit})" if option.unit else ""
            choices = f" One of {', '.join(option.choices)}." if option.choices else ""
            default = "" if entry.default in (None, "") else f" Default: {entry.default}."
            text = f"{option.text}{choices}{default}{unit}".replace("%", "%%")
            flags = [f"--{each}" for each in (name, *option.aliases)]
            group.add_argument(*flags, dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=text)
    return parser


def parse_arguments(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    command: str = "serve",
    description: str = _DESCRIPTION,
) -> Settings:
    """Return the settings. A wrong flag ends the process with `ExitCode.USAGE`.

    Args:
        arguments: the command line, without the program and the command.
        environment: variables that may hold options.
        command: the subcommand, for its help.
        description: the text of its help.

    Raises:
        SettingsError: an option, a variable or the file is wrong.
    """
    line = read_command_line(arguments)
    flags = _parser(command, description).parse(line.arguments)
    config = _config_of(flags, environment)
    values = {name: str(value) for name, value in flags.items() if name != "config"}
    settings = load_settings(values, environment, config)
    return dataclasses.replace(settings, ignored=(*line.ignored, *settings.ignored))


def _config_of(flags: Mapping[str, object], environment: Mapping[str, str]) -> Path | None:
    """Return the configuration file that the flags or the environment name."""
    named = flags.get("config") or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    return Path(str(named)) if named else None


def _take_environment() -> dict[str, str]:
    """Return a copy of the environment, and remove the secrets from the original and from `sys.argv`.

    Every spawned process inherits the environment, and multiprocessing sends it `sys.argv`. Workers decode untrusted
    files, so they must not have the API keys.
    """
    environment = dict(os.environ)
    secrets = {name for name, (entry, _) in options_of(Settings).items() if not entry.repr}
    for variable in environment:  # in every spelling that names the option
        if variable.startswith(ENVIRONMENT_PREFIX) and variable.removeprefix(ENVIRONMENT_PREFIX).lower() in secrets:
            os.environ.pop(variable, None)
    for variable in SECRETS:  # of the hub; only its own process gets them
        os.environ.pop(variable, None)
    is_value = False
    for index, argument in enumerate(sys.argv):
        name, equals, _ = argument.removeprefix("--").replace("-", "_").partition("=")
        is_flag = argument.startswith("--") and name in secrets
        if is_value or (is_flag and equals):
            sys.argv[index] = "(hidden)"
        is_value = is_flag and not equals
    return environment


def run(arguments: Sequence[str]) -> int:
    """Run the server until a signal stops it; return the exit code."""
    mode = read_command_line(arguments).mode
    if mode != "serve":
        return export(mode, arguments, parse_arguments)
    try:
        environment = _take_environment()
        settings = parse_arguments(arguments, environment)
        configure_logs(settings.log_level, settings.log_format)
        log_ignored(settings)
        if foreign := service_variables(environment):
            log.info(
                "ignored environment variables that Kubernetes sets for a Service",
                extra=fields(ignored=", ".join(foreign)),
            )
        try:
            line = read_command_line(arguments).arguments
            config = _config_of(_parser("serve", _DESCRIPTION).parse(line), environment)
            server = Server(settings, lambda: parse_arguments(arguments, environment), config, environment)
        except (OSError, MemoryError) as error:
            log.debug("cannot start", exc_info=True)
            return _end(report_error(f"cannot start: {str(error) or type(error).__name__}", ExitCode.TRANSIENT))
        return _end(server.run())
    except StartupError as error:
        return _end(report_error(str(error), _exit_code(error)))


def log_ignored(settings: Settings) -> None:
    """Log once what a reference server's files and flags say that has no meaning here."""
    if settings.ignored:
        log.warning("without effect: %s", "; ".join(settings.ignored))


def _exit_code(error: StartupError) -> ExitCode:
    if isinstance(error, ModelsFailed):
        return ExitCode.MODELS_FAILED
    return ExitCode.TRANSIENT if error.is_transient else ExitCode.USAGE


def _end(code: int) -> int:
    """Return the exit code. If a worker survived SIGKILL, end the process here.

    A normal exit would wait for it without a timeout: multiprocessing joins every child.
    """
    if left := multiprocessing.active_children():
        log.error(
            "exiting while workers that survived SIGKILL still run",
            extra=fields(workers=", ".join(each.name for each in left)),
        )
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code
