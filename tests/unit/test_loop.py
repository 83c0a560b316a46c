"""The device loop with an engine that denoises nothing: fairness, bounds, cancellation, heartbeats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from ovserve.engines.protocol import Features, Outcome, Work
from ovserve.worker.loop import DeviceLoop

PICTURE = np.zeros((8, 8, 3), np.uint8)


def work(job: str, picture: int = 0, *, alone: bool = False) -> Work:
    return Work(
        job=job,
        picture=picture,
        mode="text2image",
        prompt="",
        negative_prompt="",
        width=8,
        height=8,
        num_inference_steps=2,
        guidance_scale=1.0,
        strength=1.0,
        seed=0,
        alone=alone,
    )


class CountingEngine:
    """Finishes each picture after `turns` turns; records the jobs of each turn in `together`."""

    name = "counting"
    features = Features(frozenset({"text2image"}))

    def __init__(self, capacity: int = 1, turns: int = 1, turn_s: float = 0.0) -> None:
        self.tuned: dict[str, int] = {}
        self.capacity = capacity
        self.turns = turns
        self.turn_s = turn_s
        self.admitted: list[tuple[str, int]] = []
        self.together: list[list[str]] = []
        self.inside: dict[Work, int] = {}
        self.gate: threading.Semaphore | None = None  # if set, each turn waits for one release
        self.idle_work = 0  # pieces of work for idle time
        self.idle_at: list[int] = []  # number of turns before each piece
        self.idle_done = threading.Event()

    def load(self, beat: Callable[[str], None]) -> None:
        beat("load")
        beat("warm-up")

    def check(self, request: object) -> None:
        pass

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        return len(prompt)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        return prompt

    def admit(self, work: Work) -> None:
        assert len(self.inside) < self.capacity
        self.inside[work] = 0
        self.admitted.append((work.job, work.picture))

    def turn(self) -> Sequence[Outcome]:
        if self.gate is not None:
            assert self.gate.acquire(timeout=20)
        self.together.append([work.job for work in self.inside])
        if self.turn_s:
            time.sleep(self.turn_s)
        ended = []
        for work in list(self.inside):
            self.inside[work] += 1
            if work.on_step:
                work.on_step(self.inside[work], self.turns)
            if work.cancelled.is_set():
                ended.append(Outcome(work))
            elif self.inside[work] == self.turns:
                ended.append(Outcome(work, pixels=PICTURE))
        for outcome in ended:
            del self.inside[outcome.work]
        return ended

    def use_idle_time(self) -> bool:
        if not self.idle_work:
            self.idle_done.set()
            return False
        self.idle_work -= 1
        self.idle_at.append(len(self.together))
        return True

    def phase(self) -> str:
        return "denoise" if self.inside else "idle"

    def close(self) -> None:
        pass


class Bench:
    """A device loop in its own thread, with its heartbeats and outcomes."""

    def __init__(self, engine: CountingEngine, hang_limit_s: float = 60.0) -> None:
        self.engine = engine
        self.heartbeats: list[tuple[str, float]] = []
        self.outcomes: list[tuple[Outcome, float]] = []
        self.changed = threading.Condition()
        self.refusals = 0
        self.expired: set[str] = set()
        self.loop = DeviceLoop(engine, self.heartbeat, self.deliver, self.is_active, hang_limit_s)
        self.loop.load()
        self.thread = threading.Thread(target=self.loop.run)

    def heartbeat(self, phase: str, allow_s: float) -> None:
        with self.changed:
            self.heartbeats.append((phase, allow_s))
            self.changed.notify_all()

    def deliver(self, outcome: Outcome, seconds: float) -> bool:
        with self.changed:
            if self.refusals:
                self.refusals -= 1
                return False
            self.outcomes.append((outcome, seconds))
            self.changed.notify_all()
        return True

    def is_active(self, work: Work) -> bool:
        if work.job in self.expired:
            work.cancelled.set()
        return not work.cancelled.is_set()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=20)

    def wait_outcomes(self, count: int) -> list[Outcome]:
        self.wait(lambda: len(self.outcomes) >= count)
        return [outcome for outcome, _ in self.outcomes]


@contextmanager
def running(engine: CountingEngine, hang_limit_s: float = 60.0) -> Iterator[Bench]:
    bench = Bench(engine, hang_limit_s)
    try:
        yield bench
    finally:
        bench.loop.stop()
        if not bench.thread.ident:
            bench.thread.start()
        bench.thread.join(20)
        assert not bench.thread.is_alive()


def test_each_work_has_exactly_one_outcome() -> None:
    with running(CountingEngine(capacity=3, turns=2)) as bench:
        works = [[work(f"job{j}", k) for k in range(4)] for j in range(5)]
        for pictures in works:
            bench.loop.add(pictures)
        bench.thread.start()
        outcomes = bench.wait_outcomes(20)
    assert {outcome.work for outcome in outcomes} == {piece for pictures in works for piece in pictures}
    assert len(bench.outcomes) == 20
    assert all(outcome.pixels is PICTURE for outcome in outcomes)
    assert all(seconds > 0 for _, seconds in bench.outcomes)


def test_idle_time_is_used_when_no_work_is_pending() -> None:
    engine = CountingEngine()
    engine.idle_work = 3
    with running(engine) as bench:
        bench.loop.add([work("first", k) for k in range(2)])
        bench.thread.start()
        assert engine.idle_done.wait(20)
        assert len(bench.outcomes) == 2
        bench.loop.add([work("second")])
        bench.wait_outcomes(3)
    assert engine.idle_at == [2, 2, 2]


def test_jobs_are_admitted_round_robin_by_picture() -> None:
    with running(CountingEngine()) as bench:
        bench.loop.add([work("many", k) for k in range(4)])
        bench.loop.add([work("one")])
        bench.loop.add([work("two", k) for k in range(2)])
        bench.thread.start()
        bench.wait_outcomes(7)
    assert bench.engine.admitted == [
        ("many", 0),
        ("one", 0),
        ("two", 0),
        ("many", 1),
        ("two", 1),
        ("many", 2),
        ("many", 3),
    ]


def test_job_joins_while_another_runs() -> None:
    engine = CountingEngine(capacity=2, turns=4)
    engine.gate = threading.Semaphore(1)
    with running(engine) as bench:
        bench.loop.add([work("first")])
        bench.thread.start()
        bench.wait(lambda: len(engine.together) == 1)
        bench.loop.add([work("second")])
        engine.gate.release(20)
        bench.wait_outcomes(2)
    assert ["first", "second"] in engine.together


def test_job_marked_alone_shares_no_turn_and_is_not_overtaken() -> None:
    with running(CountingEngine(capacity=3, turns=2)) as bench:
        bench.loop.add([work("before", k) for k in range(2)])
        bench.loop.add([work("alone", k, alone=True) for k in range(2)])
        bench.loop.add([work("after", k) for k in range(3)])
        bench.thread.start()
        bench.wait_outcomes(7)
    for names in bench.engine.together:
        assert "alone" not in names or set(names) == {"alone"}
    order = [job for job, _ in bench.engine.admitted]
    assert order.index("alone") < order.index("after")


def test_inactive_work_never_reaches_the_engine() -> None:
    with running(CountingEngine()) as bench:
        cancelled = [work("cancelled", k) for k in range(3)]
        for piece in cancelled:
            piece.cancelled.set()
        bench.loop.add(cancelled)
        bench.loop.add([work("late")])
        bench.expired.add("late")
        bench.loop.add([work("active")])
        bench.thread.start()
        outcomes = bench.wait_outcomes(5)
    assert bench.engine.admitted == [("active", 0)]
    assert sum(outcome.pixels is None and outcome.error is None for outcome in outcomes) == 4


def test_work_in_flight_is_dropped_within_two_turns_of_expiry() -> None:
    engine = CountingEngine(turns=1000)
    engine.gate = threading.Semaphore(3)
    with running(engine) as bench:
        bench.loop.add([work("long")])
        bench.thread.start()
        bench.wait(lambda: len(engine.together) == 3)
        bench.expired.add("long")
        engine.gate.release(2)
        outcomes = bench.wait_outcomes(1)
        assert outcomes[0].pixels is None
        assert len(engine.together) <= 5


def test_wake_removes_cancelled_pending_work() -> None:
    engine = CountingEngine(turns=2)
    engine.gate = threading.Semaphore(0)
    with running(engine) as bench:
        waiting = work("waiting")
        bench.loop.add([work("running")])
        bench.loop.add([waiting])
        bench.thread.start()
        bench.wait(lambda: ("denoise", 0.0) in bench.heartbeats)
        waiting.cancelled.set()
        bench.loop.wake()
        engine.gate.release()
        outcomes = bench.wait_outcomes(1)
        assert outcomes[0].work is waiting
        engine.gate.release()


def test_refused_outcome_is_offered_again_while_heartbeats_continue() -> None:
    with running(CountingEngine()) as bench:
        bench.refusals = 3
        bench.loop.add([work("a")])
        bench.thread.start()
        bench.wait_outcomes(1)
    assert ("finish", 0.0) in bench.heartbeats


def test_heartbeats_are_sent_while_loading_working_and_idle() -> None:
    with running(CountingEngine()) as bench:
        bench.thread.start()
        bench.wait(lambda: [phase for phase, _ in bench.heartbeats].count("idle") >= 2)  # a second apart
        bench.loop.add([work("a")])
        bench.wait_outcomes(1)
        bench.wait(lambda: bench.heartbeats[-1][0] == "idle")
    phases = [phase for phase, _ in bench.heartbeats]
    assert phases[:3] == ["load", "load", "warm-up"]
    assert "denoise" in phases
    assert "decode" not in phases  # it came within the gap, and the same limit applies to it


def test_a_phase_of_the_device_has_a_heartbeat_of_its_own_when_the_last_one_is_old() -> None:
    with running(CountingEngine(turns=2, turn_s=0.3)) as bench:
        bench.thread.start()
        bench.loop.add([work("a")])
        bench.wait_outcomes(1)
        bench.wait(lambda: bench.heartbeats[-1][0] == "idle")
    phases = [phase for phase, _ in bench.heartbeats]
    assert phases.index("denoise") < phases.index("decode") == len(phases) - 2


def test_slow_phase_is_allowed_twenty_times_its_slowest_run() -> None:
    with running(CountingEngine(turns=3, turn_s=0.3), hang_limit_s=1.0) as bench:
        bench.thread.start()
        bench.loop.add([work("a")])
        bench.wait_outcomes(1)
        bench.loop.add([work("b")])
        bench.wait_outcomes(2)
    allowed = [allow_s for phase, allow_s in bench.heartbeats if phase == "denoise"]
    assert 6.0 <= max(allowed) <= 60.0
    assert all(allow_s == 0.0 for phase, allow_s in bench.heartbeats if phase == "idle")


def test_allowance_of_one_long_pause_decays_over_turns() -> None:
    engine = CountingEngine(turn_s=0.3)
    with running(engine, hang_limit_s=1.0) as bench:
        bench.thread.start()
        bench.loop.add([work("slow")])
        bench.wait_outcomes(1)
        engine.turn_s = 0.0
        for k in range(10):
            bench.loop.add([work(f"fast{k}")])
            bench.wait_outcomes(2 + k)
            bench.wait(lambda: bench.heartbeats[-1][0] == "idle")
    allowed = [allow_s for phase, allow_s in bench.heartbeats if phase == "denoise"]
    assert max(allowed) >= 3.0
    assert allowed[-1] == 0.0


def test_fast_phase_uses_the_configured_limit() -> None:
    with running(CountingEngine(turns=3), hang_limit_s=60.0) as bench:
        bench.thread.start()
        for k in range(10):
            bench.loop.add([work(f"j{k}")])
        bench.wait_outcomes(10)
    assert all(allow_s == 0.0 for _, allow_s in bench.heartbeats)


def test_stop_finishes_pending_work() -> None:
    bench = Bench(CountingEngine(turns=3))
    bench.loop.add([work("a", k) for k in range(3)])
    bench.loop.stop()
    bench.thread.start()
    bench.thread.join(20)
    assert not bench.thread.is_alive()
    assert len(bench.outcomes) == 3


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_in_flight_work_never_exceeds_the_capacity(capacity: int) -> None:
    with running(CountingEngine(capacity=capacity, turns=3)) as bench:
        bench.loop.add([work("a", k) for k in range(6)])
        bench.loop.add([work("b", k) for k in range(6)])
        bench.thread.start()
        bench.wait_outcomes(12)
    assert max(len(names) for names in bench.engine.together) == capacity
