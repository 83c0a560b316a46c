"""The device loop: admits work to the engine in a fair order, runs the engine's turns and sends heartbeats.

    add ──▶ pending, by job ──admit──▶ engine ──turn──▶ Outcome ──▶ deliver

Invariants:
- One thread, the device thread, runs `run`, and it alone uses the engine. `add`, `wake` and `stop` are thread-safe.
- Each piece of added work ends in exactly one Outcome; work that is no longer active gets one without using the device.
- Heartbeats come from this loop and from the engine's steps, never from a side thread: silence means a hung device.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ovserve.engines.protocol import Engine, Outcome, Work

__all__ = ["DeviceLoop"]

IDLE_HEARTBEAT_S = 1.0
MIN_HEARTBEAT_GAP_S = 0.25  # while calls run on the device: a small model makes a hundred of them a second
# The configuration allows the same silence in these phases, so they share heartbeats within the gap. A hang may then be
# reported in the phase before its own.
CALL_PHASES = frozenset({"encode", "denoise", "decode"})
ALLOWANCE_FACTOR = 20  # times the slowest recent run of a phase: another size, another batch, a busier machine


@dataclass(slots=True)
class _PendingJob:
    """The pictures of one job that are not admitted yet, in order."""

    job_id: str
    alone: bool
    works: deque[Work] = field(default_factory=deque)


class DeviceLoop:
    """Runs one engine.

    Args:
        engine: the engine to run; loaded by `load`, in the same thread that calls `run`.
        send_heartbeat: called with (phase, allow_s); allow_s = 0 means the configured limit.
        deliver: called with an outcome and the seconds since its work was admitted, 0 if it never was. Returns False
            when it had no free slot within a second; it is then called again.
        is_active: returns whether the work is still needed: its job is neither cancelled, expired nor failed.
        hang_limit_s: silence that the supervisor allows by its configuration.
    """

    def __init__(
        self,
        engine: Engine,
        send_heartbeat: Callable[[str, float], None],
        deliver: Callable[[Outcome, float], bool],
        is_active: Callable[[Work], bool],
        hang_limit_s: float,
    ) -> None:
        self._engine = engine
        self._send_heartbeat = send_heartbeat
        self._deliver = deliver
        self._is_active = is_active
        self._changed = threading.Condition()
        self._pending: deque[_PendingJob] = deque()
        self._in_flight: dict[Work, float] = {}  # to the monotonic time at which the work was admitted
        self._is_stopping = False
        self._phases = _PhaseTimer(send_heartbeat, hang_limit_s)

    def load(self) -> None:
        """Load the engine and take its warm-up pass as the first estimate of a phase's duration.

        Raises what Engine.load raises.
        """
        self._send_heartbeat("load", 0.0)
        started = time.monotonic()

        def heartbeat(phase: str) -> None:
            nonlocal started
            if phase != "warm-up":
                started = time.monotonic()
            self._send_heartbeat(phase, 0.0)

        self._engine.load(heartbeat)
        self._phases.first_estimate_s = time.monotonic() - started

    def add(self, works: Sequence[Work]) -> None:
        """Queue the pictures of one job behind those of the other jobs. Thread-safe."""
        if not works:
            return
        with self._changed:
            self._pending.append(_PendingJob(works[0].job, works[0].alone, deque(works)))
            self._changed.notify()

    def wake(self) -> None:
        """Make the loop check again which work is active. Thread-safe."""
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """Make `run` return when no work is left. Thread-safe."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def run(self) -> None:
        """Run the engine until `stop`. Runs in: the device thread."""
        while True:
            for work in self._remove_inactive():
                self._deliver_outcome(Outcome(work), 0.0)
            self._admit()
            if not self._in_flight:
                self._phases.start("idle")
                if not self._wait_for_work():
                    return
                continue
            self._phases.start(self._engine.phase())
            for outcome in self._engine.turn():
                admitted_at = self._in_flight.pop(outcome.work)
                self._deliver_outcome(outcome, time.monotonic() - admitted_at)

    def _wait_for_work(self) -> bool:
        """Use the time or wait, until work may have been added; return False if there is none and `stop` was called."""
        with self._changed:
            if self._pending:
                return True
            if self._is_stopping:
                return False
        if not self._engine.use_idle_time():
            with self._changed:
                if not self._pending and not self._is_stopping:
                    self._changed.wait(IDLE_HEARTBEAT_S)
        return True

    def _deliver_outcome(self, outcome: Outcome, seconds: float) -> None:
        while not self._deliver(outcome, seconds):
            self._phases.start("finish")

    def _remove_inactive(self) -> list[Work]:
        """Remove pending work that is no longer active and return it."""
        removed: list[Work] = []
        with self._changed:
            for entry in list(self._pending):
                kept = deque(work for work in entry.works if self._is_active(work))
                if len(kept) < len(entry.works):
                    removed.extend(work for work in entry.works if work not in kept)
                    entry.works = kept
                if not kept:
                    self._pending.remove(entry)
        for work in self._in_flight:
            self._is_active(work)  # sets `cancelled` on expired work, so that the engine drops it
        return removed

    def _admit(self) -> None:
        """Fill the engine, one picture of each job in turn, so that a job of many pictures does not delay others."""
        while len(self._in_flight) < self._engine.capacity:
            with self._changed:
                work = self._take_next()
            if work is None:
                return
            self._in_flight[work] = time.monotonic()
            self._time_steps(work)
            self._engine.admit(work)

    def _take_next(self) -> Work | None:
        if not self._pending:
            return None
        alone = next((work.job for work in self._in_flight if work.alone), None)
        if alone is not None:
            entry = next((entry for entry in self._pending if entry.job_id == alone), None)
        else:
            entry = self._pending[0]
            if entry.alone and self._in_flight:
                return None  # it is first in the queue: the engine runs empty before it, and no other job overtakes it
        if entry is None:
            return None
        self._pending.remove(entry)
        work = entry.works.popleft()
        if entry.works:
            self._pending.append(entry)
        return work

    def _time_steps(self, work: Work) -> None:
        """Make each step of the work start a phase, so that steps send heartbeats."""
        report = work.on_step

        def on_step(step: int, steps: int) -> None:
            self._phases.start("denoise" if step < steps else "decode")
            if report is not None:
                report(step, steps)

        work.on_step = on_step


