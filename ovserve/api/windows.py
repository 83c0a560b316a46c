"""Contents of replies that are read from a segment or a file in windows while the reply is written.

The source has to stay open until the reply is closed. Its size must not change: the length of the reply is announced
before the first window is read.
"""

from __future__ import annotations

import binascii
import errno
import os
from collections.abc import Callable, Iterator

__all__ = ["WINDOW_BYTES", "Base64Windows", "FileWindows"]

# What one reply holds in memory. Larger windows save system calls; 512 slow readers hold 128 MiB with this size.
WINDOW_BYTES = 256 * 1024
_SOURCE_BYTES = WINDOW_BYTES // 4 * 3  # a multiple of 3, so that no window but the last ends with padding

Read = Callable[[int, int], bytes]


class Base64Windows:
    """The first `size` bytes of a source in base64 (RFC 4648 section 4), without line breaks.

    Args:
        read: `read(offset, size)` returns at most `size` bytes of the source, and none at its end.
        size: how many bytes of the source to encode.
    """

    __slots__ = ("_read", "_size")

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size

    def __len__(self) -> int:
        """Return the length of the encoded text."""
        return (self._size + 2) // 3 * 4

    def windows(self) -> Iterator[bytes]:
        """Yield the text. Raises OSError when the source cannot be read or has become shorter."""
        for start, size in _windows(0, self._size, _SOURCE_BYTES):
            yield binascii.b2a_base64(_read_exactly(self._read, start, size), newline=False)


class FileWindows:
    """The bytes from `start` to `end` (exclusive) of an open file."""

    __slots__ = ("_descriptor", "_end", "_start")

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self._end = end

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self._end - self._start

    def windows(self) -> Iterator[bytes]:
        """Yield the bytes. Raises OSError when the file cannot be read or has become shorter."""
        for start, size in _windows(self._start, self._end, WINDOW_BYTES):
            yield _read_exactly(lambda offset, count: os.pread(self._descriptor, count, offset), start, size)


def _windows(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of each window."""
    for offset in range(start, end, step):
        yield offset, min(step, end - offset)


def _read_exactly(read: Read, start: int, size: int) -> bytes:
    """Return `size` bytes from `start`. Raises OSError when the source ends before."""
    data = read(start, size)
    while len(data) < size:
        more = read(start + len(data), size - len(data))
        if not more:
            raise OSError(errno.EIO, f"the source ends at byte {start + len(data)}; {start + size} were expected")
        data += more
    return data
