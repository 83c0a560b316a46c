"""One connection: HTTP/1.1 exchanges in order, Expect, timeouts, error to response.

    receive head ──▶ answer (route, which may read the form) ──▶ write reply ──▶ drop what is left of the body ──▶ again
         │                    │
         └── refusal ──▶ error response, writing side closed, what still comes read and dropped, closed

Runs in: the connection's own thread. Every wait has a limit; the one that may be long, for a job, watches the client.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from ovserve.api.exchange import Api, FileReply, JsonReply, Reply, ServerEvent, StreamReply
from ovserve.deadline import Deadline
from ovserve.errors import (
    ApiError,
    ClientGone,
    InternalError,
    LengthRequired,
    MalformedRequest,
    RequestTimeout,
    UnsupportedMediaType,
)
from ovserve.front.body import Body
from ovserve.front.forms.form import read_form
from ovserve.front.forms.spooled import SpooledForm
from ovserve.front.http1.events import encode_event
from ovserve.front.http1.head import METHODS, Head, HeadParser
from ovserve.front.http1.response import CONTINUE, JSON_TYPE, NO_CONTENT, Responses, error_content, error_fields
from ovserve.front.keys import Keys
from ovserve.front.request import Request, failed, harmless, new_request_id
from ovserve.front.transport import Transport
from ovserve.front.turns import Turn, Turns
from ovserve.logs import fields
from ovserve.settings.options import Settings
from ovserve.wire.local.spool import Spool

__all__ = ["Connection", "Host"]

DRAIN_BYTES = 64 * 1024  # of an unread body: less is cheaper to receive than a new connection is to make
CLIENT_GONE = 499  # for the log: nothing was answered
# An empty line before a request is passed over (RFC 9112 section 2.2). Alone it is none: some clients send one after a body.
NOTHING_YET = (b"", b"\r", b"\r\n")
LAST_CHUNK = b"0\r\n\r\n"
# The answer to OPTIONS *, which asks about the server and not about a resource: RFC 9110 section 9.3.7.
SERVER_OPTIONS = FileReply(b"", "", 204, {"Allow": ", ".join(sorted(METHODS))})
EVENTS_TYPE = "text/event-stream"
# Proxies hold events back unless told not to: X-Accel-Buffering is nginx's switch.
STREAM_FIELDS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger(__name__)


class Host(Protocol):
    """What a connection asks of its listener."""

    @property
    def settings(self) -> Settings:
        """The limits."""

    @property
    def api(self) -> Api:
        """Who answers."""

    @property
    def spool(self) -> Spool:
        """Where uploads go."""

    @property
    def responses(self) -> Responses:
        """Who makes response heads."""

    @property
    def keys(self) -> Keys:
        """Who may ask."""

    @property
    def turns(self) -> Turns:
        """By which its threads take turns."""

    @property
    def is_draining(self) -> bool:
        """Whether connections end with their exchange."""


class HttpExchange(Request):
    """One exchange of a connection: `api.exchange.Exchange`."""

    def __init__(self, connection: Connection, head: Head, address: str) -> None:
        super().__init__(head, address)
        self._connection = connection
        self._form: SpooledForm | None = None
        self.body: Body | None = None
        self.status = 0  # of the response whose head is written
        self.error: ApiError | None = None  # that was answered, in a response or at the end of a stream
        self.keeps_connection = head.keep_alive
        self.is_refused = False  # with an error after which the rest of the connection cannot be trusted

    def read_form(self) -> SpooledForm:
        """Read the body, once; the form lives until the exchange ends. Raises ApiError and ClientGone."""
        if self._form is None:
            coding = self.header("content-encoding")
            if coding and coding.lower() != "identity":
                raise UnsupportedMediaType(
                    f"Content-Encoding {coding[:40]!r}: bodies are taken as they are",
                    headers={"Accept-Encoding": "identity"},
                )
            if self.head.content_length is None and not self.head.is_chunked:
                raise LengthRequired("the request has neither content-length nor transfer-encoding")
            if self.body is None:
                raise ValueError("the exchange has ended")
            settings, spool = self._connection.settings, self._connection.spool
            self._form = read_form(self.body, self.header("content-type"), spool, settings)
        return self._form

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable; False at the deadline. Raises ClientGone as soon as the client closes."""
        return self._connection.transport.wait(descriptor, deadline)

    def can_keep(self) -> bool:
        """Whether the connection can serve another request, as far as the unread body goes."""
        body = self.body
        if not self.keeps_connection or body is None or body.is_complete:
            return self.keeps_connection
        # A client that waits for 100 may send the body or not: RFC 9110 section 10.1.1. A chunked one has no known end.
        return (
            body.expected is not None
            and body.expected - body.received <= DRAIN_BYTES
            and not self.head.expects_continue
        )

    def release(self) -> None:
        """Give the form's segments back."""
        if self._form is not None:
            self._form.release()


