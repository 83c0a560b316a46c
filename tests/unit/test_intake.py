"""Which job is prepared next, and how the decoded pixels of prepared jobs bound that."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ovserve.deadline import Deadline
from ovserve.wire.messages import Run
from ovserve.worker.intake import Intake
from ovserve.worker.jobs import WorkerJob

WAIT_S = 20.0


def job(name: str, timeout_s: float = 600.0) -> WorkerJob:
    return WorkerJob(name, Run(name, "", timeout_s), Deadline.after(timeout_s))


def intake(limit_bytes: int, *jobs: WorkerJob) -> Intake:
    made = Intake(limit_bytes)
    for each in jobs:
        made.put(each)
    return made


class Taken:
    """A thread that takes one job, and the job."""

    def __init__(self, queue: Intake) -> None:
        self.job: WorkerJob | None = None
        self._thread = threading.Thread(target=self._take, args=(queue,), daemon=True)
        self._thread.start()

    def _take(self, queue: Intake) -> None:
        self.job = queue.take()

    def wait(self) -> WorkerJob:
        self._thread.join(WAIT_S)
        assert self.job is not None
        return self.job


def test_jobs_are_taken_in_order_while_there_is_room() -> None:
    jobs = [job(name) for name in "abc"]
    queue = intake(100, *jobs)
    for index, each in enumerate(jobs):
        assert queue.take() is each
        queue.hold(each, 30)
        assert queue.held_bytes == 30 * (index + 1)


def test_job_waits_at_the_limit_until_an_earlier_one_has_ended() -> None:
    first, second, third = (job(name) for name in "abc")
    queue = intake(100, first, second, third)
    for each, count in ((first, 60), (second, 40)):
        assert queue.take() is each
        queue.hold(each, count)
    assert not queue.has_room
    taken = Taken(queue)
    queue.release(second)
    assert taken.wait() is third
    assert queue.held_bytes == 60


@pytest.mark.parametrize("held", [100, 101, 10**12])
def test_job_above_the_limit_is_taken_when_it_is_alone(held: int) -> None:
    large, small = job("large"), job("small")
    queue = intake(100, large, small)
    assert queue.take() is large
    queue.hold(large, held)
    assert not queue.has_room
    taken = Taken(queue)
    queue.release(large)
    assert taken.wait() is small
    assert queue.held_bytes == 0


def test_jobs_without_pixels_wait_for_room_like_others_but_hold_none() -> None:
    queue = intake(100, *(job(str(number)) for number in range(1000)))
    for _ in range(1000):
        queue.hold(queue.take(), 0)
    assert queue.has_room


def test_stopped_job_is_taken_first_even_without_room() -> None:
    first, waiting, stopped = (job(name) for name in "abc")
    queue = intake(100, first, waiting, stopped)
    queue.hold(queue.take(), 100)
    taken = Taken(queue)
    stopped.stopped.set()
    queue.wake()
    assert taken.wait() is stopped
    assert queue.held_bytes == 100


def test_expired_job_is_taken_even_without_room() -> None:
    first, waiting, late = job("a"), job("b"), job("c", timeout_s=0.01)
    queue = intake(100, first)
    queue.hold(queue.take(), 100)
    queue.put(waiting)
    queue.put(late)
    assert Taken(queue).wait() is late


def test_release_is_idempotent_and_unknown_jobs_release_nothing() -> None:
    first, other = job("a"), job("b")
    queue = intake(100, first)
    queue.hold(queue.take(), 70)
    queue.release(other)
    assert queue.held_bytes == 70
    queue.release(first)
    queue.release(first)
    assert queue.held_bytes == 0


def test_held_bytes_stay_below_the_limit_and_one_job_more() -> None:
    limit, size, count = 1000, 130, 200
    queue = intake(limit, *(job(str(number)) for number in range(count)))
    most, held = 0, list[WorkerJob]()
    for _ in range(count):
        if not queue.has_room:
            queue.release(held.pop(0))
        held.append(queue.take())
        queue.hold(held[-1], size)
        most = max(most, queue.held_bytes)
    assert limit <= most < limit + size


def test_many_threads_release_every_byte() -> None:
    jobs = [job(str(number)) for number in range(300)]
    queue = intake(500, *jobs)

    def end(each: WorkerJob) -> None:
        queue.release(each)

    ends: list[Any] = []
    for _ in jobs:
        each = queue.take()
        queue.hold(each, 90)
        ends.append(threading.Thread(target=end, args=(each,)))
        ends[-1].start()
    for thread in ends:
        thread.join(WAIT_S)
    assert queue.held_bytes == 0
