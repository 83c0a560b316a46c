"""What is known of one request when it ends: for the metrics, the usage log, and its line in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ovserve.dispatch.jobs import Job, State
from ovserve.wire.messages import Span

__all__ = ["CLIENT_GONE", "OUTCOMES", "End", "Record", "outcome_of"]

CLIENT_GONE = 499  # status of a request whose client left before it was answered
OUTCOMES = ("ok", "client_error", "rate_limited", "server_error", "gone")


class Trace(Protocol):
    """The trace of one request, as far as its record needs it."""

    @property
    def is_recorded(self) -> bool:
        """Whether the sampler has chosen it."""

    @property
    def trace_id(self) -> str:
        """Its id in hexadecimal digits; empty if it is not recorded."""


@dataclass(slots=True)
class Record:
    """What the API knows of a request. Filled in by the thread of its handler. The times are 0 if a stage was not run.

    Attributes:
        route: path of the row in the table of routes that serves the request; empty before it is known.
        model: name of the model; empty for a request that names none.
        state: final state of its job; empty without a job.
        pictures: finished pictures.
        width, height: of each picture, in pixels.
        steps: denoising steps of each picture.
        attempts: how many workers have run the job.
        admitted_at: monotonic instant at which the job was admitted; 0 without one.
        trace: the request's trace; None if requests are not traced.
        spans: of a traced job, the times of its stages in the worker.
    """

    route: str = ""
    model: str = ""
    state: str = ""
    pictures: int = 0
    width: int = 0
    height: int = 0
    steps: int = 0
    attempts: int = 0
    queue_s: float = 0.0
    prepare_s: float = 0.0
    denoise_s: float = 0.0
    finish_s: float = 0.0
    admitted_at: float = 0.0
    trace: Trace | None = None
    spans: Sequence[Span] = ()

    @property
    def trace_id(self) -> str:
        """The id of the request's trace; empty if it is not recorded."""
        return self.trace.trace_id if self.trace is not None else ""

    @property
    def pixels(self) -> int:
        """Pixels of all finished pictures."""
        return self.pictures * self.width * self.height

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage of the job, by its name."""
        return {
            "queue": self.queue_s,
            "prepare": self.prepare_s,
            "denoise": self.denoise_s,
            "finish": self.finish_s,
        }

    def note_job(self, job: Job) -> None:
        """Note the end of the request's job, before its results are closed."""
        timings = job.timings
        self.state, self.attempts = job.state.value, job.attempts
        self.pictures, self.admitted_at, self.spans = len(job.results), timings.admitted_at, job.spans
        if job.prepared is not None:
            self.width, self.height, self.steps = job.prepared.width, job.prepared.height, job.prepared.steps
        # A job that never left the queue has waited until it was settled.
        self.queue_s = max(0.0, (timings.dispatched_at or timings.settled_at) - timings.admitted_at)
        if job.state is State.DONE:
            self.prepare_s = max(0.0, timings.prepare_ms / 1000)
            self.denoise_s = max(0.0, timings.denoise_ms / 1000)
            self.finish_s = max(0.0, timings.finish_ms / 1000)


@dataclass(frozen=True, slots=True)
class End:
    """How an exchange has ended, as the front end knows it.

    Attributes:
        status: of the response; of the error that has ended a stream; 499: the client had gone.
        received_bytes: content of the request.
        sent_bytes: of the response, its head included.
        body_s: seconds from the request's head to the begin and the end of reading the form; None: it was not read.
        headers_s: seconds from the request's head to the head of the response; None: none was sent.
        total_s: seconds from the request's head to the end of the response.
    """

    status: int
    received_bytes: int
    sent_bytes: int
    body_s: tuple[float, float] | None
    headers_s: float | None
    total_s: float

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        return outcome_of(self.status)


def outcome_of(status: int) -> str:
    """Return which of OUTCOMES a status code belongs to."""
    if status == CLIENT_GONE:
        return "gone"
    if status == 429:
        return "rate_limited"
    if status >= 500:
        return "server_error"
    return "client_error" if status >= 400 else "ok"
