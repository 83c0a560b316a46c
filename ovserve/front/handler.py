"""Serves one connection: HTTP/1.1 exchanges in order, Expect, timeouts, and errors as responses.

    receive head ──▶ answer (route, which may read the form) ──▶ write reply ──▶ discard unread body ──▶ next request
         │                    │
         └── reject ──────────┴──▶ error response ──▶ linger (ovserve.front.linger)

Runs in: the connection's own thread. Every wait has a limit; the wait for a job, which may be long, ends when the
client closes.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ovserve.accounts import Holding
from ovserve.api.exchange import (
    Api,
    Chunk,
    FileReply,
    JsonReply,
    Reply,
    RouteMatch,
    ServerEvent,
    StreamReply,
    windows_of,
)
from ovserve.deadline import Deadline
from ovserve.errors import (
    ApiError,
    ClientGone,
    InternalError,
    LengthRequired,
    MalformedRequest,
    RequestTimeout,
    SpoolFull,
    UnsupportedMediaType,
)
from ovserve.front.access import Access
from ovserve.front.body import Body
from ovserve.front.forms.form import read_form
from ovserve.front.forms.spooled import SpooledForm
from ovserve.front.http1.events import encode_event
from ovserve.front.http1.forwarded import TrustedProxies
from ovserve.front.http1.head import METHODS, Head, HeadParser
from ovserve.front.http1.response import (
    CONTINUE,
    JSON_TYPE,
    NO_CONTENT,
    Responses,
    error_content,
    error_fields,
    reason_phrase,
)
from ovserve.front.linger import Linger
from ovserve.front.request import Request, escape_for_log, internal_error, network_of, new_request_id
from ovserve.front.tls import Certificates
from ovserve.front.transport import Transport
from ovserve.logs import LogLimit, fields
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore

__all__ = ["Connection", "ConnectionContext", "log_failed_handshake"]

MAX_DISCARD_BYTES = (
    64 * 1024
)  # read and drop up to this much of an unread body to keep the connection; beyond it, close
CLIENT_GONE = 499  # status in the log when the client left before it was answered
# Some clients send an extra line break after a body. It does not begin a request (RFC 9112 section 2.2), so the
# connection still counts as idle.
NO_REQUEST_YET = (b"", b"\r", b"\r\n")
ENDED_RETRY_S = 2  # Retry-After of a request that gave way to another client
LAST_CHUNK = b"0\r\n\r\n"
BATCH_BYTES = 256 * 1024  # responses are produced and sent in pieces of about this size
# The answer to OPTIONS *, which is about the server as a whole: RFC 9110 section 9.3.7.
SERVER_OPTIONS = FileReply(b"", "", 204, {"Allow": ", ".join(sorted(METHODS))})
EVENTS_TYPE = "text/event-stream"
# Without these, proxies buffer events: X-Accel-Buffering is nginx's switch.
STREAM_FIELDS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger(__name__)


class ConnectionContext(Protocol):
    """What the connections of one listener share; the listener implements it."""

    @property
    def settings(self) -> Settings:
        """The limits."""

    @property
    def api(self) -> Api[Any]:
        """Answers requests."""

    @property
    def spool(self) -> BlobStore:
        """Stores uploads."""

    @property
    def responses(self) -> Responses:
        """Encodes response heads."""

    @property
    def access(self) -> Access:
        """Decides which requests are served."""

    @property
    def proxies(self) -> TrustedProxies:
        """The reverse proxies whose forwarded fields count."""

    @property
    def certificates(self) -> Certificates | None:
        """The certificate for connections with TLS; None: connections without TLS."""

    @property
    def linger(self) -> Linger:
        """Takes over connections whose client may still send after the answer."""

    @property
    def rejections(self) -> LogLimit:
        """Limits the log lines of rejected connections."""

    @property
    def closes_connections(self) -> bool:
        """Whether responses close their connections, because the server will drain soon."""

    @property
    def is_draining(self) -> bool:
        """Whether each connection ends after its current exchange."""


class HttpExchange(Request):
    """One exchange of a connection; implements `api.exchange.Exchange`."""

    def __init__(self, connection: Connection, head: Head, address: str) -> None:
        super().__init__(head, address, is_secure=connection.is_secure)
        self._connection = connection
        self._form: SpooledForm | None = None
        self.body: Body | None = None
        self.status = 0  # of the response whose head has been written
        self.error: ApiError | None = None  # sent to the client, as a response or as the last event of a stream
        self.keeps_connection = head.keep_alive
        self.is_rejected = False  # with an error after which the bytes that follow cannot be parsed reliably
        self.ended_by: ApiError | None = None  # why the exchange has to end early, to make room for another client
        self._holding: Holding | None = None
        self._on_release: Callable[[], None] | None = None  # the form was offered

    @property
    def holding(self) -> Holding:
        """What its segments count for. The first use is after the access check, which knows the client."""
        if self._holding is None:
            error = SpoolFull(
                "This request gave way: its client holds more than its share of the spool, and another one waits.",
                retry_after_s=ENDED_RETRY_S,
            )
            end = functools.partial(self._connection.end_exchange, self, error)
            self._holding = self._connection.spool.account.open(self.client, end)
        return self._holding

    def required_rate(self) -> float:
        """Return the bytes a second that the client has to transfer now because of what it holds; 0 for none."""
        return self._holding.required_rate() if self._holding is not None else 0.0

    def check_ended(self) -> None:
        """Raise the error with which the exchange has to end early, if it has to."""
        if self.ended_by is not None:
            raise self.ended_by

    def read_form(self) -> SpooledForm:
        """Return the form, which lives until the exchange ends; the first call reads the body.

        Raises:
            ApiError: the body is malformed, over a limit, too slow, or of an unsupported type.
            ClientGone: the connection ended before the body did.
        """
        if self._form is None:
            coding = self.header("content-encoding")
            if coding and coding.lower() != "identity":
                raise UnsupportedMediaType(
                    f"Content-Encoding {coding[:40]!r} is not supported; send the body without a content coding",
                    headers={"Accept-Encoding": "identity"},
                )
            if self.head.content_length is None and not self.head.is_chunked:
                raise LengthRequired("the request has neither content-length nor transfer-encoding; send one of them")
            if self.body is None:
                raise ValueError("the exchange has ended")
            settings, spool = self._connection.settings, self._connection.spool
            self._form = read_form(self.body, self.header("content-type"), spool, settings, self.holding)
        return self._form

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable, and return False at the deadline.

        Raises:
            ClientGone: the client closes, or has closed.
            ApiError: the exchange has to end early.
        """
        self.check_ended()
        return self._connection.transport.wait(descriptor, deadline)

    def can_keep(self) -> bool:
        """Return whether the connection persists: the client allows it, and the unread body is short enough."""
        body = self.body
        if not self.keeps_connection or body is None or body.is_complete:
            return self.keeps_connection
        # A client that waits for 100 may or may not send the body (RFC 9110 section 10.1.1); a chunked body has no
        # known length.
        return (
            body.expected is not None
            and body.expected - body.received <= MAX_DISCARD_BYTES
            and not self.head.expects_continue
        )

    def release_form(self) -> None:
        """Release the spool segments of the form."""
        if self._form is not None:
            self._form.release()

    def offer_form(self, on_release: Callable[[], None]) -> None:
        """Let the form be released instead of ending the exchange; `on_release` is called before."""
        self._on_release = on_release

    def give_way(self, error: ApiError) -> bool:
        """Release the form if it was offered, else note the error to end with; return whether the exchange goes on.

        Runs in: the thread of another client.
        """
        on_release, self._on_release = self._on_release, None
        if on_release is None or self._form is None or self._holding is None:
            self.ended_by = self.ended_by or error
            return False
        self._holding.keep()  # before it gives back: that wakes the client that needs the room
        on_release()
        self._form.release()
        return True

    def close(self) -> None:
        """End the exchange: it no longer gives way to others."""
        self.release_form()
        if self._holding is not None:
            self._holding.close()


