"""Links over two one-way pipes, on one machine.

Invariants:
- The front end's side never blocks.
- The front end closes its copies of the worker's ends, so a dead worker reads as end-of-file and never as a hang.
- Writes are at most PIPE_BUF bytes, so that each is whole or not at all (pipe(7)).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import termios
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext

from ovserve.errors import LinkClosed
from ovserve.wire.codec import LineBuffer, decode, encode
from ovserve.wire.link import OUTBOX_LIMIT, Link
from ovserve.wire.messages import Message

__all__ = ["PipeLink", "PipeWorkerLink", "open_link"]


@dataclass(slots=True)
class PipeWorkerLink:
    """The worker's side of a link: blocking. Passed to the child process. `send` is thread-safe (one lock)."""

    commands: Connection
    reports: Connection
    _lines: LineBuffer = field(default_factory=LineBuffer)
    _waiting: deque[bytes] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> Mapping[str, Connection]:
        return {"commands": self.commands, "reports": self.reports}

    def __setstate__(self, state: Mapping[str, Connection]) -> None:
        self.commands, self.reports = state["commands"], state["reports"]
        self._lines, self._waiting, self._lock = LineBuffer(), deque(), threading.Lock()

    def receive(self) -> Message:
        """Wait for the next command and return it.

        Raises:
            LinkClosed: the front end has closed the link or exited.
            LinkGarbage: it sent something that is not a message.
        """
        while not self._waiting:
            data = os.read(self.commands.fileno(), 65536)
            if not data:
                raise LinkClosed("the front end closed the link")
            self._waiting.extend(self._lines.feed(data))
        return decode(self._waiting.popleft())

    def send(self, message: Message) -> None:
        """Send a report to the front end. Raises LinkClosed if the front end has closed the link or exited."""
        line = encode(message)
        with self._lock:
            try:
                os.write(self.reports.fileno(), line)  # at most PIPE_BUF on a blocking pipe: atomic
            except OSError as error:
                raise LinkClosed(f"the front end has closed the link: {error.strerror}") from None

    def close(self) -> None:
        """Close both pipes."""
        self.commands.close()
        self.reports.close()


class PipeLink(Link):
    """The front end's side of two pipes.

    Args:
        model: the worker's model.
        index: the worker's slot.
        incarnation: how many workers this slot had before.
        commands: the writing end of one pipe.
        reports: the reading end of the other.
    """

    def __init__(self, model: str, index: int, incarnation: int, commands: Connection, reports: Connection) -> None:
        super().__init__(model, index, incarnation)
        self._commands = commands
        self._reports = reports
        self._lines = LineBuffer()
        self._outbox: deque[bytes] = deque()
        self._sent_bytes = 0
        self._is_write_polled = False
        os.set_blocking(commands.fileno(), False)
        os.set_blocking(reports.fileno(), False)
        # One descriptor for both directions: the command pipe is in it only while commands wait to be written.
        self._poll = select.epoll()
        self._poll.register(reports.fileno(), select.EPOLLIN)

    @property
    def readiness(self) -> int:
        """A descriptor for `poll`: readable when `receive` has something to do."""
        return self._poll.fileno()

    @property
    def sent(self) -> int:
        """Bytes of all commands passed to `send`, those in the outbox included."""
        return self._sent_bytes

    @property
    def consumed(self) -> int:
        """How many bytes of the commands the worker has read. Works after its death too (pipe(7), FIONREAD)."""
        unread = fcntl.ioctl(self._commands.fileno(), termios.FIONREAD, bytes(4))
        return self._sent_bytes - sum(map(len, self._outbox)) - int.from_bytes(unread, sys.byteorder)

    def send(self, message: Message) -> None:
        """Send a command, or put it into the outbox while the pipe is full.

        Raises:
            LinkClosed: the worker has closed its end or exited, or the outbox is full.
        """
        if len(self._outbox) >= OUTBOX_LIMIT:
            self.update(is_clogged=True)
            raise LinkClosed(f"the worker does not read its commands: {OUTBOX_LIMIT} are waiting")
        line = encode(message)
        self._outbox.append(line)
        self._sent_bytes += len(line)
        self._flush()

    def receive(self) -> list[Message]:
        """Return the reports that have arrived; write the outbox as far as it fits into the pipe.

        Raises:
            LinkClosed: the worker has closed its end or exited.
            LinkGarbage: it sent something that is not a valid message.
        """
        if self._outbox:
            with contextlib.suppress(LinkClosed):  # the reports that it sent before are read first
                self._flush()
        try:
            data = os.read(self._reports.fileno(), 65536)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LinkClosed(f"the worker has closed the link: {error.strerror}") from None
        if not data:
            raise LinkClosed("the worker has closed the link")
        messages = [decode(line) for line in self._lines.feed(data)]
        for message in messages:
            self.note(message)
        return messages

    def _flush(self) -> None:
        """Write as much of the outbox as fits into the pipe. Raises LinkClosed if the worker has closed its end."""
        while self._outbox:
            try:
                os.write(self._commands.fileno(), self._outbox[0])
            except BlockingIOError:
                break
            except OSError as error:
                self._poll_writes(False)  # else the poll would report the error for ever
                raise LinkClosed(f"the worker has closed the link: {error.strerror}") from None
            self._outbox.popleft()
        self._poll_writes(bool(self._outbox))

    def _poll_writes(self, is_wanted: bool) -> None:
        if is_wanted == self._is_write_polled:
            return
        self._is_write_polled = is_wanted
        if is_wanted:
            self._poll.register(self._commands.fileno(), select.EPOLLOUT)
        else:
            self._poll.unregister(self._commands.fileno())

    def close(self) -> None:
        """Close both pipes: the worker reads end-of-file and exits. Idempotent."""
        self._poll.close()
        self._commands.close()
        self._reports.close()


def open_link(context: SpawnContext, model: str, index: int, incarnation: int) -> tuple[PipeLink, PipeWorkerLink]:
    """Create a link. The caller passes the second value to the process and closes its own copy after the start."""
    commands_read, commands_write = context.Pipe(duplex=False)
    reports_read, reports_write = context.Pipe(duplex=False)
    link = PipeLink(model, index, incarnation, commands_write, reports_read)
    return link, PipeWorkerLink(commands_read, reports_write)
