"""The usage log: one line of JSON for each request for pictures, to bill from. Prompts and pictures are never in it.

A line is written with one write(2) to a file that is opened for appending, when the response has ended. Above its size
the file is renamed, with the time in its name, and a new one is begun. A lock on the file keeps a second server from
writing to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ovserve.errors import SettingsError, may_pass
from ovserve.logs import LogLimit, fields

__all__ = ["UsageLog"]

FILE_MODE = 0o640  # the names of keys are for the operator alone

log = logging.getLogger(__name__)


class UsageLog:
    """Appends lines to a file, which is renamed when it is full. Thread-safe: yes, one lock.

    The file should be on a local disk: the thread of a request waits for the write.

    Args:
        path: the file.
        limit_bytes: size above which the file is renamed.
        kept: how many renamed files stay; 0: all of them.
        clock: seconds since 1970.

    Attributes:
        errors: lines that could not be written.
    """

    def __init__(self, path: Path, limit_bytes: int, kept: int = 0, clock: Callable[[], float] = time.time) -> None:
        """Open the file. Raises SettingsError: it cannot be opened, or another server writes to it."""
        self._path = path
        self._limit_bytes = limit_bytes
        self._kept = kept
        self._now = clock
        self._lock = threading.Lock()
        self._limit = LogLimit("usage lines that could not be written")
        self.errors = 0
        try:
            self._descriptor, self._is_torn = _open(path)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                os.close(self._descriptor)
                raise SettingsError(f"usage_log {path}: not a regular file")
        except OSError as error:
            is_locked = isinstance(error, BlockingIOError)
            why = "another process writes to it" if is_locked else error.strerror
            raise SettingsError(f"usage_log {path}: {why}", is_transient=is_locked or may_pass(error)) from None

    def write(self, entry: Mapping[str, object]) -> None:
        """Append a line. A failure is logged and counted, and changes nothing else."""
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        with self._lock:
            if self._descriptor < 0:
                return  # closed
            try:
                self._rotate(len(line))
            except OSError as error:  # the line goes to the old file, and the next one tries again
                self._limit.log(log, logging.ERROR, "usage log not renamed", path=self._path, why=error.strerror)
            try:
                self._append(line)
            except OSError as error:
                self.errors += 1
                self._limit.log(log, logging.ERROR, "usage line lost", path=self._path, why=error.strerror)

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        self._limit.stop()

    def _append(self, line: bytes) -> None:
        if self._is_torn:  # a full disk has cut the line before this one
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        self._is_torn = written < len(line)
        if self._is_torn:
            self.errors += 1
            self._limit.log(log, logging.ERROR, "usage line is incomplete", path=self._path, why="disk full")

    def _rotate(self, added: int) -> None:
        """Begin a new file if the line does not fit. The old one keeps the lock until the new one has its own."""
        size = os.fstat(self._descriptor).st_size
        if not size or size + added <= self._limit_bytes:
            return
        moment = self._now()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment * 1e6) % 1_000_000:06d}Z"
        target = self._path.with_name(f"{self._path.name}.{stamp}")
        while target.exists():  # two rotations at one instant of a coarse clock
            target = target.with_name(f"{target.name}+")
        with contextlib.suppress(FileNotFoundError):  # an earlier attempt has failed after the renaming
            self._path.rename(target)
        descriptor, self._is_torn = _open(self._path)
        os.close(self._descriptor)
        self._descriptor = descriptor
        log.info("usage log continued in a new file", extra=fields(old=target))
        self._delete_old()

    def _delete_old(self) -> None:
        if not self._kept:
            return
        old = sorted(self._path.parent.glob(f"{self._path.name}.[0-9]*Z*"))  # the names sort by time
        for path in old[: -self._kept]:
            with contextlib.suppress(OSError):
                path.unlink()


def _open(path: Path) -> tuple[int, bool]:
    """Return a locked descriptor, and whether the last line of the file is incomplete. Raises OSError."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, is_torn
