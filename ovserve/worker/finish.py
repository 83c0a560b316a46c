"""The finish thread: encodes outcomes and previews, and writes them into the segments that the front end grants.

    device loop ──deliver──▶ paste back, encode ──Need──▶ front end ──Grant──▶ fill ──Picture──▶
    engine ───────preview──▶ (the same at preview size; dropped when PREVIEW_LIMIT of them wait)

Invariants:
- A delivered outcome is counted by `settle_if_complete` exactly once, whether or not it could be encoded.
- One Grant answers each Need. Encoded pictures wait for theirs in the order of the Needs, until their job has failed.
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
class _Encoded:
    """An encoded picture that waits for its segment: until the front end grants one, cancels the job, or is gone."""

    data: bytes
    partial: int


class Finisher:
    """Encodes the results of one worker. `run` is the finish thread; the other methods are thread-safe."""

    def __init__(self, jobs: Jobs, reports: ReportSender, blobs: WorkerBlobs) -> None:
        self.busy_since: float | None = None  # monotonic time at which the current item was started
        self._jobs = jobs
        self._reports = reports
        self._blobs = blobs
        self._items: queue.SimpleQueue[_TimedOutcome | _QueuedPreview | Grant] = queue.SimpleQueue()
        self._outcome_slots = threading.Semaphore(FINISH_LIMIT)
        self._preview_slots = threading.Semaphore(PREVIEW_LIMIT)
        # By job id and picture, in the order of the Needs. Used by the finish thread only.
        self._awaiting_grant: dict[tuple[str, int], deque[_Encoded]] = {}

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

    def _finish(self, item: _TimedOutcome | _QueuedPreview | Grant) -> None:
        if isinstance(item, _QueuedPreview):
            self._preview_slots.release()
        elif isinstance(item, _TimedOutcome):
            self._outcome_slots.release()
        job_id = _job_id_of(item)
        job = self._jobs.find(job_id)
        if job is None:  # a Grant or a preview that came after its job had failed
            self._drop_encoded(job_id)
            return
        try:
            if isinstance(item, Grant):
                self._fill(job, item)
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
            self._drop_encoded(job_id)
        self._jobs.settle_if_complete(job, returned=int(isinstance(item, _TimedOutcome)))

    def _drop_encoded(self, job_id: str) -> None:
        """Free the encoded pictures of a job that has failed."""
        self._awaiting_grant = {key: value for key, value in self._awaiting_grant.items() if key[0] != job_id}

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
        self._request_segment(job, picture, data, -1)

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
            self._request_segment(job, picture, data, index)

    def _request_segment(self, job: WorkerJob, picture: int, data: bytes, partial: int) -> None:
        self._awaiting_grant.setdefault((job.id, picture), deque()).append(_Encoded(data, partial))
        self._reports.send(Need(job.id, picture, len(data), partial))

    def _fill(self, job: WorkerJob, grant: Grant) -> None:
        """Write the first picture that waits for a Grant: the dispatcher answers the Needs one by one, in order.

        Raises:
            SpoolFull: the Grant for a result has no segment. A preview without a segment is dropped.
        """
        waiting = self._awaiting_grant.get((job.id, grant.picture))
        if not waiting:
            return
        encoded = waiting.popleft()
        if not waiting:
            del self._awaiting_grant[job.id, grant.picture]
        if not grant.storage and encoded.partial >= 0:
            return
        if not grant.storage:
            raise SpoolFull("no space for the result in the spool", retry_after_s=2)
        self._blobs.fill(grant.storage, encoded.data)
        seed = job.prepared.request.seed_of(grant.picture) if job.prepared else 0
        self._reports.send(Picture(job.id, grant.picture, seed, len(encoded.data), encoded.partial))
        if encoded.partial < 0:
            job.filled += 1


def _job_id_of(item: _TimedOutcome | _QueuedPreview | Grant) -> str:
    return item.outcome.work.job if isinstance(item, _TimedOutcome) else item.job
