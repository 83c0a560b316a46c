"""The jobs of this API that are not finished, by client: what `progress` shows and `interrupt` ends.

A client sees and ends only its own jobs. Thread-safe: yes, one lock; a job's own handler thread adds, updates and
removes it, and the threads of other requests of the same client read it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from ovserve.dispatch.jobs import Client, Job, JobEvent, Partial, Result, State
from ovserve.wire.messages import Progress

__all__ = ["LiveJob", "LiveJobs", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a client's jobs; the numbers are those of the job that runs, or of the next one.

    Attributes:
        jobs: the client's jobs that are not finished.
        task: txt2img or img2img.
        pictures, finished: of the job.
        step, steps: of the newest report.
        progress: 0 to 1.
        elapsed_s: since the job was dispatched; 0 while it waits.
        started_at: seconds since the epoch.
        is_interrupted: whether it ends because the client has interrupted it.
        preview: the newest preview, an encoded image; empty without one.
    """

    jobs: int
    task: str
    pictures: int
    finished: int
    step: int
    steps: int
    progress: float
    elapsed_s: float
    started_at: float
    is_interrupted: bool
    preview: bytes


@dataclass(slots=True, eq=False)
class LiveJob:
    """One job that is not finished. The lock of LiveJobs guards it.

    Attributes:
        job: the job.
        task: txt2img or img2img.
        is_interrupted: the client has interrupted it.
    """

    job: Job
    task: str
    is_interrupted: bool = False
    started_at: float = field(default_factory=time.time)
    _shares: dict[int, float] = field(default_factory=dict)  # by picture: how much of it is done, 0 to 1
    _finished: int = 0
    _newest: Progress | None = None
    _preview: bytes = b""

    def note(self, event: JobEvent) -> None:
        """Take an event of the job. Runs in: its handler thread, which keeps the job's segments open."""
        match event:
            case Progress():
                self._newest = event
                self._shares[event.picture] = event.step / max(1, event.steps)
            case Partial():
                with event.segment.view[: event.size] as view:
                    self._preview = bytes(view)
            case Result():
                self._finished += 1
                self._shares[event.picture] = 1.0

    def snapshot(self, jobs: int) -> Snapshot:
        """Return this moment; `jobs` is how many the client has."""
        pictures, newest, dispatched_at = self.job.request.n, self._newest, self.job.timings.dispatched_at
        return Snapshot(
            jobs=jobs,
            task=self.task,
            pictures=pictures,
            finished=min(self._finished, pictures),
            step=newest.step if newest else 0,
            steps=newest.steps if newest else self.job.request.num_inference_steps,
            progress=min(1.0, sum(self._shares.values()) / pictures),
            elapsed_s=max(0.0, time.monotonic() - dispatched_at) if dispatched_at else 0.0,
            started_at=self.started_at,
            is_interrupted=self.is_interrupted,
            preview=self._preview,
        )


class LiveJobs:
    """The jobs of every client. There are at most as many as connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[Client, list[LiveJob]] = {}

    def add(self, live: LiveJob) -> None:
        """Add a job."""
        with self._lock:
            self._jobs.setdefault(live.job.client, []).append(live)

    def remove(self, live: LiveJob) -> None:
        """Remove a job. Call it before the job is closed."""
        with self._lock:
            mine = self._jobs[live.job.client]
            mine.remove(live)
            if not mine:
                del self._jobs[live.job.client]

    def note(self, live: LiveJob, events: list[JobEvent]) -> None:
        """Take the events of a job."""
        with self._lock:
            for event in events:
                live.note(event)

    def snapshot(self, client: Client) -> Snapshot | None:
        """Return a client's job that runs, or else its oldest one; None without any."""
        with self._lock:
            mine = self._jobs.get(client, [])
            running = [live for live in mine if live.job.state is State.RUNNING]
            return (running or mine)[0].snapshot(len(mine)) if mine else None

    def interrupt(self, client: Client) -> list[Job]:
        """Mark the jobs of a client as interrupted, and return them."""
        with self._lock:
            mine = list(self._jobs.get(client, []))
            for live in mine:
                live.is_interrupted = True
            return [live.job for live in mine]
