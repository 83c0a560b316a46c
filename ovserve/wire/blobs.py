"""Blobs: encoded bytes that cross the boundary between front end and workers, and who may do what with them.

    front end                                        worker
    BlobStore.put            request      ──id──▶    WorkerBlobs.read
    BlobStore.create_for_upload  uploads  ──Blob──▶  WorkerBlobs.open
    BlobStore.create         room for a result ─id─▶ WorkerBlobs.fill

Only the front end creates and releases storage. An id is opaque: what it stands for is known to the BlobStore that made
it and to the WorkerBlobs that belong to this store.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ovserve.accounts import Account, Holding

__all__ = ["ROOM_WAIT_S", "Blob", "BlobStore", "Segment", "WorkerBlobs"]

# For clients above their shares that were made to give way: their threads free what they hold within milliseconds.
ROOM_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Blob:
    """Reference to encoded bytes: `size` bytes from `offset` in the storage named `id`."""

    id: str
    offset: int
    size: int


class Segment(Protocol):
    """Storage for one upload, request or result, in the front end. Thread-safe: no; one owner at a time.

    Attributes:
        reserved: bytes from the start that are safe to touch.
    """

    reserved: int

    @property
    def id(self) -> str:
        """The name under which workers find it. Final once `reserve` was called for the last time."""

    @property
    def view(self) -> memoryview:
        """The bytes, writable up to `reserved`. Take a new view after `reserve`. Invalid after `release`.

        Raises:
            SpoolFull: the system has no memory or descriptor left for it.
        """

    def reserve(self, size: int) -> None:
        """Make the first `size` bytes safe to touch.

        Raises:
            SpoolFull: there is no space for them now.
            ContentTooLarge: the store could never hold them.
        """

    def read(self, offset: int, size: int) -> bytes:
        """Return at most `size` bytes from `offset`, and none at the end. Raises ValueError after `release`."""

    def write(self, data: bytes) -> None:
        """Write the data at the start. The bytes have to be reserved."""

    def blob(self, offset: int, size: int) -> Blob:
        """Return a reference to `size` bytes from `offset`, for a message."""

    def release(self) -> None:
        """Free the bytes; workers no longer find them. Idempotent."""


class BlobStore(Protocol):
    """The front end's side: creates and accounts storage. Thread-safe: yes.

    The bytes of a segment count for the holding that it is created with; without one, they never give way to others.
    """

    @property
    def account(self) -> Account:
        """The bytes that each client holds."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all live segments."""

    @property
    def capacity_bytes(self) -> int:
        """How much the store could hold if it were empty."""

    @property
    def unusable_reason(self) -> str:
        """Why no segment can be created, or ""."""

    def check_size(self, size: int) -> None:
        """Check that one request's bytes could fit into the empty store. Raises ContentTooLarge."""

    def create(self, max_bytes: int, reserve: int = 0, holding: Holding | None = None, wait_s: float = 0.0) -> Segment:
        """Create a segment that may grow to `max_bytes`, with `reserve` bytes safe to touch. Raises SpoolFull.

        Waits at most `wait_s` for clients that were made to give way.
        """

    def create_for_upload(
        self, max_bytes: int, expected_bytes: int | None = None, holding: Holding | None = None
    ) -> Segment:
        """Create a segment for bytes that the front end writes. Raises SpoolFull.

        It, and `reserve` of the segment, may wait ROOM_WAIT_S for clients that were made to give way.

        Args:
            max_bytes: it may grow to this size.
            expected_bytes: how many bytes are known to come; None: `max_bytes`.
            holding: what its bytes count for.
        """

    def put(self, data: bytes, holding: Holding | None = None) -> Segment:
        """Create a segment with exactly these bytes. Raises SpoolFull. May wait ROOM_WAIT_S, as for an upload."""


class WorkerBlobs(Protocol):
    """The worker's side. Passed to the worker when it is started. Thread-safe: yes.

    Every method raises BlobGone when the exchange has ended and its storage was released.
    """

    def open(self, blob: Blob) -> AbstractContextManager[memoryview]:
        """Give read access to the bytes of a blob for the duration of the context."""

    def read(self, storage: str) -> bytes:
        """Return all bytes of the storage with this id."""

    def fill(self, storage: str, data: bytes | memoryview) -> None:
        """Write the announced bytes into the storage that was granted under this id."""
