"""The finish thread: outcomes and previews to encoded pictures, and those into the segments that the front end gives for them.

    device loop ──deliver──▶ paste back, encode ──Need──▶ front end ──Grant─▶ fill ──Picture──▶
    engine ───────preview──▶ (the same at preview size; dropped where too many wait)

Laws of this file:
- An outcome that was delivered is reported to `settle` exactly once, whatever became of it.
- A Need is answered by one Room; encoded pictures wait for theirs in the order of the Needs, until their job has failed.
- A preview that goes wrong is left out; anything else that goes wrong ends its job, and no other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from ovserve.deadline import Deadline
from ovserve.engines.protocol import Outcome, Preview, Work
from ovserve.errors import ApiError, InternalError, LinkClosed, SpoolFull
from ovserve.logs import fields
from ovserve.wire.local.spool import fill
from ovserve.wire.messages import Grant, Need, Picture, Run
from ovserve.worker.prepare import PreparedRequest
from ovserve.worker.reports import ReportSender, end_process

__all__ = ["Finisher", "WorkerJob"]

FINISH_LIMIT = 4  # outcomes waiting to be encoded; then the device waits
PREVIEW_LIMIT = 8  # previews waiting to be encoded; further ones are dropped
TICK_S = 1.0  # how long the device waits for a place before it looks up

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class WorkerJob:
    """One job the worker holds. Changed under the desk's lock.

    Attributes:
        given, returned: pieces of work handed to the device loop, and outcomes dealt with.
        filled: results whose segment is filled.
        error: why it fails; the first reason counts.
        stopped: nobody wants it any more, or it has failed: whoever meets it lets go of it. Shared with its works.
        partials: previews made so far, by picture.
    """

    job: str
    run: Run
    deadline: Deadline
    edit: PreparedRequest | None = None
    is_preparing: bool = True
    given: int = 0
    returned: int = 0
    filled: int = 0
    error: ApiError | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    partials: dict[int, int] = field(default_factory=dict)
    prepare_ms: float = 0.0
    denoise_ms: float = 0.0
    finish_ms: float = 0.0
    _denoised: tuple[float, float] = (0.0, 0.0)  # the last stretch of time that counts in it

    def note_denoised(self, begun_at: float, ended_at: float) -> None:
        """The engine had one of the job's pictures from here to there, on the monotonic clock.

        Pictures of one job are denoised at the same time: what overlaps counts once, so that no stage takes longer than the
        request. Calls come in the order of the ends.
        """
        begun, until = self._denoised
        if begun_at > until:
            begun, until = begun_at, begun_at
        self.denoise_ms += 1000 * (ended_at - until + max(0.0, begun - begun_at))
        self._denoised = (min(begun, begun_at), ended_at)


class Jobs(Protocol):
    """What finishing asks of the desk. Thread-safe."""

    def find(self, job: str) -> WorkerJob | None:
        """The job, unless it has ended."""

    def fail(self, held: WorkerJob, error: ApiError) -> None:
        """The job ends with this error as soon as everything has let go of it; the first error counts."""

    def settle(self, held: WorkerJob, *, returned: int = 0) -> None:
        """So many more of its outcomes are dealt with; report the end of the job if it has come."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """What the device loop gives out, and how long the engine had it."""

    outcome: Outcome
    seconds: float
    ended_at: float  # on the monotonic clock


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A preview on its way to the client."""

    work: Work
    preview: Preview


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A picture that waits for the segment it goes into: until the front end gives one, cancels the job, or is gone."""

    data: bytes
    partial: int


class Finisher:
    """One instance in a worker. `run` is the finish thread's; the other methods are for any thread."""

    def __init__(self, jobs: Jobs, replies: ReportSender) -> None:
        self.busy_since: float | None = None  # since when it has been at one item, on the monotonic clock
        self._jobs = jobs
        self._replies = replies
        self._items: queue.SimpleQueue[_Finished | _Estimate | Grant] = queue.SimpleQueue()
        self._places = threading.Semaphore(FINISH_LIMIT)
        self._preview_places = threading.Semaphore(PREVIEW_LIMIT)
        # Finish thread only; by job and picture, in order of Need.
        self._waiting: dict[tuple[str, int], deque[_Encoded]] = {}

    # --- from other threads -------------------------------------------------------------------------------------------

    def deliver(self, outcome: Outcome, seconds: float) -> bool:
        """Take an outcome from the device loop; False when there was no place for it within a second."""
        if not self._places.acquire(timeout=TICK_S):
            return False
        self._items.put(_Finished(outcome, seconds, time.monotonic()))
        return True

    def preview(self, work: Work, preview: Preview) -> None:
        """Take an estimate, or drop it. Returns at once."""
        if self._preview_places.acquire(blocking=False):
            self._items.put(_Estimate(work, preview))

    def room(self, room: Grant) -> None:
        """Take a segment for a picture that was asked for."""
        self._items.put(room)

    # --- finish thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Finish what comes in, until the process ends."""
        while True:
            item = self._items.get()
            self.busy_since = time.monotonic()
            self._finish(item)
            self.busy_since = None
            del item  # not kept while waiting: the last job's picture would stay in memory until the next one

    def _finish(self, item: _Finished | _Estimate | Grant) -> None:
        if isinstance(item, _Estimate):
            self._preview_places.release()
        elif isinstance(item, _Finished):
            self._places.release()
        job = _job_of(item)
        held = self._jobs.find(job)
        if held is None:  # a Grant or a preview that came after its job had failed
            self._forget(job)
            return
        try:
            if isinstance(item, Grant):
                self._fill(held, item)
            elif isinstance(item, _Estimate):
                self._try_preview(held, item)
            else:
                self._finish_outcome(held, item)
        except ApiError as error:
            self._jobs.fail(held, error)
        except FileNotFoundError:
            self._jobs.fail(held, InternalError("the exchange has ended"))
        except LinkClosed:
            end_process(0)
        except Exception as error:  # one job's trouble, MemoryError included, is not the worker's
            log.exception("finish failed", extra=fields(job=held.job))
            self._jobs.fail(held, InternalError(f"the picture could not be encoded: {type(error).__name__}"))
        if held.error is not None:
            self._forget(job)
        self._jobs.settle(held, returned=int(isinstance(item, _Finished)))

    def _forget(self, job: str) -> None:
        """Let go of what was encoded for a job that has failed."""
        self._waiting = {key: value for key, value in self._waiting.items() if key[0] != job}

    def _finish_outcome(self, held: WorkerJob, item: _Finished) -> None:
        outcome = item.outcome
        held.note_denoised(item.ended_at - item.seconds, item.ended_at)
        if outcome.error is not None:
            self._jobs.fail(held, outcome.error)
        if outcome.pixels is None or held.edit is None or held.stopped.is_set():
            return
        started = time.monotonic()
        picture = outcome.work.picture
        data = held.edit.encode(held.edit.assemble(outcome.pixels), picture)
        held.finish_ms += (time.monotonic() - started) * 1000
        self._ask_room(held, picture, data, -1)

    def _try_preview(self, held: WorkerJob, item: _Estimate) -> None:
        try:
            self._finish_preview(held, item)
        except Exception:  # a preview is a courtesy: the picture does not depend on it
            log.exception("preview failed", extra=fields(job=held.job))

    def _finish_preview(self, held: WorkerJob, item: _Estimate) -> None:
        if held.edit is None or held.stopped.is_set():
            return
        picture = item.work.picture
        index = held.partials.get(picture, 0)
        if index < held.edit.request.partial_images:
            data = held.edit.encode_preview(item.preview.pixels)
            held.partials[picture] = index + 1  # one that cannot be encoded leaves its number to the next
            self._ask_room(held, picture, data, index)

    def _ask_room(self, held: WorkerJob, picture: int, data: bytes, partial: int) -> None:
        waiting = self._waiting.setdefault((held.job, picture), deque())
        waiting.append(_Encoded(data, partial))
        self._replies.send(Need(held.job, picture, len(data), partial))

    def _fill(self, held: WorkerJob, room: Grant) -> None:
        """The dispatcher answers each Need with one Grant, in order; a preview without room is left out."""
        waiting = self._waiting.get((held.job, room.picture))
        if not waiting:
            return
        encoded = waiting.popleft()
        if not waiting:
            del self._waiting[held.job, room.picture]
        if not room.path and encoded.partial >= 0:
            return
        if not room.path:
            raise SpoolFull("there is no room for the result", retry_after_s=2)
        fill(room.path, encoded.data)
        seed = held.edit.request.seed_of(room.picture) if held.edit else 0
        self._replies.send(Picture(held.job, room.picture, seed, len(encoded.data), encoded.partial))
        if encoded.partial < 0:
            held.filled += 1


def _job_of(item: _Finished | _Estimate | Grant) -> str:
    if isinstance(item, Grant):
        return item.job
    return item.work.job if isinstance(item, _Estimate) else item.outcome.work.job
