"""The state of the server as one document, for the page `/status` and for scripts: models, workers, last errors."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ovserve import __version__
from ovserve.dispatch.model_queue import ModelStatus
from ovserve.dispatch.statuses import WorkerStatus
from ovserve.errors import ApiError

__all__ = ["LastErrors", "status_document"]

ERRORS_KEPT = 20
_MESSAGE_LENGTH = 500  # of a kept error's message


class LastErrors:
    """The newest errors that were not the client's fault (5xx). Thread-safe: yes."""

    def __init__(self) -> None:
        self._errors: deque[Mapping[str, Any]] = deque(maxlen=ERRORS_KEPT)
        self._lock = threading.Lock()

    def note(self, error: ApiError, *, request_id: str, path: str) -> None:
        """Keep an error if it is the server's."""
        if error.status < 500:
            return
        entry = {
            "at": int(time.time()),
            "status": error.status,
            "code": error.code,
            "message": str(error)[:_MESSAGE_LENGTH],
            "request": request_id,
            "path": path,
        }
        with self._lock:
            self._errors.appendleft(entry)

    def newest(self) -> list[Mapping[str, Any]]:
        """Return the kept errors, the newest first."""
        with self._lock:
            return list(self._errors)


def status_document(
    models: Mapping[str, ModelStatus],
    workers: Sequence[WorkerStatus],
    errors: LastErrors,
    *,
    counts: Mapping[str, Mapping[str, int]],
    memory_bytes: Mapping[str, int],
    started_at: float,
    is_ready: bool,
    is_draining: bool,
) -> dict[str, Any]:
    """Return the document.

    Args:
        models: the status of each model by name.
        workers: the status of each worker.
        errors: the newest errors.
        counts: what the workers of each model have counted (`wire.messages.COUNTS`).
        memory_bytes: what the workers of each model take, as far as it was measured.
        started_at: monotonic instant at which the server started.
        is_ready: what the readiness check says.
        is_draining: whether the server is shutting down.
    """
    return {
        "version": __version__,
        "uptime_s": round(time.monotonic() - started_at, 1),
        "ready": is_ready,
        "draining": is_draining,
        "models": [
            {**_rounded(status), **_work(counts.get(name, {})), "memory_bytes": memory_bytes.get(name, 0)}
            for name, status in models.items()
        ],
        "workers": [_rounded(worker) for worker in workers],
        "errors": errors.newest(),
    }


def _work(counts: Mapping[str, int]) -> dict[str, float]:
    """Return the denoising calls of a model since the server's start: their number, rows, and seconds together."""
    return {
        "calls": counts.get("calls", 0),
        "rows": counts.get("rows", 0),
        "call_s": round(counts.get("call_us", 0) / 1e6, 3),
    }


def _rounded(status: ModelStatus | WorkerStatus) -> dict[str, Any]:
    """Return the attributes by name, with durations in milliseconds' precision."""
    return {
        name.removeprefix("is_"): round(value, 3) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(status).items()
    }
