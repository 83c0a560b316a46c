"""Whose turn it is to run: threads of connections take turns, so that they never fight for the interpreter's lock.

The interpreter gives its lock away at each system call. With several threads ready, each such call then costs two switches of
thread, five to ten times in a request. A thread that holds the turn makes its calls undisturbed, and gives the turn away where
it may have to wait. Whoever came first is next, but for the urgent: they go first. Taking turns is a courtesy and excludes nobody:
a holder that has run too long loses its turn and goes on without, so no order of locks and no slow holder can stop the others.
"""

from __future__ import annotations

import threading
import time
from collections import deque

__all__ = ["Turn", "Turns"]

# A request takes a fraction of a millisecond, so a holder that takes this long computes something large, or is stuck.
PATIENCE_S = 0.01
# Longer for each place in the line: only the first in line has to look after the holder.
PATIENCE_PER_PLACE_S = 0.002
# How long a client that always has its next request ready may go on while others wait: several requests, for a switch costs half
# of one, and less than the interpreter's own interval.
SLICE_S = 0.002
URGENT_IN_A_ROW = 4  # then one of the others


class Turns:
    """What the threads of one listener share: who runs, and who is next. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Turn | None = None
        self._held_since = 0.0
        self._waiting: deque[Turn] = deque()
        self._urgent: deque[Turn] = deque()
        self._in_a_row = 0

    @property
    def length(self) -> int:
        """Of the line."""
        return len(self._waiting) + len(self._urgent)

    def enter(self, turn: Turn) -> int:
        """Make `turn` the holder where there is none: 0. Else it stands in line, and its gate opens when it is next: its place."""
        with self._lock:
            if self._holder is None:
                self._hold(turn)
                return 0
            line = self._urgent if turn.is_urgent else self._waiting
            line.append(turn)
            return len(line)

    def depose(self, turn: Turn) -> bool:
        """Make `turn`, which stands in line, the holder if the holder has run too long. True also if it became it meanwhile."""
        with self._lock:
            line = self._urgent if turn.is_urgent else self._waiting
            if turn in line:
                if time.monotonic() - self._held_since < PATIENCE_S:
                    return False
                line.remove(turn)
                self._hold(turn)
                turn.gate.release()
            return True

    def leave(self, turn: Turn) -> None:
        """Make the next in line the holder. Nothing happens when `turn` is not the holder, or no longer."""
        with self._lock:
            if self._holder is not turn:
                return
            following = self._pop()
            self._hold(following)
            if following is not None:
                following.gate.release()

    def _hold(self, turn: Turn | None) -> None:
        self._holder, self._held_since = turn, time.monotonic()

    def _pop(self) -> Turn | None:
        if self._urgent and not (self._waiting and self._in_a_row >= URGENT_IN_A_ROW):
            self._in_a_row += 1
            return self._urgent.popleft()
        self._in_a_row = 0
        return self._waiting.popleft() if self._waiting else None


class Turn:
    """One thread's part in it: taken and given away over and over. Thread-safe: no.

    Attributes:
        gate: locked, but from the moment in which it has become this one's turn until its thread goes through.
        is_urgent: goes to the head of the line; for what is short and has to be prompt. Not to be changed in line.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.gate = threading.Lock()
        self.gate.acquire()
        self.is_urgent = False
        self._since = 0.0

    def take(self) -> None:
        """Wait for the turn; at most until its holder, and those before this one, have run too long. Not for one that is held."""
        place = self._turns.enter(self)
        if place:
            patience = PATIENCE_S + PATIENCE_PER_PLACE_S * place
            while not self.gate.acquire(timeout=patience):
                if self._turns.depose(self):
                    self.gate.acquire()  # it is open
                    break
                patience = PATIENCE_S
        self._since = time.monotonic()

    def give(self) -> None:
        """Let the next one run. Safe to call twice."""
        self._turns.leave(self)

    def pass_on(self) -> None:
        """Let those in line run first, once this one has had its slice."""
        if self._turns.length and time.monotonic() - self._since > SLICE_S:
            self.give()
            self.take()
