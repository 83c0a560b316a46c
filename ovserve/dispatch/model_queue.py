"""Per-model dispatch state: the queue, the attached workers, the choice of a worker for the next job.

Thread-safe: no. The dispatcher's lock guards models, their queues and their lists of workers. Only the dispatcher
thread changes the jobs assigned to a worker.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.dispatch.statuses import QueuePlace, WorkerStatus
from ovserve.errors import LinkGarbage, ModelFailed, NotReady, QueueFull
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.link import Link
from ovserve.wire.messages import COUNTS, Counts, Done, Failed, Need, Picture, Prepared, Progress

__all__ = [
    "MAX_RETRY_S",
    "MODEL_STATES",
    "NOT_READY_RETRY_S",
    "AttachedWorker",
    "ModelQueue",
    "ModelStatus",
    "largest_picture_bytes",
]

MODEL_STATES = ("unloaded", "loading", "ready", "unloading", "failed")
NOT_READY_RETRY_S = 5  # a small model loads within seconds, a large one within a few retries
MAX_UNPREPARED = 4  # of one client in one worker: it prepares two at a time, and the next ones are there
MAX_HEAVY = 2  # unprepared jobs in one worker: one is being prepared, one waits; light jobs keep the other places
MAX_RETRY_S = 60  # for a model that does not fit into the memory budget
_ENDED_KEPT = 64  # ids of ended jobs kept for each worker, to distinguish a late report from an unknown job
_MEAN_WEIGHT = 0.1  # of the newest job in the mean time in a worker: the mean follows the last ten jobs or so
_FIRST_GUESS_S = 1.0  # assumed time of a job in a worker before one was measured
# Metadata of a result: a prompt and a negative prompt of 256 KiB each, as escaped text stored in UTF-16 in a WebP.
_METADATA_BYTES = 4 * 1024 * 1024


def _is_never(_: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Status of a model at one moment.

    Attributes:
        name: the model's name.
        ready: whether it accepts jobs: a worker has passed its warm-up, or one is started when a job arrives.
        reason: why the model is not ready; empty when it is.
        failed: whether the supervisor declared it failed.
        workers: number of ready workers.
        queued: number of queued jobs.
        running: number of jobs assigned to workers.
        capacity: jobs that the ready workers can run at once.
        job_s: mean seconds that a job spends in a worker; 0 before the first.
        engine: the engine that a ready worker runs.
        engine_reason: why that engine was chosen.
        schedulers: names of the schedulers that a request may choose.
        state: one of MODEL_STATES.
        loading_s: how long it has been loading; 0 in other states.
        loading_percent: how much of the time that its last load took has passed, at most 99; None if that is not known.
        last_used_at: monotonic time at which its newest job was admitted or has ended; 0 before the first.
        waits_for: what it waits for before it is loaded, such as memory; empty if it waits for nothing.
        refusal: why it could not be loaded when that was last tried, for lack of memory; empty if it could.
        keep_alive_s: how long it stays after its last job by the newest request; None: as its options say.
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
    schedulers: tuple[str, ...] = ()
    state: str = "unloaded"
    loading_s: float = 0.0
    loading_percent: int | None = None
    last_used_at: float = 0.0
    waits_for: str = ""
    refusal: str = ""
    keep_alive_s: float | None = None


@dataclass(slots=True, eq=False)
class AttachedWorker:
    """One attached worker: its link and the jobs assigned to it.

    Attributes:
        link: the link to the worker.
        model: the model that it serves.
        hang_limit_s: hang limit of the settings that it was started with.
        assigned: tickets by job id, from dispatch until the worker reports the end of the job, even if it is settled
            earlier.
        ended: ids of the last ended jobs, newest last, each with whether it failed.
        logged_phase: the last phase written to the log.
        attached_at: monotonic time at which it was attached.
        counts: what it has counted, by its newest report.
    """

    link: Link
    model: ModelQueue
    hang_limit_s: float
    assigned: dict[str, Ticket] = field(default_factory=dict)
    ended: dict[str, bool] = field(default_factory=dict)
    logged_phase: str = ""
    attached_at: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)

    @property
    def capacity(self) -> int:
        """Jobs it can run at once; 0 before it is ready and after it was retired."""
        return 0 if self.link.state.ready is None or self.link.state.is_retired else self.link.state.ready.capacity

    @property
    def is_available(self) -> bool:
        """Whether it can take a job of a client that has none here."""
        # One place more than the capacity, for a client that has none: one client alone may fill the others, and the
        # jobs of a client that comes later need not wait until one of them has ended.
        if not self.capacity or len(self.assigned) > self.capacity:
            return False
        return not any(ticket.must_run_alone for ticket in self.assigned.values())

    def accepts(self, ticket: Ticket) -> bool:
        """Return whether it can take one more job, with any number of pictures, that may run beside others.

        The unfinished pictures of the job's address are counted, not its jobs. The device takes one picture of each job
        in turn, so without this limit a few jobs of many pictures would get one share of the device each. An address
        without competition still gets enough jobs to keep the device busy.

        Jobs that wait for their preparation are limited for each address, and heavy ones for the worker, because they
        would take the places of jobs that the device could run.
        """
        if not self.is_available:
            return False
        unprepared = [each for each in self.assigned.values() if not each.is_prepared]
        if ticket.is_heavy and sum(each.is_heavy for each in unprepared) >= MAX_HEAVY:
            return False
        own = [each for each in self.assigned.values() if each.address == ticket.address]
        if not own:
            return True
        if len(self.assigned) >= self.capacity or sum(each.unfinished for each in own) >= self.capacity:
            return False
        return sum(each.address == ticket.address for each in unprepared) < MAX_UNPREPARED

    def status(self) -> WorkerStatus:
        """Return the worker's status now."""
        state = self.link.state
        return WorkerStatus(
            name=self.link.name,
            model=self.link.model,
            phase=state.phase,
            silent_s=max(0.0, time.monotonic() - state.beat_at),
            is_ready=bool(self.capacity),
            jobs=len(self.assigned),
            capacity=self.capacity,
            jobs_done=state.jobs_done,
        )

    def note_counts(self, counts: Counts) -> None:
        """Add what it has counted since its last report to the model's counts.

        Raises:
            LinkGarbage: a count has decreased.
        """
        added = {name: getattr(counts, name) - getattr(self.counts, name) for name in COUNTS}
        if min(added.values()) < 0:
            raise LinkGarbage(f"a count has decreased: {added}")
        self.counts = counts
        self.model.counts.update(added)

    def end_job(self, job: str, *, has_failed: bool) -> None:
        """Remove a job whose end the worker has reported."""
        del self.assigned[job]
        self.ended[job] = has_failed
        if len(self.ended) > _ENDED_KEPT:
            del self.ended[next(iter(self.ended))]

    def is_late_allowed(self, message: Prepared | Progress | Need | Picture | Done | Failed) -> bool:
        """Return whether a report may arrive after the end of its job: the worker's threads report independently.

        The callback of a step can be late for any job. When one thread fails a job, another may still be preparing it
        or encoding a picture of it.
        """
        has_failed = self.ended.get(message.job)
        if has_failed is None:
            return False
        return isinstance(message, Progress) or (has_failed and isinstance(message, Prepared | Need | Picture))

    def cancel_deadline(self, ticket: Ticket) -> Deadline:
        """Return when a cancelled job must have ended.

        That is the hang limit after the cancellation, or what the newest heartbeat allows if that is longer.
        """
        return Deadline(ticket.cancelled_at + max(self.hang_limit_s, self.link.state.allow_s))

    def is_stuck(self) -> bool:
        """Return whether all its jobs are cancelled and past their cancel deadlines, so that its capacity is lost."""
        return bool(self.assigned) and all(
            ticket.cancelled_at and self.cancel_deadline(ticket).is_expired() for ticket in self.assigned.values()
        )


