"""`ovserve generate`: make a picture from a prompt, with a running server."""

from __future__ import annotations

from collections.abc import Sequence

from ovserve.cli.arguments import ArgumentParser, usage_error
from ovserve.cli.pictures import add_options, run_pictures

__all__ = ["run"]

_DESCRIPTION = """Make a picture from a prompt, with a running server. Writes generated.png unless -o says otherwise."""


def run(arguments: Sequence[str]) -> int:
    """Generate pictures; return the exit code."""
    parser = ArgumentParser("generate", _DESCRIPTION)
    parser.usage = "ovserve generate -p PROMPT [options]"
    parser.add_argument("-p", "--prompt", default="", metavar="TEXT", help="what the picture should show")
    add_options(parser)
    values = parser.parse(arguments)
    if not values["prompt"]:
        usage_error("generate: say what the picture should show with -p PROMPT")
    return run_pictures("generations", values, {"prompt": str(values["prompt"])})
