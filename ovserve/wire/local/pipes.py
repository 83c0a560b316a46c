"""A link: two one-way pipes between the front end and one worker incarnation.

    front end                                                    worker
    Link.send    ── Run Cancel Grant Stop ───────────────────▶  WorkerEnd.receive
    Link.receive ◀── Ready Heartbeat Prepared Progress ───────  WorkerEnd.send
                     Need Picture Done Failed

Invariants:
- The front end's side never blocks: a worker that is stopped in the middle of a write must not stop the dispatcher.
- The front end closes its copies of the worker's ends, so a dead worker reads as end-of-file and never as a hang.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext

from ovserve.errors import LinkClosed, LinkGarbage
from ovserve.wire.codec import LineBuffer, decode, encode
from ovserve.wire.messages import Failed, Heartbeat, Message, Ready

__all__ = ["MAX_CAPACITY", "Link", "WorkerEnd", "open_link"]

MAX_CAPACITY = 1024  # jobs a worker may take at once; a worker that reports more has a bug
_OUTBOX_LIMIT = 4096  # unsent messages; a worker holds far fewer jobs, so one with more unsent does not read


@dataclass(slots=True)
class WorkerEnd:
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


class Link:
    """The front end's side of a link: never blocks. One for each worker incarnation, discarded with it.

    Owned by the dispatcher thread: once the link is attached, only this thread calls `send`, `flush`, `receive` and
    `close`. The supervisor reads only plain attributes that the dispatcher thread replaces, never the pipes.

    Attributes:
        index: the worker's slot, 0..replicas-1.
        incarnation: how many workers this slot had before.
        ready: the worker's Ready message, once received.
        failure: its Failed message without a job: why the worker exits.
        lost: why the dispatcher has detached the worker; its process has to end. Empty while it is attached.
        is_retired: it gets no more jobs.
        is_broken: it was detached for a protocol violation or for not responding, not because it had exited.
        is_clogged: the outbox is full, because the worker has not read its commands for too long.
        jobs_lost: unsettled jobs that it had read when it was detached.
        lost_retried_job: one of those jobs had already cost another worker.
        phase: of its newest heartbeat.
        beat_at: when that came, a monotonic instant.
        allow_s: how long that heartbeat allows until the next one; 0: the configured limit.
        jobs_done: jobs whose completion the dispatcher has accepted.
        sent_bytes: bytes of all commands passed to `send`, those in the outbox included.
    """

    def __init__(self, model: str, index: int, incarnation: int, commands: Connection, reports: Connection) -> None:
        self.model = model
        self.index = index
        self.incarnation = incarnation
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.lost = ""
        self.is_retired = False
        self.is_broken = False
        self.is_clogged = False
        self.jobs_lost = 0
        self.lost_retried_job = False
        self.phase = "spawn"
        self.beat_at = time.monotonic()
        self.allow_s = 0.0
        self.jobs_done = 0
        self.sent_bytes = 0
        self._commands = commands
        self._reports = reports
        self._lines = LineBuffer()
        self._outbox: deque[bytes] = deque()
        os.set_blocking(commands.fileno(), False)
        os.set_blocking(reports.fileno(), False)

    @property
    def name(self) -> str:
        """`model/index#incarnation`, as in the log."""
        return f"{self.model}/{self.index}#{self.incarnation}"

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the worker sends a report."""
        return self._reports.fileno()

    def commands_fileno(self) -> int:
        """Return the descriptor to poll for writability while `has_backlog`."""
        return self._commands.fileno()

    @property
    def has_backlog(self) -> bool:
        """Whether commands wait in the outbox because the pipe is full."""
        return bool(self._outbox)

    @property
    def consumed_bytes(self) -> int:
        """How many of `sent_bytes` the worker has read. Works after its death too (pipe(7), FIONREAD)."""
        unread = fcntl.ioctl(self._commands.fileno(), termios.FIONREAD, bytes(4))
        return self.sent_bytes - sum(map(len, self._outbox)) - int.from_bytes(unread, sys.byteorder)

    def send(self, message: Message) -> None:
        """Send a command, or put it into the outbox while the pipe is full.

        Raises:
            LinkClosed: the worker has closed its end or exited, or the outbox is full.
        """
        if len(self._outbox) >= _OUTBOX_LIMIT:
            self.is_clogged = True
            raise LinkClosed(f"the worker does not read its commands: {_OUTBOX_LIMIT} are waiting")
        line = encode(message)
        self._outbox.append(line)
        self.sent_bytes += len(line)
        self.flush()

    def flush(self) -> None:
        """Write as much of the outbox as fits into the pipe. Raises LinkClosed if the worker has closed the link."""
        while self._outbox:
            try:
                os.write(self._commands.fileno(), self._outbox[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed(f"the worker has closed the link: {error.strerror}") from None
            self._outbox.popleft()

    def receive(self) -> list[Message]:
        """Return the reports that have arrived. Heartbeats, readiness and failure also update the link's attributes.

        Raises:
            LinkClosed: the worker has closed its end or exited.
            LinkGarbage: it sent something that is not a valid message.
        """
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
            self._note(message)
        return messages

    def _note(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.phase, self.allow_s, self.beat_at = message.phase, message.allow_s, time.monotonic()
        elif isinstance(message, Ready):
            if not 1 <= message.capacity <= MAX_CAPACITY:
                raise LinkGarbage(f"capacity is {message.capacity}; it must be 1 to {MAX_CAPACITY}")
            # Loading has ended, and with it the long silence allowed for it, even if no heartbeat has
            # reported the new phase.
            self.ready, self.phase, self.allow_s, self.beat_at = message, "idle", 0.0, time.monotonic()
        elif isinstance(message, Failed) and not message.job:
            self.failure = message

    def close(self) -> None:
        """Close both pipes: the worker reads end-of-file and exits."""
        self._commands.close()
        self._reports.close()


def open_link(context: SpawnContext, model: str, index: int, incarnation: int) -> tuple[Link, WorkerEnd]:
    """Create a link. The caller passes the WorkerEnd to the process and closes its own copy after the start."""
    commands_read, commands_write = context.Pipe(duplex=False)
    reports_read, reports_write = context.Pipe(duplex=False)
    return Link(model, index, incarnation, commands_write, reports_read), WorkerEnd(commands_read, reports_write)
