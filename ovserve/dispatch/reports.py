"""What workers report: checked against what each of them holds, then applied to the jobs.

A worker is not trusted: a job it does not hold, a picture that was not asked for, more bytes than it announced, a message
that only the front end sends. Each of these is LinkGarbage, and the dispatcher lets go of the worker.

Runs in: the dispatcher thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from ovserve.dispatch.jobs import Job, Partial, Result, State
from ovserve.dispatch.model_queue import AttachedWorker, ModelQueue
from ovserve.dispatch.queues import Ticket
from ovserve.errors import ApiError, DeadlineExceeded, InternalError, LinkGarbage, SpoolFull, from_wire
from ovserve.logs import fields
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import Done, Failed, Grant, Heartbeat, Message, Need, Picture, Prepared, Progress, Ready

__all__ = ["ReportApplier", "Settle"]

_ABSURD_FACTOR = 4  # of the largest picture: up to here a worker may have misjudged one, beyond it counts wrongly
_RETRY_S = 2  # segments and descriptors live for as long as one exchange

log = logging.getLogger(__name__)


class Settle(Protocol):
    """How a job makes its last move; False when it was settled before."""

    def __call__(self, job: Job, state: State, error: ApiError | None = None) -> bool: ...


class ReportApplier:
    """Applies reports.

    Args:
        spool: where results are laid down.
        send: gives a worker a command.
        settle: settles a job, counted once.
        on_ready: told of a worker that has passed its warm-up.
    """

    def __init__(
        self,
        spool: Spool,
        send: Callable[[AttachedWorker, Message], None],
        settle: Settle,
        on_ready: Callable[[AttachedWorker], None],
    ) -> None:
        self._spool = spool
        self._send = send
        self._settle = settle
        self._on_ready = on_ready

    def apply(self, worker: AttachedWorker, message: Message) -> None:
        """One report. Raises LinkGarbage when it does not fit what the worker holds."""
        if isinstance(message, Heartbeat):  # noted on the link
            if worker.link.ready is None and message.phase != worker.logged_phase:
                worker.logged_phase = message.phase
                log.debug("worker on its way", extra=fields(worker=worker.link.name, phase=message.phase))
            return
        if isinstance(message, Ready):
            self._on_ready(worker)
            return
        if not isinstance(message, Prepared | Progress | Need | Picture | Done | Failed):
            raise LinkGarbage(f"a worker does not send {message.kind!r}")
        if isinstance(message, Failed) and not message.job:
            return  # noted on the link: the supervisor reads it there when the process has ended
        ticket = worker.held.get(message.job)
        if ticket is None:
            if worker.may_trail(message):
                return
            raise LinkGarbage(f"{message.kind!r} for a job it does not hold")
        if isinstance(message, Done | Failed):
            self._end(worker, ticket, message)
        elif isinstance(message, Need):
            self._grant(worker, ticket, message)
        elif isinstance(message, Picture):
            self._take_picture(ticket, message)
        elif isinstance(message, Progress) or ticket.job.prepared is None:
            ticket.job.post(message)

    def _grant(self, worker: AttachedWorker, ticket: Ticket, message: Need) -> None:
        job, key = ticket.job, (message.picture, message.partial)
        _check_asked_for(ticket, message)
        if key in ticket.announced:
            raise LinkGarbage(f"picture {message.picture} announced twice")
        if not 1 <= message.size <= _ABSURD_FACTOR * worker.model.largest_picture_bytes:
            raise LinkGarbage(f"a picture of {message.size} bytes")
        path = "" if job.is_settled else self._make_segment(worker.model, ticket, message)
        if not path and message.partial < 0 and not ticket.cancelled_at:
            ticket.cancelled_at = time.monotonic()  # the empty path tells the worker as much as a Cancel
        self._send(worker, Grant(job.id, message.picture, path))

    def _make_segment(self, model: ModelQueue, ticket: Ticket, message: Need) -> str:
        """The path of a segment; empty where there is none, which ends the job. A preview is only left out."""
        job, failure = ticket.job, None
        try:
            if message.size > model.largest_picture_bytes:
                raise InternalError(f"the result takes {message.size} bytes, more than any picture of this model")
            self._spool.check_size(job.spool_bytes + message.size)  # a job's pictures lie there together
            segment = self._spool.create(message.size, reserve=message.size)
        except ApiError as error:
            failure = error
        except OSError as error:  # this job's trouble: the reports of others wait in the same read
            log.exception("no segment for a result", extra=fields(job=job.id))
            failure = SpoolFull(f"no room for the result: {error.strerror}", retry_after_s=_RETRY_S)
        if failure is None:
            if not job.own(segment):
                return ""
            ticket.announced[message.picture, message.partial] = segment
            return segment.path
        if message.partial < 0:
            self._settle(job, State.FAILED, failure)
        return ""

    def _take_picture(self, ticket: Ticket, message: Picture) -> None:
        job, key = ticket.job, (message.picture, message.partial)
        _check_asked_for(ticket, message)
        if job.is_settled:
            return
        segment = ticket.announced.get(key)
        if segment is None or not 1 <= message.size <= segment.reserved:
            raise LinkGarbage(f"picture {message.picture} of {message.size} bytes was not announced so")
        is_new = key not in ticket.posted
        ticket.posted.add(key)
        if message.partial < 0:
            result = Result(segment, message.size, message.seed, message.picture)
            job.results[message.picture] = result
            if is_new:
                job.post(result)
        elif is_new:
            job.post(Partial(message.picture, message.partial, segment, message.size))

    def _end(self, worker: AttachedWorker, ticket: Ticket, message: Done | Failed) -> None:
        job = ticket.job
        if isinstance(message, Failed):
            worker.release(job.id, has_failed=True)
            error = from_wire(message.error)
            self._settle(job, State.EXPIRED if isinstance(error, DeadlineExceeded) else State.FAILED, error)
            return
        if not job.is_settled and (job.prepared is None or len(job.results) < job.request.n):
            raise LinkGarbage(
                f"done with {len(job.results)} of {job.request.n} pictures, prepared: {job.prepared is not None}"
            )
        worker.link.jobs_done += 1
        worker.release(job.id, has_failed=False)
        timings = job.timings
        timings.prepare_ms, timings.denoise_ms = message.prepare_ms, message.denoise_ms
        timings.finish_ms = message.finish_ms
        worker.model.note_job_time(time.monotonic() - timings.dispatched_at)
        self._settle(job, State.DONE)


def _check_asked_for(ticket: Ticket, message: Need | Picture) -> None:
    request = ticket.job.request
    if not 0 <= message.picture < request.n or not -1 <= message.partial < request.partial_images:
        raise LinkGarbage(f"picture {message.picture}, partial {message.partial}: not asked for")
