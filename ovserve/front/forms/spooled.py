"""Receiver for a request body in a spool segment, and the form whose uploads are ranges of that segment.

    socket ──readinto──▶ segment.view[filled:] ──window──▶ parser

No byte of an upload is copied after it was received. It grows with the received bytes, not to the announced length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ovserve.accounts import Holding
from ovserve.errors import ContentTooLarge
from ovserve.wire.blobs import Blob, BlobStore, Segment

__all__ = ["Body", "SpooledForm", "SpooledUpload", "receive"]

RECEIVE_BYTES = 1024 * 1024  # received and parsed in one step: few waits, and the bytes are still in the CPU's cache
FIRST_BYTES = 16 * 1024  # received on the heap, so that a client that sends nothing takes no space in the spool
GROWTH_BYTES = (256 * 1024, 1024 * 1024)  # reserved ahead of the received bytes: at first, at most


class Body(Protocol):
    """The content of a request, without its framing."""

    @property
    def expected(self) -> int | None:
        """The total number of bytes, or None when the head does not announce it."""

    def readinto(self, view: memoryview, /) -> int:
        """Receive into `view`, which must not be empty, and return the byte count, 0 at the end.

        Raises ApiError and ClientGone.
        """


@dataclass(frozen=True, slots=True)
class SpooledUpload:
    """An uploaded file: `size` bytes from `offset` in a segment of the form."""

    name: str
    filename: str | None
    segment: Segment
    offset: int
    size: int

    @property
    def blob(self) -> Blob:
        """The location of its bytes, for a worker."""
        return self.segment.blob(self.offset, self.size)

    def view(self) -> memoryview:
        """Return its bytes. The view is valid until the form is released; the caller must release its slices."""
        return self.segment.view[self.offset : self.offset + self.size]


class SpooledForm:
    """Fields and uploads of one body, in its order. Owns their segments; implements `api.exchange.Form`.

    Thread-safe: no; used by one handler thread. Only `release` may be called by another one, which then uses no view.
    """

    def __init__(self, *, is_json: bool, holding: Holding | None = None) -> None:
        self._is_json = is_json
        self.holding = holding  # what its segments count for
        self._segments: list[Segment] = []
        self.fields: list[tuple[str, Any]] = []
        self.uploads: list[SpooledUpload] = []

    @property
    def is_json(self) -> bool:
        """Whether the values have JSON types."""
        return self._is_json

    def own(self, segment: Segment) -> Segment:
        """Make the form the owner of a segment: it is released with the form."""
        self._segments.append(segment)
        return segment

    def release(self) -> None:
        """Release the segments. Idempotent."""
        with contextlib.suppress(IndexError):  # two threads may release it
            while True:
                self._segments.pop().release()


def receive(body: Body, form: SpooledForm, spool: BlobStore, limit: int) -> Iterator[tuple[Segment, int, int]]:
    """Receive the body into one segment of the form.

    A head alone reserves nothing: the segment is created when the first bytes have arrived, and grows as more arrive.

    Yields:
        The segment, and the begin and the end of each piece in it.

    Raises:
        ContentTooLarge: the body is larger than `limit` bytes or than the spool.
        SpoolFull: the spool has no space at present.
        ApiError, ClientGone: raised by `body.readinto`.
    """
    ceiling = limit if body.expected is None else min(body.expected, limit)
    if body.expected is not None:
        spool.check_size(ceiling)  # fail before the body takes the space of other requests
    first = memoryview(bytearray(min(FIRST_BYTES, ceiling)))
    filled = body.readinto(first) if ceiling else 0
    if not filled:
        return
    # Without an announced length, only the bytes received so far are certain.
    expected = filled if body.expected is None else ceiling
    segment = form.own(spool.create_for_upload(ceiling, expected, form.holding))
    segment.reserve(min(ceiling, GROWTH_BYTES[0]))
    segment.view[:filled] = first[:filled]
    yield segment, 0, filled
    while filled < ceiling:
        if filled >= segment.reserved:
            segment.reserve(min(ceiling, filled + min(filled, GROWTH_BYTES[1])))
        with segment.view[filled : min(segment.reserved, ceiling, filled + RECEIVE_BYTES)] as free:
            count = body.readinto(free)
        if not count:
            return
        yield segment, filled, filled + count
        filled += count
    if body.readinto(memoryview(bytearray(1))):
        raise ContentTooLarge(f"the body is larger than {ceiling} bytes")