class _PhaseTimer:
    """Measures the phases and sends heartbeats that ask for a multiple of a phase's slowest recent run.

    Thread-safe: engines may report steps from other threads.
    """

    def __init__(self, send_heartbeat: Callable[[str, float], None], hang_limit_s: float) -> None:
        self.first_estimate_s = 0.0  # duration assumed for a phase that has not run yet
        self._send_heartbeat = send_heartbeat
        self._hang_limit_s = hang_limit_s
        self._slowest_s: dict[str, float] = {}
        self._phase = self._sent_phase = ""
        self._since = self._sent_at = self._sent_allow_s = 0.0
        self._lock = threading.Lock()

    def start(self, phase: str) -> None:
        """Start a phase, which ends the one before it."""
        now = time.monotonic()
        with self._lock:
            if self._phase not in ("", "idle"):
                # The old value is halved each time: one long pause, perhaps of the whole machine, must not allow long
                # silences for good.
                self._slowest_s[self._phase] = max(now - self._since, self._slowest_s.get(self._phase, 0.0) / 2)
            self._phase, self._since = phase, now
            allow_s = 0.0 if phase == "idle" else ALLOWANCE_FACTOR * self._slowest_s.get(phase, self.first_estimate_s)
            allow_s = allow_s if allow_s > self._hang_limit_s else 0.0
            has_same_limit = {phase, self._sent_phase} <= CALL_PHASES and allow_s == self._sent_allow_s == 0.0
            is_known = phase == self._sent_phase or has_same_limit
            if is_known and now - self._sent_at < MIN_HEARTBEAT_GAP_S:
                return
            self._sent_phase, self._sent_allow_s, self._sent_at = phase, allow_s, now
        self._send_heartbeat(phase, allow_s)