class Connection:
    """One accepted connection. Thread-safe: `idle_since`, `in_flight`, `close_idle` and `cut` are for the listener's threads.

    Attributes:
        idle_since: when its last answer had been written, if nothing of another request has come since; else 0.
        in_flight: a request's head has come, and its answer is not written yet.
    """

    def __init__(self, connection: socket.socket, address: str, host: Host) -> None:
        self._socket = connection
        self._address = address
        self._host = host
        self._responses = host.responses
        self.settings = host.settings
        self.spool = host.spool
        self._turn = Turn(host.turns)
        self.transport = Transport(connection, host.settings.write_timeout_s, self._turn)
        self._parser = HeadParser(host.settings)
        self._is_fresh = True
        self._idle_lock = (
            threading.Lock()
        )  # over `idle_since` and `_is_leaving`: a connection is either closed or goes on
        self._is_leaving = False
        self.idle_since = 0.0
        self.in_flight = False

    def serve(self) -> None:
        """Serve exchanges until the connection ends. Raises nothing that a client can cause."""
        self._turn.take()
        try:
            while self._serve_one():
                pass
        except ClientGone as gone:
            log.debug("connection lost", extra=fields(address=self._address, why=str(gone)))
        finally:
            self._wake()
            self._turn.give()

    def close_idle(self, since: float) -> bool:
        """End the connection if it has been idle since then, and is; else it is left alone. Thread-safe: yes.

        A request that comes while it is closed is not read: the client is told by a reset, and may send it again elsewhere.
        """
        with self._idle_lock:
            if not since or self.idle_since != since or self.transport.has_arrived():
                return False
            self._is_leaving = True
            self._shutdown(socket.SHUT_RD)
            return True

    def cut(self) -> None:
        """End the connection, whatever it is doing: its thread meets ClientGone. Thread-safe: yes."""
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            return  # it has ended by itself

    # --- one exchange ---------------------------------------------------------------------------------------------------

    def _serve_one(self) -> bool:
        """One exchange; whether the connection persists. Raises ClientGone."""
        try:
            head = self._read_head()
        except ApiError as error:
            self._refuse(error)
            return False
        if head is None:
            return False
        self._is_fresh = False
        self._turn.is_urgent = self._host.api.is_health(head.path)  # whoever asks for it once will ask for it again
        self.in_flight = True
        started = time.perf_counter()
        exchange = HttpExchange(self, head, self._address)
        sent = 0
        try:
            sent = self._answer(exchange)
        except ClientGone:
            exchange.keeps_connection = False
            exchange.status = CLIENT_GONE
        finally:
            exchange.release()
            self.in_flight = False
            if log.isEnabledFor(logging.INFO):
                _log_access(exchange, sent, started)
        return self._finish(exchange)

    def _read_head(self) -> Head | None:
        """The next head; None when the connection ends between requests. Raises ApiError and ClientGone."""
        self._turn.pass_on()  # or a client that always has its next request ready would keep the others out
        transport, settings = self.transport, self.settings
        data = transport.take_pending()
        end = time.monotonic() + (settings.head_timeout_s if self._is_fresh else settings.idle_timeout_s)
        while data in NOTHING_YET:
            if not self._is_fresh:  # whoever has just come is about to ask, and is answered
                self.idle_since = self.idle_since or time.monotonic()
            if self._host.is_draining and self.idle_since:
                return None
            try:
                transport.await_bytes(end - time.monotonic(), self._wake)
                if self._is_leaving:
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
                    raise RequestTimeout(f"the head took longer than {settings.head_timeout_s:g} s") from None
                if not more:
                    raise MalformedRequest("the connection ended in the middle of the head")
                data += more
                head = self._parser.parse(data)
        if head.size < len(data):
            transport.put_back(data, head.size)
        return head

    def _wake(self) -> None:
        with self._idle_lock:
            self.idle_since = 0.0

    def _answer(self, exchange: HttpExchange) -> int:
        """Have the request answered and write the answer; bytes written. The one place where errors become responses."""
        head = exchange.head
        try:
            if head.is_chunked or head.content_length is not None:
                go_on = self._send_continue if head.expects_continue else None
                exchange.body = Body(self.transport, head, self.settings, go_on, lambda: self._host.is_draining)
            self._check_key(exchange)
            reply = SERVER_OPTIONS if head.path == "*" else self._host.api.answer(exchange)
            if not isinstance(reply, StreamReply):
                exchange.release()  # a client that reads slowly holds no upload in the spool
            return self._write(exchange, reply)
        except ApiError as error:
            if error.status >= 500:
                log.warning("%s", harmless(error.message), extra=fields(id=exchange.id, code=error.code))
            return self._write_error(exchange, error)
        except ClientGone:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a bug raises, the client gets an answer and the thread lives
            return self._write_error(exchange, _unexpected(exchange, error))

    def _check_key(self, exchange: HttpExchange) -> None:
        try:
            self._host.keys.check(exchange, self._host.api.is_open)
        except ApiError as error:
            self._host.api.count_refused(error)
            raise

    def _finish(self, exchange: HttpExchange) -> bool:
        """Bring the connection to the next request, or to its end; whether it persists. Raises ClientGone."""
        body = exchange.body
        is_unread = body is not None and not body.is_complete
        if exchange.keeps_connection and body is not None and is_unread:
            try:
                body.discard()
            except ApiError:
                is_unread, exchange.keeps_connection = True, False
        if exchange.keeps_connection:
            return True
        if exchange.status != CLIENT_GONE and (is_unread or exchange.is_refused or self.transport.has_pending):
            self._linger()
        return False

    def _linger(self) -> None:
        self.transport.linger(self.settings.linger_bytes, self.settings.linger_s)

    # --- writing --------------------------------------------------------------------------------------------------------

    def _write(self, exchange: HttpExchange, reply: Reply) -> int:
        if isinstance(reply, JsonReply):
            return self._write_whole(exchange, reply.status, JSON_TYPE, reply.chunks, reply.headers)
        if isinstance(reply, StreamReply):
            return self._write_stream(exchange, reply)
        return self._write_whole(exchange, reply.status, reply.media_type, [reply.content], reply.headers)

    def _write_error(self, exchange: HttpExchange, error: ApiError) -> int:
        """Answer with the error. Raises ClientGone when another answer has begun, which can only be broken off."""
        if exchange.status:
            raise ClientGone("the answer could not be finished")
        exchange.error = error
        if error.closes_connection:
            exchange.is_refused, exchange.keeps_connection = True, False
        return self._write_whole(exchange, error.status, JSON_TYPE, [error_content(error)], error_fields(error))

    def _write_whole(
        self,
        exchange: HttpExchange,
        status: int,
        media_type: str,
        chunks: Sequence[bytes | memoryview],
        headers: Mapping[str, str],
    ) -> int:
        """Write a response of known length: one call to the kernel when it fits. Raises ClientGone."""
        length = sum(map(len, chunks))
        head = self._responses.head(
            status,
            exchange.id,
            media_type=media_type,
            framing=b"" if status in NO_CONTENT else b"Content-Length: %d\r\n" % length,
            connection=self._connection_field(exchange),
            headers=headers,
            origin=exchange.header("origin"),
        )
        exchange.status = status
        if exchange.method == "HEAD" or status in NO_CONTENT:
            return self.transport.send([head])
        return self.transport.send([head, *chunks])

    def _write_stream(self, exchange: HttpExchange, reply: StreamReply) -> int:
        """Write server-sent events as they come; an error before the first is an ordinary error response."""
        events = reply.events
        try:
            first = next(events, None)
            is_chunked = exchange.head.version != "1.0"
            if not is_chunked:
                exchange.keeps_connection = False  # the end of the stream is the end of the connection
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
            for block in _blocks(first, events, exchange):
                sent += self.transport.send([b"%x\r\n" % len(block), block, b"\r\n"] if is_chunked else [block])
            return sent + (self.transport.send([LAST_CHUNK]) if is_chunked else 0)
        finally:
            events.close()

    def _connection_field(self, exchange: HttpExchange) -> bytes:
        """Decide whether the connection persists, and say so."""
        if not exchange.can_keep() or self._host.is_draining:
            exchange.keeps_connection = False
            return b"Connection: close\r\n"
        return b"Connection: keep-alive\r\n" if exchange.head.version == "1.0" else b""

    def _send_continue(self) -> None:
        if not self.transport.has_pending:
            self.transport.send([CONTINUE])

    def _refuse(self, error: ApiError) -> None:
        """Answer what is not a request, and end the connection so that the answer arrives. Raises ClientGone."""
        request_id = new_request_id()
        self.in_flight = True
        try:
            sent = self.transport.send(self._responses.refusal(error, request_id))
        finally:
            self.in_flight = False
        told = fields(bytes=sent, id=request_id, address=self._address, why=harmless(error.message))
        log.info("refused %d", error.status, extra=told)
        self._linger()


