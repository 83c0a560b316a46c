"""`ovserve pull`: download a model or an adapter from a hub, and convert the model if it is no OpenVINO export."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from ovserve.cli.arguments import ArgumentParser, usage_error
from ovserve.cli.commands import ExitCode
from ovserve.errors import StartupError
from ovserve.hub.client import HubClient
from ovserve.hub.convert import WEIGHT_FORMATS, check_arguments
from ovserve.hub.environment import endpoint_of, is_offline, token_of
from ovserve.hub.listing import check_path, check_repository, check_revision
from ovserve.hub.progress import BarReporter, JsonReporter, QuietReporter, Reporter
from ovserve.hub.pull import Puller, PullRequest
from ovserve.hub.stored import Place
from ovserve.hub.transfer import Stopped
from ovserve.settings.repositories import default_root

__all__ = ["parse_requests", "pull_all", "reporter_for", "run"]

_DESCRIPTION = """Download a model from a hub into the directory of pulled models, to be served with --source_model or
--model_path. Only the files that the server reads are downloaded. A pull that was interrupted continues where it ended.
A repository that is no OpenVINO export is converted with optimum-cli, in an environment that uv makes when it is first
needed. Variables: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, https_proxy, no_proxy."""
MAX_CONNECTIONS = 16
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a pull
ROOT_VARIABLES = ("OVSERVE_MODEL_REPOSITORY_PATH", "OVMS_MODEL_REPOSITORY_PATH")


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pull", _DESCRIPTION)
    parser.usage = "ovserve pull REPO [options]"
    parser.add_argument("repo", nargs="?", default="", help="repository of a model: OWNER/NAME")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model. Default: main.")
    parser.add_argument(
        "--weight_format", default="", choices=("", *WEIGHT_FORMATS), help="weights of a conversion. Default: int8."
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="REPO[@FILE]",
        help="also, or only, an adapter (safetensors); can be repeated",
    )
    parser.add_argument("--model_repository_path", default="", metavar="DIR", help="directory of pulled models")
    parser.add_argument("--connections", type=int, default=4, help="files received at once, 1 to 16. Default: 4.")
    parser.add_argument("--offline", action="store_true", help="use only what is on disk")
    parser.add_argument(
        "--overwrite_models", action="store_true", help="replace a directory that was not made by a pull"
    )
    parser.add_argument(
        "--no_memory_check", action="store_true", help="pull a model that does not fit into this machine's memory too"
    )
    parser.add_argument("--no_conversion", action="store_true", help="refuse a model that must be converted")
    parser.add_argument(
        "--extra_quantization_params", default="", metavar="TEXT", help="further arguments for optimum-cli"
    )
    parser.add_argument(
        "--tune", action="store_true", help="then measure the model's plans as `ovserve tune --write` does"
    )
    parser.add_argument("--json", action="store_true", help="write each event as a JSON object on a line of stdout")
    return parser


def parse_requests(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[PullRequest], bool]:
    """Return what to pull, and whether to report as JSON. A wrong command line ends the process."""
    values = _parser().parse(arguments)
    if not values["repo"] and not values["lora"]:
        usage_error("pull: name a repository, OWNER/NAME")
    connections = values["connections"]
    if not isinstance(connections, int) or not 1 <= connections <= MAX_CONNECTIONS:
        usage_error(f"--connections={connections}: expected 1 to {MAX_CONNECTIONS}")
    try:
        extra = tuple(shlex.split(str(values["extra_quantization_params"])))
        check_arguments(extra)
    except ValueError as error:
        usage_error(f"--extra_quantization_params: {error}")
    named = values["model_repository_path"] or next((environment[n] for n in ROOT_VARIABLES if environment.get(n)), "")

    def request(name: str, revision: str, adapter: str | None) -> PullRequest:
        """Return the request for one repository: a model's, or an adapter's."""
        return PullRequest(
            repository=_checked("repository", name, check_repository),
            root=Path(str(named)).absolute() if named else default_root(),
            revision=_checked("--revision", revision, check_revision),
            adapter=adapter,
            weight_format=str(values["weight_format"]) if adapter is None else "",
            connections=connections,
            is_offline=bool(values["offline"]) or is_offline(environment),
            replaces=bool(values["overwrite_models"]),
            converts=not values["no_conversion"],
            checks_memory=not values["no_memory_check"],
            arguments=extra,
        )

    requests = [request(str(values["repo"]), str(values["revision"]), None)] if values["repo"] else []
    loras = values["lora"]
    for text in loras if isinstance(loras, list) else []:
        name, at, file = str(text).partition("@")
        if at:
            _checked("--lora", file, check_path)
        requests.append(request(name, "main", file))
    return requests, bool(values["json"])


def _checked(what: str, value: str, check: object) -> str:
    try:
        return str(check(value))  # type: ignore[operator]
    except ValueError as error:
        usage_error(f"{what} {value[:100]!r}: {error}")


def run(arguments: Sequence[str]) -> int:
    """Pull what the arguments name; return the exit code."""
    requests, is_json = parse_requests(arguments, os.environ)
    is_tuned = bool(_parser().parse(arguments)["tune"])
    if is_tuned and (is_json or requests[0].adapter is not None):
        usage_error("--tune: measures a model and prints a table; it needs a model's repository, without --json")
    code = pull_all(requests, reporter_for(is_json=is_json), os.environ)
    if code != ExitCode.OK or not is_tuned:
        return code
    from ovserve.cli.tune import run as tune  # noqa: PLC0415 - a pull needs no engine

    return tune([str(Place(requests[0].root, requests[0].repository).directory), "--write"])


def reporter_for(*, is_json: bool) -> Reporter:
    """Return what shows the progress: JSON lines, a bar on a terminal, or a line for each event."""
    if is_json:
        return JsonReporter()
    return BarReporter() if sys.stderr.isatty() else QuietReporter()


def pull_all(requests: Sequence[PullRequest], reporter: Reporter, environment: Mapping[str, str]) -> ExitCode:
    """Pull one after the other; return the exit code. SIGINT, SIGTERM and SIGHUP end the pull; the next one continues.

    Runs in: the main thread.
    """
    stop, handlers = threading.Event(), {number: signal.getsignal(number) for number in _ENDING}
    try:
        client = HubClient(endpoint_of(environment), token_of(environment))

        def end(_: int, __: FrameType | None) -> None:
            stop.set()
            client.stop()  # what this thread waits for

        for number in _ENDING:
            signal.signal(number, end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # a server blocks them
        for request in requests:
            found = Puller(client, request, reporter, stop).run()
            if not isinstance(reporter, JsonReporter):
                print(found)
    except Stopped:
        reporter.event("error", "interrupted; the same command continues the pull", is_transient=True)
        return ExitCode.TRANSIENT
    except BrokenPipeError:  # the reader of the events has closed the pipe
        return ExitCode.TRANSIENT
    except (StartupError, OSError) as error:
        is_transient = error.is_transient if isinstance(error, StartupError) else True
        reporter.event("error", f"ovserve: {error}", is_transient=is_transient)
        return ExitCode.TRANSIENT if is_transient else ExitCode.USAGE
    finally:
        for number, handler in handlers.items():  # what follows a pull is ended by them too
            signal.signal(number, handler)
    return ExitCode.OK
