"""Whose turn it is to run: threads of connections take turns, so that they never fight for the interpreter's lock.

The interpreter gives its lock away at each system call. With several threads ready, each such call then costs two switches of
thread, five to ten times in a request. A thread that holds the turn makes its calls undisturbed, and gives the turn away where
it may have to wait. Whoever came first is next, but for the urgent: they go first. Taking turns is a courtesy and excludes nobody: a holder that takes too long is
no longer waited for, so no order of locks and no slow holder can stop the others.
"""

from __future__ import annotations

import threading
import time
from collections import deque

__all__ = ["Turn", "Turns"]

# Hundreds of requests take less. A holder that takes longer is stuck in something slow.
PATIENCE_S = 0.1
# How long a client that always has its next request ready may go on while others wait: a few requests, for a switch costs half
# of one.
SLICE_S = 0.0005


class Turns:
    """What the threads of one listener share: who runs, and who is next. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Turn | None = None
        self._waiting: deque[Turn] = deque()

    def enter(self, turn: Turn) -> bool:
        """Whether the turn was free; else `turn` stands in line, and its gate opens when it is next."""
        with self._lock:
            if self._holder is None:
                self._holder = turn
                return True
            if turn.is_urgent:
                self._waiting.appendleft(turn)
            else:
                self._waiting.append(turn)
            return False

    def depose(self, turn: Turn) -> bool:
        """Take `turn` out of the line and make it the holder in another's place; False when its gate was opened meanwhile."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            self._holder = turn
            return True

    @property
    def length(self) -> int:
        """Of the line."""
        return len(self._waiting)

    def leave(self, turn: Turn) -> None:
        """Open the gate of the next in line. Nothing happens when `turn` does not hold it, or no longer."""
        with self._lock:
            if self._holder is turn:
                self._holder = self._waiting.popleft() if self._waiting else None
                if self._holder is not None:
                    self._holder.gate.release()


class Turn:
    """One thread's part in it: taken and given away over and over. Thread-safe: no.

    Attributes:
        gate: locked, but for the moment in which it has become this one's turn.
        is_urgent: goes to the head of the line; for what is short and has to be prompt.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.gate = threading.Lock()
        self.gate.acquire()
        self.is_urgent = False
        self._since = 0.0

    def take(self) -> None:
        """Wait for the turn, PATIENCE_S at most. Not for a turn that is held."""
        turns = self._turns
        if not turns.enter(self) and not self.gate.acquire(timeout=PATIENCE_S) and not turns.depose(self):
            self.gate.acquire()  # it has just been opened
        self._since = time.monotonic()

    def give(self) -> None:
        """Let the next one run. Safe to call twice."""
        self._turns.leave(self)

    def pass_on(self) -> None:
        """Let those in line run first, once this one has had its slice."""
        if self._turns.length and time.monotonic() - self._since > SLICE_S:
            self.give()
            self.take()
