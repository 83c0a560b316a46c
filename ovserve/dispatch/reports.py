"""Validation and application of the reports of workers.

A worker is not trusted. LinkGarbage is raised for a job that is not assigned to it, a picture that was not requested,
more bytes than announced, or a message that only the front end sends; the dispatcher then detaches the worker.

Runs in: dispatcher thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from ovserve.dispatch.allocator import LARGE_BYTES, Allocator
from ovserve.dispatch.jobs import Job, Partial, Result, State
from ovserve.dispatch.model_queue import AttachedWorker, ModelQueue
from ovserve.dispatch.queues import Ticket
from ovserve.errors import ApiError, DeadlineExceeded, InternalError, LinkGarbage, SpoolFull, from_wire
from ovserve.logs import fields
from ovserve.wire.blobs import ROOM_WAIT_S, BlobStore, Segment
from ovserve.wire.messages import (
    Counts,
    Done,
    Failed,
    Grant,
    Heartbeat,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Span,
)

__all__ = ["ReportApplier", "Settle"]

# A result above the largest picture fails its job. Above this multiple of it, the worker itself is considered faulty.
_MAX_SIZE_FACTOR = 4
_RETRY_S = 2  # segments and descriptors are released as exchanges end

log = logging.getLogger(__name__)


class Settle(Protocol):
    """Function that settles a job."""

    def __call__(self, job: Job, state: State, error: ApiError | None = None) -> bool:
        """Settle the job. Return False when it was settled before."""
        ...


class ReportApplier:
    """Applies the reports of workers to their jobs.

    Args:
        spool: provides the segments for results.
        send: sends a worker a command.
        settle: settles a job and counts it once.
        on_ready: called with a worker that has passed its warm-up.
        allocator: creates large segments in its own thread.
    """

    def __init__(
        self,
        spool: BlobStore,
        send: Callable[[AttachedWorker, Message], None],
        settle: Settle,
        on_ready: Callable[[AttachedWorker], None],
        allocator: Allocator,
    ) -> None:
        self._allocator = allocator
        self._spool = spool
        self._send = send
        self._settle = settle
        self._on_ready = on_ready

    def apply(self, worker: AttachedWorker, message: Message) -> None:
        """Apply one report. Raises LinkGarbage when it does not fit the jobs assigned to the worker."""
        if isinstance(message, Heartbeat):  # already recorded by the link
            if worker.link.state.ready is None and message.phase != worker.logged_phase:
                worker.logged_phase = message.phase
                log.debug("worker phase changed", extra=fields(worker=worker.link.name, phase=message.phase))
            return
        if isinstance(message, Ready):
            self._on_ready(worker)
            return
        if isinstance(message, Counts):
            worker.note_counts(message)
            return
        if isinstance(message, Span):
            if traced := worker.assigned.get(message.job):  # else the job has ended
                traced.job.add_span(message)
            return
        if not isinstance(message, Prepared | Progress | Need | Picture | Done | Failed):
            raise LinkGarbage(f"{message.kind!r} is not a message of a worker")
        if isinstance(message, Failed) and not message.job:
            return  # recorded by the link, where the supervisor reads it when the process has ended
        ticket = worker.assigned.get(message.job)
        if ticket is None:
            if worker.is_late_allowed(message):
                return
            raise LinkGarbage(f"{message.kind!r} for a job that is not assigned to it")
        if isinstance(message, Done | Failed):
            self._apply_end(worker, ticket, message)
        elif isinstance(message, Need):
            self._apply_need(worker, ticket, message)
        elif isinstance(message, Picture):
            self._apply_picture(ticket, message)
        elif isinstance(message, Progress):
            ticket.job.post(message)
        else:
            ticket.is_prepared = True
            if ticket.job.prepared is None:
                ticket.job.post(message)

    def _apply_need(self, worker: AttachedWorker, ticket: Ticket, message: Need) -> None:
        job, key = ticket.job, (message.picture, message.partial)
        _check_requested(ticket, message)
        if key in ticket.granted:
            raise LinkGarbage(f"picture {message.picture} announced twice")
        limit = _MAX_SIZE_FACTOR * worker.model.largest_picture_bytes
        if not 1 <= message.size <= limit:
            raise LinkGarbage(f"picture {message.picture} announced with {message.size} bytes; expected 1..{limit}")
        ticket.granted[key] = None
        if job.is_settled:
            self._grant(worker, ticket, message, None)
            return

        def create(wait_s: float) -> Segment | ApiError | None:
            return self._create_segment(worker.model, job, message.size, wait_s)

        def grant(created: Segment | ApiError | None) -> None:
            ticket.allocating -= 1
            if worker.assigned.get(job.id) is ticket:
                self._grant(worker, ticket, message, created)
            else:  # The job has ended. Without an answer, a worker that is still attached would keep the picture.
                self._send(worker, Grant(job.id, message.picture, ""))

        ticket.allocating += 1
        # In order: each picture's grants answer its Needs one after the other.
        if message.size < LARGE_BYTES and ticket.allocating == 1:
            created = create(0.0)
            if not isinstance(created, SpoolFull):
                grant(created)
                return
        self._allocator.run(lambda: create(ROOM_WAIT_S), grant)

    def _grant(self, worker: AttachedWorker, ticket: Ticket, message: Need, created: Segment | ApiError | None) -> None:
        """Send the Grant for a Need.

        Without a segment it is empty: a preview is skipped, for a result the job fails.
        """
        job, storage = ticket.job, ""
        if isinstance(created, ApiError):
            if message.partial < 0:
                self._settle(job, State.FAILED, created)
        elif created is not None:
            ticket.granted[message.picture, message.partial] = created
            storage = created.id
        if not storage and message.partial < 0 and not ticket.cancelled_at:
            ticket.cancelled_at = time.monotonic()  # for the worker an empty grant means the same as a Cancel
        self._send(worker, Grant(job.id, message.picture, storage))

    def _create_segment(self, model: ModelQueue, job: Job, size: int, wait_s: float) -> Segment | ApiError | None:
        """Create a segment that belongs to the job, or return the error that the job fails with.

        Wait at most `wait_s` for clients that were made to give way.

        Return None when the exchange has ended. Runs in: the dispatcher or allocator thread.
        """
        try:
            if size > model.largest_picture_bytes:
                return InternalError(
                    f"The result takes {size} bytes; at most {model.largest_picture_bytes} are allowed."
                )
            self._spool.check_size(job.spool_bytes + size)  # a job's pictures are in the spool together
            segment = self._spool.create(size, size, job.holding, wait_s)
        except ApiError as error:
            return error
        except OSError as error:  # fails only this job: the same read has reports for others
            log.exception("segment for a result could not be created", extra=fields(job=job.id))
            return SpoolFull(f"The spool cannot store the result: {error.strerror}.", retry_after_s=_RETRY_S)
        return segment if job.add_segment(segment) else None

    def _apply_picture(self, ticket: Ticket, message: Picture) -> None:
        job, key = ticket.job, (message.picture, message.partial)
        _check_requested(ticket, message)
        if job.is_settled:
            return
        segment = ticket.granted.get(key)
        if segment is None or not 1 <= message.size <= segment.reserved:
            granted = segment.reserved if segment else 0
            raise LinkGarbage(f"picture {message.picture} filled with {message.size} bytes; {granted} were granted")
        is_new = key not in ticket.posted
        ticket.posted.add(key)
        if message.partial < 0:
            result = Result(segment, message.size, message.seed, message.picture)
            job.results[message.picture] = result
            if is_new:
                job.post(result)
        elif is_new:
            job.post(Partial(message.picture, message.partial, segment, message.size))

    def _apply_end(self, worker: AttachedWorker, ticket: Ticket, message: Done | Failed) -> None:
        job = ticket.job
        if isinstance(message, Failed):
            worker.end_job(job.id, has_failed=True)
            error = from_wire(message.error)
            self._settle(job, State.EXPIRED if isinstance(error, DeadlineExceeded) else State.FAILED, error)
            return
        if not job.is_settled and (job.prepared is None or len(job.results) < job.request.n):
            raise LinkGarbage(
                f"'done' with {len(job.results)} of {job.request.n} pictures, prepared: {job.prepared is not None}"
            )
        worker.link.update(jobs_done=worker.link.state.jobs_done + 1)
        worker.end_job(job.id, has_failed=False)
        timings = job.timings
        timings.prepare_ms, timings.denoise_ms = message.prepare_ms, message.denoise_ms
        timings.finish_ms = message.finish_ms
        worker.model.note_job_time(time.monotonic() - timings.dispatched_at)
        self._settle(job, State.DONE)


def _check_requested(ticket: Ticket, message: Need | Picture) -> None:
    request = ticket.job.request
    if not 0 <= message.picture < request.n or not -1 <= message.partial < request.partial_images:
        raise LinkGarbage(f"picture {message.picture}, partial {message.partial}: not requested")
