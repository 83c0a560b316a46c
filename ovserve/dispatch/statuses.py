"""What the API shows of one worker and of one queued job, at one moment."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QueuePlace", "WorkerStatus"]


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
class QueuePlace:
    """Where a job is in its model's queue.

    Attributes:
        ahead: jobs that precede it.
        wait_s: expected seconds until it is dispatched.
    """

    ahead: int
    wait_s: float
