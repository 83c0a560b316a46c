"""Gives the next job to a worker with room, and settles jobs.

    handler threads                dispatcher thread                         supervisor thread
    admit ──▶ FairQueue ──────▶ fill workers ── Run ──▶ link         attach / retire / detach ──▶ inbox
    cancel ─▶ FairQueue, inbox ─▶ Cancel ─────────────▶ link         fail_model / clear_failure
              job.settle, job.post ◀── reports ◀─────── link

Laws of this file:
- One thread, `dispatcher`, alone touches links, poll registrations and what workers hold. Other threads put a call into the inbox
  and write to the eventfd.
- One lock guards the queues, the counts and the models' standing. It is never held across a read, a write or a file operation.
- A job moves only through Job.move and Job.settle. `_settle` does the second and counts it, exactly once for each job.
- What a worker says is checked against what it holds. A worker that answers for a job it does not hold, fills more than it
  announced or sends what is no message is let go of like a dead one; ending its process is the supervisor's work.
- A job whose worker died goes to another one once, and runs alone there. The second death is its end. A worker that had not
  read the job yet died of something else.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable

from ovserve.deadline import Deadline
from ovserve.dispatch.inbox import Inbox
from ovserve.dispatch.jobs import Job, State
from ovserve.dispatch.model_queue import (
    NOT_READY_RETRY_S,
    AttachedWorker,
    ModelQueue,
    ModelStatus,
    largest_picture_bytes,
)
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.dispatch.reports import ReportApplier
from ovserve.errors import ApiError, DeadlineExceeded, Draining, LinkClosed, LinkGarbage, ModelNotFound, WorkerCrashed
from ovserve.logs import fields
from ovserve.settings.options import Settings
from ovserve.wire.local.pipes import Link
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import Cancel, Message, Run, Stop

__all__ = ["Dispatcher", "ModelStatus"]

_TURN_S = 1.0  # the loop turns at least this often, so that `turned_at` tells a living dispatcher
_END_TIMEOUT_S = 10.0  # for the thread to settle what is left; it takes milliseconds

log = logging.getLogger(__name__)


class Dispatcher:
    """Bounded admission, fair dispatch and settlement of jobs over any number of models. Thread-safe: yes.

    Args:
        spool: where requests and results are laid down for the workers.
        settings: limits; a reload hands in new ones with `add_model`.
        on_change: called in the dispatcher thread when a worker became ready or was let go of (see Link.ready, Link.lost).
    """

    def __init__(self, spool: Spool, settings: Settings, on_change: Callable[[], None] | None = None) -> None:
        self._spool = spool
        self._settings = settings
        self.on_change = on_change
        self.turned_at = time.monotonic()  # when its last turn began: what was said by then has been read
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._models: dict[str, ModelQueue] = {}
        self._in_flight: set[Job] = set()
        self._is_draining = False
        self._next_deadline = Deadline(float("inf"))
        self._inbox = Inbox()
        self._poll = select.poll()
        self._poll.register(self._inbox, select.POLLIN)
        self._workers: dict[int, AttachedWorker] = {}  # by report descriptor
        self._writers: dict[int, AttachedWorker] = {}  # by command descriptor, those with a backlog
        self._stuck_checked_at = 0.0
        self._is_closing = False
        self._reports = ReportApplier(spool, self._send, self._settle, self._note_ready)
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    # --- handler threads ----------------------------------------------------------------------------------------------

    def admit(self, job: Job) -> None:
        """Take a job into its model's queue; from now on it will be settled.

        Raises:
            ModelNotFound: no such model.
            NotReady: the model has not worked yet, or is being unloaded; ModelFailed: it was declared failed.
            Draining: the server takes no new jobs.
            QueueFull: the queue has no place for this client; Retry-After is when the jobs now waiting should be done.
            SpoolFull, SpoolUnusable: no room for the request; ContentTooLarge: nor will there ever be.
        """
        with self._lock:
            self._check_admission(job)
        request = job.request.to_json()
        self._spool.check_size(job.spool_bytes + len(request))
        segment = self._spool.store(request)
        if not job.own(segment):
            return  # the exchange has ended already: nobody waits for a settlement
        ticket = Ticket(job, segment.path)
        with self._lock:
            model = self._check_admission(job)  # again: other handlers were admitted meanwhile
            job.timings.admitted_at = time.monotonic()
            model.queue.push(ticket)
            self._in_flight.add(job)
            self._next_deadline = min(self._next_deadline, job.deadline)
        self._inbox.wake()

    def cancel(self, job: Job) -> bool:
        """Settle a job as cancelled: it leaves the queue at once, or the device at its next step. False: settled before."""
        with self._lock:
            model = self._models.get(job.model)
            ticket = model.queue.remove(job) if model else None
            if not self._settle_locked(job, State.CANCELLED, None):
                return False
        if ticket is None:
            self._inbox.put(lambda: self._send_cancel(job))
        return True

    def in_flight(self) -> int:
        """Jobs admitted and not settled."""
        with self._lock:
            return len(self._in_flight)

    def status(self, model: str) -> ModelStatus:
        """How a model stands. Raises ModelNotFound."""
        unavailable_reason = self._unavailable_reason()
        with self._lock:
            found = self._models.get(model)
            if found is None:
                raise ModelNotFound(f"no model {model!r}", param="model")
            return found.status(unavailable_reason)

    def statuses(self) -> list[ModelStatus]:
        """How every model stands at one moment, in the order they were added."""
        unavailable_reason = self._unavailable_reason()
        with self._lock:
            return [model.status(unavailable_reason) for model in self._models.values()]

    def _unavailable_reason(self) -> str:
        """Why no model takes jobs now. Asked for without the lock: the spool may have to look into its directory."""
        return "draining" if self._is_draining else self._spool.unusable_reason

    @property
    def is_draining(self) -> bool:
        """Whether no new jobs are taken any more."""
        return self._is_draining

    def models(self) -> list[str]:
        """The names of the models, in the order they were added."""
        with self._lock:
            return list(self._models)

    # --- server and supervisor threads --------------------------------------------------------------------------------

    def add_model(self, name: str, queue_limit: int, settings: Settings | None = None) -> None:
        """Make a model known, or change its limits. `settings`: those of a reload."""
        self._settings = settings or self._settings
        largest = largest_picture_bytes(self._settings, name)
        with self._lock:
            model = self._models.get(name)
            if model is None:
                self._models[name] = ModelQueue(name, FairQueue(queue_limit), largest)
            else:
                # Pictures admitted under the old limits are still to come.
                largest = max(largest, model.largest_picture_bytes)
                model.queue.limit, model.largest_picture_bytes, model.is_removed = queue_limit, largest, False

    def remove_model(self, name: str) -> None:
        """Take no more jobs for a model; it is forgotten when the last of its jobs and workers is gone."""
        with self._lock:
            if model := self._models.get(name):
                model.is_removed = True
                self._forget_locked(model)

    def attach(self, link: Link, settings: Settings | None = None) -> None:
        """Take charge of a worker's link. Its model must be known. `settings`: the worker's own, where a reload brought others."""
        hang_limit_s = (settings or self._settings).hang_limit_s
        self._inbox.put(lambda: self._attach(link, hang_limit_s))

    def retire(self, link: Link) -> None:
        """Give this worker no more jobs, not one from now on, and tell it to end when it has finished those it holds."""
        with self._lock:  # jobs are given out under it
            if link.is_retired:
                return
            link.is_retired = True
        self._inbox.put(lambda: self._retire(link))

    def detach(self, link: Link, why: str) -> None:
        """Let go of a worker that is gone: its jobs go to others, its link is closed. Does nothing the second time."""
        self._inbox.put(lambda: self._detach(link, why))

    def fail_model(self, name: str, reason: str) -> None:
        """Declare a model failed: its queue is answered with the reason, and so is whoever comes."""
        with self._lock:
            model = self._models.get(name)
            if model is None:
                return
            model.failure = reason
            for ticket in list(model.queue):
                model.queue.remove(ticket.job)
                self._settle_locked(ticket.job, State.FAILED, model.failed_error(self._settings.failed_retry_s))

    def clear_failure(self, name: str) -> None:
        """The model works again."""
        with self._lock:
            if model := self._models.get(name):
                model.failure = ""

    def drain(self) -> None:
        """Take no new jobs; those admitted are still served."""
        with self._lock:
            self._is_draining = True

    def wait_idle(self, deadline: Deadline) -> bool:
        """Wait until no job is in flight; False at the deadline."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._in_flight, timeout=deadline.remaining())

    def close(self) -> None:
        """End the thread. Jobs still in flight are settled as failed, links are closed. Safe to call twice."""
        self.drain()
        self._is_closing = True
        self._inbox.wake()
        self._thread.join(_END_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("the dispatcher's thread does not end")

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _check_admission(self, job: Job) -> ModelQueue:
        model = self._models.get(job.model)
        if model is None:
            raise ModelNotFound(f"no model {job.model!r}", param="model")
        if self._is_draining:
            raise Draining("the server is going down and takes no new jobs", retry_after_s=NOT_READY_RETRY_S)
        model.check_admission(job.client, self._settings.failed_retry_s)
        return model

    def _settle(self, job: Job, state: State, error: ApiError | None = None) -> bool:
        with self._lock:
            return self._settle_locked(job, state, error)

    def _settle_locked(self, job: Job, state: State, error: ApiError | None) -> bool:
        if not job.settle(state, error):
            return False
        self._in_flight.discard(job)
        if not self._in_flight:
            self._idle.notify_all()
        if model := self._models.get(job.model):
            self._forget_locked(model)  # this may have been the last that waited
        return True

    def _forget_locked(self, model: ModelQueue) -> None:
        is_known = self._models.get(model.name) is model  # and no other that was named like it since
        if is_known and model.is_removed and not model.workers and not len(model.queue):
            del self._models[model.name]

    # --- the dispatcher thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._turn()
            except Exception:
                # A bug. The jobs of every model hang on this thread: go on with what still works, not in a tight loop.
                log.exception("dispatcher: a turn failed")
                time.sleep(0.1)
        self._finish()

    def _turn(self) -> None:
        """Wait for something to happen, then handle it."""
        timeout_s = min(_TURN_S, self._next_deadline.remaining())
        begun_at = time.monotonic()
        for descriptor, _ in self._poll.poll(timeout_s * 1000):
            if descriptor == self._inbox.fileno():
                self._inbox.clear_wakeup()
            elif worker := self._workers.get(descriptor):
                self._read(worker)
            elif worker := self._writers.get(descriptor):
                self._flush(worker)
        self._inbox.take_all()
        self.turned_at = begun_at
        if self._next_deadline.is_expired():
            self._expire()
        if begun_at - self._stuck_checked_at >= _TURN_S:
            self._stuck_checked_at = begun_at
            self._drop_stuck()
        for model in list(self._models.values()):
            if len(model.queue):
                self._fill(model)

    def _finish(self) -> None:
        self._inbox.take_all()
        with self._lock:
            for job in list(self._in_flight):
                error = Draining("the server went down before the job was done", retry_after_s=NOT_READY_RETRY_S)
                self._settle_locked(job, State.FAILED, error)
        for worker in list(self._workers.values()):
            worker.link.lost = worker.link.lost or "the server goes down"
            worker.link.close()
        self._workers.clear()

    # --- workers come and go ------------------------------------------------------------------------------------------

    def _attach(self, link: Link, hang_limit_s: float) -> None:
        descriptor = link.fileno()
        with self._lock:
            if model := self._models.get(link.model):
                self._workers[descriptor] = worker = AttachedWorker(link, model, hang_limit_s)
                model.workers.append(worker)
        if model is not None:
            self._poll.register(descriptor, select.POLLIN)
            return
        link.lost = "its model was removed"
        link.close()
        if self.on_change:
            self.on_change()

    def _find(self, link: Link) -> AttachedWorker | None:
        return None if link.lost else self._workers.get(link.fileno())

    def _retire(self, link: Link) -> None:
        if worker := self._find(link):
            self._send(worker, Stop())

    def _detach(self, link: Link, why: str) -> None:
        worker = self._find(link)
        if worker is None:
            return
        for _ in range(4):  # what it said before it went still counts: one pipe holds 64 KiB, one read takes as much
            if not self._read(worker):
                return
        self._lose(worker, why)

    def _lose(self, worker: AttachedWorker, why: str, *, is_broken: bool = False) -> None:
        """Let go of a worker: give its jobs back or end them, close its link, tell the supervisor."""
        link = worker.link
        self._poll.unregister(link.fileno())
        del self._workers[link.fileno()]
        self._watch_writes(worker, False)
        lost = [ticket for ticket in worker.held.values() if not ticket.job.is_settled]
        consumed_bytes = link.consumed_bytes
        was_read = [ticket for ticket in lost if ticket.given_at < consumed_bytes]
        link.jobs_lost, link.lost_retried_job = len(was_read), any(ticket.is_alone for ticket in was_read)
        for ticket in lost:
            self._requeue(worker, ticket, why, was_read=ticket in was_read)
        with self._lock:  # at once, and not before: a removed model without workers and waiting jobs is forgotten
            worker.held.clear()
            worker.model.workers.remove(worker)
            self._forget_locked(worker.model)
        link.is_broken, link.lost = is_broken, why  # last: the supervisor concludes from it
        link.close()
        if self.on_change:
            self.on_change()

    def _requeue(self, worker: AttachedWorker, ticket: Ticket, why: str, *, was_read: bool) -> None:
        """Let another worker have the job. One that was not even read has no part in the death."""
        job, link = ticket.job, worker.link
        ticket.deaths += was_read
        ticket.announced.clear()
        if was_read and ticket.deaths > 1:
            log.error("second worker died with a job", extra=fields(job=job.id, worker=link.name, why=why))
            error = WorkerCrashed("two workers died with this request; it is not tried again")
            self._settle(job, State.FAILED, error)
            return
        if was_read:
            log.warning("worker died with a job, once more", extra=fields(job=job.id, worker=link.name, why=why))
        job.drop_results()
        with self._lock:
            if worker.model.failure:
                self._settle_locked(job, State.FAILED, worker.model.failed_error(self._settings.failed_retry_s))
            elif job.move(State.QUEUED):
                worker.model.queue.requeue(ticket)

    def _send(self, worker: AttachedWorker, message: Message) -> None:
        try:
            worker.link.send(message)
        except LinkClosed:
            return  # its end-of-file is on the way: `_read` gives its jobs back, after all it has still said
        self._watch_writes(worker, worker.link.has_backlog)

    def _flush(self, worker: AttachedWorker) -> None:
        try:
            worker.link.flush()
        except LinkClosed:
            self._watch_writes(worker, False)
            return
        self._watch_writes(worker, worker.link.has_backlog)

    def _watch_writes(self, worker: AttachedWorker, wanted: bool) -> None:
        if wanted == worker.watches_writes:
            return
        worker.watches_writes = wanted
        descriptor = worker.link.commands_fileno()
        if wanted:
            self._writers[descriptor] = worker
            self._poll.register(descriptor, select.POLLOUT)
        else:
            del self._writers[descriptor]
            self._poll.unregister(descriptor)

    # --- jobs to workers ----------------------------------------------------------------------------------------------

    def _fill(self, model: ModelQueue) -> None:
        """Give waiting jobs to workers with room."""
        while len(model.queue):
            with self._lock:
                found = model.take_next()
                if found is None:
                    return
                worker, ticket = found
                job = ticket.job
                if not job.move(State.RUNNING):
                    continue  # settled meanwhile
                worker.held[job.id] = ticket
            job.attempts += 1
            job.timings.dispatched_at = time.monotonic()
            ticket.given_at = worker.link.sent_bytes
            self._send(worker, Run(job.id, ticket.request, job.deadline.remaining(), alone=ticket.is_alone))

    def _expire(self) -> None:
        """Settle the jobs whose deadline has passed, waiting or running, and find the next deadline."""
        upcoming = Deadline(float("inf"))
        with self._lock:
            for model in list(self._models.values()):
                for ticket in list(model.queue):
                    if ticket.job.deadline.is_expired():
                        model.queue.remove(ticket.job)
                        error = DeadlineExceeded("the job's deadline passed while it waited in the queue")
                        self._settle_locked(ticket.job, State.EXPIRED, error)
                    else:
                        upcoming = min(upcoming, ticket.job.deadline)
            self._next_deadline = upcoming
        for worker in self._workers.values():
            for ticket in worker.held.values():
                if ticket.job.deadline.is_expired():
                    error = DeadlineExceeded("the job's deadline passed while it was worked on")
                    self._settle(ticket.job, State.EXPIRED, error)
                    self._cancel_held(worker, ticket)
                elif not ticket.job.is_settled:
                    upcoming = min(upcoming, ticket.job.deadline)
        with self._lock:
            self._next_deadline = min(self._next_deadline, upcoming)

    def _send_cancel(self, job: Job) -> None:
        for worker in self._workers.values():
            if ticket := worker.held.get(job.id):
                self._cancel_held(worker, ticket)
                return

    def _cancel_held(self, worker: AttachedWorker, ticket: Ticket) -> None:
        if not ticket.cancelled_at:
            ticket.cancelled_at = time.monotonic()
            self._send(worker, Cancel(ticket.job.id))

    def _drop_stuck(self) -> None:
        """Let go of workers that keep a place taken with jobs that nobody wants, or hear nothing."""
        for worker in list(self._workers.values()):
            if worker.is_stuck():
                self._lose(worker, "it holds on to cancelled jobs", is_broken=True)
            elif worker.link.is_clogged:
                self._lose(worker, "it does not read its commands", is_broken=True)

    # --- reports from workers -----------------------------------------------------------------------------------------

    def _read(self, worker: AttachedWorker) -> bool:
        """Handle what a worker reports; False when it was let go of."""
        try:
            for message in worker.link.receive():
                self._reports.apply(worker, message)
        except LinkClosed as error:
            self._lose(worker, str(error))
            return False
        except LinkGarbage as error:
            log.warning("a worker broke the protocol", extra=fields(worker=worker.link.name, why=str(error)))
            self._lose(worker, f"it broke the protocol: {error}", is_broken=True)
            return False
        except Exception:
            # A bug, or a system that refuses. The reports behind this one are lost: so its jobs have to go to others.
            log.exception("a report could not be applied", extra=fields(worker=worker.link.name))
            self._lose(worker, "what it reported could not be applied", is_broken=True)
            return False
        return True

    def _note_ready(self, worker: AttachedWorker) -> None:
        with self._lock:
            worker.model.was_ready |= not worker.link.is_retired  # else it came too late: it takes no jobs
        if self.on_change:
            self.on_change()