class Connection:
    """One accepted connection.

    Thread-safe: only `quiet_since`, `in_flight`, `close_quiet`, `end_early`, `end_exchange` and `abort`, which are used
    from other threads.

    Attributes:
        place: its place among the connections; counts for the client of the current request.
        silent_since: monotonic time at which it was accepted; 0 from its first byte on.
        idle_since: monotonic time at which the connection became idle after an answer; 0 before the first answer, and
            from the first byte of the next request on.
        in_flight: whether a request's head has been received and its answer is not written yet.
    """

    def __init__(self, connection: socket.socket, address: str, context: ConnectionContext, place: Holding) -> None:
        """Take over an accepted socket; the caller closes it after `serve`. Raises OSError if the peer has gone."""
        self._socket = connection
        self._network = network_of(address)
        self.place = place
        self._address = address
        self._context = context
        self._responses = context.responses
        self.settings = context.settings
        self.spool = context.spool
        certificates = context.certificates
        self.is_secure = certificates is not None
        stream = certificates.wrap(connection) if certificates else connection
        self.transport = Transport(stream, context.settings.write_timeout_s)
        self._parser = HeadParser(context.settings)
        self._is_first = True  # no request has been received yet
        # Guards the attributes below, so that a quiet connection is either closed or serves its next request.
        self._idle_lock = threading.Lock()
        self._is_closing = False
        self._exchange: HttpExchange | None = None  # in flight
        self.silent_since = time.monotonic()
        self.idle_since = 0.0
        self.in_flight = False

    def serve(self) -> None:
        """Serve exchanges until the connection ends. Handles every error that a client can cause."""
        try:
            if not self.is_secure or self._shake_hands():
                while self._serve_one():
                    pass
                self.transport.end()
        except ClientGone as gone:
            log.debug("connection lost", extra=fields(address=self._address, why=str(gone)))
        finally:
            self._clear_idle()

    def _shake_hands(self) -> bool:
        """Complete the handshake of TLS; return whether it succeeded. Raises ClientGone."""
        try:
            self.transport.handshake(self.settings.tls_handshake_timeout_s)
        except (TimeoutError, ssl.SSLError) as error:
            if isinstance(error, ssl.SSLError) and error.reason == "HTTP_REQUEST":
                self.transport = Transport(self._socket, self.settings.write_timeout_s)
                self._reject(MalformedRequest("this port serves HTTPS; the request arrived without TLS"))
            else:
                log_failed_handshake(self._context.rejections, self._address, error)
            return False
        return True

    @property
    def quiet_since(self) -> float:
        """Monotonic time since which it waits for the first byte of a request; 0 if it does not."""
        return self.idle_since or self.silent_since

    def close_quiet(self, since: float) -> bool:
        """End the connection if it still waits for a request. Thread-safe: yes.

        A request that arrives while the connection closes is not read; the client receives a reset and may retry the
        request.

        Args:
            since: the value of `quiet_since` that the caller has seen; 0 never closes.

        Returns:
            Whether the connection ends.
        """
        with self._idle_lock:
            if not since or self.quiet_since != since or self.transport.has_unread_bytes():
                return False
            self._is_closing = True
            self._shutdown(socket.SHUT_RD)
            return True

    def end_early(self, error: ApiError) -> None:
        """End the connection, and the request in flight with this error, if its answer has not begun.

        Thread-safe: yes.
        """
        with self._idle_lock:
            self._is_closing = True
            if self._exchange is None:
                self._shutdown(socket.SHUT_RDWR)
            else:
                self._exchange.ended_by = self._exchange.ended_by or error
                self._end_locked(self._exchange)

    def end_exchange(self, exchange: HttpExchange, error: ApiError) -> None:
        """End an exchange that gives way, with this error if its answer has not begun. Thread-safe: yes."""
        with self._idle_lock:
            if self._exchange is exchange and not exchange.give_way(error):
                self._end_locked(exchange)

    def _end_locked(self, exchange: HttpExchange) -> None:
        self.transport.stop()
        if exchange.status:
            self._shutdown(socket.SHUT_RDWR)
        elif exchange.body is None or exchange.body.is_complete:
            self._shutdown(socket.SHUT_RD)  # wakes a thread that waits for a job; one that receives checks for itself

    def abort(self) -> None:
        """Shut the socket down in any state; the connection's thread then gets ClientGone. Thread-safe: yes."""
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            return  # the peer has closed already

    # --- one exchange -------------------------------------------------------------------------------------------------

    def _serve_one(self) -> bool:
        """Serve one exchange; return whether the connection persists. Raises ClientGone."""
        try:
            head = self._read_head()
        except ApiError as error:
            self._reject(error)
            return False
        if head is None:
            return False
        self._is_first = False
        match: RouteMatch = self._context.api.match(head.method, head.path)
        self.in_flight = True
        started = time.perf_counter()
        exchange = HttpExchange(self, head, self._context.proxies.client_address(self._address, head.fields))
        with self._idle_lock:
            self._exchange = exchange
        self.transport.required_rate = exchange.required_rate
        sent = 0
        try:
            sent = self._answer(exchange, match)
        except ClientGone:
            exchange.keeps_connection = False
            exchange.status = CLIENT_GONE
        finally:
            exchange.close()
            with self._idle_lock:
                self._exchange = None
            self.place.move(self._network)
            self.in_flight = False
            if log.isEnabledFor(logging.INFO):
                _log_access(exchange, sent, started)
        return self._finish_exchange(exchange)

    def _read_head(self) -> Head | None:
        """Return the next head; None when the connection ends between requests. Raises ApiError and ClientGone."""
        transport, settings = self.transport, self.settings
        data = transport.take_pending()
        end = time.monotonic() + (settings.head_timeout_s if self._is_first else settings.idle_timeout_s)
        while data in NO_REQUEST_YET:
            if not self._is_first:  # a new connection is not idle yet: its first request is served even while draining
                self.idle_since = self.idle_since or time.monotonic()
            if self._context.is_draining and self.idle_since:
                return None
            try:
                transport.wait_readable(end - time.monotonic(), self._clear_idle)
                if self._is_closing:
                    return None
                more = transport.receive(end - time.monotonic())
            except TimeoutError:
                return None
            if not more:
                return None
            data += more
        head = self._parser.parse(data)
        if head is None:
            end = time.monotonic() + settings.head_timeout_s
            while head is None:
                try:
                    more = transport.receive(end - time.monotonic())
                except TimeoutError:
                    raise RequestTimeout(
                        f"the head took longer than the {settings.head_timeout_s:g} s allowed"
                    ) from None
                if not more:
                    raise MalformedRequest("the connection ended in the middle of the head")
                data += more
                head = self._parser.parse(data)
        if head.size < len(data):
            transport.unread(data, head.size)
        return head

    def _clear_idle(self) -> None:
        with self._idle_lock:
            self.idle_since = self.silent_since = 0.0

    def _answer(self, exchange: HttpExchange, match: RouteMatch) -> int:
        """Answer the request and return the bytes written. Only here do errors of a request become responses."""
        head = exchange.head
        try:
            if head.is_chunked or head.content_length is not None:
                go_on = self._send_continue if head.expects_continue else None
                exchange.body = Body(
                    self.transport,
                    head,
                    self.settings,
                    go_on,
                    lambda: self._context.is_draining,
                    required_rate=exchange.required_rate,
                    check_ended=exchange.check_ended,
                )
            self._check_access(exchange, match)
            self.place.move(exchange.client)
            reply = SERVER_OPTIONS if head.path == "*" else self._context.api.answer(exchange, match)
            try:
                exchange.check_ended()
                if not isinstance(reply, StreamReply):
                    exchange.release_form()  # so that a client that reads slowly does not keep its upload in the spool
                return self._write(exchange, reply)
            finally:
                reply.close()
        except ApiError as error:
            if error.status >= 500:
                log.warning("%s", escape_for_log(error.message), extra=fields(id=exchange.id, code=error.code))
            return self._write_error(exchange, match, error)
        except ClientGone:
            if exchange.ended_by is None or exchange.status:
                raise
            return self._write_error(exchange, match, exchange.ended_by)  # the client is still there
        except Exception as error:  # noqa: BLE001 - on a bug, the client gets an answer and the thread continues
            return self._write_error(exchange, match, _log_bug(exchange, error))

    def _check_access(self, exchange: HttpExchange, match: RouteMatch) -> None:
        try:
            self._context.access.check(exchange, match)
        except ApiError as error:
            self._context.api.count_refused(error)
            raise

    def _finish_exchange(self, exchange: HttpExchange) -> bool:
        """Discard what is left of the body, or linger; return whether the connection persists. Raises ClientGone."""
        body = exchange.body
        is_unread = body is not None and not body.is_complete
        if exchange.keeps_connection and body is not None and is_unread:
            try:
                body.discard()
            except ApiError:
                is_unread, exchange.keeps_connection = True, False
        if exchange.keeps_connection:
            return True
        if exchange.status != CLIENT_GONE and (is_unread or exchange.is_rejected or self.transport.has_pending):
            self._linger()
        return False

    def _linger(self) -> None:
        """Give the socket away: closing it now could reset the connection before the client has read the answer."""
        self.transport.end()
        self._context.linger.add(self._socket)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write(self, exchange: HttpExchange, reply: Reply) -> int:
        if isinstance(reply, JsonReply):
            return self._write_whole(exchange, reply.status, JSON_TYPE, reply.chunks, reply.headers)
        if isinstance(reply, StreamReply):
            return self._write_stream(exchange, reply)
        return self._write_whole(exchange, reply.status, reply.media_type, [reply.content], reply.headers)

    def _write_error(self, exchange: HttpExchange, match: RouteMatch, error: ApiError) -> int:
        """Write the error as the response, in the form of the route.

        Raises ClientGone if a response head was sent: the connection can only be closed.
        """
        if exchange.status:
            raise ClientGone("an error occurred after the response had begun")
        exchange.error = error
        if error is exchange.ended_by:
            exchange.keeps_connection = False
        if error.closes_connection:
            exchange.is_rejected, exchange.keeps_connection = True, False
        content = [error_content(match.error_document(error))]
        fields = error_fields(error, match.challenge)
        return self._write_whole(exchange, error.status, JSON_TYPE, content, fields, reason=reason_phrase(error))

    def _write_whole(
        self,
        exchange: HttpExchange,
        status: int,
        media_type: str,
        chunks: Sequence[Chunk],
        headers: Mapping[str, str],
        *,
        reason: bytes = b"",
    ) -> int:
        """Write a response of known length, a short one in one system call when the socket accepts it.

        Raises:
            ClientGone: the client is gone, or reads too slowly.
            OSError: reading the content failed.
        """
        length = sum(map(len, chunks))
        head = self._responses.head(
            status,
            exchange.id,
            reason=reason,
            media_type=media_type,
            framing=b"" if status in NO_CONTENT else b"Content-Length: %d\r\n" % length,
            connection=self._connection_field(exchange),
            headers=headers,
            origin=exchange.header("origin"),
        )
        has_content = exchange.method != "HEAD" and status not in NO_CONTENT
        batches = _batches([head, *chunks] if has_content else [head])
        first = next(batches)  # before anything is sent, so that a failure can still become an error response
        exchange.status = status
        return self.transport.send_batches(itertools.chain([first], batches))

    def _write_stream(self, exchange: HttpExchange, reply: StreamReply) -> int:
        """Write server-sent events as they are produced. An error before the first one becomes an error response."""
        events = reply.events
        first = next(events, None)
        is_chunked = exchange.head.version != "1.0"
        if not is_chunked:
            exchange.keeps_connection = False  # without chunks, the stream ends with the connection
        head = self._responses.head(
            200,
            exchange.id,
            media_type=EVENTS_TYPE,
            framing=b"Transfer-Encoding: chunked\r\n" if is_chunked else b"",
            connection=self._connection_field(exchange),
            headers={**STREAM_FIELDS, **reply.headers},
            origin=exchange.header("origin"),
        )
        exchange.status = 200
        if exchange.method == "HEAD":
            return self.transport.send([head])
        sent = self.transport.send([head])
        for block in _encode_events(first, events, exchange):
            framed = [b"%x\r\n" % sum(map(len, block)), *block, b"\r\n"] if is_chunked else block
            sent += self.transport.send_batches(_batches(framed))
        return sent + (self.transport.send([LAST_CHUNK]) if is_chunked else 0)

    def _connection_field(self, exchange: HttpExchange) -> bytes:
        """Decide whether the connection persists, and return its Connection field line."""
        if not exchange.can_keep() or self._context.closes_connections or self._context.is_draining:
            exchange.keeps_connection = False
            return b"Connection: close\r\n"
        return b"Connection: keep-alive\r\n" if exchange.head.version == "1.0" else b""

    def _send_continue(self) -> None:
        if not self.transport.has_pending:
            self.transport.send([CONTINUE])

    def _reject(self, error: ApiError) -> None:
        """Answer a malformed or late head, and linger so that the client receives the answer. Raises ClientGone."""
        request_id = new_request_id()
        self._context.api.count_refused(error)
        self.in_flight = True
        try:
            sent = self.transport.send(self._responses.closing_error(error, request_id))
        finally:
            self.in_flight = False
        why = escape_for_log(error.message)
        self._context.rejections.log(
            log, logging.INFO, "rejected %d", error.status, bytes=sent, id=request_id, address=self._address, why=why
        )
        self._linger()