@dataclass(slots=True, eq=False)
class ModelQueue:
    """Queue, workers and status of one model.

    Attributes:
        name: the model's name.
        queue: jobs that wait for a worker.
        largest_picture_bytes: see `largest_picture_bytes` below.
        workers: the attached workers, retired ones included.
        failure: why the supervisor declared the model failed; empty if it did not.
        was_ready: whether a worker has been ready at any time.
        is_removed: whether the model is being unloaded.
        wanted: how many workers it should have; 0: it is not resident.
        expected_load_s: how long it is expected to load; 0: not known.
        waits_for: what it waits for before it is loaded; empty if it waits for nothing.
        unplaced: why none of its workers could be placed in a cluster; empty if one is ready, or may be soon.
        refusal: why it could not be loaded when that was last tried; empty if it could.
        keep_alive_s: `keep_alive` of the newest request; None if it has none.
        is_on_demand: whether it admits jobs while it has no workers, which are then started.
        queues_first_load: whether jobs wait also while it loads for the first time, because a reload has added it.
        job_s: mean seconds that a job spends in a worker; 0 before the first.
        last_used_at: monotonic time at which its newest job was admitted or has ended; 0 before the first.
        counts: what its workers have counted since the server's start, by name of COUNTS, and the jobs that were
            `retried` because a worker died.
    """

    name: str
    queue: FairQueue
    largest_picture_bytes: int
    workers: list[AttachedWorker] = field(default_factory=list)
    failure: str = ""
    was_ready: bool = False
    is_removed: bool = False
    wanted: int = 1
    expected_load_s: float = 0.0
    waits_for: str = ""
    unplaced: str = ""
    refusal: str = ""
    keep_alive_s: float | None = None
    is_on_demand: bool = False
    queues_first_load: bool = False
    job_s: float = 0.0
    last_used_at: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def take_next(self, is_delayed: Callable[[str], bool] = _is_never) -> tuple[AttachedWorker, Ticket] | None:
        """Remove the next job from the queue and return it with the least loaded worker for it.

        Return None while no worker can take a queued job. An address whose next job no worker can take now is passed
        over and keeps its turn. A job that must run alone needs a worker without jobs: from its turn on, the worker
        with the fewest jobs gets no others, so that it becomes free.

        Args:
            is_delayed: whether the jobs of an address have to wait.
        """
        available = [worker for worker in self.workers if worker.is_available]
        is_reserved = False
        for ticket in self.queue.heads():
            if not available:
                return None
            if is_delayed(ticket.address) or (ticket.must_run_alone and is_reserved):
                continue
            if ticket.must_run_alone:
                reserved = min((each for each in self.workers if each.capacity), key=lambda each: len(each.assigned))
                chosen = None if reserved.assigned else reserved
                available, is_reserved = [each for each in available if each is not reserved], True
            else:
                chosen = min((each for each in available if each.accepts(ticket)), key=_load, default=None)
            if chosen is not None:
                self.queue.take(ticket)
                return chosen, ticket
        return None

    def check_admission(self, client: Client, failed_retry_s: float) -> None:
        """Check that this client may add one more job now.

        Raises:
            NotReady: the model is loading, or is being unloaded.
            ModelFailed: the model was declared failed.
            QueueFull: the queue is full, or the client already has its share of it.
        """
        if self.is_removed:
            raise NotReady(f"Model {self.name!r} is being unloaded.", retry_after_s=NOT_READY_RETRY_S)
        if self.failure:
            raise self.failed_error(failed_retry_s)
        if self.unplaced:
            raise self.unplaced_error()
        if not (self.was_ready or self.is_on_demand or self.queues_first_load):
            raise NotReady(f"Model {self.name!r} is loading.", retry_after_s=NOT_READY_RETRY_S)
        if not self.has_space_for(client):
            raise QueueFull(
                f"The queue of model {self.name!r} has no place for this client: it has {len(self.queue)} jobs and "
                f"its limit is {self.queue.limit}.",
                retry_after_s=self.expected_wait_s(),
            )

    def failed_error(self, retry_s: float) -> ModelFailed:
        """Return the error for jobs of this model while it is declared failed."""
        return ModelFailed(f"Model {self.name!r} failed: {self.failure}", retry_after_s=retry_s)

    def unplaced_error(self) -> NotReady:
        """Return the error for jobs of this model while none of its workers can be placed."""
        return NotReady(f"Model {self.name!r} has no worker: {self.unplaced}.", retry_after_s=NOT_READY_RETRY_S)

    def has_space_for(self, client: Client) -> bool:
        """Return whether this client may add one more job. The workers' free capacity is added to the limit."""
        free = sum(max(0, worker.capacity - len(worker.assigned)) for worker in self.workers)
        return self.queue.has_space_for(client, free)

    def note_job_time(self, seconds: float) -> None:
        """Add a finished job's seconds in a worker to the mean."""
        self.job_s += (seconds - self.job_s) * (_MEAN_WEIGHT if self.job_s else 1.0)

    def expected_wait_s(self) -> float:
        """Return the expected seconds until all queued jobs are dispatched.

        This is Little's law over the measured time in a worker. The concurrency is the number of assigned jobs, at most
        the capacity: jobs of many pictures leave part of the capacity unused.
        """
        return self._wait_s(len(self.queue))

    def place_of(self, job: Job) -> QueuePlace | None:
        """Return the place of a job in the queue, or None if it is not queued."""
        ahead = self.queue.ahead_of(job)
        return None if ahead is None else QueuePlace(ahead, self._wait_s(ahead + 1))

    def _wait_s(self, jobs: int) -> float:
        """Return the expected seconds until the next `jobs` queued jobs are dispatched."""
        assigned = sum(min(worker.capacity, len(worker.assigned)) for worker in self.workers) or 1
        return jobs * (self.job_s or _FIRST_GUESS_S) / assigned

    def status(self, unavailable_reason: str = "") -> ModelStatus:
        """Return the model's status now.

        Args:
            unavailable_reason: why the server accepts jobs for no model; empty when it does.
        """
        ready = [worker for worker in self.workers if worker.capacity]
        reason = ""
        if self.failure:
            reason = f"failed: {self.failure}"
        elif unavailable_reason:
            reason = unavailable_reason
        elif self.is_removed:
            reason = "unloading"
        elif self.unplaced:
            reason = self.unplaced
        elif not ready and not self.is_on_demand:
            reason = "restarting" if self.was_ready else "loading"
        report = ready[0].link.state.ready if ready else None
        state = self._state(is_served=bool(ready))
        loading_s = self._loading_s() if state == "loading" else 0.0
        return ModelStatus(
            name=self.name,
            ready=not reason,
            reason=reason,
            failed=bool(self.failure),
            workers=len(ready),
            queued=len(self.queue),
            running=sum(len(worker.assigned) for worker in self.workers),
            capacity=sum(worker.capacity for worker in ready),
            job_s=self.job_s,
            engine=report.engine if report else "",
            engine_reason=report.why if report else "",
            schedulers=tuple(report.schedulers.split(",")) if report and report.schedulers else (),
            state=state,
            loading_s=loading_s,
            loading_percent=self._loading_percent(loading_s),
            last_used_at=self.last_used_at,
            waits_for=self.waits_for or self.unplaced,
            refusal=self.refusal,
            keep_alive_s=self.keep_alive_s,
        )

    def waiting_phrase(self) -> str:
        """Return what a queued job waits for, as the end of a sentence."""
        if any(worker.capacity for worker in self.workers):
            return "while it waited in the queue"
        return f"while its model was being loaded (for {self._loading_s():.0f} s so far)"

    def _state(self, *, is_served: bool) -> str:
        if self.failure:
            return "failed"
        if self.is_removed:
            return "unloading"
        if is_served:
            return "ready"
        if self.wanted:
            return "loading"
        return "unloading" if self.workers else "unloaded"

    def _loading_s(self) -> float:
        begun = [worker.attached_at for worker in self.workers if worker.link.state.ready is None]
        return max(0.0, time.monotonic() - min(begun)) if begun else 0.0

    def _loading_percent(self, loading_s: float) -> int | None:
        if not loading_s or not self.expected_load_s:
            return None
        return min(99, int(100 * loading_s / self.expected_load_s))


def _load(worker: AttachedWorker) -> tuple[int, float]:
    """Return a sort key: fewest jobs first, then the newest heartbeat, because a hung worker sends none."""
    return len(worker.assigned), -worker.link.state.beat_at


def largest_picture_bytes(settings: Settings, name: str) -> int:
    """Return an upper bound of the bytes of an encoded result of the model `name`.

    The sum of: RGBA at the model's largest size, the bytes that PNG adds to incompressible pixels, and the metadata,
    which is the larger part of a small picture.
    """
    model = next((model for model in settings.models if model.name == name), ModelSettings())
    pixels = model.max_resolution.width * model.max_resolution.height
    return pixels * 4 + pixels // 16 + _METADATA_BYTES
