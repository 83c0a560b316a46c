"""A link: the private pair of message queues between the front end and one worker incarnation.

    front end                                                    worker
    Link.send    ── Run Cancel Grant LogLevel Stop ──────────▶  WorkerLink.receive
    Link.receive ◀── Ready Heartbeat Counts Span Prepared ────  WorkerLink.send
                     Progress Need Picture Done Failed

The front end's side never blocks: a worker that is stopped in the middle of a write must not stop the dispatcher. A
link is discarded with its worker.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from ovserve.errors import LinkGarbage
from ovserve.wire.messages import Failed, Heartbeat, Message, Ready

__all__ = ["MAX_CAPACITY", "OUTBOX_LIMIT", "Link", "WorkerLink", "WorkerState"]

MAX_CAPACITY = 1024  # jobs a worker may take at once; a worker that reports more has a bug
OUTBOX_LIMIT = 4096  # unsent commands; a worker holds far fewer jobs, so one with more unsent does not read


class WorkerLink(Protocol):
    """The worker's side: blocking. `send` is thread-safe."""

    def receive(self) -> Message:
        """Wait for the next command and return it.

        Raises:
            LinkClosed: the front end has closed the link or exited.
            LinkGarbage: it sent something that is not a message.
        """

    def send(self, message: Message) -> None:
        """Send a report to the front end. Raises LinkClosed if the front end has closed the link or exited."""

    def close(self) -> None:
        """Close the link."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What is known of a worker at one moment. Replaced as a whole, so that every thread reads a consistent record.

    Attributes:
        ready: the worker's Ready message, once received.
        failure: its Failed message without a job: why the worker exits.
        lost: why the dispatcher has detached the worker; its process has to end. Empty while it is attached.
        is_retired: it gets no more jobs.
        is_broken: it was detached for a protocol violation or for not responding, not because it had exited.
        is_clogged: it has not read its commands for too long.
        jobs_lost: unsettled jobs that it had read when it was detached.
        lost_retried_job: one of those jobs had already cost another worker.
        lost_client: the client of those jobs; empty if there were none, or jobs of several clients.
        phase: of its newest heartbeat.
        beat_at: when that came, a monotonic instant.
        allow_s: how long that heartbeat allows until the next one; 0: the configured limit.
        jobs_done: jobs whose completion the dispatcher has accepted.
    """

    ready: Ready | None = None
    failure: Failed | None = None
    lost: str = ""
    is_retired: bool = False
    is_broken: bool = False
    is_clogged: bool = False
    jobs_lost: int = 0
    lost_retried_job: bool = False
    lost_client: str = ""
    phase: str = "spawn"
    beat_at: float = 0.0
    allow_s: float = 0.0
    jobs_done: int = 0


class Link(ABC):
    """The front end's side: never blocks.

    Once the link is attached, only the dispatcher thread calls `send`, `receive` and `close`. `state` may be read, and
    `update` called, by any thread.

    Attributes:
        index: the worker's slot, 0..replicas-1.
        incarnation: how many workers this slot had before.
    """

    def __init__(self, model: str, index: int, incarnation: int) -> None:
        self.model = model
        self.index = index
        self.incarnation = incarnation
        self._state = WorkerState(beat_at=time.monotonic())
        self._state_lock = threading.Lock()

    @property
    def name(self) -> str:
        """`model/index#incarnation`, as in the log."""
        return f"{self.model}/{self.index}#{self.incarnation}"

    @property
    def state(self) -> WorkerState:
        """The newest record."""
        return self._state

    def update(self, **changes: Any) -> None:
        """Replace the record by one with these attributes changed."""
        with self._state_lock:  # so that two threads do not lose each other's changes
            self._state = dataclasses.replace(self._state, **changes)

    def note(self, message: Message) -> None:
        """Record a heartbeat, readiness or the failure of the worker itself; ignore other reports.

        Raises:
            LinkGarbage: the reported capacity is out of range.
        """
        if isinstance(message, Heartbeat):
            self.update(phase=message.phase, allow_s=message.allow_s, beat_at=time.monotonic())
        elif isinstance(message, Ready):
            if not 1 <= message.capacity <= MAX_CAPACITY:
                raise LinkGarbage(f"capacity is {message.capacity}; it must be 1 to {MAX_CAPACITY}")
            # Loading has ended, and with it the long silence allowed for it, even if no heartbeat has reported the new
            # phase.
            self.update(ready=message, phase="idle", allow_s=0.0, beat_at=time.monotonic())
        elif isinstance(message, Failed) and not message.job:
            self.update(failure=message)

    @property
    @abstractmethod
    def readiness(self) -> int:
        """A descriptor for `poll`: readable when `receive` has something to do."""

    @property
    @abstractmethod
    def sent(self) -> int:
        """Position after the last command passed to `send`, in units of the link's own."""

    @property
    @abstractmethod
    def consumed(self) -> int:
        """Position up to which the worker has taken its commands. Works after its death too.

        Where that is not known, as on another machine, what was sent on to it counts as taken.
        """

    @abstractmethod
    def send(self, message: Message) -> None:
        """Send a command, or keep it until the worker reads.

        Raises:
            LinkClosed: the worker has closed its end or exited, or does not read (`is_clogged`).
        """

    @abstractmethod
    def receive(self) -> list[Message]:
        """Return the reports that have arrived, each recorded by `note`; send kept commands as far as possible.

        Raises:
            LinkClosed: the worker has closed its end or exited.
            LinkGarbage: it sent something that is not a valid message.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the link: the worker reads the end and exits. Idempotent."""
