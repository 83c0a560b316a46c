"""Calls that other threads leave for one thread, and the descriptor that wakes it."""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Callable

__all__ = ["Inbox"]

log = logging.getLogger(__name__)


class Inbox:
    """Calls in the order they were put. Thread-safe: yes; `clear_wakeup` and `take_all` are for the one thread."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not when the thread ends: a late call would write to whoever got the number.
        weakref.finalize(self, os.close, self._wakeup)

    def fileno(self) -> int:
        """Readable when there is something to look at."""
        return self._wakeup

    def put(self, call: Callable[[], None]) -> None:
        """Leave a call, and wake the thread."""
        self._calls.append(call)
        self.wake()

    def wake(self) -> None:
        """Have the thread look around."""
        os.eventfd_write(self._wakeup, 1)

    def clear_wakeup(self) -> None:
        """The thread has been woken."""
        os.eventfd_read(self._wakeup)

    def take_all(self) -> None:
        """Make the calls."""
        while self._calls:
            call = self._calls.popleft()
            try:
                call()
            except Exception:
                log.exception("a call failed")  # a bug; the calls behind it are others'
