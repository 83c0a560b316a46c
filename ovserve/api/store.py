"""Stored pictures for `response_format=url`: files with unguessable names that expire after `url_ttl_s`.

They survive a restart of the server.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import NotFound, RangeNotSatisfiable, SettingsError
from ovserve.settings.options import Settings

__all__ = ["MEDIA_TYPES", "Store", "StoredPicture", "default_store", "parse_range"]

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")
_UNFINISHED = ".ovserve-new-"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """One stored picture. Names are unique, so the name is the entity tag (RFC 9110 section 8.8.3)."""

    name: str
    media_type: str
    data: bytes
    expires_in_s: float

    @property
    def etag(self) -> str:
        """The entity tag, quoted."""
        return f'"{self.name}"'


def default_store() -> Path:
    """Return `pictures` in systemd's CacheDirectory, else `ovserve/pictures` in the user's cache directory.

    For a user without a home directory it is in a private folder of the temporary directory, which is created here.

    Raises:
        SettingsError: another user can write to that folder.
    """
    if given := os.environ.get("CACHE_DIRECTORY"):
        return Path(given.partition(":")[0]) / "pictures"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ovserve" / "pictures"
    try:
        return Path.home() / ".cache" / "ovserve" / "pictures"
    except (
        RuntimeError
    ):  # HOME is unset and the user database has no such user: systemd's DynamicUser, a container's uid
        return _private_folder() / "pictures"


def _private_folder() -> Path:
    """Return the folder of this user in the temporary directory; create it if needed. Raises SettingsError."""
    folder = Path(tempfile.gettempdir()) / f"ovserve-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise SettingsError(
            f"no home directory, and {folder} cannot be used: {error.strerror}; set store_dir"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SettingsError(f"no home directory, and {folder} is not private to this user; set store_dir")
    return folder


class Store:
    """The directory of stored pictures. Thread-safe: yes, one lock around changes.

    A picture's age is its file's modification time, and there is no other state, so a restart changes nothing. The
    directory is created with the first picture.
    """

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.store_dir or default_store()
        self._limit = settings.store_bytes
        self._ttl_s = settings.url_ttl_s
        self._lock = threading.Lock()
        if settings.store_dir and settings.store_dir.exists() and not os.access(settings.store_dir, os.W_OK):
            raise SettingsError(f"store_dir {settings.store_dir}: not writable")

    def keep(self, data: memoryview, form: str) -> str:
        """Store a picture of format png, jpeg or webp and return its name. Raises OSError if the disk is full."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        with self._lock:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep(len(data))
            descriptor, temporary = tempfile.mkstemp(dir=self._directory, prefix=_UNFINISHED)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                os.replace(temporary, self._directory / name)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        return name

    def find(self, name: str) -> StoredPicture:
        """Return a stored picture. Raises NotFound for an unknown name or an expired picture."""
        match = _NAME.fullmatch(name)
        if match:
            path = self._directory / name
            with contextlib.suppress(OSError):
                left = path.stat().st_mtime + self._ttl_s - time.time()
                if left > 0:
                    return StoredPicture(name, MEDIA_TYPES[match[1]], path.read_bytes(), left)
        raise NotFound(
            f"Picture {name[:100]!r} does not exist or has expired; pictures are kept for {self._ttl_s:g} s."
        )

    def _sweep(self, coming: int) -> None:
        """Remove expired pictures, then the oldest until `coming` bytes fit under the limit."""
        kept: list[tuple[float, int, Path]] = []
        now = time.time()
        for path in self._directory.iterdir():
            if not _NAME.fullmatch(path.name) and not path.name.startswith(_UNFINISHED):
                continue  # the operator may have chosen a directory with other files in it
            with contextlib.suppress(OSError):
                info = path.stat()
                if info.st_mtime + self._ttl_s <= now:
                    path.unlink()
                else:
                    kept.append((info.st_mtime, info.st_size, path))
        total = sum(size for _, size, _ in kept) + coming
        for _, size, path in sorted(kept):
            if total <= self._limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size


def parse_range(value: str | None, size: int) -> tuple[int, int] | None:
    """Parse a Range field with one byte range.

    Several ranges, other units and malformed fields are ignored, as RFC 9110 section 14.2 allows.

    Returns:
        (start, end exclusive), or None to send the whole file.

    Raises:
        RangeNotSatisfiable: the range is outside the file.
    """
    match = _RANGE.fullmatch(value.strip()) if value else None
    if match is None or (not match[1] and not match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
        if int(match[2]) == 0:
            start = size
    else:
        start = int(match[1])
        end = min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(
            f"Range {match[0]} is outside the file; it has {size} bytes.", headers={"content-range": f"bytes */{size}"}
        )
    return start, end
