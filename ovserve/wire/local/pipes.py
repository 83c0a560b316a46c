"""The two ends of a link over a private pair of one-way pipes for each worker incarnation.

    front end                                             worker
    Link.send  ── Run Cancel Grant Stop ──────────────▶  WorkerEnd.receive
    Link.receive ◀── Ready Heartbeat Prepared Progress ────  WorkerEnd.send
                     Need Done Failed

- The front end's side never blocks: a worker stopped in mid-write must not stop the dispatcher.
- The front end closes its copy of the worker's ends, so a dead worker reads as end-of-file and never as a hang.
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

MAX_CAPACITY = 1024  # jobs one worker may ask for; more is a worker that counts wrongly
_OUTBOX_LIMIT = 4096  # messages waiting for a worker that does not read; a worker holds far fewer jobs than this


@dataclass(slots=True)
class WorkerEnd:
    """The worker's side of a link. Passed to the child process; blocking; `send` is thread-safe (one lock)."""

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
        """The next command; blocks. Raises LinkClosed when the front end is gone, LinkGarbage."""
        while not self._waiting:
            data = os.read(self.commands.fileno(), 65536)
            if not data:
                raise LinkClosed("the front end closed the link")
            self._waiting.extend(self._lines.feed(data))
        return decode(self._waiting.popleft())

    def send(self, message: Message) -> None:
        """Report to the front end. Raises LinkClosed when it is gone."""
        line = encode(message)
        with self._lock:
            try:
                os.write(self.reports.fileno(), line)  # at most PIPE_BUF on a blocking pipe: whole or not at all
            except OSError as error:
                raise LinkClosed(f"the front end is gone: {error.strerror}") from None

    def close(self) -> None:
        """Close both queues."""
        self.commands.close()
        self.reports.close()


class Link:
    """The front end's side: never blocks. One link for one worker incarnation; thrown away with it.

    Owned by the dispatcher thread, which alone calls `send`, `flush`, `receive` and `close` once the link is attached. The
    supervisor reads `ready`, `failure`, `lost`, `phase`, `beat_at`, `allow_s` and `jobs_done` (plain values that the dispatcher
    thread replaces), never the queues.
    """

    def __init__(self, model: str, index: int, incarnation: int, commands: Connection, reports: Connection) -> None:
        self.model = model
        self.index = index  # stable place 0..replicas-1
        self.incarnation = incarnation  # how often that place was filled before
        self.ready: Ready | None = None
        self.failure: Failed | None = None  # a Failed without a job: why the worker gives up
        self.lost = ""  # why the dispatcher has let go of it; its process has to end
        self.is_retired = False  # it gets no more jobs
        self.is_broken = False  # let go of for what it said, not because it was gone
        self.is_clogged = False  # a command found no place, for the worker has not read for far too long
        self.jobs_lost = 0  # jobs it had read then that nobody had settled
        self.lost_second_try = False  # one of those had cost a worker before
        self.phase = "spawn"
        self.beat_at = time.monotonic()
        self.allow_s = 0.0
        self.jobs_done = 0  # those whose end was believed
        self._commands = commands
        self._reports = reports
        self._lines = LineBuffer()
        self._outbox: deque[bytes] = deque()
        self.given_bytes = 0  # of commands, those in the outbox included
        os.set_blocking(commands.fileno(), False)
        os.set_blocking(reports.fileno(), False)

    @property
    def name(self) -> str:
        """`model/index#incarnation`, as logs write it."""
        return f"{self.model}/{self.index}#{self.incarnation}"

    def fileno(self) -> int:
        """The descriptor that becomes readable when the worker reports."""
        return self._reports.fileno()

    def commands_fileno(self) -> int:
        """The descriptor to watch for writability while `has_backlog`."""
        return self._commands.fileno()

    @property
    def has_backlog(self) -> bool:
        """Whether commands wait for the worker to read."""
        return bool(self._outbox)

    @property
    def read_bytes(self) -> int:
        """How many of `given_bytes` the worker has taken; a pipe tells (pipe(7), FIONREAD) after the reader's death too."""
        left = fcntl.ioctl(self._commands.fileno(), termios.FIONREAD, bytes(4))
        return self.given_bytes - sum(map(len, self._outbox)) - int.from_bytes(left, sys.byteorder)

    def send(self, message: Message) -> None:
        """Give the worker a command, now or as soon as it reads. Raises LinkClosed."""
        if len(self._outbox) >= _OUTBOX_LIMIT:
            self.is_clogged = True
            raise LinkClosed("the worker has not read its commands for too long")
        line = encode(message)
        self._outbox.append(line)
        self.given_bytes += len(line)
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes. Raises LinkClosed."""
        while self._outbox:
            try:
                os.write(self._commands.fileno(), self._outbox[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed(f"the worker is gone: {error.strerror}") from None
            self._outbox.popleft()

    def receive(self) -> list[Message]:
        """What has come in; beats and readiness are noted on the link itself. Raises LinkClosed, LinkGarbage."""
        try:
            data = os.read(self._reports.fileno(), 65536)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LinkClosed(f"the worker is gone: {error.strerror}") from None
        if not data:
            raise LinkClosed("the worker is gone")
        messages = [decode(line) for line in self._lines.feed(data)]
        for message in messages:
            self._note(message)
        return messages

    def _note(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.phase, self.allow_s, self.beat_at = message.phase, message.allow_s, time.monotonic()
        elif isinstance(message, Ready):
            if not 1 <= message.capacity <= MAX_CAPACITY:
                raise LinkGarbage(f"a capacity of {message.capacity}")
            # Loading is over, and with it the long silence allowed for it, whether a beat says so or not.
            self.ready, self.phase, self.allow_s, self.beat_at = message, "idle", 0.0, time.monotonic()
        elif isinstance(message, Failed) and not message.job:
            self.failure = message

    def close(self) -> None:
        """Close both queues: the worker reads end-of-file and ends."""
        self._commands.close()
        self._reports.close()


def open_link(context: SpawnContext, model: str, index: int, incarnation: int) -> tuple[Link, WorkerEnd]:
    """A fresh pair of queues. The caller passes the second value to the process and closes its own copy after the start."""
    commands_read, commands_write = context.Pipe(duplex=False)
    reports_read, reports_write = context.Pipe(duplex=False)
    return Link(model, index, incarnation, commands_write, reports_read), WorkerEnd(commands_read, reports_write)
