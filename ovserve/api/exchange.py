"""Interface between front end and API: the request as a route sees it, and the reply it returns.

`ovserve.front` implements these protocols, so that the API never sees a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ovserve.accounts import Holding
from ovserve.api.record import End, Record
from ovserve.deadline import Deadline
from ovserve.errors import ApiError
from ovserve.wire.blobs import Blob

__all__ = [
    "Api",
    "Chunk",
    "Exchange",
    "FileReply",
    "Form",
    "JsonReply",
    "Reply",
    "RouteMatch",
    "ServerEvent",
    "StreamReply",
    "Upload",
    "Windowed",
    "windows_of",
]


class Upload(Protocol):
    """One complete uploaded file, in a spool segment until the exchange ends."""

    @property
    def name(self) -> str:
        """Field name as the client wrote it, e.g. `image[]`."""

    @property
    def filename(self) -> str | None:
        """Filename from the client; for messages only, never used as a path."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    @property
    def blob(self) -> Blob:
        """Reference to the content, for a worker."""

    def view(self) -> memoryview:
        """Return the content. Valid until the exchange ends; the caller releases slices of it."""


class Form(Protocol):
    """The fields and uploads of one request body, multipart or JSON, in the order of the body."""

    @property
    def fields(self) -> Sequence[tuple[str, Any]]:
        """(name, value) as received: text for multipart, any JSON value for JSON. Names keep their brackets."""

    @property
    def uploads(self) -> Sequence[Upload]:
        """File parts, or the data URLs of a JSON body under the names `images[k]` and `mask`."""

    @property
    def is_json(self) -> bool:
        """Whether values have JSON types; text is then not parsed as a number."""


class Exchange(Protocol):
    """One request, as a route sees it. Used by one handler thread."""

    @property
    def id(self) -> str:
        """Request id, in x-request-id, the log and the job."""

    @property
    def method(self) -> str:
        """Request method: GET, HEAD, POST, ..."""

    @property
    def path(self) -> str:
        """Path of the request target, percent-decoded once."""

    @property
    def query(self) -> Mapping[str, str]:
        """Fields of the query, the first of each name."""

    @property
    def record(self) -> Record:
        """What the API notes of the request, for its end."""

    @property
    def key_name(self) -> str:
        """Name of the request's named key; empty without one."""

    @property
    def address(self) -> str:
        """Address of the peer."""

    @property
    def is_secure(self) -> bool:
        """Whether the request has arrived over TLS."""

    @property
    def network(self) -> str:
        """Part of the address that the client cannot choose: an IPv4 address, or the /64 of an IPv6 address."""

    @property
    def key(self) -> str:
        """Fingerprint of the API key; empty without one."""

    @property
    def is_verified(self) -> bool:
        """Whether the key is one of the server's keys."""

    def take_pictures(self, model: str, count: int, aliases: Collection[str] = ()) -> None:
        """Count pictures for the request's key. Raises Forbidden and RateLimited when the key may not have them.

        Args:
            model: the model's name.
            count: how many pictures.
            aliases: other names of the model, by which the key may be limited to it.
        """

    @property
    def holding(self) -> Holding | None:
        """What the segments of the request count for; None: for no client."""

    def header(self, name: str) -> str | None:
        """Return the value of a header field by its lower-case name; lines with the same name are joined by `, `."""

    def note(self, name: str, value: str) -> None:
        """Add a field to the log line of the request. The value must be safe to log."""

    def read_form(self) -> Form:
        """Read the body. Raises ApiError (4xx, spool_full) and ClientGone. The form ends with the exchange."""

    def release_form(self) -> None:
        """Release the uploads before the exchange ends: no worker needs them any more."""

    def offer_form(self, on_release: Callable[[], None]) -> None:
        """Let the uploads be released as soon as another client needs the space, instead of ending the exchange.

        `on_release` is called in another thread before they are released.
        """

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable; return False at the deadline. Raises ClientGone if the client closes."""


class Windowed(Protocol):
    """Bytes of a reply that are produced while it is written, so that a slow reader does not hold them in memory."""

    def __len__(self) -> int:
        """Return how many bytes `windows` yields in total."""

    def windows(self) -> Iterator[bytes]:
        """Yield the bytes in windows of bounded size. Raises OSError when their source cannot be read any more."""


Chunk = bytes | memoryview | Windowed


def windows_of(chunks: Iterable[Chunk]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of all chunks in order."""
    for chunk in chunks:
        if isinstance(chunk, bytes | memoryview):
            yield chunk
        else:
            yield from chunk.windows()


def _hold_nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class JsonReply:
    """A JSON document in chunks, which are written one after another, so that pictures are not joined in memory.

    Attributes:
        close: releases what the chunks are read from. The front end calls it once, when the reply is written or cannot
            be written.
    """

    chunks: Sequence[Chunk]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    close: Callable[[], None] = _hold_nothing


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event with one line of JSON as data. With an empty kind it is a comment line with text.

    The chunks of `data` are valid until the next event is requested from the stream.
    """

    kind: str
    data: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class StreamReply:
    """Server-sent events, each written and flushed at once. The handler always closes the iterator.

    An ApiError raised by the iterator is sent as the error event, which then ends the stream properly.
    """

    events: Generator[ServerEvent, None, None]
    headers: Mapping[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Close the iterator. Idempotent."""
        self.events.close()


@dataclass(frozen=True, slots=True)
class FileReply:
    """Bytes of one media type, e.g. a stored picture or the metrics. `close` is that of `JsonReply`."""

    content: Chunk
    media_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    close: Callable[[], None] = _hold_nothing


Reply = JsonReply | StreamReply | FileReply


class RouteMatch(Protocol):
    """The route of one request. The front end reads these properties, and hands it back to `Api.answer`."""

    @property
    def is_health(self) -> bool:
        """Whether the request is a health check."""

    @property
    def is_exempt(self) -> bool:
        """Whether the request is served even at the connection limit."""

    @property
    def is_open(self) -> bool:
        """Whether the request needs no API key."""

    @property
    def is_admin(self) -> bool:
        """Whether the request needs an admin key or the admin listener."""

    @property
    def is_operator(self) -> bool:
        """Whether the request is for operators: it belongs on the admin listener if there is one."""

    @property
    def is_public(self) -> bool:
        """Whether web pages of every origin may send the request."""

    @property
    def challenge(self) -> str:
        """Value of WWW-Authenticate in the response to a request without a valid key (RFC 9110 section 11.6.1)."""

    def error_document(self, error: ApiError) -> Mapping[str, Any]:
        """Return the JSON document of an error response, in the form that the clients of this path expect."""


MatchT = TypeVar("MatchT", bound=RouteMatch)  # each API has its own kind of match


class Api(Protocol[MatchT]):
    """The API as the front end uses it."""

    def match(self, method: str, path: str) -> MatchT:
        """Find the route of a request, once for everything that depends on it. An unknown path has a match too."""

    def answer(self, exchange: Exchange, match: MatchT) -> Reply:
        """Serve one request of any method and path; HEAD like GET. Raises ApiError and ClientGone."""

    def count_refused(self, error: ApiError) -> None:
        """Count a request that was rejected with this error and did not reach `answer`."""

    def note_end(self, exchange: Exchange, match: MatchT, end: End) -> None:
        """Count a request whose response has been written, or could not be written. Called once for each exchange."""
