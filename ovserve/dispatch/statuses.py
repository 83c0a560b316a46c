"""What the API shows of one worker and of one queued job, at one moment."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["JobStatus", "QueuePlace", "WorkerStatus"]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Status of an attached worker at one moment.

    Attributes:
        name: `model/index#incarnation`, as in the log.
        model: the model's name.
        phase: what its newest heartbeat says it does.
        silent_s: seconds since that heartbeat.
        is_ready: whether it has passed its warm-up and is not retired.
        jobs: number of jobs assigned to it.
        capacity: jobs that it can run at once.
        jobs_done: jobs that it has completed.
    """

    name: str
    model: str
    phase: str
    silent_s: float
    is_ready: bool
    jobs: int
    capacity: int
    jobs_done: int


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job in flight at one moment. The instants are monotonic.

    Attributes:
        id: the request id.
        model: the model's name.
        state: `queued` or `running`.
        client: whose turn it takes: an address, or the fingerprint of a key.
        key_name: name of its key; empty without a named one.
        worker: the worker that it is assigned to; empty while it is queued.
        attempts: how many workers it was given to.
        pictures: how many were asked for.
        pictures_done: how many of them are finished.
        is_prepared: a worker has prepared it.
        admitted_at: when it was admitted.
        dispatched_at: when it was given to a worker; 0 before.
        deadline_at: its deadline.
    """

    id: str
    model: str
    state: str
    client: str
    key_name: str
    worker: str
    attempts: int
    pictures: int
    pictures_done: int
    is_prepared: bool
    admitted_at: float
    dispatched_at: float
    deadline_at: float


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where a job is in its model's queue.

    Attributes:
        ahead: jobs that precede it.
        wait_s: expected seconds until it is dispatched.
    """

    ahead: int
    wait_s: float
