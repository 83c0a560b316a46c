"""A job: one admitted request, its deadline, its state, and the result that a handler thread waits for.

    QUEUED ──▶ RUNNING ──▶ DONE
      │  ▲        │  └───▶ FAILED
      │  └────────┘ (its worker died: once)
      └──────────────────▶ CANCELLED | EXPIRED | FAILED

`settle` performs the last move, exactly once, under the job's lock; whoever comes later is told so and does nothing.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ovserve.deadline import Deadline
from ovserve.errors import ApiError, SpoolFull
from ovserve.wire.local.spool import Segment
from ovserve.wire.messages import Prepared, Progress
from ovserve.wire.request import ImageRequest

__all__ = ["Job", "JobEvent", "Partial", "Result", "State"]


_FULL_RETRY_S = 2  # descriptors come back as exchanges end


class State(enum.Enum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


_MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.RUNNING: frozenset({State.QUEUED, State.DONE, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}
_SETTLED = frozenset(state for state, moves in _MOVES.items() if not moves)


@dataclass(frozen=True, slots=True)
class Result:
    """One finished picture, number `picture` of its job: encoded bytes in a segment that the job owns."""

    segment: Segment
    size: int
    seed: int
    picture: int = 0


@dataclass(frozen=True, slots=True)
class Partial:
    """One preview of picture `picture`, `index` 0.. in time; the segment belongs to the job."""

    picture: int
    index: int
    segment: Segment
    size: int


JobEvent = Prepared | Progress | Partial | Result


@dataclass(slots=True)
class Timings:
    """Where the time went: monotonic instants set by the dispatcher, milliseconds reported by the worker."""

    admitted_at: float = 0.0
    dispatched_at: float = 0.0
    settled_at: float = 0.0
    prepare_ms: float = 0.0
    denoise_ms: float = 0.0
    finish_ms: float = 0.0


class Client(NamedTuple):
    """Whom fairness counts a job for: an address, and within it the fingerprint of an API key, or the lack of one.

    A key that nobody has verified says who is who among those of one address, and never who has more rights than another. A
    verified one stands in place of the address.
    """

    address: str
    key: str = ""


def _new_wakeup() -> int:
    """A descriptor for a job's handler to wait on. Raises SpoolFull where there is none left, as for the job's segments."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:  # EMFILE, ENFILE, ENOMEM: eventfd(2) knows no others here
        raise SpoolFull(f"no room for one more job: {error.strerror}", retry_after_s=_FULL_RETRY_S) from None


@dataclass(slots=True, eq=False)
class Job:
    """One admitted request. The handler thread makes it and calls `close`; the dispatcher thread moves it.

    Making one raises SpoolFull when the process has no descriptor left.

    Attributes:
        id: unguessable, and the request id of the logs.
        client: whom fairness counts it for.
        attempts: how many workers have had it.
        results: by picture number, filled as they come.
        wakeup: a descriptor (eventfd) that becomes readable when the job settles, and for a request with `progress` with each event.
    """

    id: str
    model: str
    client: Client
    request: ImageRequest
    deadline: Deadline
    state: State = State.QUEUED
    attempts: int = 0
    error: ApiError | None = None
    prepared: Prepared | None = None
    results: dict[int, Result] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    wakeup: int = field(default_factory=_new_wakeup)
    _events: deque[JobEvent] = field(default_factory=deque)
    _segments: list[Segment] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether the job has made its last move."""
        return self.state in _SETTLED

    def move(self, state: State) -> bool:
        """Make a move that is not the last one; False when the job is settled already."""
        with self._lock:
            if state not in _MOVES[self.state]:
                return False
            self.state = state
            return True

    def settle(self, state: State, error: ApiError | None = None) -> bool:
        """Make the last move and wake the handler; False when another came first. Thread-safe."""
        with self._lock:
            if state not in _SETTLED or state not in _MOVES[self.state]:
                return False
            self.state, self.error = state, error
            self.timings.settled_at = time.monotonic()
            self._wake()
            return True

    def post(self, event: JobEvent) -> None:
        """Hand an event to the handler. A Progress that nobody has read yet is replaced, so the list stays short.

        Only a handler that streams (`request.progress`) is woken for it: the others wait for the end, and would wake for nothing.
        """
        with self._lock:
            if self._closed:
                return
            if isinstance(event, Prepared):
                self.prepared = event
            if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
                self._events.pop()
            self._events.append(event)
            if self.request.progress:
                self._wake()

    def take_events(self) -> list[JobEvent]:
        """What has happened since the last call; clears `wakeup`. Runs in: the handler thread."""
        with self._lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.wakeup)
            taken = list(self._events)
            self._events.clear()
            return taken

    def own(self, segment: Segment) -> bool:
        """Make the job the owner of a segment; False (and the segment released) when the exchange has ended."""
        with self._lock:
            if not self._closed:
                self._segments.append(segment)
                return True
        segment.release()
        return False

    @property
    def spool_bytes(self) -> int:
        """What the job has in the spool, its uploads included."""
        request = self.request
        uploads = [*request.images, request.mask] if request.mask else request.images
        with self._lock:
            return sum(blob.size for blob in uploads) + sum(segment.reserved for segment in self._segments)

    def drop_results(self) -> None:
        """Forget what a dead worker had finished: the next one makes every picture again."""
        with self._lock:
            self.results.clear()

    def close(self) -> None:
        """End the exchange: release every segment and the descriptor. Runs in: the handler thread, in a finally."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            segments, self._segments = self._segments, []
            self.results.clear()
            self._events.clear()
            os.close(self.wakeup)
        for segment in segments:
            segment.release()

    def _wake(self) -> None:
        if not self._closed:
            os.eventfd_write(self.wakeup, 1)
