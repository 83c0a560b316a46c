"""A request body in a spool segment, received as it arrives, and the form whose uploads are places in that segment.

    socket ──readinto──▶ segment.view[filled:] ──window──▶ parser

No byte of an upload is copied after it was received. The segment grows with what has come in, never by what a head promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ovserve.errors import ContentTooLarge
from ovserve.wire.blobs import Blob
from ovserve.wire.local.spool import Segment, Spool

__all__ = ["Body", "SpooledForm", "SpooledUpload", "receive"]

RECEIVE_BYTES = 1024 * 1024  # received and parsed at once: few waits, and the bytes are still in a cache near by
FIRST_BYTES = 16 * 1024  # on the heap: what a client may keep us waiting for before it costs room in the spool
GROWTH_BYTES = (256 * 1024, 1024 * 1024)  # how far a segment is reserved ahead of what has come in: at first, at most


class Body(Protocol):
    """The content of a request, without its framing."""

    @property
    def expected(self) -> int | None:
        """Bytes in all, where the head says so."""

    def readinto(self, view: memoryview, /) -> int:
        """Receive into `view`, which is not empty; the number of bytes, 0 at the end. Raises ApiError and ClientGone."""


@dataclass(frozen=True, slots=True)
class SpooledUpload:
    """One uploaded file: `size` bytes from `offset` in a segment of the form."""

    name: str
    filename: str | None
    segment: Segment
    offset: int
    size: int

    @property
    def blob(self) -> Blob:
        """Where its bytes lie, for a worker."""
        return self.segment.blob(self.offset, self.size)

    def view(self) -> memoryview:
        """Its bytes. Valid until the form is released; the caller releases what it slices."""
        return self.segment.view[self.offset : self.offset + self.size]


class SpooledForm:
    """Fields and uploads of one body, in the order of the body, as `api.exchange.Form` asks; owns their segments.

    Thread-safe: no; it lives in one handler thread.
    """

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json
        self._segments: list[Segment] = []
        self.fields: list[tuple[str, Any]] = []
        self.uploads: list[SpooledUpload] = []

    @property
    def is_json(self) -> bool:
        """Whether values have JSON types."""
        return self._is_json

    def own(self, segment: Segment) -> Segment:
        """Release this segment with the form."""
        self._segments.append(segment)
        return segment

    def release(self) -> None:
        """Give the segments back. Safe to call twice."""
        while self._segments:
            self._segments.pop().release()


def receive(body: Body, form: SpooledForm, spool: Spool, limit: int) -> Iterator[tuple[Segment, int, int]]:
    """Receive the body into one segment of the form; yields the segment, and begin and end of each piece in it.

    A head alone reserves nothing: there is a segment when the first bytes have come, and it grows with those that follow.

    Raises ContentTooLarge beyond `limit` bytes or what the spool can hold, SpoolFull, and what `body.readinto` raises.
    """
    ceiling = limit if body.expected is None else min(body.expected, limit)
    if body.expected is not None:
        spool.check_size(ceiling)  # before it has filled the spool, and taken the room of others
    first = memoryview(bytearray(min(FIRST_BYTES, ceiling)))
    filled = body.readinto(first) if ceiling else 0
    if not filled:
        return
    # Without a length in the head, no more is known to come than has come.
    segment = form.own(spool.create_for_upload(ceiling, filled if body.expected is None else ceiling))
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
