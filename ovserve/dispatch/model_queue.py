"""The models and workers that the dispatcher knows, and which worker gets a model's next job.

Thread-safe: no. The dispatcher's lock guards models, their queues and their lists of workers; what a worker holds is the
dispatcher thread's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client
from ovserve.dispatch.queues import FairQueue, Ticket
from ovserve.errors import ModelFailed, NotReady, QueueFull
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.pipes import Link
from ovserve.wire.messages import Done, Failed, Need, Picture, Prepared, Progress

__all__ = ["NOT_READY_RETRY_S", "AttachedWorker", "ModelQueue", "ModelStatus", "largest_picture_bytes"]

NOT_READY_RETRY_S = 5  # a small model loads within seconds, a large one within a few tries
_ENDED_KEPT = 64  # ids of ended jobs kept for each worker, to tell a late report from a made-up job
_MEAN_WEIGHT = 0.1  # of the newest job in the mean time in a worker: ten jobs make a new mean
_FIRST_GUESS_S = 1.0  # of a job's time in a worker, before one was measured
# Metadata of a result: a prompt and a negative prompt of 256 KiB each, in UTF-16 in a WebP, and escaped in between.
_METADATA_BYTES = 4 * 1024 * 1024


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
class AttachedWorker:
    """One attached link with what its worker holds: tickets by job id, settled ones too until the worker has let go of them."""

    link: Link
    model: ModelQueue
    hang_limit_s: float  # of the settings it was started with
    held: dict[str, Ticket] = field(default_factory=dict)
    ended: dict[str, bool] = field(default_factory=dict)  # newest last; whether each has failed
    watches_writes: bool = False
    logged_phase: str = ""  # the last one in the log

    @property
    def capacity(self) -> int:
        """Jobs it takes at once, 0 before it is ready and after it was retired."""
        return 0 if self.link.ready is None or self.link.is_retired else self.link.ready.capacity

    @property
    def has_room(self) -> bool:
        """Whether it takes one more ordinary job."""
        return len(self.held) < self.capacity and not any(ticket.is_alone for ticket in self.held.values())

    def takes_from(self, address: str) -> bool:
        """Whether it takes one more job of this address, of however many pictures.

        Pictures are counted: the device takes one of each job in turn, so that whoever has a few jobs of many pictures would have
        as much of it as they have jobs there. They need no more of them than keep it busy when nobody else comes.
        """
        unfinished = sum(ticket.unfinished for ticket in self.held.values() if ticket.job.client.address == address)
        return self.has_room and unfinished < self.capacity

    def release(self, job: str, *, has_failed: bool) -> None:
        """Note that it has let go of a job."""
        del self.held[job]
        self.ended[job] = has_failed
        if len(self.ended) > _ENDED_KEPT:
            del self.ended[next(iter(self.ended))]

    def may_trail(self, message: Prepared | Progress | Need | Picture | Done | Failed) -> bool:
        """Whether a report may come after the job's end: its threads meet no later than that.

        A step's callback can be late for any job; a job that one thread gave up can be at its picture in another.
        """
        has_failed = self.ended.get(message.job)
        if has_failed is None:
            return False
        return isinstance(message, Progress) or (has_failed and isinstance(message, Prepared | Need | Picture))

    def release_deadline(self, ticket: Ticket) -> Deadline:
        """When it must have let go of a cancelled job: a hang limit after it was told, or what its newest beat allows."""
        return Deadline(ticket.cancelled_at + max(self.hang_limit_s, self.link.allow_s))

    def is_stuck(self) -> bool:
        """Whether it holds nothing but cancelled jobs, each of them for too long: a place is lost there."""
        return bool(self.held) and all(
            ticket.cancelled_at and self.release_deadline(ticket).is_expired() for ticket in self.held.values()
        )


@dataclass(slots=True, eq=False)
class ModelQueue:
    """One model's queue, workers and standing."""

    name: str
    queue: FairQueue
    largest_picture_bytes: int
    workers: list[AttachedWorker] = field(default_factory=list)
    failure: str = ""
    was_ready: bool = False
    is_removed: bool = False
    job_s: float = 0.0

    def take_next(self) -> tuple[AttachedWorker, Ticket] | None:
        """The next job with the worker for it, the least loaded; None while no worker has room, or nothing waits.

        A job that must run alone takes an empty worker. While there is none, the emptiest gets nothing else, so that one comes.
        """
        open_workers = [worker for worker in self.workers if worker.has_room]
        if not open_workers:
            return None
        first = self.queue.first_requeued()
        if first is not None and not first.is_alone:
            return min(open_workers, key=_load), self.queue.pop_requeued()
        if first is not None:
            able = [worker for worker in self.workers if worker.capacity]
            emptiest = min(able, key=lambda worker: len(worker.held))
            if not emptiest.held:
                return emptiest, self.queue.pop_requeued()
            open_workers = [worker for worker in open_workers if worker is not emptiest]
            if not open_workers:
                return None  # before a job is taken out of the queue that nobody would get
        ticket = self.queue.pop_shared(lambda address: any(worker.takes_from(address) for worker in open_workers))
        if ticket is None:
            return None
        takers = [worker for worker in open_workers if worker.takes_from(ticket.job.client.address)]
        return min(takers or open_workers, key=_load), ticket  # who comes back from a dead worker goes to any

    def check_admission(self, client: Client, failed_retry_s: float) -> None:
        """Whether this client may add one more job now. Raises NotReady, ModelFailed or QueueFull."""
        if self.is_removed:
            raise NotReady(f"model {self.name!r} is being unloaded", retry_after_s=NOT_READY_RETRY_S)
        if self.failure:
            raise self.failed_error(failed_retry_s)
        if not self.was_ready:
            raise NotReady(f"model {self.name!r} is loading", retry_after_s=NOT_READY_RETRY_S)
        if not self.has_space_for(client):
            raise QueueFull(
                f"{len(self.queue)} jobs wait for model {self.name!r} already; its limit is {self.queue.limit}",
                retry_after_s=self.expected_wait_s(),
            )

    def failed_error(self, retry_s: float) -> ModelFailed:
        """What a job of a model that was declared failed is answered."""
        return ModelFailed(f"model {self.name!r} failed: {self.failure}", retry_after_s=retry_s)

    def has_space_for(self, client: Client) -> bool:
        """Whether this client may add one more job: the limit is for those beyond the workers' places."""
        free = sum(max(0, worker.capacity - len(worker.held)) for worker in self.workers)
        return self.queue.has_space_for(client, free)

    def note_job_time(self, seconds: float) -> None:
        """One more job has spent `seconds` in a worker."""
        self.job_s += (seconds - self.job_s) * (_MEAN_WEIGHT if self.job_s else 1.0)

    def expected_wait_s(self) -> float:
        """Seconds until the jobs now waiting should have gone to workers: Little's law over the measured time in a worker.

        It asks for the jobs that workers hold while others wait: of many pictures each, those are fewer than their places.
        """
        held = sum(len(worker.held) for worker in self.workers) or 1
        return len(self.queue) * (self.job_s or _FIRST_GUESS_S) / held

    def status(self, unavailable_reason: str = "") -> ModelStatus:
        """How it stands now. `unavailable_reason`: why no model takes jobs, whatever its own standing."""
        ready = [worker for worker in self.workers if worker.capacity]
        reason = ""
        if self.failure:
            reason = f"failed: {self.failure}"
        elif unavailable_reason:
            reason = unavailable_reason
        elif self.is_removed:
            reason = "unloading"
        elif not ready:
            reason = "restarting" if self.was_ready else "loading"
        known = ready[0].link.ready if ready else None
        return ModelStatus(
            name=self.name,
            ready=not reason,
            reason=reason,
            failed=bool(self.failure),
            workers=len(ready),
            queued=len(self.queue),
            running=sum(len(worker.held) for worker in self.workers),
            capacity=sum(worker.capacity for worker in ready),
            job_s=self.job_s,
            engine=known.engine if known else "",
            engine_reason=known.why if known else "",
        )


def _load(worker: AttachedWorker) -> tuple[int, float]:
    """Fewer jobs first; among equals the one heard of last, for a worker that stands still falls silent."""
    return len(worker.held), -worker.link.beat_at


def largest_picture_bytes(settings: Settings, name: str) -> int:
    """Bytes that no encoded result passes: RGBA at the model's largest size, what PNG adds to pixels it cannot compress,
    and the metadata, which for a small picture is the larger part.
    """
    model = next((model for model in settings.models if model.name == name), ModelSettings())
    pixels = model.max_resolution.width * model.max_resolution.height
    return pixels * 4 + pixels // 16 + _METADATA_BYTES
