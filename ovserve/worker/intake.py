"""The queue of jobs to prepare, which stops giving out jobs while the prepared ones use too much memory.

    main thread ──put──▶ waiting ──take──▶ prepare thread ──hold──▶ device, finish thread ──release──▶

Decoded pixels are hundreds of times larger than the messages that announce them, so a bound on the number of jobs does
not bound a worker's memory. A job holds its bytes from its preparation until it ends.
"""

from __future__ import annotations

import threading
from collections import deque

from ovserve.worker.jobs import WorkerJob

__all__ = ["Intake"]


class Intake:
    """A queue of jobs that pauses while prepared jobs hold `limit_bytes` or more. Thread-safe.

    Rules:
    - Jobs are taken in order, while the prepared ones hold less than the limit: they may exceed it by one job, and a
      job of any size is taken when no other holds pixels.
    - Jobs that were stopped or have expired are returned first, even when the limit is reached: they need no memory.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._waiting: deque[WorkerJob] = deque()
        self._held: dict[WorkerJob, int] = {}
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        """Bytes of the pixels of all prepared jobs."""
        with self._changed:
            return sum(self._held.values())

    @property
    def has_room(self) -> bool:
        """Whether a job may be prepared."""
        return self.held_bytes < self._limit_bytes

    def put(self, job: WorkerJob) -> None:
        """Add a job that is to be prepared."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def take(self) -> WorkerJob:
        """Remove and return the next job to prepare; wait until there is one."""
        with self._changed:
            while True:
                abandoned = next((job for job in self._waiting if _is_abandoned(job)), None)
                if abandoned is not None:
                    self._waiting.remove(abandoned)
                    return abandoned
                if self._waiting and sum(self._held.values()) < self._limit_bytes:
                    return self._waiting.popleft()
                self._changed.wait(min((job.deadline.remaining() for job in self._waiting), default=None))

    def hold(self, job: WorkerJob, count: int) -> None:
        """Count the bytes of a job's decoded pixels, until `release`."""
        with self._changed:
            self._held[job] = count

    def release(self, job: WorkerJob) -> None:
        """Give back the bytes of a job that has ended. Idempotent."""
        with self._changed:
            self._held.pop(job, None)
            self._changed.notify()

    def wake(self) -> None:
        """Make `take` check again which jobs were stopped."""
        with self._changed:
            self._changed.notify()


def _is_abandoned(job: WorkerJob) -> bool:
    return job.stopped.is_set() or job.deadline.is_expired()
