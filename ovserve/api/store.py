"""Stored pictures for `response_format=url`: files with unguessable names that expire after `url_ttl_s`.

They survive a restart of the server. They are in a private folder, `pictures`, of the store's directory: others may
read that directory, but a picture's name is all that is needed to fetch it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ovserve.api.windows import FileWindows
from ovserve.errors import NotFound, RangeNotSatisfiable, SettingsError, SpoolFull
from ovserve.folders import check_parent, open_private, open_regular, user_cache
from ovserve.logs import fields
from ovserve.settings.options import Settings

__all__ = ["MEDIA_TYPES", "Store", "StoredPicture", "default_store", "parse_range"]

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")
_UNFINISHED = ".ovserve-new-"
_FOLDER = "pictures"
_NO_DESCRIPTOR_ERRNOS = (errno.EMFILE, errno.ENFILE)
PROBE_BYTES = 4096  # one block: a picture may still find too little space
_RETRY_S = 2  # descriptors are released as exchanges end
_MAX_WAIT_S = 3600.0  # for the next expiry: the system's clock may be set meanwhile
_CLOSE_TIMEOUT_S = 5.0  # for the thread: it may be reading a slow directory
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """One stored picture, open for reading until `close`, even if its file is removed meanwhile.

    Names are unique, so the name is the entity tag (RFC 9110 section 8.8.3).
    """

    name: str
    media_type: str
    size: int
    expires_in_s: float
    descriptor: int

    @property
    def etag(self) -> str:
        """The entity tag, quoted."""
        return f'"{self.name}"'

    def part(self, start: int, end: int) -> FileWindows:
        """Return the bytes from `start` to `end` (exclusive), which are read while they are written."""
        return FileWindows(self.descriptor, start, end)

    def close(self) -> None:
        """Close the file. Call it once."""
        os.close(self.descriptor)


def default_store() -> Path:
    """Return `pictures` in the user's cache folder. Raises SettingsError."""
    return user_cache("store_dir") / _FOLDER


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file in the index: its modification time, in seconds since the epoch, and its size in bytes."""

    born: float
    size: int


class Store:
    """The folder of stored pictures, and an index of its files in memory. Thread-safe: yes, one lock.

    A picture's age is its file's modification time. The index is read once, at `start` or with the first picture, so
    storing a picture costs the same however many there are. Expired files are removed by a thread, which runs only
    while there are files. The folder is created with the first picture.

    Files that other programs remove stay in the index until they would expire, and count towards the limit until then.
    Files that others add later, such as a second server on the same directory, are served, but this store neither
    counts nor removes them. So each of several servers applies the limit and the expiry to its own pictures, and to
    those that it found when it started.

    Args:
        settings: directory, size limit and time to live.
        clock: returns the time in seconds since the epoch.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._directory = settings.store_dir / _FOLDER if settings.store_dir else default_store()
        self._limit_bytes = settings.store_bytes
        self._ttl_s = settings.url_ttl_s
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below; notified at the end
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by file name, the oldest first
        self._used_bytes = 0  # of the entries, and of the pictures being written
        self._is_read = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        parent = self._directory.parent
        if settings.store_dir and parent.exists() and not os.access(parent, os.W_OK):
            raise SettingsError(f"store_dir {parent}: not writable")
        try:
            check_parent(parent)
            os.close(open_private(self._directory))
        except OSError as error:
            if error.errno == errno.EPERM:
                raise SettingsError(f"store_dir {error.filename}: {error.strerror}") from None
            # It does not exist yet, or cannot be used now: `keep` tries again.

    def start(self) -> None:
        """Read the index in the background, and expire the pictures of earlier runs.

        Log a warning if no picture can be stored, so that the operator finds out before the first request does.
        """
        try:
            self.check(create=False)
        except OSError as error:
            log.warning(
                "response_format=url cannot be served: no picture can be stored; change store_dir or free space",
                extra=fields(folder=self._directory, why=error.strerror),
            )
        with self._changed:
            self._start_thread()

    def close(self) -> None:
        """End the thread. The files stay. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_TIMEOUT_S)

    def check(self, *, create: bool = True) -> None:
        """Check that a file can be written, by writing and removing one of PROBE_BYTES.

        Args:
            create: create the directory if it does not exist; otherwise only check whether that is possible.

        Raises:
            OSError: no file can be written: the directory is read-only, the disk is full, ...
        """
        if not create and not self._directory.exists():
            parent = next(parent for parent in self._directory.parents if parent.exists())
            if not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
            if not os.access(parent, os.W_OK | os.X_OK):
                reason = errno.EROFS if os.statvfs(parent).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(reason, os.strerror(reason), str(parent))
            return
        probe = f"{_UNFINISHED}{secrets.token_hex(8)}"
        with self._opened(create=create) as folder:
            descriptor = open_regular(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder)
            try:
                os.posix_fallocate(descriptor, 0, PROBE_BYTES)
            finally:
                os.close(descriptor)
                os.unlink(probe, dir_fd=folder)

    def keep(self, data: memoryview, form: str) -> str:
        """Store a picture of format png, jpeg or webp and return its name. Raises OSError if the disk is full.

        The oldest pictures are removed if the limit requires it.
        """
        name = f"{secrets.token_urlsafe(24)}.{form}"
        with self._changed:
            self._read_index()
            surplus = self._pop_while(self._is_expired)
            surplus += self._pop_while(lambda _: self._used_bytes + len(data) > self._limit_bytes)
            self._used_bytes += len(data)
        try:
            self._unlink(surplus)
            born = self._write(name, data)
        except BaseException:
            with self._changed:
                self._used_bytes -= len(data)
            raise
        with self._changed:
            self._entries[name] = _Entry(born, len(data))
            self._start_thread()
        return name

    def find(self, name: str) -> StoredPicture:
        """Open a stored picture; the caller closes it. The file decides, not the index.

        Raises:
            NotFound: unknown name, or expired picture.
            SpoolFull: no descriptor is left.
        """
        match = _NAME.fullmatch(name)
        if match:
            try:
                with self._opened() as folder:
                    descriptor = open_regular(name, os.O_RDONLY, folder)
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR_ERRNOS:
                    raise SpoolFull(
                        f"The server cannot open the picture ({error.strerror}); retry later.", retry_after_s=_RETRY_S
                    ) from None
            else:
                info = os.fstat(descriptor)
                left = info.st_mtime + self._ttl_s - self._clock()
                if left > 0:
                    return StoredPicture(name, MEDIA_TYPES[match[1]], info.st_size, left, descriptor)
                os.close(descriptor)
        raise NotFound(
            f"Picture {name[:100]!r} does not exist or has expired; pictures are kept for {self._ttl_s:g} s."
        )

    def _write(self, name: str, data: memoryview) -> float:
        """Write the file under another name, rename it, and return its modification time. Raises OSError."""
        temporary = f"{_UNFINISHED}{secrets.token_hex(8)}"
        with self._opened(create=True) as folder:
            descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    born = os.fstat(descriptor).st_mtime
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
        return born

    @contextlib.contextmanager
    def _opened(self, *, create: bool = False) -> Iterator[int]:
        """Open the folder for the duration of the context. Raises OSError."""
        descriptor = open_private(self._directory, create=create)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _unlink(self, names: list[str]) -> None:
        """Remove files that are no longer in the index."""
        if not names:
            return
        try:
            with self._opened() as folder:
                for name in names:
                    try:
                        os.unlink(name, dir_fd=folder)
                    except FileNotFoundError:  # another program has removed it, or renamed it if it was unfinished
                        continue
                    except OSError as error:
                        log.warning("cannot remove a stored picture", extra=fields(file=name, why=error.strerror))
        except FileNotFoundError:  # another program has removed the folder
            return
        except OSError as error:
            log.warning("cannot remove stored pictures", extra=fields(folder=self._directory, why=error.strerror))

    def _adopt(self) -> None:
        """Move the pictures of earlier versions, which are in the store's directory itself, into the folder."""
        with contextlib.suppress(OSError), os.scandir(self._directory.parent) as listing:
            names = [
                each.name for each in listing if _NAME.fullmatch(each.name) and each.is_file(follow_symlinks=False)
            ]
            if names:
                with self._opened(create=True) as folder:
                    for name in names:
                        os.rename(self._directory.parent / name, name, dst_dir_fd=folder)

    # --- the index; the caller holds the lock -------------------------------------------------------------------------

    def _read_index(self) -> None:
        """Read the index from the directory, once. Raises OSError if the directory cannot be read."""
        if self._is_read:
            return
        self._adopt()
        found: list[tuple[float, str, int]] = []
        with contextlib.suppress(FileNotFoundError), self._opened() as folder, os.scandir(folder) as listing:
            for each in listing:
                # Nothing else should be here, and is left alone if it is.
                if _NAME.fullmatch(each.name) or each.name.startswith(_UNFINISHED):
                    with contextlib.suppress(FileNotFoundError):
                        info = each.stat(follow_symlinks=False)
                        if stat.S_ISREG(info.st_mode):
                            found.append((info.st_mtime, each.name, info.st_size))
        for born, name, size in sorted(found):
            self._entries[name] = _Entry(born, size)
            self._used_bytes += size
        self._is_read = True

    def _pop_while(self, is_surplus: Callable[[_Entry], bool]) -> list[str]:
        """Remove entries from the index, the oldest first, while `is_surplus`; return their names."""
        names = []
        while self._entries:
            name, entry = next(iter(self._entries.items()))
            if not is_surplus(entry):
                break
            del self._entries[name]
            self._used_bytes -= entry.size
            names.append(name)
        return names

    def _is_expired(self, entry: _Entry) -> bool:
        return entry.born + self._ttl_s <= self._clock()

    # --- expiry -------------------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        """Start the thread unless it runs. The caller holds the lock."""
        if self._thread is None and not self._is_closed:
            thread = threading.Thread(target=self._expire, name="store", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads can be started; the next picture tries again
                return
            self._thread = thread

    def _expire(self) -> None:
        """Remove files when they expire. Runs in: the store thread."""
        while expired := self._wait_for_expired():
            self._unlink(expired)  # without the lock: there may be thousands

    def _wait_for_expired(self) -> list[str]:
        """Wait until files expire and return their names; none when the thread has to end."""
        with self._changed:
            try:
                self._read_index()
            except OSError as error:
                log.warning("store_dir cannot be read", extra=fields(folder=self._directory, why=error.strerror))
            while self._entries and not self._is_closed:
                if expired := self._pop_while(self._is_expired):
                    return expired
                oldest = next(iter(self._entries.values()))
                self._changed.wait(min(oldest.born + self._ttl_s - self._clock(), _MAX_WAIT_S))
            self._thread = None
            return []


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
