"""Connections beyond the limit: answers health checks and metrics, and others with 503, on a thread that never blocks.

    accept thread ──offer──▶ [TLS handshake ──▶] HEAD ──▶ ANSWER ──▶ linger (ovserve.front.linger)

Each connection has `overflow_timeout_s` for all states. At most `overflow_connections` are open; beyond that the
oldest of the address that has most is closed, so that clients that connect and send nothing cannot keep a health check
out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import NoReturn

from ovserve.api.exchange import Chunk, Form, JsonReply, RouteMatch, StreamReply, windows_of
from ovserve.deadline import Deadline
from ovserve.errors import ApiError, ClientGone, MalformedRequest, TooManyConnections
from ovserve.front.context import ConnectionContext
from ovserve.front.http1.head import HeadParser
from ovserve.front.http1.proxyheader import ProxyHeader
from ovserve.front.http1.response import JSON_TYPE
from ovserve.front.request import Request, escape_for_log, internal_error, network_of, new_request_id
from ovserve.front.tls import TlsSocket, log_failed_handshake
from ovserve.logs import fields

__all__ = ["Overflow", "too_many_connections"]

RETRY_AFTER_S = 1
STOP_GRACE_S = 1.0  # at `stop`, for connections that are not answered yet
RECEIVE_BYTES = 16 * 1024

log = logging.getLogger(__name__)


def too_many_connections() -> TooManyConnections:
    """Return the error for clients that arrive at the connection limit."""
    return TooManyConnections(
        f"All connections of this server are in use; try again in {RETRY_AFTER_S} s.", retry_after_s=RETRY_AFTER_S
    )


class _ExemptExchange(Request):
    """A request that is served beyond the limit, as the API sees it: it has no body and must not wait."""

    def read_form(self) -> Form:
        """Raise TooManyConnections."""
        raise too_many_connections()

    def wait(self, descriptor: int, deadline: Deadline) -> NoReturn:  # noqa: ARG002 - arguments of the protocol
        """Raise TooManyConnections."""
        raise too_many_connections()


class _OverflowConnection:
    """One connection and its state.

    A PROXY header while `proxy_header` is not None, a TLS handshake while `is_open` is false, then HEAD while `answer`
    is None.
    """

    def __init__(self, connection: socket.socket, address: str, context: ConnectionContext) -> None:
        self.socket = connection
        certificates = context.certificates
        self.stream = certificates.wrap(connection) if certificates else connection
        self.is_open = certificates is None
        self.proxy_header = ProxyHeader() if context.proxies.sends_header(address) else None
        self.address = address
        self.network = network_of(address)
        self.deadline = time.monotonic() + context.settings.overflow_timeout_s
        self.parser = HeadParser(context.settings)
        self.data = b""
        self.origin: str | None = None  # field of its request
        self.answer: memoryview | None = None


class Overflow:
    """The thread for connections beyond the limit. Thread-safe: `offer` and `stop`."""

    def __init__(self, context: ConnectionContext) -> None:
        self._context = context
        self._limit = context.settings.overflow_connections
        self._offered: deque[tuple[socket.socket, str]] = deque()
        self._connections: dict[int, _OverflowConnection] = {}  # by descriptor, the oldest first
        self._poll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wakeup, select.EPOLLIN)
        self._stop_deadline: float | None = None  # when the thread ends at the latest; None before `stop`
        self._thread = threading.Thread(target=self._run, name="overflow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Answer the remaining connections within STOP_GRACE_S, then end the thread. Idempotent; needs no `start`."""
        if self._wakeup < 0:
            return
        self._stop_deadline = time.monotonic() + STOP_GRACE_S
        if self._thread.is_alive():
            os.eventfd_write(self._wakeup, 1)
            self._thread.join()
        for connection, _ in self._offered:
            connection.close()
        self._poll.close()
        os.close(self._wakeup)
        self._wakeup = -1

    def offer(self, connection: socket.socket, address: str) -> None:
        """Take over an accepted connection; close the oldest offered one if there are too many. Never blocks."""
        self._offered.append((connection, address))
        if len(self._offered) > self._limit:
            with contextlib.suppress(IndexError):  # the thread has taken them meanwhile
                self._offered.popleft()[0].close()
        os.eventfd_write(self._wakeup, 1)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_finished():
            for descriptor, _ in self._poll.poll(self._poll_timeout_s()):
                try:
                    if descriptor == self._wakeup:
                        os.eventfd_read(self._wakeup)
                        self._take_offered()
                    elif connection := self._connections.get(descriptor):
                        self._advance(connection)
                except Exception:  # drop only this connection: at the limit, only this thread answers health checks
                    log.exception("unexpected error; a connection beyond the limit is closed")
                    if connection := self._connections.get(descriptor):
                        self._close(connection)
            now = time.monotonic()
            while self._connections and (oldest := next(iter(self._connections.values()))).deadline <= now:
                self._close(oldest)
        for connection in list(self._connections.values()):
            self._close(connection)

    def _is_finished(self) -> bool:
        if self._stop_deadline is None:
            return False
        return time.monotonic() >= self._stop_deadline or not (self._connections or self._offered)

    def _poll_timeout_s(self) -> float | None:
        deadlines = [next(iter(self._connections.values())).deadline] if self._connections else []
        if self._stop_deadline is not None:
            deadlines.append(self._stop_deadline)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _take_offered(self) -> None:
        while True:
            try:
                accepted, address = self._offered.popleft()
            except IndexError:
                return  # none is left; the accept thread also removes connections
            if len(self._connections) >= self._limit:
                self._close(self._oldest_of_most())
            accepted.setblocking(False)
            connection = _OverflowConnection(accepted, address, self._context)
            self._connections[accepted.fileno()] = connection
            self._poll.register(accepted, select.EPOLLIN)
            self._advance(connection)

    def _oldest_of_most(self) -> _OverflowConnection:
        """Return the oldest connection of the client that has most: its flood does not keep others out."""
        counts = Counter(connection.network for connection in self._connections.values())
        most = max(counts.values())
        return next(each for each in self._connections.values() if counts[each.network] == most)

    def _advance(self, connection: _OverflowConnection) -> None:
        """Do what the connection's state allows without blocking."""
        try:
            if connection.proxy_header is not None:
                _read_proxy_header(connection, connection.proxy_header)
            if not connection.is_open and isinstance(connection.stream, TlsSocket):
                connection.is_open = connection.stream.advance_handshake()
                if not connection.is_open:
                    return
            while connection.answer is None:  # until nothing is left: poll does not see what TLS has received already
                self._read_head(connection)
            self._write(connection)
        except BlockingIOError:
            return
        except MalformedRequest as error:  # of the PROXY header
            self._context.api.count_refused(error)
            why = escape_for_log(error.message)
            self._context.rejections.log(log, logging.INFO, "rejected 400", address=connection.address, why=why)
            self._close(connection)
        except ssl.SSLError as error:
            log_failed_handshake(self._context.rejections, connection.address, error)
            self._close(connection)
        except (OSError, ClientGone):
            self._close(connection)

    def _read_head(self, connection: _OverflowConnection) -> None:
        """Receive more of the head, and set the answer when it is complete. Raises BlockingIOError without more."""
        data = connection.stream.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        if not data:
            raise ClientGone("the client closed the connection before its head was complete")
        connection.data += data
        try:
            try:
                request = self._check_head(connection)
            except ApiError as error:
                self._context.api.count_refused(error)
                raise
            if request is None:
                return
            buffers: Sequence[bytes | memoryview] = self._answer(*request)
        except ApiError as error:
            buffers = self._context.responses.closing_error(error, new_request_id(), connection.origin)
            why = escape_for_log(error.message)
            self._context.rejections.log(
                log, logging.INFO, "rejected %d", error.status, address=connection.address, why=why
            )
        connection.answer = memoryview(b"".join(buffers))

    def _check_head(self, connection: _OverflowConnection) -> tuple[_ExemptExchange, RouteMatch] | None:
        """Return the request if it is served even at the limit; None until its head is complete.

        Raises:
            TooManyConnections: it is another request.
            ApiError: its head is malformed, or it needs a key that it does not have.
        """
        head = connection.parser.parse(connection.data)
        if head is None:
            return None
        connection.origin = head.fields.get("origin")
        match: RouteMatch = self._context.api.match(head.method, head.path)
        if not match.is_exempt:
            raise too_many_connections()
        exchange = _ExemptExchange(head, connection.address)
        self._context.access.check(exchange, match)
        return exchange, match

    def _answer(self, exchange: _ExemptExchange, match: RouteMatch) -> list[bytes | memoryview]:
        """Return the answer to a request. Raises ApiError and ClientGone."""
        api = self._context.api
        try:
            reply = api.answer(exchange, match)
        except (ApiError, ClientGone):
            raise
        except Exception as error:
            log.exception("unexpected error", extra=fields(id=exchange.id))
            raise internal_error(exchange.id) from error
        try:
            if isinstance(reply, StreamReply):
                raise too_many_connections()
            media_type = JSON_TYPE if isinstance(reply, JsonReply) else reply.media_type
            chunks: Sequence[Chunk] = reply.chunks if isinstance(reply, JsonReply) else [reply.content]
            response_head = self._context.responses.head(
                reply.status,
                exchange.id,
                media_type=media_type,
                framing=b"Content-Length: %d\r\n" % sum(map(len, chunks)),
                connection=b"Connection: close\r\n",
                headers=reply.headers,
                origin=exchange.header("origin"),
            )
            return [response_head] if exchange.method == "HEAD" else [response_head, *windows_of(chunks)]
        finally:
            reply.close()

    def _write(self, connection: _OverflowConnection) -> None:
        """Send what the socket accepts; after the last byte, let the connection linger."""
        rest = connection.answer or memoryview(b"")
        with contextlib.suppress(BlockingIOError):
            while rest and (sent := connection.stream.send(rest, socket.MSG_DONTWAIT)):
                rest = rest[sent:]
        connection.answer = rest
        if rest:
            self._poll.modify(connection.socket, select.EPOLLOUT)
            return
        self._forget(connection)
        if isinstance(connection.stream, TlsSocket):
            connection.stream.close_notify()
        self._context.linger.add(connection.socket)

    def _close(self, connection: _OverflowConnection) -> None:
        self._forget(connection)
        connection.socket.close()

    def _forget(self, connection: _OverflowConnection) -> None:
        self._connections.pop(connection.socket.fileno(), None)
        with contextlib.suppress(OSError):
            self._poll.unregister(connection.socket)


def _read_proxy_header(connection: _OverflowConnection, header: ProxyHeader) -> None:
    """Receive the header of the PROXY protocol; from then on, the client's address counts.

    Raises:
        BlockingIOError: it is not complete.
        MalformedRequest: it is malformed.
        ClientGone: the connection has ended before.
    """
    while header.wanted:
        data = connection.socket.recv(header.wanted, socket.MSG_DONTWAIT)
        if not data:
            raise ClientGone("the proxy closed the connection in its PROXY header")
        header.feed(data)
    connection.proxy_header = None
    connection.address = header.address or connection.address
    connection.network = network_of(connection.address)
