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
- A job whose worker died goes to another one once, and runs alone there. The second death is its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ovserve.config import ModelSettings, Settings
from ovserve.deadline import Deadline
from ovserve.dispatch.ipc import (
    Beat,
    Cancel,
    Done,
    Failed,
    Link,
    LinkClosed,
    LinkGarbage,
    Message,
    Need,
    Picture,
    Progress,
    Ready,
    Room,
    Run,
    Stop,
)
from ovserve.dispatch.jobs import Job, Partial, Result, State
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.dispatch.spool import Spool
from ovserve.errors import (
    ApiError,
    DeadlineExceeded,
    Draining,
    ModelFailed,
    ModelNotFound,
    NotReady,
    QueueFull,
    SpoolFull,
    WorkerCrashed,
    from_wire,
)
from ovserve.logs import fields

__all__ = ["Dispatcher", "ModelStatus"]

_TURN_S = 1.0  # the loop turns at least this often, so that `turned_at` tells a living dispatcher
_NOT_READY_RETRY_S = 5  # a small model loads within seconds, a large one within a few tries
_MEAN_WEIGHT = 0.1  # of the newest job in the mean time in a worker: ten jobs make a new mean
_MAX_CAPACITY = 1024  # jobs one worker may ask for; more is a worker that counts wrongly
_ENDED_KEPT = 64  # ids of ended jobs kept for each worker, to know a late Progress from a made-up job

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How a model stands at one moment.

    Attributes:
        ready: a worker has passed its warm-up and takes jobs.
        reason: why it is not ready; empty when it is.
        failed: declared failed by the supervisor.
        workers: how many of its workers are ready.
        queued, running: jobs that wait, and jobs that workers hold.
        capacity: jobs that its ready workers take at once.
        job_s: mean seconds a job spends in a worker; 0 before the first.
        engine, engine_reason: which engine a ready worker runs, and why.
    """

    name: str
    ready: bool
    reason: str
    failed: bool
    workers: int
    queued: int
    running: int
    capacity: int
    job_s: float
    engine: str = ""
    engine_reason: str = ""


@dataclass(slots=True, eq=False)
class _Model:
    name: str
    queue: FairQueue
    largest_picture_bytes: int
    workers: list[_Worker] = field(default_factory=list)
    failure: str = ""
    was_ready: bool = False
    is_leaving: bool = False
    job_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Worker:
    """One attached link with what its worker holds: tickets by job id, settled ones too until the worker has let go of them."""

    link: Link
    model: _Model
    held: dict[str, Ticket] = field(default_factory=dict)
    ended: deque[str] = field(default_factory=lambda: deque(maxlen=_ENDED_KEPT))
    is_retired: bool = False
    watches_writes: bool = False

    @property
    def capacity(self) -> int:
        """Jobs it takes at once, 0 before it is ready and after it was retired."""
        return 0 if self.link.ready is None or self.is_retired else self.link.ready.capacity

    @property
    def has_room(self) -> bool:
        """Whether it takes one more ordinary job."""
        return len(self.held) < self.capacity and not any(ticket.is_alone for ticket in self.held.values())


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
        self.turned_at = time.monotonic()  # when the loop last turned; systemd's watchdog is fed by it
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._models: dict[str, _Model] = {}
        self._in_flight: set[Job] = set()
        self._is_draining = False
        self._next_deadline = Deadline(float("inf"))
        self._inbox: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wakeup, select.POLLIN)
        self._workers: dict[int, _Worker] = {}  # by report descriptor
        self._writers: dict[int, _Worker] = {}  # by command descriptor, those with a backlog
        self._is_closing = False
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
            SpoolFull: no room for the request.
        """
        with self._lock:
            self._check_admission(job)
        segment = self._spool.store(job.request.to_json())
        if not job.own(segment):
            return  # the exchange has ended already: nobody waits for a settlement
        ticket = Ticket(job, segment.path)
        with self._lock:
            model = self._check_admission(job)  # again: other handlers were admitted meanwhile
            job.timings.admitted_at = time.monotonic()
            model.queue.push(ticket)
            self._in_flight.add(job)
            self._next_deadline = min(self._next_deadline, job.deadline)
        self._wake()

    def cancel(self, job: Job) -> bool:
        """Settle a job as cancelled: it leaves the queue at once, or the device at its next step. False: settled before."""
        with self._lock:
            model = self._models.get(job.model)
            ticket = model.queue.remove(job) if model else None
            if not self._settle_locked(job, State.CANCELLED, None):
                return False
        if ticket is None:
            self._call(lambda: self._tell_cancelled(job))
        return True

    def in_flight(self) -> int:
        """Jobs admitted and not settled."""
        with self._lock:
            return len(self._in_flight)

    def status(self, model: str) -> ModelStatus:
        """How a model stands. Raises ModelNotFound."""
        with self._lock:
            found = self._models.get(model)
            if found is None:
                raise ModelNotFound(f"no model {model!r}", param="model")
            return self._status_locked(found)

    @property
    def is_draining(self) -> bool:
        """Whether no new jobs are taken any more."""
        return self._is_draining

    def models(self) -> list[str]:
        """The names of the models, in the order they were added."""
        with self._lock:
            return list(self._models)

    # --- server and supervisor threads --------------------------------------------------------------------------------

    def add_model(self, name: str, queue_limit: int, largest_picture_bytes: int = 0) -> None:
        """Make a model known, or change its limits. `largest_picture_bytes` 0: from the model's max_resolution."""
        largest = largest_picture_bytes or _largest_picture(self._settings, name)
        with self._lock:
            model = self._models.get(name)
            if model is None:
                self._models[name] = _Model(name, FairQueue(queue_limit), largest)
            else:
                model.queue.limit, model.largest_picture_bytes, model.is_leaving = queue_limit, largest, False

    def remove_model(self, name: str) -> None:
        """Take no more jobs for a model; it is forgotten when the last of its jobs and workers is gone."""
        with self._lock:
            if model := self._models.get(name):
                model.is_leaving = True
                self._forget_locked(model)

    def attach(self, link: Link) -> None:
        """Take charge of a worker's link. Its model must be known."""
        self._call(lambda: self._attach(link))

    def retire(self, link: Link) -> None:
        """Give this worker no more jobs and tell it to end when it has finished those it holds."""
        self._call(lambda: self._retire(link))

    def detach(self, link: Link, why: str) -> None:
        """Let go of a worker that is gone: its jobs go to others, its link is closed. Does nothing the second time."""
        self._call(lambda: self._detach(link, why))

    def fail_model(self, name: str, reason: str) -> None:
        """Declare a model failed: its queue is answered with the reason, and so is whoever comes."""
        with self._lock:
            model = self._models.get(name)
            if model is None:
                return
            model.failure = reason
            for ticket in list(model.queue):
                model.queue.remove(ticket.job)
                self._settle_locked(ticket.job, State.FAILED, self._failed_error(model))

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
        self._wake()
        self._thread.join()
        if self._wakeup >= 0:
            os.close(self._wakeup)
            self._wakeup = -1

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _check_admission(self, job: Job) -> _Model:
        model = self._models.get(job.model)
        if model is None:
            raise ModelNotFound(f"no model {job.model!r}", param="model")
        if self._is_draining:
            raise Draining("the server is going down and takes no new jobs", retry_after_s=_NOT_READY_RETRY_S)
        if model.is_leaving:
            raise NotReady(f"model {job.model!r} is being unloaded", retry_after_s=_NOT_READY_RETRY_S)
        if model.failure:
            raise self._failed_error(model)
        if not model.was_ready:
            raise NotReady(f"model {job.model!r} is loading", retry_after_s=_NOT_READY_RETRY_S)
        if not model.queue.has_place_for(job.client):
            waiting = len(model.queue)
            raise QueueFull(
                f"{waiting} jobs wait for model {job.model!r} already; its limit is {model.queue.limit}",
                retry_after_s=_expected_wait_s(model),
            )
        return model

    def _failed_error(self, model: _Model) -> ModelFailed:
        return ModelFailed(f"model {model.name!r} failed: {model.failure}", retry_after_s=self._settings.failed_retry_s)

    def _settle_locked(self, job: Job, state: State, error: ApiError | None) -> bool:
        if not job.settle(state, error):
            return False
        self._in_flight.discard(job)
        if not self._in_flight:
            self._idle.notify_all()
        return True

    def _status_locked(self, model: _Model) -> ModelStatus:
        ready = [worker for worker in model.workers if worker.capacity]
        reason = ""
        if model.failure:
            reason = f"failed: {model.failure}"
        elif self._is_draining:
            reason = "draining"
        elif model.is_leaving:
            reason = "unloading"
        elif not ready:
            reason = "restarting" if model.was_ready else "loading"
        known = ready[0].link.ready if ready else None
        return ModelStatus(
            name=model.name,
            ready=not reason,
            reason=reason,
            failed=bool(model.failure),
            workers=len(ready),
            queued=len(model.queue),
            running=sum(len(worker.held) for worker in model.workers),
            capacity=sum(worker.capacity for worker in ready),
            job_s=model.job_s,
            engine=known.engine if known else "",
            engine_reason=known.why if known else "",
        )

    def _forget_locked(self, model: _Model) -> None:
        if model.is_leaving and not model.workers and not len(model.queue):
            self._models.pop(model.name, None)

    # --- the dispatcher thread ----------------------------------------------------------------------------------------

    def _call(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # closed: the thread has ended, and nobody is left to wake
            os.eventfd_write(self._wakeup, 1)

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
        for descriptor, _ in self._poll.poll(timeout_s * 1000):
            if descriptor == self._wakeup:
                os.eventfd_read(self._wakeup)
            elif worker := self._workers.get(descriptor):
                self._read(worker)
            elif worker := self._writers.get(descriptor):
                self._flush(worker)
        while self._inbox:
            self._inbox.popleft()()
        self.turned_at = time.monotonic()
        if self._next_deadline.at <= self.turned_at:
            self._expire()
        for model in list(self._models.values()):
            if len(model.queue):
                self._fill(model)

    def _finish(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        with self._lock:
            for job in list(self._in_flight):
                error = Draining("the server went down before the job was done", retry_after_s=_NOT_READY_RETRY_S)
                self._settle_locked(job, State.FAILED, error)
        for worker in list(self._workers.values()):
            worker.link.lost = worker.link.lost or "the server goes down"
            worker.link.close()
        self._workers.clear()

    # --- workers come and go ------------------------------------------------------------------------------------------

    def _attach(self, link: Link) -> None:
        with self._lock:
            model = self._models[link.model]
            worker = _Worker(link, model)
            model.workers.append(worker)
        self._workers[link.fileno()] = worker
        self._poll.register(link.fileno(), select.POLLIN)

    def _find(self, link: Link) -> _Worker | None:
        return None if link.lost else self._workers.get(link.fileno())

    def _retire(self, link: Link) -> None:
        worker = self._find(link)
        if worker is None or worker.is_retired:
            return
        worker.is_retired = True
        self._send(worker, Stop())

    def _detach(self, link: Link, why: str) -> None:
        worker = self._find(link)
        if worker is None:
            return
        for _ in range(4):  # what it said before it went still counts: one pipe holds 64 KiB, one read takes as much
            if not self._read(worker):
                return
        self._lose(worker, why)

    def _lose(self, worker: _Worker, why: str, *, is_broken: bool = False) -> None:
        """Let go of a worker: give its jobs back or end them, close its link, tell the supervisor."""
        link = worker.link
        self._poll.unregister(link.fileno())
        del self._workers[link.fileno()]
        self._watch_writes(worker, False)
        link.jobs_lost = sum(not ticket.job.is_settled for ticket in worker.held.values())
        link.is_broken, link.lost = is_broken, why
        link.close()
        with self._lock:
            worker.model.workers.remove(worker)
        for ticket in worker.held.values():
            self._give_back(worker, ticket, why)
        worker.held.clear()
        with self._lock:
            self._forget_locked(worker.model)
        if self.on_change:
            self.on_change()

    def _give_back(self, worker: _Worker, ticket: Ticket, why: str) -> None:
        job, link = ticket.job, worker.link
        if job.is_settled:
            return
        ticket.deaths += 1
        ticket.announced.clear()
        if ticket.deaths > 1:
            log.error("second worker died with a job", extra=fields(job=job.id, worker=link.name, why=why))
            error = WorkerCrashed("two workers died with this request; it is not tried again")
            with self._lock:
                self._settle_locked(job, State.FAILED, error)
            return
        log.warning("worker died with a job, once more", extra=fields(job=job.id, worker=link.name, why=why))
        job.drop_results()
        with self._lock:
            failure = worker.model.failure
            if job.move(State.QUEUED):
                worker.model.queue.push_front(ticket)
        if failure:
            self.fail_model(worker.model.name, failure)

    def _send(self, worker: _Worker, message: Message) -> None:
        try:
            worker.link.send(message)
        except LinkClosed:
            return  # its end-of-file is on the way: `_read` gives its jobs back, after all it has still said
        self._watch_writes(worker, worker.link.has_backlog)

    def _flush(self, worker: _Worker) -> None:
        try:
            worker.link.flush()
        except LinkClosed:
            self._watch_writes(worker, False)
            return
        self._watch_writes(worker, worker.link.has_backlog)

    def _watch_writes(self, worker: _Worker, wanted: bool) -> None:
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

    def _fill(self, model: _Model) -> None:
        """Give waiting jobs to workers with room, the least loaded first."""
        while True:
            with self._lock:
                worker, ticket = self._next_locked(model)
                if ticket is None or worker is None:
                    return
                if not ticket.job.move(State.RUNNING):
                    continue  # settled meanwhile
                worker.held[ticket.job.id] = ticket
            job = ticket.job
            job.attempts += 1
            job.timings.dispatched_at = time.monotonic()
            self._send(worker, Run(job.id, ticket.request, job.deadline.remaining(), alone=ticket.is_alone))

    def _next_locked(self, model: _Model) -> tuple[_Worker | None, Ticket | None]:
        """The next job and the worker for it. A job that must run alone waits for an empty worker, which is kept free for it."""
        open_workers = [worker for worker in model.workers if worker.has_room and not worker.link.lost]
        if not open_workers:
            return None, None
        if model.queue.first_given_back():
            emptiest = min(model.workers, key=lambda worker: len(worker.held) if worker.capacity else _MAX_CAPACITY)
            if not emptiest.held and emptiest.capacity:
                return emptiest, model.queue.pop_given_back()
            open_workers = [worker for worker in open_workers if worker is not emptiest]
            if not open_workers:
                return None, None
        return min(open_workers, key=lambda worker: len(worker.held)), model.queue.pop()

    def _expire(self) -> None:
        """Settle the jobs whose deadline has passed, waiting or running, and find the next deadline."""
        expired: list[tuple[_Worker | None, Ticket]] = []
        upcoming = Deadline(float("inf"))
        with self._lock:
            for model in self._models.values():
                waiting = [(None, ticket) for ticket in model.queue]
                held = [(worker, ticket) for worker in model.workers for ticket in worker.held.values()]
                for worker, ticket in [*waiting, *held]:
                    if ticket.job.is_settled:
                        if ticket.cancelled_at and worker:
                            upcoming = min(upcoming, self._release_deadline(worker, ticket))
                    elif ticket.job.deadline.is_expired():
                        expired.append((worker, ticket))
                    else:
                        upcoming = min(upcoming, ticket.job.deadline)
                for worker, ticket in expired:
                    if worker is None:
                        model.queue.remove(ticket.job)
            self._next_deadline = upcoming
        for worker, ticket in expired:
            where = "on the device" if worker else "in the queue"
            error = DeadlineExceeded(f"the job's deadline passed while it was {where}")
            with self._lock:
                self._settle_locked(ticket.job, State.EXPIRED, error)
            if worker:
                self._cancel_held(worker, ticket)
        self._drop_stuck()

    def _tell_cancelled(self, job: Job) -> None:
        for worker in self._workers.values():
            if ticket := worker.held.get(job.id):
                self._cancel_held(worker, ticket)
                return

    def _cancel_held(self, worker: _Worker, ticket: Ticket) -> None:
        if ticket.cancelled_at:
            return
        ticket.cancelled_at = time.monotonic()
        self._send(worker, Cancel(ticket.job.id))
        with self._lock:
            self._next_deadline = min(self._next_deadline, self._release_deadline(worker, ticket))

    def _release_deadline(self, worker: _Worker, ticket: Ticket) -> Deadline:
        """When a worker must have let go of a cancelled job: a hang limit after it was told, or after its newest beat's leave."""
        return Deadline(ticket.cancelled_at + max(self._settings.hang_limit_s, worker.link.allow_s))

    def _drop_stuck(self) -> None:
        """Let go of workers that hold nothing but cancelled jobs and have not said so within the limit: a place is lost there."""
        for worker in list(self._workers.values()):
            held = list(worker.held.values())
            if held and all(t.cancelled_at and self._release_deadline(worker, t).is_expired() for t in held):
                self._lose(worker, "it holds on to cancelled jobs", is_broken=True)

    # --- reports from workers -----------------------------------------------------------------------------------------

    def _read(self, worker: _Worker) -> bool:
        """Handle what a worker reports; False when it was let go of."""
        try:
            for message in worker.link.receive():
                self._note(worker, message)
        except LinkClosed as error:
            self._lose(worker, str(error))
            return False
        except LinkGarbage as error:
            log.warning("a worker broke the protocol", extra=fields(worker=worker.link.name, why=error))
            self._lose(worker, f"it broke the protocol: {error}", is_broken=True)
            return False
        return True

    def _note(self, worker: _Worker, message: Message) -> None:
        """One report. Raises LinkGarbage when it does not fit what the worker holds."""
        if isinstance(message, Beat):
            return
        if isinstance(message, Ready):
            self._note_ready(worker, message)
            return
        if isinstance(message, Run | Cancel | Room | Stop):
            raise LinkGarbage(f"a worker does not send {message.kind!r}")
        if isinstance(message, Failed) and not message.job:
            return  # noted on the link: the supervisor reads it there when the process has ended
        ticket = worker.held.get(message.job)
        if ticket is None:
            if message.job in worker.ended and isinstance(message, Progress):
                return  # a callback of its engine came late
            raise LinkGarbage(f"{message.kind!r} for a job it does not hold")
        if isinstance(message, Done | Failed):
            self._end(worker, ticket, message)
        elif isinstance(message, Need):
            self._make_room(worker, ticket, message)
        elif isinstance(message, Picture):
            self._note_picture(ticket, message)
        elif isinstance(message, Progress) or ticket.job.prepared is None:
            ticket.job.post(message)

    def _note_ready(self, worker: _Worker, message: Ready) -> None:
        if not 1 <= message.capacity <= _MAX_CAPACITY:
            raise LinkGarbage(f"a capacity of {message.capacity}")
        with self._lock:
            worker.model.was_ready = True
        if self.on_change:
            self.on_change()

    def _make_room(self, worker: _Worker, ticket: Ticket, message: Need) -> None:
        job, key = ticket.job, (message.picture, message.partial)
        self._check_picture(ticket, message)
        if key in ticket.announced:
            raise LinkGarbage(f"picture {message.picture} announced twice")
        if not 1 <= message.size <= worker.model.largest_picture_bytes:
            raise LinkGarbage(f"a picture of {message.size} bytes")
        path = ""
        if not job.is_settled:
            try:
                segment = self._spool.create(message.size, reserve=message.size)
            except SpoolFull as error:
                with self._lock:
                    self._settle_locked(job, State.FAILED, error)
                ticket.cancelled_at = time.monotonic()  # the empty path tells the worker
            else:
                if job.own(segment):
                    ticket.announced[key] = segment
                    path = segment.path
        self._send(worker, Room(job.id, message.picture, path))

    def _note_picture(self, ticket: Ticket, message: Picture) -> None:
        job, key = ticket.job, (message.picture, message.partial)
        self._check_picture(ticket, message)
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

    def _check_picture(self, ticket: Ticket, message: Need | Picture) -> None:
        request = ticket.job.request
        if not 0 <= message.picture < request.n or not -1 <= message.partial < request.partial_images:
            raise LinkGarbage(f"picture {message.picture}, partial {message.partial}: not asked for")

    def _end(self, worker: _Worker, ticket: Ticket, message: Done | Failed) -> None:
        job = ticket.job
        if isinstance(message, Done) and not job.is_settled and len(job.results) < job.request.n:
            raise LinkGarbage(f"done with {len(job.results)} of {job.request.n} pictures")
        with self._lock:
            del worker.held[job.id]
            worker.ended.append(job.id)
            if isinstance(message, Done):
                timings = job.timings
                timings.prepare_ms, timings.denoise_ms = message.prepare_ms, message.denoise_ms
                timings.finish_ms = message.finish_ms
                _note_job_time(worker.model, time.monotonic() - timings.dispatched_at)
                self._settle_locked(job, State.DONE, None)
            else:
                self._settle_locked(job, State.FAILED, from_wire(message.error))


def _largest_picture(settings: Settings, name: str) -> int:
    """Bytes that no encoded result passes: RGBA at the largest size, and what PNG adds to pixels it cannot compress."""
    model = next((model for model in settings.models if model.name == name), ModelSettings())
    pixels = model.max_resolution.width * model.max_resolution.height
    return pixels * 4 + pixels // 16 + 1024 * 1024


def _note_job_time(model: _Model, seconds: float) -> None:
    model.job_s = seconds if not model.job_s else model.job_s + _MEAN_WEIGHT * (seconds - model.job_s)


def _expected_wait_s(model: _Model) -> float:
    """Seconds until the jobs now waiting should have gone to workers: Little's law over the measured time in a worker."""
    places = sum(worker.capacity for worker in model.workers) or 1
    return len(model.queue) * (model.job_s or 1.0) / places
