"""Slots: places where one call to the device runs at a time, side by side, each with a thread and infer requests of its own.

    device thread ──start──▶ slot thread ──▶ Finished ──wait──▶ device thread

Infer requests run in their slot's thread with the interpreter lock released; an exception there comes back in `Finished`.
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
    """A call that has ended: what it was for, what it gave, or why it failed; times on the monotonic clock."""

    slot: int
    subject: T
    result: Any
    error: Exception | None
    started_at: float
    ended_at: float


class Slots(Generic[T]):
    """A fixed number of slots. Every method runs in the device thread; `run` of a call in the slot's."""

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
        """How many there are."""
        return len(self._requests)

    @property
    def free(self) -> int:
        """How many have nothing to do."""
        return len(self._free)

    @property
    def busy(self) -> int:
        """How many calls are under way."""
        return self.count - self.free

    def start(self, subject: T, run: Callable[[Any], Any]) -> None:
        """Run `run(requests)` in a free slot."""
        self._inboxes[self._free.pop()].put((subject, run))

    def wait(self) -> list[Finished[T]]:
        """Block until at least one call has ended; all that have. Only while `busy`."""
        finished = [self._finished.get()]
        while True:
            try:
                finished.append(self._finished.get_nowait())
            except queue.Empty:
                break
        self._free.extend(call.slot for call in finished)
        return finished

    def close(self) -> None:
        """End the threads, after the calls under way."""
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
            except Exception as raised:  # noqa: BLE001 - it belongs to the call's subject, whatever it is
                error = raised
            self._finished.put(Finished(slot, subject, result, error, started_at, time.monotonic()))
