"""Socket I/O of one connection; every wait has a time limit.

Calls that need not wait do not block, and the thread holds the run token during them. Before a call that may block, the
thread releases the token, and the kernel limits the wait (SO_RCVTIMEO, SO_SNDTIMEO). That is one system call, where
Python's own socket timeouts need a poll before it.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ovserve.deadline import Deadline
from ovserve.errors import ClientGone
from ovserve.front.run_token import RunHandle, RunToken
from ovserve.front.tls import TlsSocket

__all__ = ["Transport"]

RECEIVE_BYTES = 16 * 1024  # for a head and what arrives with it; later content is received directly into its target
MIN_READ_BYTES_PER_S = 1024  # by the client, beyond the write timeout; a slower one would occupy a thread
RATE_WINDOW_S = 5.0  # over which the rate of a slow reader is measured while another client waits for what it holds
IOV_LIMIT = 512  # buffers for one sendmsg; Linux accepts 1024
# The kernel's timeout for one wait; a longer wait is made of several. While it stays the same, each wait saves a
# setsockopt call.
MAX_KERNEL_WAIT_S = 5.0
_T = TypeVar("_T")
_HANGUP_EVENTS = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Transport:
    """One connection's socket, and the bytes received from it that are not taken yet ("pending").

    Thread-safe: no, except `stop`.

    Attributes:
        required_rate: returns the bytes a second that the peer has to read now because of what it holds; 0 for none.
        sent_bytes: what the socket has accepted so far.
    """

    def __init__(
        self, connection: socket.socket | TlsSocket, write_timeout_s: float, run_handle: RunHandle | None = None
    ) -> None:
        """Take over a connected, blocking socket.

        Args:
            connection: the socket, with or without TLS; the caller closes it.
            write_timeout_s: how long the peer may accept no bytes of an answer.
            run_handle: released during each wait; without one, the thread shares no run token.
        """
        self._socket = connection
        self.run_handle = run_handle or RunHandle(RunToken())
        self._timeout_s = 0.0  # the current SO_RCVTIMEO
        self._data = b""
        self._position = 0
        self._overflow: memoryview | None = None
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._write_timeout_s = write_timeout_s
        self._is_stopped = False
        self.sent_bytes = 0
        self.required_rate: Callable[[], float] = lambda: 0.0
        # A longer wait is made of several, so that it ends when the required rate or `stop` demands it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(min(write_timeout_s, MAX_KERNEL_WAIT_S)))

    @property
    def is_secure(self) -> bool:
        """Whether the connection has TLS."""
        return isinstance(self._socket, TlsSocket)

    @property
    def has_pending(self) -> bool:
        """Whether received bytes are pending."""
        return self._position < len(self._data)

    def take_pending(self) -> bytes:
        """Return and remove all pending bytes."""
        data, start = self._data, self._position
        self._data, self._position = b"", 0
        return data[start:] if start else data

    def unread(self, data: bytes, start: int) -> None:
        """Make `data[start:]`, which belongs to the next reader, pending again. Nothing may be pending."""
        self._data, self._position = data, start

    def take_into(self, view: memoryview) -> int:
        """Move pending bytes into `view` and return their number."""
        start = self._position
        count = min(len(view), len(self._data) - start)
        if count:
            view[:count] = memoryview(self._data)[start : start + count]
            self._position = start + count
            if self._position == len(self._data):
                self._data, self._position = b"", 0
        return count

    def receive(self, timeout_s: float) -> bytes:
        """Return the next bytes from the socket, empty at end-of-file. Nothing may be pending.

        Raises:
            TimeoutError: nothing arrived in time.
            ClientGone: the connection was lost.
        """
        return self._receive_within(timeout_s, self._socket.recv, RECEIVE_BYTES)

    def wait_readable(self, timeout_s: float, on_wake: Callable[[], None]) -> None:
        """Wait until the socket has bytes or is at end-of-file, without reading them.

        Args:
            timeout_s: the longest wait.
            on_wake: called when the wait is over, however it ends, before the thread waits for the run token.

        Raises:
            TimeoutError: nothing arrived in time.
            ClientGone: the connection was lost.
        """
        try:
            self._peek(socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGone(error.strerror or "connection lost") from None
        else:
            on_wake()
            return
        self.run_handle.release()
        try:
            self._receive_blocking(timeout_s, self._peek, 0)
        finally:
            on_wake()
            self.run_handle.acquire()

    def has_unread_bytes(self) -> bool:
        """Return whether the socket holds bytes that have not been received. Thread-safe: yes."""
        if isinstance(self._socket, TlsSocket):
            return self._socket.has_unread_bytes()
        try:
            return bool(self._peek(socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _peek(self, flags: int) -> bytes:
        return self._socket.recv(1, flags | socket.MSG_PEEK)

    def fill(self, view: memoryview, timeout_s: float) -> int:
        """Receive into `view` until it is full, the peer has closed, or the time is over.

        After the first bytes it waits no longer than MAX_KERNEL_WAIT_S for the others.

        Returns:
            Bytes received, 0 at end-of-file.

        Raises:
            TimeoutError: no byte arrived in time.
            ClientGone: the connection was lost.
        """
        end = time.monotonic() + timeout_s
        self.run_handle.yield_to_waiters()
        count = self._receive_within(timeout_s, self._socket.recv_into, view, 0)
        if not 0 < count < len(view):
            return count
        self.run_handle.release()
        try:
            left = min(MAX_KERNEL_WAIT_S, end - time.monotonic())
            return count + self._receive_blocking(left, self._socket.recv_into, view[count:], 0, socket.MSG_WAITALL)
        except TimeoutError:
            return count
        finally:
            self.run_handle.acquire()

    def receive_beyond(self, view: memoryview, timeout_s: float) -> int:
        """Receive into `view`, and what exceeds it into the pending bytes, in one system call. Nothing may be pending.

        Returns:
            Bytes in `view`, 0 at end-of-file.

        Raises:
            TimeoutError: nothing arrived in time.
            ClientGone: the connection was lost.
        """
        overflow = self._overflow
        if overflow is None:
            overflow = self._overflow = memoryview(bytearray(RECEIVE_BYTES))
        count = self._receive_within(timeout_s, self._socket.recvmsg_into, [view, overflow], 0)[0]
        if count <= len(view):
            return count
        self._data, self._position = bytes(overflow[: count - len(view)]), 0
        return len(view)

    def send(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Write all buffers, in as few system calls as the socket allows, and return the number of bytes.

        Raises:
            ClientGone: the peer has closed, has accepted nothing for the write timeout, or reads more slowly than
                MIN_READ_BYTES_PER_S.
        """
        return self.send_batches((buffers,))

    def send_batches(self, batches: Iterable[Sequence[bytes | memoryview]]) -> int:
        """Write batches of buffers, each taken when the socket has accepted those before, and return their bytes.

        Args:
            batches: none of them is empty. They may be produced while they are written; what that raises is passed on.

        Raises:
            ClientGone: as for `send`; the rate is that of all batches together.
        """
        total = 0
        remaining = iter(batches)
        for batch in remaining:
            if total:
                self.run_handle.yield_to_waiters()
            total += sum(map(len, batch))
            try:
                rest = self._send_some(batch, socket.MSG_DONTWAIT)
            except BlockingIOError:
                rest = list(batch)
            except OSError as error:
                raise ClientGone(error.strerror or "connection lost") from None
            if rest:
                self.run_handle.release()
                try:
                    total += self._send_rest(rest, remaining)
                finally:
                    self.run_handle.acquire()
        return total

    def _send_some(self, buffers: Sequence[bytes | memoryview], flags: int = 0) -> list[bytes | memoryview]:
        """Make one system call and return what is not sent yet."""
        sent = self._socket.sendmsg(buffers if len(buffers) <= IOV_LIMIT else buffers[:IOV_LIMIT], [], flags)
        self.sent_bytes += sent
        return _unsent(buffers, sent)

    def _send_rest(self, rest: Sequence[bytes | memoryview], batches: Iterator[Sequence[bytes | memoryview]]) -> int:
        """Write what the socket did not accept at once, then the other batches; return the bytes of the batches.

        Raises:
            ClientGone: as for `send`.
        """
        pace = _Pace(self._write_timeout_s)
        total = 0
        while rest:
            reason = "ended, because another client waits" if self._is_stopped else pace.check(self.required_rate())
            if reason:
                self._reset_on_close()
                raise ClientGone(reason)
            before = sum(map(len, rest))
            try:
                rest = self._send_some(rest)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ClientGone(error.strerror or "connection lost") from None
            pace.note(before - sum(map(len, rest)))
            if not rest:
                rest = next(batches, ())
                total += sum(map(len, rest))
        return total

    def stop(self) -> None:
        """Make a write that waits raise ClientGone within MAX_KERNEL_WAIT_S. Thread-safe: yes."""
        self._is_stopped = True

    def _reset_on_close(self) -> None:
        """Make the close reset the connection; otherwise the kernel would keep the unsent bytes for minutes."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))

    def handshake(self, timeout_s: float) -> None:
        """Complete the handshake of TLS, if the connection has TLS.

        Raises:
            TimeoutError: it took longer.
            ClientGone: the connection was lost.
            ssl.SSLError: the handshake failed.
        """
        if isinstance(self._socket, TlsSocket):
            try:
                self._socket.handshake(timeout_s)
            except (TimeoutError, ssl.SSLError):
                raise
            except OSError as error:
                raise ClientGone(error.strerror or "connection lost") from None

    def end(self) -> None:
        """Mark the end of what was sent, for a connection with TLS. Idempotent; never waits."""
        if isinstance(self._socket, TlsSocket):
            self._socket.close_notify()

    def wait(self, descriptor: int, deadline: Deadline) -> bool:
        """Wait until `descriptor` is readable; return False at the deadline.

        Uses POLLRDHUP, because bytes of a pipelined request would hide an end-of-file from a peek.

        Raises:
            ClientGone: the peer closes, or has closed.
            ValueError: the descriptor is not open.
        """
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.register(self._socket, select.POLLRDHUP)
        self.run_handle.release()
        try:
            return self._poll(poller, descriptor, deadline)
        finally:
            self.run_handle.acquire()

    def _poll(self, poller: select.poll, descriptor: int, deadline: Deadline) -> bool:
        while True:
            found = dict(poller.poll(deadline.remaining() * 1000 + 1))
            if found.get(self._socket.fileno(), 0) & _HANGUP_EVENTS:
                raise ClientGone("closed by the client")
            if found.get(descriptor, 0) & select.POLLNVAL:
                raise ValueError(f"descriptor {descriptor} is not open")
            if found:
                return True
            if deadline.is_expired():
                return False

    def _receive_within(self, timeout_s: float, receive: Callable[..., _T], *arguments: object) -> _T:
        """Return what `receive` returns at once, or within the time. Raises TimeoutError and ClientGone.

        Bytes that have arrived are received even when no time is left: this thread may have lost it waiting for the run
        token, which is not the client's fault.
        """
        try:
            return receive(*arguments, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGone(error.strerror or "connection lost") from None
        self.run_handle.release()
        try:
            return self._receive_blocking(timeout_s, receive, *arguments, 0)
        finally:
            self.run_handle.acquire()

    def _receive_blocking(self, timeout_s: float, receive: Callable[..., _T], *arguments: object) -> _T:
        """Call `receive` until it returns something or the time is over. Raises TimeoutError and ClientGone."""
        while True:
            if timeout_s <= 0 or self._timeout_s != min(timeout_s, MAX_KERNEL_WAIT_S):
                self._set_receive_timeout(timeout_s)
            try:
                return receive(*arguments)
            except BlockingIOError:
                timeout_s -= self._timeout_s
            except OSError as error:
                raise ClientGone(error.strerror or "connection lost") from None

    def _set_receive_timeout(self, timeout_s: float) -> None:
        """Set the kernel's limit for the next wait. Raises TimeoutError when no time is left."""
        if timeout_s <= 0:
            raise TimeoutError
        self._timeout_s = min(timeout_s, MAX_KERNEL_WAIT_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(self._timeout_s))


