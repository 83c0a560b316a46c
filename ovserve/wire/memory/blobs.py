"""Blobs as byte arrays in one process."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ovserve.accounts import Account, Holding
from ovserve.errors import BlobGone, ContentTooLarge, SpoolFull
from ovserve.wire.blobs import ROOM_WAIT_S, Blob

__all__ = ["MemoryBlobs", "MemorySegment"]

_FULL_RETRY_S = 2  # segments live for as long as one exchange


class MemorySegment:
    """`wire.blobs.Segment` over a byte array."""

    def __init__(self, blobs: MemoryBlobs, name: str, max_bytes: int, holding: Holding, wait_s: float) -> None:
        self._blobs = blobs
        self._holding = holding
        self._wait_s = wait_s
        self.id = name
        self.data = bytearray(max_bytes)
        self.reserved = 0
        self._is_released = False

    @property
    def view(self) -> memoryview:
        """The bytes. Raises ValueError after `release`."""
        if self._is_released:
            raise ValueError("segment is released")
        return memoryview(self.data)

    def reserve(self, size: int) -> None:
        """Count the first `size` bytes as used. Raises SpoolFull and ContentTooLarge."""
        if size > len(self.data):
            raise ValueError(f"reserve of {size} bytes; this segment may have at most {len(self.data)}")
        self._blobs.check_size(size)
        if not self._holding.take(max(0, size - self.reserved), self._wait_s):
            limit = self._blobs.capacity_bytes
            raise SpoolFull(f"the limit of {limit} bytes is reached", retry_after_s=_FULL_RETRY_S)
        self.reserved = max(self.reserved, size)

    def read(self, offset: int, size: int) -> bytes:
        """Return at most `size` bytes from `offset`. Raises ValueError after `release`."""
        with self.view[offset : offset + size] as part:
            return bytes(part)

    def write(self, data: bytes) -> None:
        """Write the data at the start."""
        self.data[: len(data)] = data

    def blob(self, offset: int, size: int) -> Blob:
        """Return a reference to `size` bytes from `offset`."""
        return Blob(self.id, offset, size)

    def release(self) -> None:
        """Free the bytes. Idempotent."""
        if not self._is_released:
            self._is_released = True
            self._blobs.remove(self)
            self._holding.give(self.reserved)


class MemoryBlobs:
    """`wire.blobs.BlobStore` and `wire.blobs.WorkerBlobs` in one object. Thread-safe: yes, one lock.

    Args:
        limit_bytes: limit for all live segments together.
    """

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.capacity_bytes = limit_bytes
        self.unusable_reason = ""
        self.account = Account(limit_bytes)
        self._unowned = self.account.open("")
        self._lock = threading.Lock()
        self._names = itertools.count()
        self._segments: dict[str, MemorySegment] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of all live segments."""
        return self.account.used

    def check_size(self, size: int) -> None:
        """Check that one request's bytes could fit into the empty store. Raises ContentTooLarge."""
        if size > self.capacity_bytes:
            raise ContentTooLarge(f"the request takes {size} bytes; this store holds {self.capacity_bytes}")

    def create(
        self, max_bytes: int, reserve: int = 0, holding: Holding | None = None, wait_s: float = 0.0
    ) -> MemorySegment:
        """Create a segment that may grow to `max_bytes`. Raises SpoolFull."""
        with self._lock:
            name = str(next(self._names))
            segment = MemorySegment(self, name, max(1, max_bytes), holding or self._unowned, wait_s)
            self._segments[segment.id] = segment
        try:
            segment.reserve(reserve)
        except BaseException:
            segment.release()
            raise
        return segment

    def create_for_upload(
        self,
        max_bytes: int,
        expected_bytes: int | None = None,  # noqa: ARG002 - argument of the protocol
        holding: Holding | None = None,
    ) -> MemorySegment:
        """Create a segment for an upload. Raises SpoolFull."""
        return self.create(max_bytes, 0, holding, ROOM_WAIT_S)

    def put(self, data: bytes, holding: Holding | None = None) -> MemorySegment:
        """Create a segment with exactly these bytes. Raises SpoolFull."""
        segment = self.create(len(data), len(data), holding, ROOM_WAIT_S)
        segment.write(data)
        return segment

    def remove(self, segment: MemorySegment) -> None:
        """Forget a released segment."""
        with self._lock:
            self._segments.pop(segment.id, None)

    @contextmanager
    def open(self, blob: Blob) -> Iterator[memoryview]:
        """Give access to the bytes of a blob. Raises BlobGone."""
        with memoryview(bytes(self._find(blob.id).data)) as whole:
            yield whole[blob.offset : blob.offset + blob.size]

    def read(self, storage: str) -> bytes:
        """Return all bytes of a segment. Raises BlobGone."""
        segment = self._find(storage)
        return bytes(segment.data[: segment.reserved])

    def fill(self, storage: str, data: bytes | memoryview) -> None:
        """Write the announced bytes into a segment. Raises BlobGone."""
        self._find(storage).data[: len(data)] = data

    def _find(self, storage: str) -> MemorySegment:
        with self._lock:
            segment = self._segments.get(storage)
        if segment is None:
            raise BlobGone(f"no segment {storage[:40]!r}: its exchange has ended")
        return segment