def log_failed_handshake(limit: LogLimit, address: str, error: OSError) -> None:
    """Log why a TLS handshake failed: the peer is no HTTPS client, does not trust the certificate, or is too slow."""
    why = getattr(error, "reason", None) or str(error)
    limit.log(log, logging.INFO, "TLS handshake failed", address=address, why=escape_for_log(str(why)))


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[bytes | memoryview]]:
    """Yield the bytes of a response in batches, so that at most one batch and one window are in memory."""
    batch: list[bytes | memoryview] = []
    size = 0
    for window in windows_of(chunks):
        batch.append(window)
        size += len(window)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_events(
    first: ServerEvent | None, events: Generator[ServerEvent, None, None], exchange: HttpExchange
) -> Generator[Sequence[Chunk], None, None]:
    """Yield the bytes of each event; an error becomes the last event. Raises ClientGone."""
    if first is None:
        return
    yield encode_event(first.kind, first.data)
    try:
        for item in events:
            yield encode_event(item.kind, item.data)
    except ClientGone:
        raise
    except ApiError as error:
        exchange.error = error
        yield _error_event(error)
    except Exception as error:  # noqa: BLE001 - on a bug, the stream ends with an error event and the thread continues
        yield _error_event(_log_bug(exchange, error))


def _error_event(error: ApiError) -> Sequence[Chunk]:
    """Encode an error as official clients expect it: a top-level `type`, and the error object under `error`."""
    return encode_event(
        "error", [json.dumps({"type": "error", **error.body()}, ensure_ascii=False).encode("utf-8", "replace")]
    )


def _log_bug(exchange: HttpExchange, error: Exception) -> InternalError:
    """Log an unexpected exception with its traceback, and return the error for the client."""
    log.error("unexpected error", extra=fields(id=exchange.id), exc_info=error)
    return internal_error(exchange.id)


def _log_access(exchange: HttpExchange, sent: int, started: float) -> None:
    """Log one line for a request. The path stays percent-encoded, which makes it safe to log."""
    log_fields: dict[str, object] = {
        "bytes": sent,
        "ms": round((time.perf_counter() - started) * 1000, 1),
        "id": exchange.id,
        "address": exchange.address,
        **exchange.notes,
    }
    if exchange.key:
        log_fields["key"] = exchange.key
    if exchange.client_request_id:
        log_fields["client_id"] = exchange.client_request_id
    if exchange.error is not None:
        log_fields["code"] = exchange.error.code
        if exchange.error.param:
            log_fields["param"] = escape_for_log(exchange.error.param)
        log_fields["why"] = escape_for_log(exchange.error.message)
    path = exchange.head.target.partition("?")[0]
    log.info("%s %s %d", exchange.method, path, exchange.status, extra=fields(**log_fields))
