"""Links over two queues in one process.

Messages are encoded and decoded as on a pipe, so that the same limits apply.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque

from ovserve.errors import LinkClosed
from ovserve.wire.codec import decode, encode
from ovserve.wire.link import OUTBOX_LIMIT, Link
from ovserve.wire.messages import Message

__all__ = ["MemoryLink", "MemoryWorkerLink", "open_memory_link"]


class _Pair:
    """What both sides share, under one lock."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.commands: deque[bytes] = deque()
        self.reports: deque[bytes] = deque()
        self.consumed = 0
        self.is_worker_closed = False
        self.is_front_closed = False
        self.wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not closed with the link: a late report would write to a descriptor that has been reused.
        weakref.finalize(self, os.close, self.wakeup)


class MemoryWorkerLink:
    """The worker's side: `wire.link.WorkerLink`."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair

    def receive(self) -> Message:
        """Wait for the next command and return it. Raises LinkClosed."""
        pair = self._pair
        with pair.changed:
            pair.changed.wait_for(lambda: pair.commands or pair.is_front_closed or pair.is_worker_closed)
            if pair.is_worker_closed or not pair.commands:
                raise LinkClosed("the front end closed the link")
            pair.consumed += 1
            return decode(pair.commands.popleft().removesuffix(b"\n"))

    def send(self, message: Message) -> None:
        """Send a report to the front end. Raises LinkClosed."""
        pair, line = self._pair, encode(message)
        with pair.changed:
            if pair.is_front_closed or pair.is_worker_closed:
                raise LinkClosed("the front end has closed the link")
            pair.reports.append(line)
        os.eventfd_write(pair.wakeup, 1)

    def close(self) -> None:
        """Close this side, as the exit of a worker does. Idempotent."""
        pair = self._pair
        with pair.changed:
            pair.is_worker_closed = True
            pair.changed.notify_all()
        os.eventfd_write(pair.wakeup, 1)


class MemoryLink(Link):
    """The front end's side. Positions count commands."""

    def __init__(self, model: str, index: int, incarnation: int, pair: _Pair) -> None:
        super().__init__(model, index, incarnation)
        self._pair = pair
        self._sent = 0

    @property
    def readiness(self) -> int:
        """A descriptor for `poll`: readable when `receive` has something to do."""
        return self._pair.wakeup

    @property
    def sent(self) -> int:
        """Number of commands passed to `send`."""
        return self._sent

    @property
    def consumed(self) -> int:
        """Number of commands that the worker has taken."""
        return self._pair.consumed

    def send(self, message: Message) -> None:
        """Send a command. Raises LinkClosed."""
        line = encode(message)
        with self._pair.changed:
            if self._pair.is_worker_closed or self._pair.is_front_closed:
                raise LinkClosed("the worker has closed the link")
            if len(self._pair.commands) >= OUTBOX_LIMIT:
                self.update(is_clogged=True)
                raise LinkClosed(f"the worker does not read its commands: {OUTBOX_LIMIT} are waiting")
            self._pair.commands.append(line)
            self._sent += 1
            self._pair.changed.notify_all()

    def receive(self) -> list[Message]:
        """Return the reports that have arrived, each recorded by `note`. Raises LinkClosed and LinkGarbage."""
        with self._pair.changed:
            lines = list(self._pair.reports)
            self._pair.reports.clear()
            is_closed = self._pair.is_worker_closed
            if not is_closed:  # else it stays readable, so that the next call reports the end
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._pair.wakeup)
        if not lines and is_closed:
            raise LinkClosed("the worker has closed the link")
        messages = [decode(line.removesuffix(b"\n")) for line in lines]
        for message in messages:
            self.note(message)
        return messages

    def close(self) -> None:
        """Close the link: the worker's `receive` raises LinkClosed. Idempotent."""
        with self._pair.changed:
            self._pair.is_front_closed = True
            self._pair.changed.notify_all()


def open_memory_link(model: str, index: int, incarnation: int) -> tuple[MemoryLink, MemoryWorkerLink]:
    """Create a link; return its two sides."""
    pair = _Pair()
    return MemoryLink(model, index, incarnation, pair), MemoryWorkerLink(pair)
