"""Lingering: keeps connections open after an early refusal until the client has read it; drops what it still sends.

    handler, overflow ──add──▶ writing side closed, receive and drop ──▶ closed

A client that sends a large body may read the answer only after its last byte. To close a socket that has unread bytes,
or that gets further ones, resets the connection, and a reset discards an answer that the client has not read. So such
a connection is closed when
- the client has closed it, which it does when it has read the answer,
- it has been silent, or slower than `min_body_bytes_per_s`, for `body_grace_s`: the same rule as for a body,
- `linger_s` have passed, or `linger_bytes` have been dropped,
- more than `linger_connections` linger: the oldest is closed first.

Runs in: one thread for each listener, which never blocks on a client. A lingering connection takes a descriptor, but
none of the places of `max_connections`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque

from ovserve.settings.options import Settings

__all__ = ["Linger"]

DROP_BYTES = 4 * 1024 * 1024  # with one system call, for each connection in turn; about what the kernel buffers
STOP_SILENCE_S = 0.5  # at `stop`: a client that is still sending gets the rest of the time, others are closed


class _Lingering:
    """One connection: what it may still send, and until when."""

    def __init__(self, connection: socket.socket, settings: Settings) -> None:
        now = time.monotonic()
        self.socket = connection
        self.bytes_left = settings.linger_bytes
        self.seen_at = now  # when bytes arrived last
        self._end = now + settings.linger_s
        self._rate, self._grace_s = settings.min_body_bytes_per_s, settings.body_grace_s
        self._allowance_s = self._grace_s  # silence that the minimum rate still allows

    @property
    def expires_at(self) -> float:
        """When it is closed if nothing more arrives, on the monotonic clock."""
        return min(self._end, self.seen_at + self._allowance_s)

    def count(self, dropped: int) -> None:
        """Count bytes that have just arrived: they add to the allowance, the time before them took from it."""
        now = time.monotonic()
        self.bytes_left -= dropped
        gained = dropped / self._rate if self._rate else self._grace_s
        self._allowance_s = min(self._grace_s, self._allowance_s - (now - self.seen_at) + gained)
        self.seen_at = now


class Linger:
    """The lingering connections of one listener. Thread-safe: yes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._added: deque[socket.socket] = deque()
        self._connections: dict[int, _Lingering] = {}  # by descriptor, the oldest first; of the thread
        self._buffer = bytearray(DROP_BYTES)
        self._poll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wakeup, select.EPOLLIN)
        self._lock = threading.Lock()  # no connection is added after `stop`
        self._stop_at = float("inf")  # when the thread ends at the latest
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="linger", daemon=True)

    @property
    def count(self) -> int:
        """How many connections linger."""
        return len(self._connections) + len(self._added)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, connection: socket.socket) -> None:
        """Take over a connection whose answer is written; never blocks. The caller's socket object is detached."""
        taken = socket.socket(fileno=connection.detach())
        try:
            taken.setblocking(False)
            taken.shutdown(socket.SHUT_WR)
        except OSError:
            taken.close()  # the client has closed already
            return
        with self._lock:
            if self._is_stopping:
                taken.close()
                return
            self._added.append(taken)
            os.eventfd_write(self._wakeup, 1)

    def stop(self, grace_s: float) -> None:
        """Wait up to `grace_s` for clients that are still sending, close all and end the thread. Idempotent."""
        with self._lock:
            if self._is_stopping:
                return
            self._is_stopping, self._stop_at = True, time.monotonic() + grace_s
            os.eventfd_write(self._wakeup, 1)
        if self._thread.is_alive():
            self._thread.join()
        for connection in self._added:
            connection.close()
        self._poll.close()
        os.close(self._wakeup)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_finished():
            for descriptor, _ in self._poll.poll(self._poll_timeout_s()):
                if descriptor == self._wakeup:
                    os.eventfd_read(self._wakeup)
                    self._take_added()
                elif found := self._connections.get(descriptor):
                    self._drop(found)
            now = time.monotonic()
            for each in [each for each in self._connections.values() if self._expires_at(each) <= now]:
                self._close(each)
        for each in list(self._connections.values()):
            self._close(each)

    def _is_finished(self) -> bool:
        return self._is_stopping and (time.monotonic() >= self._stop_at or not (self._connections or self._added))

    def _expires_at(self, lingering: _Lingering) -> float:
        if not self._is_stopping:
            return lingering.expires_at
        return min(lingering.expires_at, self._stop_at, lingering.seen_at + STOP_SILENCE_S)

    def _poll_timeout_s(self) -> float | None:
        first = min(map(self._expires_at, self._connections.values()), default=self._stop_at)
        return None if first == float("inf") else max(0.0, first - time.monotonic())

    def _take_added(self) -> None:
        while self._added:
            connection = self._added.popleft()
            if len(self._connections) >= self._settings.linger_connections:
                self._close(next(iter(self._connections.values())))
            self._connections[connection.fileno()] = _Lingering(connection, self._settings)
            self._poll.register(connection, select.EPOLLIN)

    def _drop(self, lingering: _Lingering) -> None:
        """Drop what has arrived; close the connection if that is its end."""
        try:
            # With MSG_TRUNC, the kernel drops the bytes of a TCP connection without copying them: tcp(7).
            dropped = lingering.socket.recv_into(self._buffer, DROP_BYTES, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        except OSError:
            dropped = 0
        lingering.count(dropped)
        if not dropped or lingering.bytes_left <= 0:
            self._close(lingering)

    def _close(self, lingering: _Lingering) -> None:
        del self._connections[lingering.socket.fileno()]
        with contextlib.suppress(OSError):
            self._poll.unregister(lingering.socket)
        lingering.socket.close()
