"""Slots: each has a thread and infer requests, and runs one call to the device at a time.

    device thread ──start──▶ slot thread ──▶ Finished ──wait──▶ device thread

Infer requests run in their slot's thread and release the GIL. An exception of a call is returned in `Finished`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Finished", "Slots"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finished(Generic[T]):
    """A call that has ended: its subject, and its result or error; times on the monotonic clock."""

    slot: int
    subject: T
    result: Any
    error: Exception | None
    started_at: float
    ended_at: float


class Slots(Generic[T]):
    """A fixed number of slots, one for each of `requests`. All methods run in the device thread."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self._requests = list(requests)
        self._free = list(range(len(requests)))
        self._inboxes: list[queue.SimpleQueue[tuple[T, Callable[[Any], Any]] | None]] = []
        self._finished: queue.SimpleQueue[Finished[T]] = queue.SimpleQueue()
        self._threads = []
        for slot in range(len(requests)):
            self._inboxes.append(queue.SimpleQueue())
            thread = threading.Thread(target=self._serve, args=(slot,), name=f"slot-{slot}", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def count(self) -> int:
        """Number of slots."""
        return len(self._requests)

    @property
    def free(self) -> int:
        """Number of slots without a call."""
        return len(self._free)

    @property
    def busy(self) -> int:
        """Number of calls in flight."""
        return self.count - self.free

    def start(self, subject: T, run: Callable[[Any], Any]) -> None:
        """Run `run(requests)` in a free slot's thread. Requires `free`."""
        self._inboxes[self._free.pop()].put((subject, run))

    def wait(self) -> list[Finished[T]]:
        """Block until at least one call has ended; return all that have. Requires `busy`."""
        finished = [self._finished.get()]
        while True:
            try:
                finished.append(self._finished.get_nowait())
            except queue.Empty:
                break
        self._free.extend(call.slot for call in finished)
        return finished

    def close(self) -> None:
        """Stop the threads after the calls in flight."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._requests.clear()

    def _serve(self, slot: int) -> None:
        requests = self._requests[slot]
        while (entry := self._inboxes[slot].get()) is not None:
            subject, run = entry
            result, error = None, None
            started_at = time.monotonic()
            try:
                result = run(requests)
            except Exception as raised:  # noqa: BLE001 - the device thread decides what the failure means
                error = raised
            self._finished.put(Finished(slot, subject, result, error, started_at, time.monotonic()))
