"""API keys and admin keys: read from the configuration, and looked up for requests."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import logging
import math
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovserve.errors import SettingsError, Unauthorized, may_pass
from ovserve.front.request import Request
from ovserve.grants import MAX_PER_MINUTE, Grant, KeyLimits
from ovserve.logs import fields
from ovserve.settings.options import Settings

__all__ = ["KEY_NAME", "Keys", "NamedKey", "read_admin_keys", "read_keys", "read_named_keys"]

MAX_KEYS_BYTES = 1024 * 1024  # of the file
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]{1,512}")  # characters that a field value can carry unquoted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A key of `named_keys_file`: its SHA-256, what it may do, and until when (seconds since 1970)."""

    digest: bytes
    grant: Grant
    is_admin: bool = False
    expires_at: float = math.inf

    def is_expired(self) -> bool:
        """Return whether the key is no longer valid."""
        return time.time() >= self.expires_at


class Keys:
    """The configured API keys. Without any, requests need no key. Thread-safe: immutable.

    Keys are found by their SHA-256, so a check costs the same for one key and for thousands. The time of a lookup shows
    no part of a key: a client that does not know the key cannot choose the digest that is looked up.
    """

    def __init__(self, keys: Iterable[str] = (), named: Iterable[NamedKey] = ()) -> None:
        self._digests = frozenset(_digest(key) for key in keys)
        self._named = {each.digest: each for each in named}

    def __len__(self) -> int:
        return len(self._digests) + len(self._named)

    def check(self, request: Request, *, is_open: bool) -> None:
        """Check the API key of a request, and set `request.is_verified` if it is a configured one.

        Args:
            request: the request to check.
            is_open: whether its route needs no key.

        Raises:
            Unauthorized: the request needs a key, and has none or an unknown one.
        """
        if not len(self) or is_open:
            return
        if not request.api_key:
            raise Unauthorized(
                "You didn't provide an API key. Send it in an Authorization field, as in `Authorization: Bearer KEY`,"
                " or in api-key."
            )
        if not self.matches(request.api_key):
            named = self._find(request.api_key)
            if named is None:
                raise Unauthorized("Incorrect API key provided.")
            if named.is_expired():
                raise Unauthorized(f"The API key {named.grant.name!r} has expired.")
            request.grant = named.grant
        request.is_verified = True

    def is_admin(self, key: str) -> bool:
        """Return whether a key is a named one for operators."""
        named = self._find(key)
        return named is not None and named.is_admin and not named.is_expired()

    def _find(self, key: str) -> NamedKey | None:
        """Return the named key, or None."""
        return self._named.get(_digest(key)) if self._named else None

    def matches(self, key: str) -> bool:
        """Return whether a key is a configured one."""
        return bool(self._digests) and _digest(key) in self._digests


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1")).digest()


def read_keys(settings: Settings) -> Keys:
    """Return the keys of `api_key`, `api_key_file` and `named_keys_file`. Raises SettingsError, which quotes no key."""
    keys = _read("api_key", settings.api_key, settings.api_key_file)
    return Keys(keys, read_named_keys(settings.named_keys_file) if settings.named_keys_file else ())


def read_admin_keys(settings: Settings) -> Keys:
    """Return the keys of `admin_key` and `admin_key_file`. Raises SettingsError, whose message never quotes a key."""
    return Keys(_read("admin_key", settings.admin_key, settings.admin_key_file))


def _read(name: str, key: str, path: Path | None) -> list[str]:
    keys = []
    if key:
        if not _KEY.fullmatch(key):
            raise SettingsError(f"{name}: expected up to 512 printable ASCII characters without blanks")
        keys.append(key)
    if path:
        keys += _read_file(f"{name}_file", path)
    return keys


_grants: dict[str, Grant] = {}  # by the key's name: what a key has used stays counted when the file is read again