class _Pace:
    """How fast the peer accepts the bytes of one write, and when that is too slow."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._started = self._progressed = self._window_began = time.monotonic()
        self._accepted = self._in_window = 0

    def note(self, count: int) -> None:
        """Count accepted bytes."""
        self._accepted += count
        self._in_window += count
        self._progressed = time.monotonic()

    def check(self, required_rate: float) -> str:
        """Return why the peer is too slow, or "".

        Args:
            required_rate: bytes a second that it has to accept now; 0 for none.
        """
        now = time.monotonic()
        if now - self._progressed >= self._timeout_s:
            return "the client has stopped reading"
        if now - self._started > self._timeout_s + self._accepted / MIN_READ_BYTES_PER_S:
            return f"the client reads fewer than {MIN_READ_BYTES_PER_S} bytes a second"
        seconds = now - self._window_began
        if required_rate and seconds < RATE_WINDOW_S:
            return ""
        if required_rate and self._in_window < required_rate * seconds:
            return f"the client reads fewer than {required_rate:.0f} bytes a second, while another client waits"
        self._window_began, self._in_window = now, 0
        return ""


def _timeval(seconds: float) -> bytes:
    """Return a struct timeval of at least one millisecond, because zero means no timeout."""
    whole, microseconds = divmod(max(1000, int(seconds * 1_000_000)), 1_000_000)
    return struct.pack("@ll", whole, microseconds)


def _unsent(buffers: Sequence[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """Return what is left of the buffers after `sent` bytes."""
    for index, buffer in enumerate(buffers):
        size = len(buffer)
        if sent < size:
            rest = list(buffers[index:])
            if sent:
                rest[0] = memoryview(buffer)[sent:]
            return rest
        sent -= size
    return []
