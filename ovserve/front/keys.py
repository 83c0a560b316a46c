"""API keys: decides which requests need one and checks it, before a body is read."""

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

__all__ = ["Keys", "read_keys"]

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
        # Compare hashes, and always all of them, so that timing reveals neither a correct prefix nor which key matched.
        digest = hashlib.sha256(request.api_key.encode("latin-1")).digest()
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthorized("Incorrect API key provided.")
        request.is_verified = True


def read_keys(settings: Settings) -> Keys:
    """Return the keys of `api_key` and `api_key_file`. Raises SettingsError, whose message never quotes a key."""
    keys = []
    if settings.api_key:
        if not _KEY.fullmatch(settings.api_key):
            raise SettingsError("api_key: expected up to 512 printable ASCII characters without blanks")
        keys.append(settings.api_key)
    if settings.api_key_file:
        keys += _read_file(settings.api_key_file)
    return Keys(keys)


def _read_file(path: Path) -> list[str]:
    try:
        # O_NONBLOCK: opening a FIFO would otherwise block start-up, or a reload, until another process opens it for
        # writing.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise SettingsError(f"api_key_file {path}: not a regular file")
            data = stream.read(MAX_KEYS_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"api_key_file {path}: {error.strerror}", is_transient=may_pass(error)) from None
    if len(data) > MAX_KEYS_BYTES:
        raise SettingsError(f"api_key_file {path}: larger than {MAX_KEYS_BYTES} bytes")
    keys = []
    for number, line in enumerate(data.decode("latin-1").split("\n"), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise SettingsError(
                f"api_key_file {path}, line {number}: expected one key, up to 512 printable ASCII characters without"
                " blanks"
            )
        keys.append(key)
    if not keys:
        raise SettingsError(f"api_key_file {path}: no key found; expected one on each line")
    if mode & stat.S_IROTH:
        log.warning(
            "the API key file is readable by every user of this machine; restrict its permissions",
            extra=fields(api_key_file=path),
        )
    return keys
