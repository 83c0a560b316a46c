"""Bytes in and out of one connection's socket, each wait with a time limit.

Bytes that can be had at once are had at once, while the thread keeps its turn. Before it waits it gives the turn away, the socket
blocks, and the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO): one system call, where Python's own timeouts poll first.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ovserve.deadline import Deadline
from ovserve.errors import ClientGone
from ovserve.front.turns import Turn, Turns

__all__ = ["Transport"]

RECEIVE_BYTES = 16 * 1024  # a head, and what comes with it; content beyond goes straight to where it belongs
SLOWEST_READER = 1024  # bytes per second of an answer, beside the write timeout: less is somebody who holds a thread
IOV_LIMIT = 512  # buffers for one sendmsg; Linux takes 1024
# The kernel's limit on one wait. Longer waits are made of several; a limit that stays the same is one system call less for each.
TICK_S = 5.0
_T = TypeVar("_T")
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Transport:
    """One connection's socket, and the bytes received from it that nobody has taken yet. Thread-safe: no."""

    def __init__(self, connection: socket.socket, write_timeout_s: float, turn: Turn | None = None) -> None:
        """Args: turn: given away during each wait; without one the thread takes turns with nobody."""
        self._socket = connection
        self.turn = turn or Turn(Turns())
        self._timeout = 0.0
        self._data = b""
        self._position = 0
        self._overflow: memoryview | None = None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._write_timeout_s = write_timeout_s
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(write_timeout_s))

    @property
    def has_pending(self) -> bool:
        """Whether received bytes wait to be taken."""
        return self._position < len(self._data)

    def take_pending(self) -> bytes:
        """All bytes that were received and not taken."""
        data, start = self._data, self._position
        self._data, self._position = b"", 0
        return data[start:] if start else data

    def put_back(self, data: bytes, start: int) -> None:
        """Give back what was taken, from `start` on, when it belongs to somebody else. Nothing may be pending."""
        self._data, self._position = data, start

    def take_into(self, view: memoryview) -> int:
        """Move pending bytes into `view`; their number."""
        start = self._position
        count = min(len(view), len(self._data) - start)
        if count:
            view[:count] = memoryview(self._data)[start : start + count]
            self._position = start + count
            if self._position == len(self._data):
                self._data, self._position = b"", 0
        return count

    def receive(self, timeout_s: float) -> bytes:
        """The next bytes from the socket, empty at its end. Nothing may be pending. Raises TimeoutError and ClientGone."""
        return self._within(timeout_s, self._socket.recv, RECEIVE_BYTES)

    def await_bytes(self, timeout_s: float, arrived: Callable[[], None]) -> None:
        """Wait for the next bytes, or the end, and leave them in the socket. Raises TimeoutError and ClientGone.

        `arrived` is called as soon as they are there, before the thread waits for its turn, and also when they never came.
        """
        try:
            self._peek(socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGone(error.strerror or "connection lost") from None
        else:
            arrived()
            return
        self.turn.give()
        try:
            self._wait_for(timeout_s, self._peek, 0)
        finally:
            arrived()
            self.turn.take()

    def has_arrived(self) -> bool:
        """Whether bytes lie in the socket that nobody has received. Thread-safe: yes."""
        try:
            return bool(self._peek(socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _peek(self, flags: int) -> bytes:
        return self._socket.recv(1, flags | socket.MSG_PEEK)

    def fill(self, view: memoryview, timeout_s: float) -> int:
        """Receive into `view` until it is full, the peer has no more, or the time (or a tick of it) is over.

        Returns bytes received, 0 at the end. Raises TimeoutError when the time passed without a byte, and ClientGone.
        """
        end = time.monotonic() + timeout_s
        self.turn.pass_on()
        count = self._within(timeout_s, self._socket.recv_into, view, 0)
        if not 0 < count < len(view):
            return count
        self.turn.give()
        try:
            left = min(TICK_S, end - time.monotonic())
            return count + self._wait_for(left, self._socket.recv_into, view[count:], 0, socket.MSG_WAITALL)
        except TimeoutError:
            return count
        finally:
            self.turn.take()

    def receive_beyond(self, view: memoryview, timeout_s: float) -> int:
        """Receive into `view`, and in the same call what comes after it into the pending bytes; bytes put into `view`.

        0 at the end. Nothing may be pending. Raises TimeoutError and ClientGone.
        """
        overflow = self._overflow
        if overflow is None:
            overflow = self._overflow = memoryview(bytearray(RECEIVE_BYTES))
        count = self._within(timeout_s, self._socket.recvmsg_into, [view, overflow], 0)[0]
        if count <= len(view):
            return count
        self._data, self._position = bytes(overflow[: count - len(view)]), 0
        return len(view)

    def send(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Write all of the buffers, in as few calls as the socket allows; bytes written.

        Raises ClientGone when the peer has closed, has taken nothing for the write timeout, or reads slower than SLOWEST_READER.
        """
        total = sum(map(len, buffers))
        try:
            rest = self._send_some(buffers, socket.MSG_DONTWAIT)
        except BlockingIOError:
            rest = list(buffers)
        except OSError as error:
            raise ClientGone(error.strerror or "connection lost") from None
        if rest:
            self.turn.give()
            try:
                self._send_rest(rest)
            finally:
                self.turn.take()
        return total

    def _send_some(self, buffers: Sequence[bytes | memoryview], flags: int = 0) -> list[bytes | memoryview]:
        """One call to the kernel; what is left."""
        sent = self._socket.sendmsg(buffers if len(buffers) <= IOV_LIMIT else buffers[:IOV_LIMIT], [], flags)
        return _behind(buffers, sent)

    def _send_rest(self, rest: list[bytes | memoryview]) -> None:
        """Write what the socket did not take at once. Raises ClientGone."""
        total, taken = sum(map(len, rest)), 0
        started = time.monotonic()
        try:
            while rest and time.monotonic() - started <= self._write_timeout_s + taken / SLOWEST_READER:
                rest = self._send_some(rest)
                taken = total - sum(map(len, rest))
        except BlockingIOError:
            self._reset()
            raise ClientGone("the client has stopped reading") from None
        except OSError as error:
            raise ClientGone(error.strerror or "connection lost") from None
        if rest:
            self._reset()
            raise ClientGone(f"the client reads fewer than {SLOWEST_READER} bytes a second")

    def _reset(self) -> None:
        """Have the close reset the connection: as usual, the kernel would hold what is unread for minutes."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable; False at the deadline. Raises ClientGone when the peer closes, or has closed.

        POLLRDHUP, because bytes of a pipelined request would hide the end of the stream from a peek.
        """
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.register(self._socket, select.POLLRDHUP)
        self.turn.give()
        try:
            return self._poll(poller, descriptor, deadline)
        finally:
            self.turn.take()

    def _poll(self, poller: select.poll, descriptor: int, deadline: Deadline) -> bool:
        while True:
            found = dict(poller.poll(deadline.remaining() * 1000 + 1))
            if found.get(self._socket.fileno(), 0) & _GONE:
                raise ClientGone("closed by the client")
            if found.get(descriptor, 0) & select.POLLNVAL:
                raise ValueError(f"descriptor {descriptor} is not open")
            if found:
                return True
            if deadline.is_expired():
                return False

    def linger(self, limit_bytes: int, limit_s: float) -> None:
        """Close the writing side, then read and drop until the peer closes or a limit is reached.

        Closing a socket that has unread bytes resets the connection, and the reset can overtake the answer.
        """
        self._data, self._position = b"", 0
        with contextlib.suppress(OSError, ClientGone, TimeoutError):
            self._socket.shutdown(socket.SHUT_WR)
            end = time.monotonic() + limit_s
            while limit_bytes > 0 and (left := end - time.monotonic()) > 0:
                dropped = len(self.receive(left))
                if not dropped:
                    return
                limit_bytes -= dropped

    def _within(self, timeout_s: float, receive: Callable[..., _T], *arguments: object) -> _T:
        """What `receive` gives at once, or within the time. Raises TimeoutError and ClientGone.

        What has come is taken even when the time is over: the client is not to blame for this thread's wait for its turn.
        """
        try:
            return receive(*arguments, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGone(error.strerror or "connection lost") from None
        self.turn.give()
        try:
            return self._wait_for(timeout_s, receive, *arguments, 0)
        finally:
            self.turn.take()

    def _wait_for(self, timeout_s: float, receive: Callable[..., _T], *arguments: object) -> _T:
        """Call `receive` until it gives something or the time is over. Raises TimeoutError and ClientGone."""
        while True:
            if timeout_s <= 0 or self._timeout != min(timeout_s, TICK_S):
                self._limit_wait(timeout_s)
            try:
                return receive(*arguments)
            except BlockingIOError:
                timeout_s -= self._timeout
            except OSError as error:
                raise ClientGone(error.strerror or "connection lost") from None

    def _limit_wait(self, timeout_s: float) -> None:
        """Have the kernel end the next wait in time. Raises TimeoutError when no time is left."""
        if timeout_s <= 0:
            raise TimeoutError
        self._timeout = min(timeout_s, TICK_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(self._timeout))


def _timeval(seconds: float) -> bytes:
    """A struct timeval of at least a millisecond: zero would mean for ever."""
    whole, microseconds = divmod(max(1000, int(seconds * 1_000_000)), 1_000_000)
    return struct.pack("@ll", whole, microseconds)


def _behind(buffers: Sequence[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of the buffers after `sent` bytes."""
    for index, buffer in enumerate(buffers):
        size = len(buffer)
        if sent < size:
            rest = list(buffers[index:])
            if sent:
                rest[0] = memoryview(buffer)[sent:]
            return rest
        sent -= size
    return []
