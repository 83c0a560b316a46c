"""Spool segments: memory-mapped files that carry encoded bytes between the front end and the workers.

The front end alone creates, sizes and unlinks segments; workers open them by path (`open_blob`, `fill`). Space is taken with
posix_fallocate, which makes a full tmpfs an error that can be answered, where writing to a plain mapping would be a SIGBUS.

Each front end has a folder of its own inside the spool directory, held by an flock for as long as the process lives: the lock,
not a pid (containers reuse those), tells a living front end's folder from a dead one's, which `Spool` removes when it starts.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import SettingsError, SpoolFull

__all__ = ["Blob", "Segment", "Spool", "default_directory", "fill", "open_blob"]

PREFIX = "ovserve-spool-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


def default_directory() -> Path:
    """The machine's shared-memory tmpfs where there is one, else the temporary directory."""
    shared = Path("/dev/shm")  # noqa: S108 - tmpfs is the point; segments lie in a folder of mode 0700
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


@dataclass(frozen=True, slots=True)
class Blob:
    """Encoded bytes in a spool segment: `size` bytes from `offset` in the file at `path`."""

    path: str
    offset: int
    size: int


class Segment:
    """One mapped file. `view` is writable up to `reserved` bytes; beyond that lies address space without pages: do not touch.

    Thread-safe: no; one owner at a time.
    """

    def __init__(self, spool: Spool, path: str, ceiling: int) -> None:
        self._spool = spool
        self.path = path
        self.reserved = 0
        self._ceiling = ceiling
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._descriptor, ceiling)  # address space for all of it at once: the mapping never moves
            self._map = mmap.mmap(self._descriptor, ceiling)
            self._view = memoryview(self._map)
        except BaseException:
            self.release()
            raise

    @property
    def view(self) -> memoryview:
        """The mapped bytes. Valid until `release`."""
        if self._view is None:
            raise ValueError("segment is released")
        return self._view

    def reserve(self, upto: int) -> None:
        """Make the first `upto` bytes safe to touch. Raises SpoolFull when there is no room for them."""
        if upto <= self.reserved:
            return
        if upto > self._ceiling:
            raise ValueError(f"segment of {self._ceiling} bytes asked for {upto}")
        self._spool.take(upto - self.reserved)
        try:
            os.posix_fallocate(self._descriptor, self.reserved, upto - self.reserved)
        except OSError as error:
            self._spool.give(upto - self.reserved)
            if error.errno in _NO_ROOM:
                raise SpoolFull("the spool directory is full", retry_after_s=2) from None
            raise
        self.reserved = upto

    def blob(self, offset: int, size: int) -> Blob:
        """A reference to `size` bytes from `offset`, for a message."""
        return Blob(self.path, offset, size)

    def release(self) -> None:
        """Unlink the file and give its bytes back. Safe to call twice; views handed out before become invalid."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:
                # Somebody still holds a slice; the mapping goes with it. The file's name goes now all the same.
                log.debug("segment %s released while a view is held", self.path)
            self._map = None
        os.close(descriptor)
        Path(self.path).unlink(missing_ok=True)
        self._spool.give(self.reserved)
        self.reserved = 0


class Spool:
    """The front end's own folder of segments, with a limit on their bytes. Thread-safe: yes, one lock."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """Raises SettingsError when the directory cannot be used."""
        self._limit = limit_bytes
        self._used = 0
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)
            self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
            self._guard = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(f"spool_dir {directory}: {error.strerror}") from None

    @property
    def used_bytes(self) -> int:
        """Bytes of all living segments."""
        return self._used

    def create(self, ceiling: int, reserve: int = 0) -> Segment:
        """A segment that may grow to `ceiling` bytes, `reserve` of them usable at once. Raises SpoolFull."""
        try:
            segment = Segment(self, str(self.directory / secrets.token_hex(12)), max(1, ceiling))
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise SpoolFull("the spool directory is full", retry_after_s=2) from None
            raise
        try:
            segment.reserve(reserve)
        except BaseException:
            segment.release()
            raise
        return segment

    def store(self, data: bytes) -> Segment:
        """A segment with exactly these bytes. Raises SpoolFull."""
        segment = self.create(len(data), reserve=len(data))
        segment.view[: len(data)] = data
        return segment

    def take(self, size: int) -> None:
        """Account for `size` more bytes. Raises SpoolFull at the limit."""
        with self._lock:
            if self._used + size > self._limit:
                raise SpoolFull(
                    f"uploads and results in flight are at the limit of {self._limit} bytes", retry_after_s=2
                )
            self._used += size

    def give(self, size: int) -> None:
        """Account for `size` fewer bytes."""
        with self._lock:
            self._used -= size

    def close(self) -> None:
        """Remove the folder with all that is in it. Safe to call twice."""
        if self._guard >= 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._guard)
            self._guard = -1


def sweep(directory: Path) -> int:
    """Remove the folders of dead front ends from the spool directory; the number removed."""
    removed = 0
    for folder in directory.glob(PREFIX + "*"):
        try:
            guard = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # just being made, or not ours
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        except OSError:
            continue  # its front end lives
        finally:
            os.close(guard)
    return removed


@contextmanager
def open_blob(blob: Blob) -> Iterator[memoryview]:
    """The bytes of a blob, mapped read-only. Runs in: worker. Raises FileNotFoundError when the exchange has ended."""
    descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(descriptor, blob.offset + blob.size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with mapped:
        whole = memoryview(mapped)
        part = whole[blob.offset : blob.offset + blob.size]
        try:
            yield part
        finally:
            part.release()
            whole.release()


def fill(path: str, data: bytes | memoryview) -> None:
    """Write the announced bytes into a segment. Runs in: worker. Raises FileNotFoundError when the exchange has ended."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
