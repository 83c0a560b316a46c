"""Connections beyond the limit: 503 at once, or a health check's answer, all of them on one thread that never blocks.

    accept thread ──offer──▶ HEAD ──▶ ANSWER ──▶ LINGER until the client closes

Each connection has one short time for all of it. There is a limit on their number, beyond which the oldest goes: whoever opens
connections and says nothing cannot keep a health check out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from ovserve.api.exchange import Form, JsonReply, StreamReply
from ovserve.deadline import Deadline
from ovserve.errors import ApiError, ClientGone, TooManyConnections
from ovserve.front.handler import Host
from ovserve.front.http1.head import Head, HeadParser
from ovserve.front.http1.response import JSON_TYPE
from ovserve.front.request import Request, failed, harmless, new_request_id
from ovserve.logs import fields

__all__ = ["Overflow", "too_many"]

RETRY_AFTER_S = 1
LAST_ANSWERS_S = 1.0  # at the end, for those who have come and were not answered yet
RECEIVE_BYTES = 16 * 1024

log = logging.getLogger(__name__)


def too_many() -> TooManyConnections:
    """What a client is told that finds every place taken."""
    return TooManyConnections("Every connection of this server is in use. Try again.", retry_after_s=RETRY_AFTER_S)


class _Exchange(Request):
    """A health check as the API sees it: without a body, and without time to wait."""

    def read_form(self) -> Form:
        """Refuse: Raises TooManyConnections."""
        raise too_many()

    def wait(self, descriptor: int, deadline: Deadline) -> NoReturn:  # noqa: ARG002 - the protocol's arguments
        """Refuse: Raises TooManyConnections."""
        raise too_many()


class _Visitor:
    """One connection on its way through the three states; `answer` is None in HEAD, and empty in LINGER."""

    def __init__(self, connection: socket.socket, address: str, host: Host) -> None:
        self.socket = connection
        self.address = address
        self.end = time.monotonic() + host.settings.overflow_timeout_s
        self.parser = HeadParser(host.settings)
        self.data = b""
        self.answer: memoryview | None = None
        self.may_drop = host.settings.linger_bytes


class Overflow:
    """The thread for connections that found no place. Thread-safe: `offer` and `stop`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limit = host.settings.overflow_connections
        self._offered: deque[tuple[socket.socket, str]] = deque()
        self._visitors: dict[int, _Visitor] = {}  # by descriptor, the oldest first
        self._poll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wakeup, select.EPOLLIN)
        self._last: float | None = None  # when the thread ends, at the latest
        self._thread = threading.Thread(target=self._run, name="overflow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Give those there are a last moment for their answers, and end the thread. Safe to call twice, and without `start`."""
        if self._wakeup < 0:
            return
        self._last = time.monotonic() + LAST_ANSWERS_S
        if self._thread.is_alive():
            os.eventfd_write(self._wakeup, 1)
            self._thread.join()
        for connection, _ in self._offered:
            connection.close()
        self._poll.close()
        os.close(self._wakeup)
        self._wakeup = -1

    def offer(self, connection: socket.socket, address: str) -> None:
        """Take over an accepted connection; the oldest that still waits is closed when there are too many. Never blocks."""
        self._offered.append((connection, address))
        if len(self._offered) > self._limit:
            with contextlib.suppress(IndexError):  # the thread was quicker
                self._offered.popleft()[0].close()
        os.eventfd_write(self._wakeup, 1)

    # --- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over():
            for descriptor, _ in self._poll.poll(self._time_left()):
                try:
                    if descriptor == self._wakeup:
                        os.eventfd_read(self._wakeup)
                        self._admit()
                    elif visitor := self._visitors.get(descriptor):
                        self._step(visitor)
                except Exception:  # one visitor's trouble: this thread is all that answers health when places are taken
                    log.exception("a connection beyond the limit was dropped")
                    if visitor := self._visitors.get(descriptor):
                        self._close(visitor)
            now = time.monotonic()
            while self._visitors and (oldest := next(iter(self._visitors.values()))).end <= now:
                self._close(oldest)
        for visitor in list(self._visitors.values()):
            self._close(visitor)

    def _is_over(self) -> bool:
        if self._last is None:
            return False
        return time.monotonic() >= self._last or not (self._visitors or self._offered)

    def _time_left(self) -> float | None:
        ends = [next(iter(self._visitors.values())).end] if self._visitors else []
        if self._last is not None:
            ends.append(self._last)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _admit(self) -> None:
        while True:
            try:
                connection, address = self._offered.popleft()
            except IndexError:
                return  # none left, or the accept thread has closed the last one
            if len(self._visitors) >= self._limit:
                self._close(next(iter(self._visitors.values())))
            connection.setblocking(False)
            visitor = _Visitor(connection, address, self._host)
            self._visitors[connection.fileno()] = visitor
            self._poll.register(connection, select.EPOLLIN)
            self._step(visitor)

    def _step(self, visitor: _Visitor) -> None:
        try:
            if visitor.answer is None:
                self._read_head(visitor)
            if visitor.answer:
                self._write(visitor)
            elif visitor.answer is not None:
                self._drop(visitor)
        except BlockingIOError:
            return
        except (OSError, ClientGone):
            self._close(visitor)

    def _read_head(self, visitor: _Visitor) -> None:
        data = visitor.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ClientGone("closed before its head was complete")
        visitor.data += data
        head = None
        try:
            head = visitor.parser.parse(visitor.data)
            if head is None:
                raise BlockingIOError
            buffers: Sequence[bytes | memoryview] = self._health(head, visitor)
        except ApiError as error:
            origin = head.fields.get("origin") if head else None
            buffers = self._host.responses.refusal(error, new_request_id(), origin)
            log.info("refused %d", error.status, extra=fields(address=visitor.address, why=harmless(error.message)))
        visitor.answer = memoryview(b"".join(buffers))

    def _health(self, head: Head, visitor: _Visitor) -> list[bytes | memoryview]:
        """A health check's answer. Raises ApiError, for anything else TooManyConnections."""
        api = self._host.api
        if head.method not in {"GET", "HEAD"} or not api.is_health(head.path):
            raise too_many()
        exchange = _Exchange(head, visitor.address)
        try:
            reply = api.answer(exchange)
        except (ApiError, ClientGone):
            raise
        except Exception as error:
            log.exception("unexpected error", extra=fields(id=exchange.id))
            raise failed(exchange.id) from error
        if isinstance(reply, StreamReply):
            reply.events.close()
            raise too_many()
        media_type = JSON_TYPE if isinstance(reply, JsonReply) else reply.media_type
        chunks: Sequence[bytes | memoryview] = reply.chunks if isinstance(reply, JsonReply) else [reply.content]
        top = self._host.responses.head(
            reply.status,
            exchange.id,
            media_type=media_type,
            framing=b"Content-Length: %d\r\n" % sum(map(len, chunks)),
            connection=b"Connection: close\r\n",
            headers=reply.headers,
            origin=exchange.header("origin"),
        )
        return [top] if head.method == "HEAD" else [top, *chunks]

    def _write(self, visitor: _Visitor) -> None:
        rest = visitor.answer or memoryview(b"")
        with contextlib.suppress(BlockingIOError):
            rest = rest[visitor.socket.send(rest) :]
        visitor.answer = rest
        if not rest:
            visitor.socket.shutdown(socket.SHUT_WR)
        self._poll.modify(visitor.socket, select.EPOLLOUT if rest else select.EPOLLIN)

    def _drop(self, visitor: _Visitor) -> None:
        """What still comes is read and dropped, so that closing does not reset the connection before the answer is read."""
        dropped = len(visitor.socket.recv(RECEIVE_BYTES))
        visitor.may_drop -= dropped
        if not dropped or visitor.may_drop <= 0:
            self._close(visitor)

    def _close(self, visitor: _Visitor) -> None:
        self._visitors.pop(visitor.socket.fileno(), None)
        with contextlib.suppress(OSError):
            self._poll.unregister(visitor.socket)
        visitor.socket.close()