def _blocks(
    first: ServerEvent | None, events: Generator[ServerEvent, None, None], exchange: HttpExchange
) -> Generator[bytes, None, None]:
    """The bytes of each event; an error becomes the last one. Raises ClientGone."""
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
    except Exception as error:  # noqa: BLE001 - a bug ends the stream, not the thread
        yield _error_event(_unexpected(exchange, error))


def _error_event(error: ApiError) -> bytes:
    """The form that official clients turn into an exception: the error object under `error`, and the type beside it."""
    return encode_event(
        "error", json.dumps({"type": "error", **error.body()}, ensure_ascii=False).encode("utf-8", "replace")
    )


def _unexpected(exchange: HttpExchange, error: Exception) -> InternalError:
    """Put a bug's traceback into the log; what the client is told of it."""
    log.error("unexpected error", extra=fields(id=exchange.id), exc_info=error)
    return failed(exchange.id)


def _log_access(exchange: HttpExchange, sent: int, started: float) -> None:
    """One line for each request. The path is written as it came: percent-encoded, so that it is harmless in a log."""
    told: dict[str, object] = {
        "bytes": sent,
        "ms": round((time.perf_counter() - started) * 1000, 1),
        "id": exchange.id,
        "address": exchange.address,
    }
    if exchange.key:
        told["key"] = exchange.key
    if exchange.client_request_id:
        told["client_id"] = exchange.client_request_id
    if exchange.error is not None:
        told["code"] = exchange.error.code
        if exchange.error.param:
            told["param"] = harmless(exchange.error.param)
        told["why"] = harmless(exchange.error.message)
    path = exchange.head.target.partition("?")[0]
    log.info("%s %s %d", exchange.method, path, exchange.status, extra=fields(**told))
