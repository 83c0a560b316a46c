"""`ovserve key add NAME`: add a named API key with limits to a file, and print the key once."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from ovserve.cli.arguments import ArgumentParser, report_error
from ovserve.cli.commands import ExitCode
from ovserve.errors import SettingsError
from ovserve.front.keys import KEY_NAME, read_named_keys
from ovserve.grants import MAX_PER_MINUTE

__all__ = ["run"]

_DESCRIPTION = """Add a named API key to a file for the option `named_keys_file`. The key is printed once; the file
holds its SHA-256. A running server reads the file again on SIGHUP."""
_LIMITS = ("requests_per_minute", "pictures_per_minute", "concurrent")


def run(arguments: Sequence[str]) -> int:
    """Add the key; return the exit code."""
    parser = ArgumentParser("key", _DESCRIPTION)
    parser.add_argument("action", choices=("add",))
    parser.add_argument("name", metavar="NAME", help="1 to 64 letters, digits and ._-")
    parser.add_argument("--file", type=Path, required=True, metavar="FILE", help="the file; it is made if missing")
    for limit in _LIMITS:
        parser.add_argument(f"--{limit}", type=int, metavar="N", help=f"1 to {MAX_PER_MINUTE}; none: no limit")
    parser.add_argument("--models", metavar="NAMES", help="models that it may use, separated by commas; none: all")
    parser.add_argument("--admin", action="store_true", help="also valid for the admin routes")
    parser.add_argument("--expires", type=dt.date.fromisoformat, metavar="DATE", help="a day, such as 2027-06-30")
    values = parser.parse(arguments)
    name, path = str(values["name"]), Path(str(values["file"]))
    if not KEY_NAME.fullmatch(name):
        return report_error(f"name {name[:100]!r}: expected 1 to 64 letters, digits and ._-", ExitCode.USAGE)
    key = f"sk-{secrets.token_urlsafe(32)}"
    lines = ["[[key]]", f'name = "{name}"', f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    lines += [f"{limit} = {values[limit]}" for limit in _LIMITS if values[limit] is not None]
    if values["models"]:
        lines.append(f"models = {json.dumps([model.strip() for model in str(values['models']).split(',')])}")
    if values["admin"]:
        lines.append("admin = true")
    if values["expires"]:
        lines.append(f"expires = {values['expires']}")
    try:
        _add(path, "\n".join(lines) + "\n")
    except SettingsError as error:
        return report_error(str(error), ExitCode.USAGE)
    except (OSError, UnicodeDecodeError) as error:
        return report_error(f"{path}: {error}", ExitCode.USAGE)
    print(key)
    return ExitCode.OK


def _add(path: Path, table: str) -> None:
    """Write the file with one more table, which only its owner can read; it replaces the old one at once.

    Raises:
        SettingsError: the result is wrong, such as a name that is given twice; the file stays as it was.
        OSError: the file cannot be written.
    """
    old = path.read_text("utf-8") if path.exists() else ""
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            if old:
                status = path.stat()
                os.fchmod(stream.fileno(), status.st_mode & 0o777)
                if os.geteuid() == 0:
                    os.fchown(stream.fileno(), status.st_uid, status.st_gid)
            stream.write(f"{old.rstrip()}\n\n{table}" if old.strip() else table)
        read_named_keys(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
