"""The queue of jobs to prepare: clients take turns, within limits on the pixels of prepared jobs.

    main thread ──put──▶ waiting, by client ──take──▶ prepare threads ──hold──▶ device, finish thread ──release──▶

Decoded pixels are hundreds of times larger than the messages that announce them, so a bound on the number of jobs does
not bound a worker's memory. A job holds its bytes from its preparation until it ends.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque

from ovserve.worker.jobs import WorkerJob

__all__ = ["Intake"]


class Intake:
    """A queue of jobs that pauses while prepared jobs hold `limit_bytes` or more. Thread-safe.

    Rules:
    - Each client's jobs are taken in order, and prepared one at a time; clients take turns.
    - Jobs are taken while the prepared ones hold less than the limit: they may exceed it by one job for each prepare
      thread, and a job of any size is taken when no other holds pixels.
    - A client whose jobs hold its share of the limit or more is passed over while another client's job can be taken.
      The share is an equal part for each client that holds pixels or waits.
    - Jobs that were stopped or have expired are returned first, even when the limit is reached: they need no memory.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._waiting: OrderedDict[str, deque[WorkerJob]] = OrderedDict()  # by client, in the order of their turns
        self._held: dict[WorkerJob, int] = {}
        self._preparing: set[str] = set()  # clients
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
            self._waiting.setdefault(job.run.client, deque()).append(job)
            self._changed.notify_all()

    def take(self, *, takes_heavy: bool = True) -> WorkerJob:
        """Remove and return the next job to prepare; wait until there is one. Call `end_preparation` after it.

        Args:
            takes_heavy: whether the caller takes jobs whose preparation takes long. If not, it takes the others, and
                only while another caller prepares a job: one thread, with one decoding process, is enough without.
        """
        with self._changed:
            while True:
                job = self._next(takes_heavy=takes_heavy)
                if job is not None:
                    self._remove(job)
                    self._preparing.add(job.run.client)
                    return job
                deadlines = [each.deadline.remaining() for jobs in self._waiting.values() for each in jobs]
                self._changed.wait(min(deadlines, default=None))

    def end_preparation(self, job: WorkerJob) -> None:
        """Note that the preparation of a job has ended, however it did."""
        with self._changed:
            self._preparing.discard(job.run.client)
            self._changed.notify_all()

    def hold(self, job: WorkerJob, count: int) -> None:
        """Count the bytes of a job's decoded pixels, until `release`."""
        with self._changed:
            self._held[job] = count

    def release(self, job: WorkerJob) -> None:
        """Give back the bytes of a job that has ended. Idempotent."""
        with self._changed:
            self._held.pop(job, None)
            self._changed.notify_all()

    def wake(self) -> None:
        """Make `take` check again which jobs were stopped."""
        with self._changed:
            self._changed.notify_all()

    def _next(self, *, takes_heavy: bool) -> WorkerJob | None:
        ready = [jobs for client, jobs in self._waiting.items() if client not in self._preparing]
        abandoned = (job for jobs in ready for job in jobs if _is_abandoned(job))
        if (job := next(abandoned, None)) is not None:
            return job
        if not takes_heavy and not self._preparing:
            return None
        held: Counter[str] = Counter()
        for job, count in self._held.items():
            held[job.run.client] += count
        if held.total() >= self._limit_bytes:
            return None
        share = self._limit_bytes / max(1, len(held.keys() | self._waiting.keys()))
        heads = [jobs[0] for jobs in ready if takes_heavy or not jobs[0].run.heavy]
        return next((job for job in heads if held[job.run.client] < share), next(iter(heads), None))

    def _remove(self, job: WorkerJob) -> None:
        """Remove a job; the turn of its client is over."""
        client = job.run.client
        self._waiting[client].remove(job)
        self._waiting.move_to_end(client)
        if not self._waiting[client]:
            del self._waiting[client]


def _is_abandoned(job: WorkerJob) -> bool:
    return job.stopped.is_set() or job.deadline.is_expired()
