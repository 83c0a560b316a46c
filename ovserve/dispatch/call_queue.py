"""A queue of calls for one thread, with a descriptor that wakes it."""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Callable

__all__ = ["CallQueue"]

log = logging.getLogger(__name__)


class CallQueue:
    """Calls in the order they were put.

    Thread-safe: yes, but only the owning thread may call `clear_wakeup` and `run_all`.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Closed with this object, not when the thread ends: a late `put` would write to a reused descriptor number.
        weakref.finalize(self, os.close, self._wakeup)

    def fileno(self) -> int:
        """Return the descriptor that is readable after `put` or `wake`."""
        return self._wakeup

    def put(self, call: Callable[[], None]) -> None:
        """Append a call and wake the owning thread."""
        self._calls.append(call)
        self.wake()

    def wake(self) -> None:
        """Wake the owning thread without a call."""
        os.eventfd_write(self._wakeup, 1)

    def clear_wakeup(self) -> None:
        """Reset the descriptor to not readable."""
        os.eventfd_read(self._wakeup)

    def run_all(self) -> None:
        """Run and remove all calls. An exception in one is logged and does not stop the others."""
        while self._calls:
            call = self._calls.popleft()
            try:
                call()
            except Exception:
                log.exception("queued call failed")  # a bug; the remaining calls are independent of it
