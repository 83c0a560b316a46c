"""Slots: each has a thread and infer requests, and runs one call to the device at a time.

    device thread ──start, release──▶ slot thread ──▶ Finished ──wait──▶ device thread
          └────────start────▶ wait runs the call itself ─────────────────────┘

A hand-over between threads costs about 0.1 ms, a twentieth of a step of a small model. So the call that was started
last is held: `wait` runs it in the device thread, which has nothing else to do then. `release` starts it in its slot's
thread instead, where the device thread must not be blocked until it ends. Infer requests release the GIL. An exception
of a call is returned in `Finished`.
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


@dataclass(frozen=True, slots=True)
class _Run(Generic[T]):
    """A call that has not started: its subject, and what runs with its slot's requests."""

    subject: T
    run: Callable[[Any], Any]


class Slots(Generic[T]):
    """A fixed number of slots, one for each of `requests`. All methods run in the device thread."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self._requests = list(requests)
        self._free = list(range(len(requests)))
        self._held: tuple[int, _Run[T]] | None = None
        self._inboxes: list[queue.SimpleQueue[_Run[T] | None]] = []
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
        """Run `run(requests)` in a free slot: in `wait`, or from the next `start` or `release`. Requires `free`."""
        self.release()
        self._held = self._free.pop(), _Run(subject, run)

    def release(self) -> None:
        """Run the call that is held, if there is one, in its slot's thread."""
        if self._held is not None:
            slot, entry = self._held
            self._held = None
            self._inboxes[slot].put(entry)

    def wait(self) -> list[Finished[T]]:
        """Block until at least one call has ended; return all that have. Requires `busy`.

        A call that is held runs in this thread, so that other calls that end meanwhile are returned after it.
        """
        finished = []
        if self._held is not None:
            slot, entry = self._held
            self._held = None
            finished.append(self._run(slot, entry))
        else:
            finished.append(self._finished.get())
        while True:
            try:
                finished.append(self._finished.get_nowait())
            except queue.Empty:
                break
        self._free.extend(call.slot for call in finished)
        return finished

    def close(self) -> None:
        """Stop the threads after the calls in flight."""
        self.release()
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._requests.clear()

    def _serve(self, slot: int) -> None:
        while (entry := self._inboxes[slot].get()) is not None:
            self._finished.put(self._run(slot, entry))
            del entry  # otherwise the call's pictures would stay in memory until the next call of this slot

    def _run(self, slot: int, entry: _Run[T]) -> Finished[T]:
        result, error = None, None
        started_at = time.monotonic()
        try:
            result = entry.run(self._requests[slot])
        except Exception as raised:  # noqa: BLE001 - the device thread decides what the failure means
            error = raised
        return Finished(slot, entry.subject, result, error, started_at, time.monotonic())
