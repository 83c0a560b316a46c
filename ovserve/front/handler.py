"""Serves one connection: HTTP/1.1 exchanges in order, Expect, timeouts, and errors as responses.

    receive head ──▶ answer (route, which may read the form) ──▶ write reply ──▶ discard unread body ──▶ next request
         │                    │
         └── reject ──────────┴──▶ error response ──▶ linger (ovserve.front.linger)

Runs in: the connection's own thread. Every wait has a limit; the wait for a job, which may be long, ends when the
client closes.
"""

from __future__ import annotations

import itertools
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

from ovserve.accounts import Holding
from ovserve.api.exchange import (
    Chunk,
    FileReply,
    JsonReply,
    Reply,
    RouteMatch,
    ServerEvent,
    StreamReply,
    windows_of,
)
from ovserve.errors import ApiError, ClientGone, MalformedRequest, RequestTimeout
from ovserve.front.body import Body
from ovserve.front.context import ConnectionContext
from ovserve.front.exchange import CLIENT_GONE, HttpExchange, log_access, log_bug
from ovserve.front.http1.events import encode_event
from ovserve.front.http1.head import METHODS, Head, HeadParser
from ovserve.front.http1.proxyheader import ProxyHeader
from ovserve.front.http1.response import (
    CONTINUE,
    JSON_TYPE,
    NO_CONTENT,
    error_content,
    error_fields,
    reason_phrase,
)
from ovserve.front.request import escape_for_log, network_of, new_request_id
from ovserve.front.run_token import RunHandle
from ovserve.front.tls import log_failed_handshake
from ovserve.front.transport import Transport
from ovserve.logs import fields

__all__ = ["Connection"]

# Some clients send an extra line break after a body. It does not begin a request (RFC 9112 section 2.2), so the
# connection still counts as idle.
NO_REQUEST_YET = (b"", b"\r", b"\r\n")
LAST_CHUNK = b"0\r\n\r\n"
BATCH_BYTES = 256 * 1024  # responses are produced and sent in pieces of about this size
# The answer to OPTIONS *, which is about the server as a whole: RFC 9110 section 9.3.7.
SERVER_OPTIONS = FileReply(b"", "", 204, {"Allow": ", ".join(sorted(METHODS))})
EVENTS_TYPE = "text/event-stream"
# Without these, proxies buffer events: X-Accel-Buffering is nginx's switch.
STREAM_FIELDS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger(__name__)


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
        certificates = context.certificates
        stream = certificates.wrap(connection) if certificates else connection
        self._run_handle = RunHandle(context.run_token)
        self.transport = Transport(stream, context.settings.write_timeout_s, self._run_handle)
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
            if self._read_proxy_header() and (not self.transport.is_secure or self._shake_hands()):
                self._run_handle.acquire()
                while self._serve_one():
                    pass
                self.transport.end()
        except ClientGone as gone:
            log.debug("connection lost", extra=fields(address=self._address, why=str(gone)))
        finally:
            self._clear_idle()
            self._run_handle.release()

    def _read_proxy_header(self) -> bool:
        """Read the header of the PROXY protocol, if the peer sends one; return whether the connection goes on.

        From then on, the client's address counts in place of the proxy's. Raises ClientGone.
        """
        if not self._context.proxies.sends_header(self._address):
            return True
        header, plain = ProxyHeader(), Transport(self._socket, self.settings.write_timeout_s)
        end = time.monotonic() + self.settings.head_timeout_s
        try:
            while header.wanted:
                buffer = memoryview(bytearray(header.wanted))
                count = plain.fill(buffer, end - time.monotonic())
                if not count:
                    return False
                header.feed(bytes(buffer[:count]))
        except TimeoutError:
            return False  # as for a client that sends nothing
        except MalformedRequest as error:
            self._reject(error, is_answered=not self.transport.is_secure)
            return False
        self._address = header.address or self._address
        self._network = network_of(self._address)
        self.place.move(self._network)
        return True

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
        # Stays set while this connection waits for its next request: a health checker reuses its connection.
        self._run_handle.is_urgent = match.is_health
        self.in_flight = True
        exchange = HttpExchange(
            head,
            self._context.proxies.client_address(self._address, head.fields),
            transport=self.transport,
            spool=self._context.spool,
            settings=self.settings,
            end=self.end_exchange,
        )
        with self._idle_lock:
            self._exchange = exchange
        self.transport.required_rate = exchange.required_rate
        sent, sent_before = 0, self.transport.sent_bytes
        try:
            sent = self._answer(exchange, match)
        except ClientGone:
            sent = self.transport.sent_bytes - sent_before
            exchange.keeps_connection = False
            exchange.status = CLIENT_GONE
        finally:
            exchange.close()
            with self._idle_lock:
                self._exchange = None
            self.place.move(self._network)
            self.in_flight = False
            end = exchange.end(sent)
            self._context.api.note_end(exchange, match, end)
            if log.isEnabledFor(logging.INFO):
                log_access(exchange, end)
        return self._finish_exchange(exchange)

    def _read_head(self) -> Head | None:
        """Return the next head; None when the connection ends between requests. Raises ApiError and ClientGone."""
        # Otherwise a client that always has its next request ready would keep the token from the others.
        self._run_handle.yield_to_waiters()
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
            if exchange.body is not None:
                exchange.body.check_size()
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
            return self._write_error(exchange, match, log_bug(exchange, error))

    def _check_access(self, exchange: HttpExchange, match: RouteMatch) -> None:
        try:
            self._context.access.check(exchange, match)
            exchange.begin_for_key()
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
            headers={**exchange.key_fields(), **headers},
            origin=exchange.header("origin"),
        )
        has_content = exchange.method != "HEAD" and status not in NO_CONTENT
        batches = _batches([head, *chunks] if has_content else [head])
        first = next(batches)  # before anything is sent, so that a failure can still become an error response
        exchange.begin_response(status)
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
            headers={**STREAM_FIELDS, **exchange.key_fields(), **reply.headers},
            origin=exchange.header("origin"),
        )
        exchange.begin_response(200)
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

    def _reject(self, error: ApiError, *, is_answered: bool = True) -> None:
        """Answer a malformed or late head, and linger so that the client receives the answer. Raises ClientGone.

        Args:
            error: what is wrong.
            is_answered: whether the client can read an answer; before a TLS handshake it cannot.
        """
        request_id = new_request_id()
        self._context.api.count_refused(error)
        self.in_flight = True
        sent = 0
        try:
            if is_answered:
                sent = self.transport.send(self._responses.closing_error(error, request_id))
        finally:
            self.in_flight = False
        why = escape_for_log(error.message)
        self._context.rejections.log(
            log, logging.INFO, "rejected %d", error.status, bytes=sent, id=request_id, address=self._address, why=why
        )
        if is_answered:
            self._linger()


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
        yield _error_event(log_bug(exchange, error))


def _error_event(error: ApiError) -> Sequence[Chunk]:
    """Encode an error as official clients expect it: a top-level `type`, and the error object under `error`."""
    return encode_event(
        "error", [json.dumps({"type": "error", **error.body()}, ensure_ascii=False).encode("utf-8", "replace")]
    )
