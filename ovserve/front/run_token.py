"""Run token: lets the connection threads of a listener run one at a time.

The interpreter releases its lock (the GIL) at each system call. When several threads are ready, each such call costs
two thread switches, and a request makes five to ten of them. A thread that holds the run token makes its calls
undisturbed, and releases the token before it may have to wait. The others get it in the order in which they asked,
urgent ones first.

The token is advisory: a holder that runs longer than MAX_HOLD_S loses it and continues without it. So no lock order and
no slow holder can block the other threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque

__all__ = ["RunHandle", "RunToken"]

# A request takes a fraction of a millisecond, so a holder that takes this long computes something large, or is stuck.
MAX_HOLD_S = 0.01
# Added to a waiter's timeout for each position in the queue, so that only the first one checks on the holder.
EXTRA_WAIT_PER_POSITION_S = 0.002
# How long a client that always has its next request ready may run while others wait. Several requests, because a thread
# switch costs half a request; and less than the interpreter's own switch interval.
TIME_SLICE_S = 0.002
MAX_URGENT_IN_A_ROW = 4  # then one that is not urgent, so that those always make progress


class RunToken:
    """The token that the threads of one listener share: its holder and its waiters. Thread-safe: yes, one lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: RunHandle | None = None
        self._held_since = 0.0
        self._waiting: deque[RunHandle] = deque()
        self._urgent: deque[RunHandle] = deque()
        self._urgent_in_a_row = 0

    @property
    def waiting_count(self) -> int:
        """How many handles wait for the token."""
        return len(self._waiting) + len(self._urgent)

    def acquire_or_queue(self, handle: RunHandle) -> int:
        """Give the token to `handle` and return 0 if it is free; else queue the handle and return its position, from 1.

        When a queued handle gets the token, its `granted` lock is released.
        """
        with self._lock:
            if self._holder is None:
                self._set_holder(handle)
                return 0
            queue = self._urgent if handle.is_urgent else self._waiting
            queue.append(handle)
            return len(queue)

    def preempt(self, handle: RunHandle) -> bool:
        """Give the token to the queued `handle` if its holder has had it for MAX_HOLD_S.

        Returns:
            Whether `handle` has the token, which it may also have got in the usual way meanwhile.
        """
        with self._lock:
            queue = self._urgent if handle.is_urgent else self._waiting
            if handle in queue:
                if time.monotonic() - self._held_since < MAX_HOLD_S:
                    return False
                queue.remove(handle)
                self._set_holder(handle)
                handle.granted.release()
            return True

    def release(self, handle: RunHandle) -> None:
        """Give the token to the next waiter. No effect when `handle` is not the holder, or was preempted."""
        with self._lock:
            if self._holder is not handle:
                return
            following = self._pop_next()
            self._set_holder(following)
            if following is not None:
                following.granted.release()

    def _set_holder(self, handle: RunHandle | None) -> None:
        self._holder, self._held_since = handle, time.monotonic()

    def _pop_next(self) -> RunHandle | None:
        if self._urgent and not (self._waiting and self._urgent_in_a_row >= MAX_URGENT_IN_A_ROW):
            self._urgent_in_a_row += 1
            return self._urgent.popleft()
        self._urgent_in_a_row = 0
        return self._waiting.popleft() if self._waiting else None


class RunHandle:
    """Per-connection handle on the run token. Thread-safe: no, it belongs to one thread.

    Attributes:
        granted: a lock that the token releases when it grants this handle the token, and the waiting thread acquires
            again.
        is_urgent: goes ahead of handles that are not urgent; for short requests that need a prompt answer. Must not
            change while the handle is queued.
    """

    def __init__(self, token: RunToken) -> None:
        self._token = token
        self.granted = threading.Lock()
        self.granted.acquire()
        self.is_urgent = False
        self._since = 0.0

    def acquire(self) -> None:
        """Wait for the token; the wait is bounded, because holders that run too long are preempted.

        The handle must not hold the token already.
        """
        position = self._token.acquire_or_queue(self)
        if position:
            timeout_s = MAX_HOLD_S + EXTRA_WAIT_PER_POSITION_S * position
            while not self.granted.acquire(timeout=timeout_s):
                if self._token.preempt(self):
                    self.granted.acquire()  # returns at once: the token has released it
                    break
                timeout_s = MAX_HOLD_S
        self._since = time.monotonic()

    def release(self) -> None:
        """Release the token. Idempotent."""
        self._token.release(self)

    def yield_to_waiters(self) -> None:
        """Let the waiters run first, if there are any and this thread has had its time slice."""
        if self._token.waiting_count and time.monotonic() - self._since > TIME_SLICE_S:
            self.release()
            self.acquire()
