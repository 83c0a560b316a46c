"""The dispatcher: takes each job from admission to settlement.

    handler threads                dispatcher thread                      supervisor thread
    admit ──▶ FairQueue ─────────▶ _dispatch_queued ─── Run ────▶ link    attach / retire / detach ──▶ CallQueue
    cancel ─▶ FairQueue, CallQueue ─────────────────── Cancel ──▶ link    fail_model / clear_failure
              job.settle, job.post ◀────────────────── reports ◀─ link

Invariants:
- Only the `dispatcher` thread accesses links, poll registrations and the jobs assigned to workers. Other threads put
  calls into the CallQueue, which wakes it through an eventfd.
- One lock guards the queues, the counts and the status of the models. It is never held across a read, a write or a file
  operation.
- A job changes state only through Job.move and Job.settle. Only `_settle_locked` calls Job.settle. It removes the job
  from `_in_flight` the first time and does nothing on later calls.
- A worker's reports are checked against its assigned jobs. A worker that reports on a job that is not assigned to it,
  writes more than it announced or sends an invalid message is detached like a dead one; the supervisor terminates its
  process.
- If a worker dies, the jobs that it had read are retried once, each alone on a worker. If that worker dies too, the job
  fails. Jobs that it had not read are requeued without using up their retry. A client whose jobs alone were lost by
  several workers in a row is delayed (`Penalties`).
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from ovserve.deadline import Deadline
from ovserve.dispatch.allocator import Allocator
from ovserve.dispatch.call_queue import CallQueue
from ovserve.dispatch.jobs import Job, State
from ovserve.dispatch.model_queue import (
    MAX_RETRY_S,
    NOT_READY_RETRY_S,
    AttachedWorker,
    ModelQueue,
    ModelStatus,
    largest_picture_bytes,
)
from ovserve.dispatch.penalties import Penalties
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.dispatch.reports import ReportApplier
from ovserve.dispatch.statuses import JobStatus, QueuePlace, WorkerStatus
from ovserve.errors import (
    ApiError,
    DeadlineExceeded,
    Draining,
    LinkClosed,
    LinkGarbage,
    ModelNotFound,
    NotReady,
    WorkerCrashed,
)
from ovserve.logs import fields
from ovserve.settings.options import Settings
from ovserve.wire.blobs import BlobStore
from ovserve.wire.link import Link
from ovserve.wire.messages import Cancel, LogLevel, Message, Run, Stop

__all__ = ["Dispatcher", "ModelStatus"]

# Longest wait of one loop iteration, so that `polled_at` of a live loop is recent; also the interval of the checks for
# stuck workers.
_POLL_INTERVAL_S = 1.0
MAX_SHOWN_JOBS = 1000
LAST_WORKERS = 16  # lost ones whose jobs are remembered for `jobs_of`
_END_TIMEOUT_S = 10.0  # for the thread to settle the remaining jobs; it takes milliseconds

log = logging.getLogger(__name__)


class Dispatcher:
    """Bounded admission, fair dispatch and settlement of jobs over any number of models.

    Thread-safe: yes.

    Args:
        spool: stores requests and results for the workers.
        settings: limits; a reload passes new ones to `add_model`.
        on_change: called when a worker becomes ready or is detached (in the dispatcher thread), and when a job is
            admitted for a model without ready workers (in the thread of the caller).

    Attributes:
        polled_at: monotonic start of the last completed loop iteration; every report sent before it has been read.
    """

    def __init__(self, spool: BlobStore, settings: Settings, on_change: Callable[[], None] | None = None) -> None:
        self._spool = spool
        self._settings = settings
        self.on_change = on_change
        self.polled_at = time.monotonic()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._models: dict[str, ModelQueue] = {}
        self._in_flight: set[Job] = set()
        self._penalties = Penalties()
        self._is_draining = False
        self._next_deadline = Deadline(float("inf"))
        self._calls = CallQueue()
        self._poll = select.poll()
        self._poll.register(self._calls, select.POLLIN)
        self._workers: dict[int, AttachedWorker] = {}  # by the descriptor of their links
        self._stuck_checked_at = 0.0
        self._log_level = settings.log_level  # of all workers
        # Names of the newest lost workers, and the jobs that each had: their last lines of output come late.
        self._last_jobs: deque[tuple[str, list[str]]] = deque(maxlen=LAST_WORKERS)
        self._is_closing = False
        self._allocator = Allocator(self._calls.put)
        self._reports = ReportApplier(spool, self._send, self._settle, self._note_ready, self._allocator)
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    # --- handler threads ----------------------------------------------------------------------------------------------

    def admit(self, job: Job) -> None:
        """Add a job to its model's queue. An admitted job is always settled.

        Returns without admitting the job if its exchange has already ended.

        Raises:
            ModelNotFound: there is no such model.
            NotReady: the model is loading for the first time, or is being unloaded.
            ModelFailed: the model was declared failed.
            Draining: the server is shutting down.
            QueueFull: the queue has no place for this client; `retry_after_s` is the expected time until the queued
                jobs are dispatched.
            SpoolFull: the spool has no space for the request now.
            SpoolUnusable: the spool directory cannot be used.
            ContentTooLarge: the request and its uploads are larger than the spool.
        """
        with self._lock:
            self._check_admission(job)
        request = job.request.to_json()
        self._spool.check_size(job.spool_bytes + len(request))
        segment = self._spool.put(request, job.holding)
        if not job.add_segment(segment):
            return  # the exchange has ended: no handler waits for the settlement
        ticket = Ticket(job, segment.id)
        with self._lock:
            model = self._check_admission(job)  # again: other jobs were admitted meanwhile
            job.timings.admitted_at = time.monotonic()
            model.last_used_at, model.keep_alive_s = job.timings.admitted_at, job.keep_alive_s
            model.queue.push(ticket)
            self._in_flight.add(job)
            self._next_deadline = min(self._next_deadline, job.deadline)
            has_no_workers = not any(worker.capacity for worker in model.workers)
        self._calls.wake()
        if has_no_workers and self.on_change:
            self.on_change()  # a model that is not resident gets its workers

    def cancel(self, job: Job) -> bool:
        """Settle a job as cancelled. Return False when it was settled before.

        A queued job is removed at once; a running one stops at the device's next step.
        """
        with self._lock:
            model = self._models.get(job.model)
            ticket = model.queue.remove(job) if model else None
            if not self._settle_locked(job, State.CANCELLED, None):
                return False
        if ticket is None:
            self._calls.put(lambda: self._send_cancel(job))
        return True

    def in_flight(self) -> int:
        """Return the number of jobs that are admitted and not settled."""
        with self._lock:
            return len(self._in_flight)

    def status(self, model: str) -> ModelStatus:
        """Return a model's status. Raises ModelNotFound."""
        unavailable_reason = self._unavailable_reason()
        with self._lock:
            found = self._models.get(model)
            if found is None:
                raise ModelNotFound(f"The model {model!r} does not exist.", param="model")
            return found.status(unavailable_reason)

    def statuses(self) -> list[ModelStatus]:
        """Return the status of every model at one moment, in the order they were added."""
        unavailable_reason = self._unavailable_reason()
        with self._lock:
            return [model.status(unavailable_reason) for model in self._models.values()]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return for each model what its workers have counted; see `ModelQueue.counts`."""
        with self._lock:
            return {name: dict(model.counts) for name, model in self._models.items()}

    def worker_statuses(self) -> list[WorkerStatus]:
        """Return the status of every attached worker at one moment, by model and slot."""
        with self._lock:
            workers = [worker.status() for model in self._models.values() for worker in model.workers]
        return sorted(workers, key=lambda worker: worker.name)

    def job_statuses(self) -> tuple[list[JobStatus], int]:
        """Return jobs in flight, those that run first, and how many were left out: only MAX_SHOWN_JOBS are returned."""
        with self._lock:
            workers = [worker for model in self._models.values() for worker in model.workers]
            # A copy of each: the dispatcher thread removes ended jobs without the lock.
            names = {ticket.job: worker.link.name for worker in workers for ticket in list(worker.assigned.values())}
            jobs = sorted(self._in_flight, key=lambda job: (job not in names, job.timings.admitted_at))
            shown = [_status_of(job, names.get(job, "")) for job in jobs[:MAX_SHOWN_JOBS]]
        return shown, len(jobs) - len(shown)

    def jobs_of(self, worker_name: str) -> list[str]:
        """Return the ids of the jobs that a worker has, or had when it was lost. Thread-safe: yes."""
        with self._lock:
            for model in self._models.values():
                for worker in model.workers:
                    if worker.link.name == worker_name:
                        return list(worker.assigned)
            return next((jobs for name, jobs in self._last_jobs if name == worker_name), [])

    def set_log_level(self, level: str) -> None:
        """Change the level of the log in all workers, and in those that are attached later."""
        self._calls.put(lambda: self._set_log_level(level))

    def place_of(self, job: Job) -> QueuePlace | None:
        """Return where a job is in its model's queue, or None if it is not queued."""
        with self._lock:
            model = self._models.get(job.model)
            return model.place_of(job) if model is not None else None

    def _unavailable_reason(self) -> str:
        """Return why no model accepts jobs now, or "". Called without the lock: the spool may access its directory."""
        return "draining" if self._is_draining else self._spool.unusable_reason

    @property
    def is_draining(self) -> bool:
        """Whether new jobs are rejected because the server is shutting down."""
        return self._is_draining

    def models(self) -> list[str]:
        """Return the names of the models, in the order they were added."""
        with self._lock:
            return list(self._models)

    # --- server and supervisor threads --------------------------------------------------------------------------------

    def add_model(
        self,
        name: str,
        queue_limit: int,
        settings: Settings | None = None,
        *,
        is_on_demand: bool = False,
        queues_first_load: bool = False,
    ) -> None:
        """Add a model, or change its limits.

        Args:
            name: the model's name.
            queue_limit: how many jobs may wait for it.
            settings: new settings after a reload; they replace those of the constructor.
            is_on_demand: whether the model's workers are started when a job arrives. A model that has been unloaded
                is on demand in any case.
            queues_first_load: whether a new model queues jobs before it was ready for the first time.
        """
        self._settings = settings or self._settings
        largest = largest_picture_bytes(self._settings, name)
        with self._lock:
            model = self._models.get(name)
            if model is None:
                wanted = 0 if is_on_demand else 1
                model = ModelQueue(name, FairQueue(queue_limit), largest, wanted=wanted, is_on_demand=is_on_demand)
                model.queues_first_load = queues_first_load
                self._models[name] = model
            else:
                # Jobs admitted under the old limits may still produce pictures of the old size.
                largest = max(largest, model.largest_picture_bytes)
                model.queue.limit, model.largest_picture_bytes, model.is_removed = queue_limit, largest, False
                model.is_on_demand = is_on_demand or not model.wanted

    def set_wanted(self, name: str, workers: int, expected_load_s: float = 0.0) -> None:
        """Note how many workers a model should have, for its status and for admission.

        Args:
            name: the model's name.
            workers: the number of workers; 0: the model is unloaded, and the next job loads it again.
            expected_load_s: how long loading is expected to take; 0: not known.
        """
        with self._lock:
            if model := self._models.get(name):
                model.wanted, model.expected_load_s = workers, expected_load_s
                model.refusal = ""
                model.is_on_demand |= not workers

    def set_waiting(self, reasons: Mapping[str, str]) -> None:
        """Note which models wait for memory before they are loaded, by name with the reason; no others wait."""
        with self._lock:
            for name, model in self._models.items():
                model.waits_for = reasons.get(name, "")

    def set_unplaced(self, reasons: Mapping[str, str]) -> None:
        """Note for which models no worker can be placed in a cluster, by name with the reason; no others.

        Jobs of such a model are rejected, those that are queued too: when a place is found is not known.
        """
        with self._lock:
            for name, model in self._models.items():
                model.unplaced = reasons.get(name, "")
                if model.unplaced:
                    for ticket in list(model.queue):
                        model.queue.remove(ticket.job)
                        self._settle_locked(ticket.job, State.FAILED, model.unplaced_error())

    def reject_queued(self, name: str, reason: str) -> None:
        """Fail a model's queued jobs because it cannot be loaded now. Later jobs are admitted and tried again."""
        with self._lock:
            if model := self._models.get(name):
                model.refusal = reason
                error = NotReady(f"Model {name!r} cannot be loaded: {reason}.", retry_after_s=MAX_RETRY_S)
                for ticket in list(model.queue):
                    model.queue.remove(ticket.job)
                    self._settle_locked(ticket.job, State.FAILED, error)
        log.warning("model cannot be loaded", extra=fields(model=name, why=reason))

    def remove_model(self, name: str) -> None:
        """Stop admission for a model. Its entry is deleted with the last of its queued jobs and workers."""
        with self._lock:
            if model := self._models.get(name):
                model.is_removed = True
                self._delete_unused_locked(model)

    def attach(self, link: Link, settings: Settings | None = None) -> None:
        """Take over a worker's link. Its model must have been added.

        Args:
            link: the link; only the dispatcher thread uses it from now on.
            settings: the settings that the worker was started with, if they differ from the newest.
        """
        known = settings or self._settings
        self._calls.put(lambda: self._attach(link, known))

    def retire(self, link: Link) -> None:
        """Dispatch no more jobs to a worker, effective on return, and command it to exit after its assigned jobs."""
        with self._lock:  # jobs are assigned under it
            if link.state.is_retired:
                return
            link.update(is_retired=True)
        self._calls.put(lambda: self._retire(link))

    def detach(self, link: Link, why: str) -> None:
        """Detach a dead worker: requeue its jobs and close its link. Idempotent."""
        self._calls.put(lambda: self._detach(link, why))

    def fail_model(self, name: str, reason: str) -> None:
        """Declare a model failed: fail its queued jobs and reject new ones with the reason."""
        with self._lock:
            model = self._models.get(name)
            if model is None:
                return
            model.failure = reason
            for ticket in list(model.queue):
                model.queue.remove(ticket.job)
                self._settle_locked(ticket.job, State.FAILED, model.failed_error(self._settings.failed_retry_s))

    def clear_failure(self, name: str) -> None:
        """Undo `fail_model`, before the model is tried again. A worker that becomes ready undoes it too."""
        with self._lock:
            if model := self._models.get(name):
                model.failure = ""

    def clear_refusal(self, name: str) -> None:
        """Forget why a model could not be loaded, before it is tried again."""
        with self._lock:
            if model := self._models.get(name):
                model.refusal = ""

    def drain(self) -> None:
        """Reject new jobs; admitted jobs are still served."""
        with self._lock:
            self._is_draining = True

    def wait_idle(self, deadline: Deadline) -> bool:
        """Wait until no job is in flight. Return False when the deadline passes first."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._in_flight, timeout=deadline.remaining())

    def close(self) -> None:
        """End the thread: settle the jobs in flight as failed and close the links. Safe to call twice."""
        self.drain()
        self._is_closing = True
        self._calls.wake()
        self._thread.join(_END_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("dispatcher: thread still runs after %g s", _END_TIMEOUT_S)

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _check_admission(self, job: Job) -> ModelQueue:
        model = self._models.get(job.model)
        if model is None:
            raise ModelNotFound(f"The model {job.model!r} does not exist.", param="model")
        if self._is_draining:
            raise Draining("The server is shutting down and accepts no new jobs.", retry_after_s=NOT_READY_RETRY_S)
        model.check_admission(job.client, self._settings.failed_retry_s)
        return model

    def _settle(self, job: Job, state: State, error: ApiError | None = None) -> bool:
        with self._lock:
            return self._settle_locked(job, state, error)

    def _settle_locked(self, job: Job, state: State, error: ApiError | None) -> bool:
        if not job.settle(state, error):
            return False
        self._in_flight.discard(job)
        if state is State.DONE:
            self._penalties.note_done(job.client.address)
        if not self._in_flight:
            self._idle.notify_all()
        if model := self._models.get(job.model):
            model.last_used_at = time.monotonic()
            self._delete_unused_locked(model)  # this may have been its last queued job
        return True

    def _delete_unused_locked(self, model: ModelQueue) -> None:
        is_current = self._models.get(model.name) is model  # not a newer model of the same name
        if is_current and model.is_removed and not model.workers and not len(model.queue):
            del self._models[model.name]

    # --- the dispatcher thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._run_once()
            except Exception:
                # A bug. The jobs of every model depend on this thread: continue, but not in a tight loop.
                log.exception("dispatcher: loop iteration failed")
                time.sleep(0.1)
        self._shut_down()

    def _run_once(self) -> None:
        """Wait for ready links, calls or a deadline, then handle them."""
        timeout_s = min(_POLL_INTERVAL_S, self._next_deadline.remaining())
        begun_at = time.monotonic()
        for descriptor, _ in self._poll.poll(timeout_s * 1000):
            if descriptor == self._calls.fileno():
                self._calls.clear_wakeup()
            elif worker := self._workers.get(descriptor):
                self._read_reports(worker)
        self._calls.run_all()
        self.polled_at = begun_at
        if self._next_deadline.is_expired():
            self._expire_jobs()
        if begun_at - self._stuck_checked_at >= _POLL_INTERVAL_S:
            self._stuck_checked_at = begun_at
            self._detach_stuck_workers()
        for model in list(self._models.values()):
            if len(model.queue):
                self._dispatch_queued(model)

    def _shut_down(self) -> None:
        self._allocator.close()
        self._calls.run_all()
        with self._lock:
            for job in list(self._in_flight):
                error = Draining("The server shut down before the job was done.", retry_after_s=NOT_READY_RETRY_S)
                self._settle_locked(job, State.FAILED, error)
        for worker in list(self._workers.values()):
            worker.link.update(lost=worker.link.state.lost or "server shutting down")
            worker.link.close()
        self._workers.clear()

    # --- attached workers ---------------------------------------------------------------------------------------------

    def _attach(self, link: Link, settings: Settings) -> None:
        with self._lock:
            if model := self._models.get(link.model):
                self._workers[link.readiness] = worker = AttachedWorker(link, model, settings.hang_limit_s)
                model.workers.append(worker)
        if model is not None:
            self._poll.register(link.readiness, select.POLLIN)
            if self._log_level != settings.log_level:
                self._send(worker, LogLevel(self._log_level))
            return
        link.update(lost="model removed")
        link.close()
        if self.on_change:
            self.on_change()

    def _set_log_level(self, level: str) -> None:
        if level == self._log_level:
            return
        self._log_level = level
        for worker in self._workers.values():
            self._send(worker, LogLevel(level))

    def _find_worker(self, link: Link) -> AttachedWorker | None:
        return None if link.state.lost else self._workers.get(link.readiness)

    def _retire(self, link: Link) -> None:
        if worker := self._find_worker(link):
            self._send(worker, Stop())

    def _detach(self, link: Link, why: str) -> None:
        worker = self._find_worker(link)
        if worker is None:
            return
        for _ in range(4):  # reports sent before its death still count; a pipe holds 64 KiB, one read takes as much
            if not self._read_reports(worker):
                return
        self._detach_worker(worker, why)

    def _detach_worker(self, worker: AttachedWorker, why: str, *, is_broken: bool = False) -> None:
        """Detach a worker: requeue or settle its jobs, close its link, notify the supervisor.

        Args:
            worker: the worker, whose link is not closed yet.
            why: the reason, for the log.
            is_broken: whether the worker is alive but misbehaves; the supervisor then kills it at once.
        """
        link = worker.link
        self._poll.unregister(link.readiness)
        del self._workers[link.readiness]
        unsettled = [ticket for ticket in worker.assigned.values() if not ticket.job.is_settled]
        consumed = link.consumed
        was_read = [ticket for ticket in unsettled if ticket.run_position < consumed]
        lost_retried_job = any(ticket.must_run_alone for ticket in was_read)
        clients = {ticket.address for ticket in was_read}
        lost_client = clients.pop() if len(clients) == 1 else ""
        if lost_client:
            self._delay_client(lost_client, worker)
        for ticket in was_read:
            self._requeue(worker, ticket, why, was_read=True)
        for ticket in reversed(unsettled):
            if ticket not in was_read:
                self._requeue(worker, ticket, why, was_read=False)
        with self._lock:  # only after requeueing: a removed model without workers and queued jobs is deleted
            self._last_jobs.append((link.name, list(worker.assigned)))
            worker.assigned.clear()
            worker.model.workers.remove(worker)
            self._delete_unused_locked(worker.model)
        # Last: the supervisor acts on it.
        link.update(
            is_broken=is_broken,
            lost=why,
            jobs_lost=len(was_read),
            lost_retried_job=lost_retried_job,
            lost_client=lost_client,
        )
        link.close()
        if self.on_change:
            self.on_change()

    def _delay_client(self, client: str, worker: AttachedWorker) -> None:
        """Count a worker that died with jobs of this client alone."""
        with self._lock:
            delay_s = self._penalties.note_death(client)
        if delay_s:
            log.warning(
                "a client's jobs have killed several workers in a row; its next job is delayed",
                extra=fields(client=client, delay_s=delay_s, worker=worker.link.name),
            )

    def _requeue(self, worker: AttachedWorker, ticket: Ticket, why: str, *, was_read: bool) -> None:
        """Requeue the job, or fail it. A death does not count for a job that the worker had not read."""
        job, link = ticket.job, worker.link
        ticket.failed_attempts += was_read
        granted = [segment for segment in ticket.granted.values() if segment is not None]
        ticket.granted.clear()
        if was_read and ticket.failed_attempts > 1:
            log.error("second worker died with a job; job failed", extra=fields(job=job.id, worker=link.name, why=why))
            error = WorkerCrashed("Two workers died while they ran this request; it is not retried.")
            self._settle(job, State.FAILED, error)
            return
        if was_read and not job.has_uploads:
            message = "A worker died while it ran this request, and its images are no longer there for another one."
            if job.has_all_pictures:
                self._settle(job, State.DONE)
            else:
                self._settle(job, State.FAILED, WorkerCrashed(message))
            return
        if was_read:
            log.warning("worker died with a job; job requeued", extra=fields(job=job.id, worker=link.name, why=why))
            worker.model.counts["retried"] += 1
        job.drop_results(granted)
        with self._lock:
            if worker.model.failure:
                self._settle_locked(job, State.FAILED, worker.model.failed_error(self._settings.failed_retry_s))
            elif job.move(State.QUEUED):
                worker.model.queue.requeue(ticket)

    def _send(self, worker: AttachedWorker, message: Message) -> None:
        # If the link is closed, ignore it: `_read_reports` will read the remaining reports and detach the worker.
        with contextlib.suppress(LinkClosed):
            worker.link.send(message)

    # --- jobs to workers ----------------------------------------------------------------------------------------------

    def _dispatch_queued(self, model: ModelQueue) -> None:
        """Dispatch queued jobs until no worker has capacity for the next one."""
        while len(model.queue):
            with self._lock:
                found = model.take_next(self._penalties.is_delayed)
                if found is None:
                    return
                worker, ticket = found
                job = ticket.job
                if not job.move(State.RUNNING):
                    continue  # settled meanwhile
                worker.assigned[job.id] = ticket
                ticket.is_prepared = False
            job.attempts += 1
            job.timings.dispatched_at = time.monotonic()
            ticket.run_position = worker.link.sent
            command = Run(
                job.id,
                ticket.request,
                job.deadline.remaining(),
                alone=ticket.must_run_alone,
                client=ticket.address,
                heavy=ticket.is_heavy,
                traced=job.is_traced,
            )
            self._send(worker, command)

    def _expire_jobs(self) -> None:
        """Settle the queued and running jobs whose deadline has passed, and find the next deadline."""
        upcoming = Deadline(float("inf"))
        with self._lock:
            for model in list(self._models.values()):
                for ticket in list(model.queue):
                    if ticket.job.deadline.is_expired():
                        model.queue.remove(ticket.job)
                        error = DeadlineExceeded(f"The job's deadline passed {model.waiting_phrase()}.")
                        self._settle_locked(ticket.job, State.EXPIRED, error)
                    else:
                        upcoming = min(upcoming, ticket.job.deadline)
            self._next_deadline = upcoming
        for worker in self._workers.values():
            for ticket in worker.assigned.values():
                if ticket.job.deadline.is_expired():
                    error = DeadlineExceeded("The job's deadline passed while a worker ran it.")
                    self._settle(ticket.job, State.EXPIRED, error)
                    self._cancel_assigned(worker, ticket)
                elif not ticket.job.is_settled:
                    upcoming = min(upcoming, ticket.job.deadline)
        with self._lock:
            self._next_deadline = min(self._next_deadline, upcoming)

    def _send_cancel(self, job: Job) -> None:
        for worker in self._workers.values():
            if ticket := worker.assigned.get(job.id):
                self._cancel_assigned(worker, ticket)
                return

    def _cancel_assigned(self, worker: AttachedWorker, ticket: Ticket) -> None:
        if not ticket.cancelled_at:
            ticket.cancelled_at = time.monotonic()
            self._send(worker, Cancel(ticket.job.id))

    def _detach_stuck_workers(self) -> None:
        """Detach workers that do not end their cancelled jobs or do not read their commands."""
        for worker in list(self._workers.values()):
            if worker.is_stuck():
                self._detach_worker(worker, "cancelled jobs not ended within the hang limit", is_broken=True)
            elif worker.link.state.is_clogged:
                self._detach_worker(worker, "commands not read", is_broken=True)

    # --- reports from workers -----------------------------------------------------------------------------------------

    def _read_reports(self, worker: AttachedWorker) -> bool:
        """Read and apply a worker's reports. Return False when it was detached."""
        try:
            for message in worker.link.receive():
                self._reports.apply(worker, message)
        except LinkClosed as error:
            self._detach_worker(worker, str(error))
            return False
        except LinkGarbage as error:
            log.warning("worker violated the protocol", extra=fields(worker=worker.link.name, why=str(error)))
            self._detach_worker(worker, f"protocol violation: {error}", is_broken=True)
            return False
        except Exception:
            # A bug or a failed system call. The reports after this one are lost, so another worker has to run the jobs.
            log.exception("report could not be applied", extra=fields(worker=worker.link.name))
            self._detach_worker(worker, "report could not be applied", is_broken=True)
            return False
        return True

    def _note_ready(self, worker: AttachedWorker) -> None:
        with self._lock:
            if not worker.link.state.is_retired:  # a retired worker gets no jobs
                worker.model.was_ready, worker.model.failure = True, ""
        if self.on_change:
            self.on_change()


def _status_of(job: Job, worker: str) -> JobStatus:
    return JobStatus(
        id=job.id,
        model=job.model,
        state=job.state.value,
        client=job.client.address,
        key_name=job.key_name,
        worker=worker,
        attempts=job.attempts,
        pictures=job.request.n,
        pictures_done=len(job.results),
        is_prepared=job.prepared is not None,
        admitted_at=job.timings.admitted_at,
        dispatched_at=job.timings.dispatched_at,
        deadline_at=job.deadline.at,
    )
