"""API keys and admin keys: read from the configuration, and compared with those of requests."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from ovserve.errors import SettingsError, Unauthorized, may_pass
from ovserve.front.request import Request
from ovserve.logs import fields
from ovserve.settings.options import Settings

__all__ = ["Keys", "read_admin_keys", "read_keys"]

MAX_KEYS_BYTES = 1024 * 1024  # of the file: every request is compared with every key
_KEY = re.compile(r"[!-~]{1,512}")  # characters that a field value can carry unquoted

log = logging.getLogger(__name__)


class Keys:
    """The configured API keys. Without any, requests need no key. Thread-safe: immutable."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({hashlib.sha256(key.encode("ascii")).digest() for key in keys})

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, request: Request, *, is_open: bool) -> None:
        """Check the API key of a request, and set `request.is_verified` if it is a configured one.

        Args:
            request: the request to check.
            is_open: whether its route needs no key.

        Raises:
            Unauthorized: the request needs a key, and has none or an unknown one.
        """
        if not self._digests or is_open:
            return
        if not request.api_key:
            raise Unauthorized(
                "You didn't provide an API key. Send it in an Authorization field, as in `Authorization: Bearer KEY`,"
                " or in api-key."
            )
        if not self.matches(request.api_key):
            raise Unauthorized("Incorrect API key provided.")
        request.is_verified = True

    def matches(self, key: str) -> bool:
        """Return whether a key is a configured one.

        Hashes are compared, and always all of them, so that timing reveals neither a correct prefix nor which key
        matched.
        """
        digest = hashlib.sha256(key.encode("latin-1")).digest()
        return bool(sum(hmac.compare_digest(digest, known) for known in self._digests))


def read_keys(settings: Settings) -> Keys:
    """Return the keys of `api_key` and `api_key_file`. Raises SettingsError, whose message never quotes a key."""
    return _read("api_key", settings.api_key, settings.api_key_file)


def read_admin_keys(settings: Settings) -> Keys:
    """Return the keys of `admin_key` and `admin_key_file`. Raises SettingsError, whose message never quotes a key."""
    return _read("admin_key", settings.admin_key, settings.admin_key_file)


def _read(name: str, key: str, path: Path | None) -> Keys:
    keys = []
    if key:
        if not _KEY.fullmatch(key):
            raise SettingsError(f"{name}: expected up to 512 printable ASCII characters without blanks")
        keys.append(key)
    if path:
        keys += _read_file(f"{name}_file", path)
    return Keys(keys)


def _read_file(option: str, path: Path) -> list[str]:
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
    if mode & stat.S_IROTH:
        log.warning(
            "the API key file is readable by every user of this machine; restrict its permissions",
            extra=fields(**{option: path}),
        )
    return keys
