"""A job: one admitted request with its deadline, state and results.

    QUEUED ──▶ RUNNING ──▶ DONE
      │  ▲        │  └───▶ FAILED | CANCELLED | EXPIRED
      │  └────────┘ (requeued: its worker died)
      └──────────────────▶ CANCELLED | EXPIRED | FAILED

Invariant: `Job.settle` makes the last move, exactly once, under the job's lock; later calls return False and change
nothing.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from ovserve.accounts import Holding
from ovserve.deadline import Deadline
from ovserve.errors import ApiError, SpoolFull
from ovserve.wire.blobs import Segment
from ovserve.wire.messages import Prepared, Progress, Span
from ovserve.wire.request import ImageRequest

__all__ = ["Job", "JobEvent", "Partial", "Result", "State"]


MAX_SPANS = 4096  # of one job: ten pictures of a hundred steps, and as many for a second attempt
_FULL_RETRY_S = 2  # descriptors are released as exchanges end


class State(enum.Enum):
    """State of a job."""

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
    """Finished picture number `picture` of a job: `size` encoded bytes in a segment that the job owns."""

    segment: Segment
    size: int
    seed: int
    picture: int = 0


@dataclass(frozen=True, slots=True)
class Partial:
    """Preview number `index`, from 0, of picture `picture`: `size` encoded bytes in a segment that the job owns."""

    picture: int
    index: int
    segment: Segment
    size: int


JobEvent = Prepared | Progress | Partial | Result


@dataclass(slots=True)
class Timings:
    """Times of a job: monotonic instants set by the dispatcher, milliseconds reported by the worker."""

    admitted_at: float = 0.0
    dispatched_at: float = 0.0
    settled_at: float = 0.0
    prepare_ms: float = 0.0
    denoise_ms: float = 0.0
    finish_ms: float = 0.0


class Client(NamedTuple):
    """The party that fair queueing counts a job for.

    Attributes:
        address: network address, or the fingerprint of a verified API key in its place.
        key: fingerprint of an unverified API key, or empty. It separates the clients of one address and grants no
            rights.
    """

    address: str
    key: str = ""


def _new_wakeup() -> int:
    """Return a new eventfd for a job's handler. Raises SpoolFull when no descriptor is left, as for segments."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:  # EMFILE, ENFILE or ENOMEM: with these flags eventfd(2) has no other errors
        raise SpoolFull(
            f"The server has no resources for one more job: {error.strerror}.", retry_after_s=_FULL_RETRY_S
        ) from None


@dataclass(slots=True, eq=False)
class Job:
    """One admitted request. The handler thread creates and closes it; the dispatcher thread moves it.

    The constructor raises SpoolFull when the process has no descriptor left.

    Attributes:
        id: unguessable; also the request id in the logs.
        client: the party that fair queueing counts the job for.
        key_name: name of the client's named key, to show it; empty without one.
        is_traced: whether workers report the times of its stages, into `spans`.
        keep_alive_s: how long its model stays after its last job; None: as the model's options say.
        attempts: how many times the job was dispatched to a worker.
        results: by picture number, added as they are reported.
        wakeup: eventfd that becomes readable when the job settles, and on each event of a request with `progress`.
        holding: what its segments count for; None: for no client.
        has_uploads: whether its uploads are still in the spool, as a second attempt needs them.
    """

    id: str
    model: str
    client: Client
    request: ImageRequest
    deadline: Deadline
    keep_alive_s: float | None = None
    key_name: str = ""
    is_traced: bool = False
    state: State = State.QUEUED
    attempts: int = 0
    error: ApiError | None = None
    prepared: Prepared | None = None
    results: dict[int, Result] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    wakeup: int = field(default_factory=_new_wakeup)
    holding: Holding | None = None
    has_uploads: bool = True
    spans: list[Span] = field(default_factory=list)
    _events: deque[JobEvent] = field(default_factory=deque)
    _segments: list[Segment] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether the job has reached its final state."""
        return self.state in _SETTLED

    @property
    def has_all_pictures(self) -> bool:
        """Whether a worker has made every picture; only the end of the job is outstanding."""
        return self.prepared is not None and len(self.results) >= self.request.n

    def move(self, state: State) -> bool:
        """Change to a state that is not final. Return False when the current state does not allow it.

        Thread-safe: yes.
        """
        with self._lock:
            if state not in _MOVES[self.state]:
                return False
            self.state = state
            return True

    def settle(self, state: State, error: ApiError | None = None) -> bool:
        """Change to a final state and wake the handler. Return False when the current state does not allow it.

        Thread-safe: yes.
        """
        with self._lock:
            if state not in _SETTLED or state not in _MOVES[self.state]:
                return False
            self.state, self.error = state, error
            self.timings.settled_at = time.monotonic()
            self._wake()
            return True

    def post(self, event: JobEvent) -> None:
        """Queue an event for the handler.

        A new Progress replaces an unread one at the end of the queue, to bound its length. Only a streaming handler
        (`request.progress`) is woken: the others wait for settlement and would wake for nothing.
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

    def add_span(self, span: Span) -> None:
        """Keep the times of a stage, if the job is traced and has not too many."""
        if self.is_traced and len(self.spans) < MAX_SPANS:
            self.spans.append(span)

    def take_events(self) -> list[JobEvent]:
        """Return the events since the last call and clear `wakeup`. Runs in: handler thread."""
        with self._lock:
            return self._take_locked()

    def _take_locked(self) -> list[JobEvent]:
        if not self._closed:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.wakeup)
        taken = list(self._events)
        self._events.clear()
        return taken

    def take_with_state(self) -> tuple[list[JobEvent], bool]:
        """Return the events since the last call, and whether the job is settled: then there will be no more.

        Both are of one moment, so that a settlement after it makes `wakeup` readable again. Runs in: handler thread.
        """
        with self._lock:
            return self._take_locked(), self.state in _SETTLED

    def give_up_uploads(self) -> None:
        """Note that the uploads are released: the job cannot be tried again. Thread-safe: yes."""
        self.has_uploads = False

    def add_segment(self, segment: Segment) -> bool:
        """Make the job the owner of a segment. When the exchange has ended, release the segment and return False."""
        with self._lock:
            if not self._closed:
                self._segments.append(segment)
                return True
        segment.release()
        return False

    @property
    def spool_bytes(self) -> int:
        """Bytes that the job holds in the spool, uploads included."""
        request = self.request
        uploads = [*request.images, request.mask] if request.mask else request.images
        with self._lock:
            return sum(blob.size for blob in uploads) + sum(segment.reserved for segment in self._segments)

    def release_picture(self, picture: Result | Partial) -> None:
        """Release the segment of a picture that has been sent. Runs in: handler thread."""
        with self._lock:
            self._segments = [segment for segment in self._segments if segment is not picture.segment]
        picture.segment.release()

    def drop_results(self, segments: Collection[Segment]) -> None:
        """Drop the results of a dead worker: the next attempt produces every picture again.

        Args:
            segments: the segments granted to that worker. They are released, so that the next attempt has their space,
                unless the handler sends pictures as they arrive and may be reading one.
        """
        with self._lock:
            self.results.clear()
            if self._closed or self.request.progress:
                return
            self._segments = [segment for segment in self._segments if segment not in segments]
        for segment in segments:
            segment.release()

    def close(self) -> None:
        """End the exchange: release every segment and the descriptor. Safe to call twice.

        Runs in: handler thread, in a `finally` block.
        """
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
