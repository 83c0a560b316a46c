"""The options that `edit`, `generate` and `vary` share, and how their failures become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from ovserve.cli.arguments import ArgumentParser, report_error, usage_error
from ovserve.cli.commands import ExitCode
from ovserve.client.requests import DEFAULT_URL, PictureRequest, expand, run_requests
from ovserve.client.server import NoServer, Refused

__all__ = ["add_options", "run_pictures"]

# Options that are request fields: option, field, metavar, help.
_FIELDS = (
    ("--model", "model", "NAME", "the model. Default: the server's"),
    ("--negative_prompt", "negative_prompt", "TEXT", "what the picture should not show"),
    ("--size", "size", "WxH", "size of the result. Default: the picture's own"),
    ("--n", "n", "N", "number of pictures"),
    ("--seed", "seed", "N", "seed of the noise. Default: random"),
    ("--steps", "num_inference_steps", "N", "denoising steps"),
    ("--guidance", "guidance_scale", "X", "how closely the result follows the prompt"),
    ("--quality", "quality", "NAME", "low, medium or high"),
    ("--format", "output_format", "NAME", "png, jpeg or webp"),
)


def add_options(parser: ArgumentParser) -> None:
    """Add the options that all three commands have."""
    for option, _, metavar, text in _FIELDS:
        parser.add_argument(option, default="", metavar=metavar, help=text)
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=VALUE", help="any other field of the API; can be repeated"
    )
    parser.add_argument("-o", "--output", default=None, metavar="FILE", help="file or directory to write; -: stdout")
    parser.add_argument("--url", default="", metavar="URL", help=f"the server. Default: $OVSERVE_URL, {DEFAULT_URL}")
    parser.add_argument("--builtin", action="store_true", help="start a server with the built-in model for this call")
    parser.add_argument("--no_show", action="store_true", help="show no picture in the terminal")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each picture")


def run_pictures(
    endpoint: str,
    values: Mapping[str, Any],
    fields: Mapping[str, str],
    *,
    inputs: tuple[str, ...] = (),
    mask: str | None = None,
    box: tuple[int, int, int, int] | None = None,
) -> int:
    """Run one command with the values of `add_options`; return the exit code."""
    sent = {name: str(values[option[2:]]) for option, name, _, _ in _FIELDS if values[option[2:]] != ""}
    for pair in values["field"]:
        name, equals, value = str(pair).partition("=")
        if not equals or not name:
            usage_error(f"--field {pair[:100]!r}: expected NAME=VALUE")
        sent[name] = value
    url = "" if values["builtin"] else str(values["url"] or os.environ.get("OVSERVE_URL") or DEFAULT_URL)
    try:
        run_requests(
            PictureRequest(
                endpoint,
                expand(inputs),
                {**sent, **{name: value for name, value in fields.items() if value}},
                mask=mask,
                box=box,
                output=values["output"],
                url=url,
                key=os.environ.get("OVSERVE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "",
                is_json=bool(values["json"]),
                shows=not values["no_show"],
            )
        )
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print("Cancelled.", file=sys.stderr)
        return ExitCode.CANCELLED
    except NoServer as error:
        hint = "" if values["builtin"] else "; start one with `ovserve serve`, or use --builtin"
        return report_error(f"{error}{hint}", ExitCode.NO_SERVER)
    except Refused as error:
        field = f"{error.param}: " if error.param and error.param not in str(error) else ""
        hint = "; set OVSERVE_API_KEY" if error.status == 401 else ""
        return report_error(f"{field}{error}{hint}", ExitCode.REFUSED)
    except (ValueError, OSError) as error:
        return report_error(str(error), ExitCode.USAGE)
    return ExitCode.OK
