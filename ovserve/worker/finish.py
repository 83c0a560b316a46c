"""The finish thread: encodes outcomes and previews, and writes them into the segments that the front end grants.

    device loop ──deliver──▶ paste back, encode ──Need──▶ front end ──Grant──▶ fill ──Picture──▶
    engine ───────preview──▶ (the same at preview size; dropped when PREVIEW_LIMIT of them wait)

The Need of a small result is sent earlier, with an upper limit of its size: when its steps are done and only decoding
and encoding are left (`announce`). The Grant then comes before the file is made, and nothing waits for it.

Invariants:
- A delivered outcome is counted by `settle_if_complete` exactly once, whether or not it could be encoded.
- One Grant answers each Need. The Grants of a picture come in the order of its Needs; what is encoded waits for its own
  until the job has failed.
- An error in a preview drops that preview; any other error fails its own job and no other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass

from ovserve.engines.protocol import Outcome, Preview
from ovserve.errors import ApiError, BlobGone, InternalError, LinkClosed, SpoolFull
from ovserve.logs import fields
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.messages import Grant, Need, Picture
from ovserve.worker.jobs import Jobs, WorkerJob
from ovserve.worker.reports import ReportSender, end_process

__all__ = ["Finisher"]

FINISH_LIMIT = 4  # outcomes waiting to be encoded; at this limit the device waits
# Results that may be larger are announced when they are encoded: granting them takes more time, and more of the spool.
ANNOUNCED_BYTES = 1 << 20
PREVIEW_LIMIT = 8  # previews waiting to be encoded; further ones are dropped
DELIVER_TIMEOUT_S = 1.0  # for `deliver` to get a free slot; the device loop sends heartbeats between tries

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _TimedOutcome:
    """An outcome and how long the engine had its work."""

    outcome: Outcome
    seconds: float
    ended_at: float  # on the monotonic clock


@dataclass(frozen=True, slots=True)
class _QueuedPreview:
    """A preview waiting to be encoded."""

    job: str
    picture: int
    preview: Preview


@dataclass(frozen=True, slots=True)
class _Announcement:
    """A picture whose steps are done."""

    job: str
    picture: int


@dataclass(slots=True)
class _Needed:
    """A segment that the front end was asked for, until it is filled or its job has failed.

    Attributes:
        size: bytes of the segment.
        partial: as in `Need`.
        data: what it is for; None until it is encoded.
        storage: its id; None until it is granted, empty if there was no space.
    """

    size: int
    partial: int
    data: bytes | None = None
    storage: str | None = None


_Item = _TimedOutcome | _QueuedPreview | _Announcement | Grant


class Finisher:
    """Encodes the results of one worker. `run` is the finish thread; the other methods are thread-safe."""

    def __init__(self, jobs: Jobs, reports: ReportSender, blobs: WorkerBlobs) -> None:
        self.busy_since: float | None = None  # monotonic time at which the current item was started
        self._jobs = jobs
        self._reports = reports
        self._blobs = blobs
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._outcome_slots = threading.Semaphore(FINISH_LIMIT)
        self._preview_slots = threading.Semaphore(PREVIEW_LIMIT)
        # By job id and picture, in the order of the Needs. Used by the finish thread only.
        self._needed: dict[tuple[str, int], deque[_Needed]] = {}

    # --- any thread ---------------------------------------------------------------------------------------------------

    def deliver(self, outcome: Outcome, seconds: float) -> bool:
        """Queue an outcome of the device loop; return False when no slot became free within DELIVER_TIMEOUT_S."""
        if not self._outcome_slots.acquire(timeout=DELIVER_TIMEOUT_S):
            return False
        self._items.put(_TimedOutcome(outcome, seconds, time.monotonic()))
        return True

    def preview(self, job_id: str, picture: int, preview: Preview) -> None:
        """Queue a preview, or drop it when PREVIEW_LIMIT of them wait. Returns at once."""
        if self._preview_slots.acquire(blocking=False):
            self._items.put(_QueuedPreview(job_id, picture, preview))

    def announce(self, job_id: str, picture: int) -> None:
        """Queue the announcement of a result whose steps are done. Returns at once."""
        self._items.put(_Announcement(job_id, picture))

    def grant(self, grant: Grant) -> None:
        """Queue the front end's answer to a Need."""
        self._items.put(grant)

    # --- finish thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Finish queued items until the process ends."""
        while True:
            item = self._items.get()
            self.busy_since = time.monotonic()
            self._finish(item)
            self.busy_since = None
            del item  # otherwise the last job's picture would stay in memory until the next item arrives

    def _finish(self, item: _Item) -> None:
        if isinstance(item, _QueuedPreview):
            self._preview_slots.release()
        elif isinstance(item, _TimedOutcome):
            self._outcome_slots.release()
        job_id = _job_id_of(item)
        job = self._jobs.find(job_id)
        if job is None:  # a Grant or a preview that came after its job had failed
            self._drop_needed(job_id)
            return
        try:
            if isinstance(item, Grant):
                self._note_grant(job, item)
            elif isinstance(item, _Announcement):
                self._announce(job, item.picture)
            elif isinstance(item, _QueuedPreview):
                self._try_preview(job, item)
            else:
                self._finish_outcome(job, item)
        except ApiError as error:
            self._jobs.fail(job, error)
        except BlobGone:
            self._jobs.fail(job, InternalError("the exchange has ended"))
        except LinkClosed:
            end_process(0)
        except Exception as error:  # an error of one job, MemoryError included, must not end the worker
            log.exception("finish failed", extra=fields(job=job.id))
            self._jobs.fail(job, InternalError(f"the picture could not be encoded: {type(error).__name__}"))
        if job.error is not None:
            self._drop_needed(job_id)
        self._jobs.settle_if_complete(job, returned=int(isinstance(item, _TimedOutcome)))

    def _drop_needed(self, job_id: str) -> None:
        """Free the encoded pictures of a job that has failed."""
        self._needed = {key: value for key, value in self._needed.items() if key[0] != job_id}

    def _announce(self, job: WorkerJob, picture: int) -> None:
        """Send the Need of a result that is not encoded yet, if a small segment is enough for it in any case.

        Not where there are previews: the last of them may be encoded after the steps are done, and comes before the
        result.
        """
        if job.prepared is None or job.stopped.is_set() or job.prepared.request.partial_images:
            return
        bound = job.prepared.bound_of(picture)
        if 0 < bound <= ANNOUNCED_BYTES and self._announced(job, picture) is None:
            self._need(job, picture, _Needed(bound, -1))

    def _announced(self, job: WorkerJob, picture: int) -> _Needed | None:
        """Return what was announced for a result that is not encoded yet."""
        return next((needed for needed in self._needed.get((job.id, picture), ()) if needed.partial < 0), None)

    def _finish_outcome(self, job: WorkerJob, item: _TimedOutcome) -> None:
        outcome = item.outcome
        job.add_denoise_interval(item.ended_at - item.seconds, item.ended_at)
        if outcome.error is not None:
            self._jobs.fail(job, outcome.error)
        if outcome.pixels is None or job.prepared is None or job.stopped.is_set():
            return
        started = time.monotonic()
        picture = outcome.work.picture
        data = job.prepared.encode(job.prepared.assemble(outcome.pixels), picture)
        ended = time.monotonic()
        job.finish_ms += (ended - started) * 1000
        self._reports.span(job, "device", item.ended_at - item.seconds, item.ended_at, picture=picture)
        self._reports.span(job, "finish", started, ended, picture=picture)
        needed = self._announced(job, picture)
        if needed is None:
            self._need(job, picture, _Needed(len(data), -1, data))
            return
        if len(data) > needed.size:
            raise InternalError(f"the result takes {len(data)} bytes; {needed.size} were announced")
        needed.data = data
        self._fill_granted(job, picture)

    def _try_preview(self, job: WorkerJob, item: _QueuedPreview) -> None:
        try:
            self._finish_preview(job, item)
        except Exception:  # the picture does not depend on its previews
            log.exception("preview failed", extra=fields(job=job.id))

    def _finish_preview(self, job: WorkerJob, item: _QueuedPreview) -> None:
        if job.prepared is None or job.stopped.is_set():
            return
        picture = item.picture
        index = job.partials.get(picture, 0)
        if index < job.prepared.request.partial_images:
            data = job.prepared.encode_preview(item.preview.pixels)
            job.partials[picture] = index + 1  # only now: if encoding fails, the next preview takes this index
            self._need(job, picture, _Needed(len(data), index, data))

    def _need(self, job: WorkerJob, picture: int, needed: _Needed) -> None:
        """Send a Need."""
        self._needed.setdefault((job.id, picture), deque()).append(needed)
        self._reports.send(Need(job.id, picture, needed.size, needed.partial))

    def _note_grant(self, job: WorkerJob, grant: Grant) -> None:
        """Note a Grant, which answers the picture's first Need without one; fill the segment if it can be filled.

        Raises:
            SpoolFull: the Grant for a result has no segment. A preview without a segment is dropped.
        """
        waiting = [needed for needed in self._needed.get((job.id, grant.picture), ()) if needed.storage is None]
        if waiting:
            waiting[0].storage = grant.storage
            self._fill_granted(job, grant.picture)

    def _fill_granted(self, job: WorkerJob, picture: int) -> None:
        """Write what is encoded into the segments that are granted.

        Raises:
            SpoolFull: there is no segment for a result.
        """
        needed = self._needed.get((job.id, picture), deque())
        for each in [each for each in needed if each.storage == "" or (each.storage and each.data is not None)]:
            needed.remove(each)
            self._fill(job, picture, each)
        if not needed:
            self._needed.pop((job.id, picture), None)

    def _fill(self, job: WorkerJob, picture: int, needed: _Needed) -> None:
        if not needed.storage and needed.partial >= 0:
            return
        if not needed.storage or needed.data is None:
            raise SpoolFull("no space for the result in the spool", retry_after_s=2)
        self._blobs.fill(needed.storage, needed.data)
        seed = job.prepared.request.seed_of(picture) if job.prepared else 0
        self._reports.send(Picture(job.id, picture, seed, len(needed.data), needed.partial))
        if needed.partial < 0:
            job.filled += 1


def _job_id_of(item: _Item) -> str:
    return item.outcome.work.job if isinstance(item, _TimedOutcome) else item.job
