"""Allocation of large segments in a thread, because the kernel clears their pages while `posix_fallocate` runs.

The dispatcher thread serves all workers: 64 MiB would stop it for tens of milliseconds, and for longer when memory is
short.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from ovserve.errors import ApiError, InternalError
from ovserve.wire.blobs import Segment

__all__ = ["LARGE_BYTES", "Allocator"]

LARGE_BYTES = 1 << 20  # smaller segments are created at once: a hand-over costs as much as their pages
_END_TIMEOUT_S = 10.0  # for the allocations that were asked for before the end

log = logging.getLogger(__name__)

Created = Segment | ApiError | None


class Allocator:
    """One thread that creates segments in the order in which they are asked for.

    Only the dispatcher thread calls `run` and `close`. The number of pending allocations is bounded by the pictures of
    the jobs that workers hold.

    Args:
        call_later: makes a call in the dispatcher thread.
    """

    def __init__(self, call_later: Callable[[Callable[[], None]], None]) -> None:
        self._call_later = call_later
        self._requests: queue.SimpleQueue[tuple[Callable[[], Created], Callable[[Created], None]] | None]
        self._requests = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, create: Callable[[], Created], done: Callable[[Created], None]) -> None:
        """Call `create` in the thread, then `done` with its result in the dispatcher thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="allocator", daemon=True)
            self._thread.start()
        self._requests.put((create, done))

    def close(self) -> None:
        """End the thread after the allocations asked for; their results are still handed over."""
        if self._thread is not None:
            self._requests.put(None)
            self._thread.join(_END_TIMEOUT_S)

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            create, done = request
            try:
                created: Created = create()
            except Exception as error:
                log.exception("allocation failed")  # a bug; the job fails, the thread goes on
                created = InternalError(f"The result could not be stored: {type(error).__name__}.")
            self._call_later(lambda created=created, done=done: done(created))  # type: ignore[misc]
