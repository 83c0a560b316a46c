"""Pool of used spool files that stay mapped, so that the next upload does not touch fresh pages.

A fresh page costs more than everything else that is done with its bytes: the kernel clears it, then maps it at the
first touch. `benchmarks/bench_multipart.py` measures the gain: an upload of 64 kB, or of 50 MB, is received several
times as fast.

Invariants: no process may still read a file that is about to carry another client's bytes.
- Before a file enters the pool it is renamed, so a worker that opens the old path late finds no file.
- A worker holds a shared lock while it has a blob open (`lock_for_reading`). The pool takes the exclusive lock when a
  file enters. If it cannot, or if a view of the file is still held in this process, the file does not enter the pool.
- A worker that opened the file earlier, and locks it only after the file has been reused, finds that its path no longer
  exists.
Results of workers are written into segments that never enter the pool.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import BlobGone

__all__ = ["MAX_POOLED_FILES", "FilePool", "PooledFile", "lock_for_reading"]

MAX_POOLED_FILES = 64  # two descriptors each; enough for the concurrent small uploads of a busy server
MIN_MAPPING_BYTES = 1 << 20
# A reused file may have at most this many times the expected bytes: no other request can use the excess meanwhile.
MAX_OVERSIZE_FACTOR = 2


@dataclass(slots=True)
class PooledFile:
    """An open file of the spool.

    Attributes:
        mapping_bytes: length of the mapping.
        allocated_bytes: of these, how many from the start have pages.
    """

    path: str
    descriptor: int
    mapping: mmap.mmap
    mapping_bytes: int
    allocated_bytes: int

    def close(self) -> None:
        """Unmap, close and unlink the file."""
        with contextlib.suppress(BufferError):  # a slice is still held; the mapping is freed with it
            self.mapping.close()
        os.close(self.descriptor)
        with contextlib.suppress(OSError):  # the file, or the whole folder, may have been removed
            os.unlink(self.path)


class FilePool:
    """At most `limit_bytes` of unused files. Thread-safe: yes, one lock."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._files: list[PooledFile] = []  # oldest first
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all files in the pool."""
        return self._size_bytes

    def mapping_bytes_for(self, max_bytes: int) -> int:
        """Return how many bytes to map for a file whose first segment may grow to `max_bytes`.

        It is more than that, so that larger segments can reuse the file; 0 if the pool keeps no files.
        """
        return max(MIN_MAPPING_BYTES, 1 << (max_bytes - 1).bit_length()) if self._limit_bytes else 0

    def acquire(self, max_bytes: int, expected_bytes: int) -> PooledFile | None:
        """Take a file out of the pool, under a new name, for a segment that may grow to `max_bytes`; None if none fits.

        The smallest file with at least `expected_bytes` is taken, else the largest. Much larger files are not
        considered, because their excess cannot be reclaimed while they are in use: the file of one large upload, reused
        for a small one, could leave no spool space for that small request itself.
        """
        most = max(MAX_OVERSIZE_FACTOR * expected_bytes, MIN_MAPPING_BYTES)
        with self._lock:
            fitting = [f for f in self._files if f.mapping_bytes >= max_bytes and f.allocated_bytes <= most]
            if not fitting:
                return None
            enough = [file for file in fitting if file.allocated_bytes >= expected_bytes]
            file = min(enough, key=_allocated_bytes) if enough else max(fitting, key=_allocated_bytes)
            self._files.remove(file)
            self._size_bytes -= file.allocated_bytes
        try:
            _rename(file, f"{self._folder}/{secrets.token_hex(12)}")
            fcntl.flock(file.descriptor, fcntl.LOCK_UN)
        except OSError:
            file.close()  # another program has removed it from the folder
            return None
        return file

    def add(self, file: PooledFile) -> bool:
        """Put a used file into the pool.

        Returns:
            False if the caller has to close the file: it is too large, still in use, or no longer in the folder.
        """
        if file.allocated_bytes > self._limit_bytes:
            return False
        try:
            _rename(file, f"{self._folder}/warm-{secrets.token_hex(12)}")
            fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.mapping.resize(file.mapping_bytes)  # to its present size: fails while a view of it is held
        except (OSError, BufferError):
            return False
        with self._lock:
            self._files.append(file)
            self._size_bytes += file.allocated_bytes
            evicted = self._pop_excess(self._limit_bytes)
        _close_all(evicted)
        return True

    def evict(self, size_bytes: int) -> None:
        """Close files, oldest first, until at least `size_bytes` are freed or the pool is empty."""
        with self._lock:
            evicted = self._pop_excess(max(0, self._size_bytes - size_bytes))
        _close_all(evicted)

    def _pop_excess(self, limit_bytes: int) -> list[PooledFile]:
        evicted = []
        while self._files and (self._size_bytes > limit_bytes or len(self._files) > MAX_POOLED_FILES):
            file = self._files.pop(0)
            self._size_bytes -= file.allocated_bytes
            evicted.append(file)
        return evicted


def _rename(file: PooledFile, name: str) -> None:
    os.rename(file.path, name)
    file.path = name


def _allocated_bytes(file: PooledFile) -> int:
    return file.allocated_bytes


def _close_all(files: list[PooledFile]) -> None:
    for file in files:
        file.close()


def lock_for_reading(descriptor: int, path: str) -> None:
    """Take the shared lock on a file that was opened at `path`. Closing the descriptor releases it. Runs in: worker.

    Raises:
        BlobGone: the segment was released meanwhile, so the file may carry other bytes.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise BlobGone(f"segment {os.path.basename(path)!r} was released")
