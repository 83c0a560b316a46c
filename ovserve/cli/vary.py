"""`ovserve vary`: make variations of pictures, with a running server."""

from __future__ import annotations

from collections.abc import Sequence

from ovserve.cli.arguments import ArgumentParser, usage_error
from ovserve.cli.pictures import add_options, run_pictures

__all__ = ["run"]

_DESCRIPTION = """Make variations of pictures without a prompt, with a running server. Writes NAME-varied.png beside
each picture unless -o says otherwise."""


def run(arguments: Sequence[str]) -> int:
    """Vary the pictures; return the exit code."""
    parser = ArgumentParser("vary", _DESCRIPTION)
    parser.usage = "ovserve vary PICTURE... [options]"
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files or glob patterns; -: standard input")
    parser.add_argument("--strength", default="", metavar="X", help="how much may change, 0 to 1")
    add_options(parser)
    values = parser.parse(arguments)
    pictures = values["pictures"]
    if not isinstance(pictures, list) or not pictures:
        usage_error("vary: name a picture")
    return run_pictures("variations", values, {"strength": str(values["strength"])}, inputs=tuple(map(str, pictures)))
