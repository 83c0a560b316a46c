"""One job inside a worker, from its Run message to its one Done or Failed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

from ovserve.deadline import Deadline
from ovserve.errors import ApiError
from ovserve.wire.messages import Run
from ovserve.worker.prepared import PreparedRequest

__all__ = ["Jobs", "WorkerJob"]


@dataclass(slots=True, eq=False)
class WorkerJob:
    """One job in this worker. Changed under the job runner's lock.

    Attributes:
        id: the job's id, as in the messages.
        run: the command that started it.
        prepared: the prepared request; None until preparation has succeeded.
        is_preparing: a prepare thread has not finished with it, or has not started.
        added: pieces of work added to the device loop.
        returned: outcomes the finish thread has dealt with.
        filled: results whose segment is filled.
        error: why the job fails; the first error counts.
        stopped: set when the job was cancelled, has expired or has failed: every stage then drops its work. Its works
            share this event.
        partials: number of previews made so far, by picture.
    """

    id: str
    run: Run
    deadline: Deadline
    prepared: PreparedRequest | None = None
    is_preparing: bool = True
    added: int = 0
    returned: int = 0
    filled: int = 0
    error: ApiError | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    partials: dict[int, int] = field(default_factory=dict)
    prepare_ms: float = 0.0
    denoise_ms: float = 0.0
    finish_ms: float = 0.0
    _last_interval: tuple[float, float] = (0.0, 0.0)  # the latest interval counted in denoise_ms

    def add_denoise_interval(self, begun_at: float, ended_at: float) -> None:
        """Add the time during which the engine had one of the job's pictures, in seconds on the monotonic clock.

        Pictures of one job are denoised at the same time: overlapping time counts once, so that no stage takes longer
        than the request. Calls come in the order of `ended_at`.
        """
        begun, until = self._last_interval
        if begun_at > until:
            begun, until = begun_at, begun_at
        self.denoise_ms += 1000 * (ended_at - until + max(0.0, begun - begun_at))
        self._last_interval = (min(begun, begun_at), ended_at)


class Jobs(Protocol):
    """The job operations that the finish thread needs. Thread-safe."""

    def find(self, job_id: str) -> WorkerJob | None:
        """Return the job, or None when it has ended."""

    def fail(self, job: WorkerJob, error: ApiError) -> None:
        """Fail the job; it ends as soon as no stage holds any of its work. The first error counts."""

    def settle_if_complete(self, job: WorkerJob, *, returned: int = 0) -> None:
        """Count `returned` more outcomes as dealt with; report the end of the job if it is complete."""
