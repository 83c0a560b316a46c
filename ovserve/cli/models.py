"""`ovserve models`: show the models of a running server, load or unload one."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from ovserve.cli.arguments import ArgumentParser, report_error, usage_error
from ovserve.cli.commands import ExitCode
from ovserve.client.requests import DEFAULT_URL

__all__ = ["run"]

_DESCRIPTION = """Show the models of a running server: state, memory, jobs. With --load or --unload, load a model or
unload it when its running jobs have ended; that needs an admin key, or the address of the admin listener as --url.
Keys are read from the variables OVSERVE_ADMIN_KEY and OVSERVE_API_KEY."""
_TIMEOUT_S = 30.0
_MAX_REPLY_BYTES = 16 << 20
_MIB = 1 << 20


class _Refused(Exception):
    """The server has answered with an error, or could not be reached; the message is one line."""


def run(arguments: Sequence[str]) -> int:
    """Print the table, after the change that was asked for; return the exit code."""
    parser = ArgumentParser("models", _DESCRIPTION)
    parser.add_argument("--url", default="", metavar="URL", help=f"the server. Default: $OVSERVE_URL, {DEFAULT_URL}")
    parser.add_argument("--load", default="", metavar="NAME", help="load this model")
    parser.add_argument("--unload", default="", metavar="NAME", help="unload this model")
    parser.add_argument("--wait_s", type=float, default=600.0, metavar="S", help="for a load. Default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the server's document")
    values = parser.parse(arguments)
    url = str(values["url"] or os.environ.get("OVSERVE_URL") or DEFAULT_URL).rstrip("/")
    if urlsplit(url).scheme not in ("http", "https"):
        usage_error(f"--url={url[:100]}: expected http://HOST:PORT")
    try:
        for verb in ("load", "unload"):
            if name := values[verb]:
                _change(url, str(name), verb, float(str(values["wait_s"])))
        document = _fetch(f"{url}/v1/models")
    except _Refused as error:
        return report_error(str(error), ExitCode.TRANSIENT)
    print(json.dumps(document, indent=1) if values["json"] else "\n".join(_table(document)))
    return ExitCode.OK


def _change(url: str, name: str, verb: str, wait_s: float) -> None:
    path = f"/v1/models/{quote(name)}/{verb}?wait_s={min(wait_s, 3600):g}"
    _fetch(url + path, method="POST", timeout_s=wait_s + _TIMEOUT_S)


def _fetch(url: str, method: str = "GET", timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """Return the JSON document at a URL. Raises _Refused."""
    key = os.environ.get("OVSERVE_ADMIN_KEY" if method == "POST" else "OVSERVE_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310
            document = json.loads(reply.read(_MAX_REPLY_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            raise _Refused(f"{error.code}: {_message(error.read(_MAX_REPLY_BYTES)) or error.reason}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _Refused(f"no answer from {url}: {reason}") from None
    if not isinstance(document, dict):
        raise _Refused(f"{url} is no ovserve server")
    return document


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, LookupError):
        return ""


def _table(document: Mapping[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("MODEL", "STATE", "DEVICE", "MEMORY", "WORKERS", "RUNNING", "QUEUED", "")]
    rows += [_row(each) for each in document.get("data", []) if "alias_of" not in each]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    used, expected = model.get("memory_bytes", 0), model.get("expected_worker_bytes", 0)
    memory = f"{used // _MIB} MiB" if used else f"({expected // _MIB} MiB)" if expected else ""
    loading = model.get("loading") or {}
    note = str(model.get("waits_for") or (model.get("reason", "") if model.get("state") == "failed" else ""))
    if loading:
        percent = "" if loading.get("percent") is None else f"{loading['percent']} %, "
        note = f"{percent}{loading.get('seconds', 0):g} s"
    counts = (str(model.get(name, "")) for name in ("workers", "running", "queued"))
    return (str(model.get("id", "")), str(model.get("state", "")), str(model.get("device", "")), memory, *counts, note)
