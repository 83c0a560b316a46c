"""The device loop: lets work into the engine in a fair order, drives it turn by turn, and beats.

    add ──▶ pending, by job ──admit──▶ engine ──turn──▶ Outcome ──▶ deliver

Laws of this file:
- One thread, the device thread, runs `run` and alone touches the engine. `add` and `wake` may be called from others.
- Each piece of work that came in goes out in exactly one Outcome; what is no longer wanted goes out without touching the device.
- Heartbeats come from here and from the engine's own steps, never from a side thread: silence means that the device stands still.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ovserve.engines.protocol import Engine, Outcome, Work

__all__ = ["DeviceLoop"]

IDLE_BEAT_S = 1.0
BUSY_BEAT_S = 0.25  # beats within one phase are no closer than this: a small model makes a hundred steps a second
ALLOWANCE = 20  # times the slowest seen of a phase of late: another size, another batch, a busier machine


@dataclass(slots=True)
class _Pending:
    """The pictures of one job that are still to be made, in order."""

    job: str
    alone: bool
    works: deque[Work] = field(default_factory=deque)


class DeviceLoop:
    """Runs one engine.

    Args:
        engine: loaded by `load`, in the same thread that calls `run`.
        send_beat: called with (phase, allow_s); allow_s 0 leaves it to the configured limit.
        deliver: takes an outcome with the seconds since its work was admitted, 0 when it never was; False when it had no room
            for it within a second, and is then asked again.
        is_wanted: whether somebody still waits for this piece of work.
        hang_limit_s: what the supervisor allows without being asked.
    """

    def __init__(
        self,
        engine: Engine,
        send_beat: Callable[[str, float], None],
        deliver: Callable[[Outcome, float], bool],
        is_wanted: Callable[[Work], bool],
        hang_limit_s: float,
    ) -> None:
        self._engine = engine
        self._send_beat = send_beat
        self._deliver = deliver
        self._is_wanted = is_wanted
        self._changed = threading.Condition()
        self._pending: deque[_Pending] = deque()
        self._in_flight: dict[Work, float] = {}  # and when each was admitted, on the monotonic clock
        self._is_stopping = False
        self._pace = _Pace(send_beat, hang_limit_s)

    def load(self) -> None:
        """Load the engine; its warm-up pass is the first measure of how long a phase takes. Raises what Engine.load raises."""
        self._send_beat("load", 0.0)
        started = time.monotonic()

        def beat(phase: str) -> None:
            nonlocal started
            if phase != "warm-up":
                started = time.monotonic()
            self._send_beat(phase, 0.0)

        self._engine.load(beat)
        self._pace.unseen_s = time.monotonic() - started

    def add(self, works: Sequence[Work]) -> None:
        """Put the pictures of one job behind those of the others. Thread-safe."""
        if not works:
            return
        with self._changed:
            self._pending.append(_Pending(works[0].job, works[0].alone, deque(works)))
            self._changed.notify()

    def wake(self) -> None:
        """Look again at what is wanted. Thread-safe."""
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """Make `run` return when there is nothing left to do. Thread-safe."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def run(self) -> None:
        """Serve until `stop`. Runs in: the device thread."""
        while True:
            for work in self._unwanted():
                self._give_out(Outcome(work), 0.0)
            self._admit()
            if not self._in_flight:
                self._pace.mark("idle")
                with self._changed:
                    if not self._pending:
                        if self._is_stopping:
                            return
                        self._changed.wait(IDLE_BEAT_S)
                continue
            self._pace.mark(self._engine.phase())
            for outcome in self._engine.turn():
                admitted_at = self._in_flight.pop(outcome.work)
                self._give_out(outcome, time.monotonic() - admitted_at)

    def _give_out(self, outcome: Outcome, seconds: float) -> None:
        while not self._deliver(outcome, seconds):
            self._pace.mark("finish")

    def _unwanted(self) -> list[Work]:
        dropped: list[Work] = []
        with self._changed:
            for entry in list(self._pending):
                kept = deque(work for work in entry.works if self._is_wanted(work))
                if len(kept) < len(entry.works):
                    dropped.extend(work for work in entry.works if work not in kept)
                    entry.works = kept
                if not kept:
                    self._pending.remove(entry)
        for work in self._in_flight:
            self._is_wanted(work)  # marks what has passed its deadline, so that the engine drops it
        return dropped

    def _admit(self) -> None:
        """Fill the engine: one picture of each job in turn, so that a job of many pictures does not hold up the others."""
        while len(self._in_flight) < self._engine.capacity:
            with self._changed:
                work = self._next()
            if work is None:
                return
            self._in_flight[work] = time.monotonic()
            self._follow_steps(work)
            self._engine.admit(work)

    def _next(self) -> Work | None:
        if not self._pending:
            return None
        alone = next((work.job for work in self._in_flight if work.alone), None)
        if alone is not None:
            entry = next((entry for entry in self._pending if entry.job == alone), None)
        else:
            entry = self._pending[0]
            if entry.alone and self._in_flight:
                return None  # first of the queue and not overtaken: the engine runs empty for it
        if entry is None:
            return None
        self._pending.remove(entry)
        work = entry.works.popleft()
        if entry.works:
            self._pending.append(entry)
        return work

    def _follow_steps(self, work: Work) -> None:
        report = work.on_step

        def on_step(step: int, steps: int) -> None:
            self._pace.mark("denoise" if step < steps else "decode")
            if report is not None:
                report(step, steps)

        work.on_step = on_step


class _Pace:
    """How long each phase takes at its slowest of late, and beats that ask for a multiple of it. Thread-safe: steps report from others."""

    def __init__(self, send_beat: Callable[[str, float], None], hang_limit_s: float) -> None:
        self.unseen_s = 0.0  # what a phase is taken to need before it has been seen
        self._send_beat = send_beat
        self._hang_limit_s = hang_limit_s
        self._slowest_s: dict[str, float] = {}
        self._phase = ""
        self._since = self._beat_at = 0.0
        self._lock = threading.Lock()

    def mark(self, phase: str) -> None:
        """A phase begins; the one before it has ended."""
        now = time.monotonic()
        with self._lock:
            if self._phase not in ("", "idle"):
                # Half the old: one long pause, of the whole machine perhaps, must not allow long silences for good.
                self._slowest_s[self._phase] = max(now - self._since, self._slowest_s.get(self._phase, 0.0) / 2)
            is_due = phase != self._phase or now - self._beat_at >= BUSY_BEAT_S
            self._phase, self._since = phase, now
            if not is_due:
                return
            self._beat_at = now
            allow_s = 0.0 if phase == "idle" else ALLOWANCE * self._slowest_s.get(phase, self.unseen_s)
        self._send_beat(phase, allow_s if allow_s > self._hang_limit_s else 0.0)