def read_named_keys(path: Path) -> list[NamedKey]:
    """Return the keys of a file with `[[key]]` tables. Raises SettingsError."""
    option = "named_keys_file"
    data, mode = _read_bytes(option, path)
    try:
        tables = tomllib.loads(data.decode("utf-8")).get("key", [])
    except ValueError as error:
        raise SettingsError(f"{option} {path}: {error}") from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{option} {path}: write each key as a [[key]] table")
    found: dict[str, NamedKey] = {}
    names: dict[bytes, str] = {}
    for number, table in enumerate(tables, 1):
        named = _named_key(f"{option} {path}, key {number}", table)
        name = named.grant.name
        if name in found:
            raise SettingsError(f"{option} {path}, key {number}: the name {name!r} is given twice")
        if other := names.get(named.digest):
            raise SettingsError(f"{option} {path}, key {number} ({name}): sha256 is that of the key {other!r}")
        found[name], names[named.digest] = named, name
    if not found:
        raise SettingsError(f"{option} {path}: no key found; `ovserve key add NAME` writes one")
    for named in found.values():
        known = _grants.setdefault(named.grant.name, named.grant)
        known.limits = named.grant.limits
    for name in _grants.keys() - found.keys():
        del _grants[name]
    _warn_if_public(option, path, mode)
    return [dataclasses.replace(named, grant=_grants[name]) for name, named in found.items()]


def _named_key(where: str, table: dict[str, Any]) -> NamedKey:
    """Return one key from its table. Raises SettingsError."""
    kinds: dict[str, Any] = {
        "name": str,
        "sha256": str,
        "requests_per_minute": int,
        "pictures_per_minute": int,
        "concurrent": int,
        "models": list,
        "admin": bool,
        "expires": dt.date,
    }
    for name, value in table.items():
        if name not in kinds:
            raise SettingsError(f"{where}: unknown field {name[:100]!r}; expected {', '.join(kinds)}")
        if not isinstance(value, kinds[name]) or (isinstance(value, bool) and kinds[name] is int):
            raise SettingsError(f"{where}: {name} has the wrong type; expected {kinds[name].__name__}")
        if kinds[name] is int and not 1 <= value <= MAX_PER_MINUTE:
            raise SettingsError(f"{where}: {name} is {value}; expected 1 to {MAX_PER_MINUTE}")
    name, digest = table.get("name", ""), table.get("sha256", "")
    if not KEY_NAME.fullmatch(name):
        raise SettingsError(f"{where}: name: expected 1 to 64 letters, digits and ._-")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise SettingsError(f"{where} ({name}): sha256: expected 64 hexadecimal digits")
    models = table.get("models", [])
    if not all(isinstance(model, str) for model in models):
        raise SettingsError(f"{where} ({name}): models: expected a list of names")
    limits = KeyLimits(
        table.get("requests_per_minute", 0), table.get("pictures_per_minute", 0), table.get("concurrent", 0),
        tuple(models),
    )  # fmt: skip
    expires = table.get("expires")
    if expires is not None and not isinstance(expires, dt.datetime):
        expires = dt.datetime.combine(expires, dt.time())
    if expires is not None and expires.tzinfo is None:
        expires = expires.replace(tzinfo=dt.UTC)
    until = expires.timestamp() if expires is not None else math.inf
    return NamedKey(bytes.fromhex(digest), Grant(name, limits), table.get("admin", False), until)


def _read_bytes(option: str, path: Path) -> tuple[bytes, int]:
    """Return the content of a key file, and its mode. Raises SettingsError."""
    try:
        # O_NONBLOCK: opening a FIFO would otherwise block start-up, or a reload, until another process opens it for
        # writing.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise SettingsError(f"{option} {path}: not a regular file")
            data = stream.read(MAX_KEYS_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{option} {path}: {error.strerror}", is_transient=may_pass(error)) from None
    if len(data) > MAX_KEYS_BYTES:
        raise SettingsError(f"{option} {path}: larger than {MAX_KEYS_BYTES} bytes")
    return data, mode


def _read_file(option: str, path: Path) -> list[str]:
    data, mode = _read_bytes(option, path)
    keys = []
    for number, line in enumerate(data.decode("latin-1").split("\n"), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise SettingsError(
                f"{option} {path}, line {number}: expected one key, up to 512 printable ASCII characters without blanks"
            )
        keys.append(key)
    if not keys:
        raise SettingsError(f"{option} {path}: no key found; expected one on each line")
    _warn_if_public(option, path, mode)
    return keys


def _warn_if_public(option: str, path: Path, mode: int) -> None:
    if mode & stat.S_IROTH:
        log.warning(
            "the API key file is readable by every user of this machine; restrict its permissions",
            extra=fields(**{option: path}),
        )
