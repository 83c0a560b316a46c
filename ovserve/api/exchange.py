"""What crosses between the front end and the API: the request as a route sees it, and the reply it gives back.

The protocols are defined here and implemented in `ovserve.front`, so that the API never sees a socket.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ovserve.deadline import Deadline
from ovserve.errors import ApiError
from ovserve.wire.blobs import Blob

__all__ = ["Api", "Exchange", "FileReply", "Form", "JsonReply", "Reply", "ServerEvent", "StreamReply", "Upload"]


class Upload(Protocol):
    """One uploaded file, whole, in a spool segment until the exchange ends."""

    @property
    def name(self) -> str:
        """The field's name as the client wrote it, e.g. `image[]`."""

    @property
    def filename(self) -> str | None:
        """What the client calls it; for messages only, never a path."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def blob(self) -> Blob:
        """Where its bytes lie, for a worker."""

    def view(self) -> memoryview:
        """Its bytes. Valid until the exchange ends; the caller releases what it slices."""


class Form(Protocol):
    """The fields and uploads of one request body, multipart or JSON, in the order of the body."""

    @property
    def fields(self) -> Sequence[tuple[str, Any]]:
        """(name, value) as they came: text for multipart, any JSON value for JSON. Names keep their brackets."""

    @property
    def uploads(self) -> Sequence[Upload]:
        """The file parts, or the data URLs of a JSON body under the names `images[k]` and `mask`."""

    @property
    def is_json(self) -> bool:
        """Whether values have JSON types, so that text is not read as a number."""


class Exchange(Protocol):
    """One request, as a route sees it. Lives in one handler thread."""

    @property
    def id(self) -> str:
        """The request id: in x-request-id, in the log, in the job."""

    @property
    def method(self) -> str:
        """GET, HEAD, POST, ..."""

    @property
    def path(self) -> str:
        """The path of the target, percent-decoded once."""

    @property
    def query(self) -> Mapping[str, str]:
        """The query's fields, the first of each name."""

    @property
    def address(self) -> str:
        """The peer's address."""

    @property
    def network(self) -> str:
        """The part of the address that its owner cannot choose."""

    @property
    def key(self) -> str:
        """A fingerprint of the API key; empty without one."""

    @property
    def is_verified(self) -> bool:
        """Whether the key is one of those that are known here."""

    def header(self, name: str) -> str | None:
        """A request field by its lower-case name; lines of one name joined by `, `."""

    def read_form(self) -> Form:
        """Read the body. Raises ApiError (4xx, spool_full) and ClientGone; the form ends with the exchange."""

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable; False at the deadline. Raises ClientGone as soon as the client closes."""


@dataclass(frozen=True, slots=True)
class JsonReply:
    """A JSON document. `chunks` carries it in pieces that are written one after another: pictures are never joined up."""

    chunks: Sequence[bytes | memoryview]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event: its kind, and its data as one line of JSON. Without a kind: a comment line (`data` as text)."""

    kind: str
    data: bytes


@dataclass(frozen=True, slots=True)
class StreamReply:
    """Server-sent events, each written and flushed at once. The handler always closes the iterator, however it ends.

    An ApiError out of the iterator becomes the error event, and the stream ends properly after it.
    """

    events: Generator[ServerEvent, None, None]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileReply:
    """Bytes of one media type, e.g. a stored picture, a metrics page."""

    content: bytes | memoryview
    media_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Reply = JsonReply | StreamReply | FileReply


class Api(Protocol):
    """What the front end asks of the API."""

    def answer(self, exchange: Exchange) -> Reply:
        """Serve one request of any method and path; HEAD is answered as GET. Raises ApiError and ClientGone."""

    def is_health(self, path: str) -> bool:
        """Whether this path answers even when every connection place is taken."""

    def is_open(self, method: str, path: str) -> bool:
        """Whether this is answered without an API key."""

    def count_refused(self, error: ApiError) -> None:
        """Count a request that was answered with this error before it came to `answer`."""
