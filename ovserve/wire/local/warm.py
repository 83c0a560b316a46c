"""Files of finished segments, kept mapped, so that the next upload touches no fresh page.

A fresh page costs more than all else that is done to the bytes in it: the kernel clears it, then maps it at the first touch. What
a pool saves is measured by `benchmarks/bench_multipart.py`: an upload of 64 kB, or of 50 MB, is received several times as fast.

A file that carries another client's bytes next must be out of everybody's hands first:
- Before it is kept it loses its name, so that a worker that comes late finds nothing under the old one.
- A worker holds a shared lock for as long as it has a blob open (`join`). The pool takes the exclusive one when it keeps a file;
  where it cannot, or where a view in this process is still held, the file is not kept.
- A worker that had opened the file before, and asks for the lock only after the file was lent again, finds that the name that it
  was told is gone.
Workers write results into segments that are never kept.
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

__all__ = ["MOST_FILES", "WarmFile", "WarmPool", "join"]

MOST_FILES = 64  # two descriptors each; as many small uploads at once as a busy server has
SMALLEST_SPAN = 1 << 20
MOST_EXCESS = 2  # times the bytes wanted: what a lent file holds beyond them is lost to everybody while it is lent


@dataclass(slots=True)
class WarmFile:
    """An open file of the spool: `span` bytes are mapped, the first `size` of them have pages."""

    path: str
    descriptor: int
    mapping: mmap.mmap
    span: int
    size: int

    def close(self) -> None:
        """Unmap, close and unlink."""
        with contextlib.suppress(BufferError):  # somebody still holds a slice; the mapping goes with it
            self.mapping.close()
        os.close(self.descriptor)
        with contextlib.suppress(OSError):  # it may be gone, or the whole folder
            os.unlink(self.path)


class WarmPool:
    """At most `limit_bytes` of files that nobody uses. Thread-safe: yes, one lock."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._files: list[WarmFile] = []  # the one kept last is the last
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._size

    def span_for(self, ceiling: int) -> int:
        """The address space for a file whose first segment may grow to `ceiling` bytes: room for later ones; 0: not kept."""
        return max(SMALLEST_SPAN, 1 << (ceiling - 1).bit_length()) if self._limit else 0

    def lend(self, ceiling: int, wanted: int) -> WarmFile | None:
        """A file, under a new name, for a segment that may grow to `ceiling` bytes, of which `wanted` are known to come.

        The smallest that is large enough, else the largest; none that is much too large: nobody can take back what is lent, and
        the file of one large upload, lent to a small one, would leave that one no room for its own request.
        """
        most = max(MOST_EXCESS * wanted, SMALLEST_SPAN)
        with self._lock:
            fitting = [file for file in self._files if file.span >= ceiling and file.size <= most]
            if not fitting:
                return None
            enough = [file for file in fitting if file.size >= wanted]
            file = min(enough, key=_size_of) if enough else max(fitting, key=_size_of)
            self._files.remove(file)
            self._size -= file.size
        try:
            _rename(file, f"{self._folder}/{secrets.token_hex(12)}")
            fcntl.flock(file.descriptor, fcntl.LOCK_UN)
        except OSError:
            file.close()  # somebody has taken it out of the folder
            return None
        return file

    def keep(self, file: WarmFile) -> bool:
        """Keep a file for later; False when it has to be closed: too large, in somebody's hands still, or gone from the folder."""
        if file.size > self._limit:
            return False
        try:
            _rename(file, f"{self._folder}/warm-{secrets.token_hex(12)}")
            fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.mapping.resize(file.span)  # to the size that it has: refused while a view of it is held
        except (OSError, BufferError):
            return False
        with self._lock:
            self._files.append(file)
            self._size += file.size
            dropped = self._shrink(self._limit)
        _close_all(dropped)
        return True

    def drop(self, size: int) -> None:
        """Close files, the oldest first, until `size` bytes are given back or none is left."""
        with self._lock:
            dropped = self._shrink(max(0, self._size - size))
        _close_all(dropped)

    def _shrink(self, limit: int) -> list[WarmFile]:
        dropped = []
        while self._files and (self._size > limit or len(self._files) > MOST_FILES):
            file = self._files.pop(0)
            self._size -= file.size
            dropped.append(file)
        return dropped


def _rename(file: WarmFile, name: str) -> None:
    os.rename(file.path, name)
    file.path = name


def _size_of(file: WarmFile) -> int:
    return file.size


def _close_all(files: list[WarmFile]) -> None:
    for file in files:
        file.close()


def join(descriptor: int, path: str) -> None:
    """Hold a file that was opened by this name until the descriptor is closed. Runs in: worker.

    Raises FileNotFoundError when the file was given back meanwhile, and may carry other bytes.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return
    except BlockingIOError:
        pass
    raise FileNotFoundError(f"{path} was given back")
