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


def job(name: str, timeout_s: float = 600.0, client: str = "", *, heavy: bool = False) -> WorkerJob:
    return WorkerJob(name, Run(name, "", timeout_s, client=client, heavy=heavy), Deadline.after(timeout_s))


def take(queue: Intake, *, takes_heavy: bool = True) -> WorkerJob:
    """Take a job whose preparation takes no time."""
    taken = queue.take(takes_heavy=takes_heavy)
    queue.end_preparation(taken)
    return taken


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
        self.job = take(queue)

    def wait(self) -> WorkerJob:
        self._thread.join(WAIT_S)
        assert self.job is not None
        return self.job


def test_jobs_are_taken_in_order_while_there_is_room() -> None:
    jobs = [job(name) for name in "abc"]
    queue = intake(100, *jobs)
    for index, each in enumerate(jobs):
        assert take(queue) is each
        queue.hold(each, 30)
        assert queue.held_bytes == 30 * (index + 1)


def test_job_waits_at_the_limit_until_an_earlier_one_has_ended() -> None:
    first, second, third = (job(name) for name in "abc")
    queue = intake(100, first, second, third)
    for each, count in ((first, 60), (second, 40)):
        assert take(queue) is each
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
    assert take(queue) is large
    queue.hold(large, held)
    assert not queue.has_room
    taken = Taken(queue)
    queue.release(large)
    assert taken.wait() is small
    assert queue.held_bytes == 0


def test_jobs_without_pixels_wait_for_room_like_others_but_hold_none() -> None:
    queue = intake(100, *(job(str(number)) for number in range(1000)))
    for _ in range(1000):
        queue.hold(take(queue), 0)
    assert queue.has_room


def test_stopped_job_is_taken_first_even_without_room() -> None:
    first, waiting, stopped = (job(name) for name in "abc")
    queue = intake(100, first, waiting, stopped)
    queue.hold(take(queue), 100)
    taken = Taken(queue)
    stopped.stopped.set()
    queue.wake()
    assert taken.wait() is stopped
    assert queue.held_bytes == 100


def test_expired_job_is_taken_even_without_room() -> None:
    first, waiting, late = job("a"), job("b"), job("c", timeout_s=0.01)
    queue = intake(100, first)
    queue.hold(take(queue), 100)
    queue.put(waiting)
    queue.put(late)
    assert Taken(queue).wait() is late


def test_release_is_idempotent_and_unknown_jobs_release_nothing() -> None:
    first, other = job("a"), job("b")
    queue = intake(100, first)
    queue.hold(take(queue), 70)
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
        held.append(take(queue))
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
        each = take(queue)
        queue.hold(each, 90)
        ends.append(threading.Thread(target=end, args=(each,)))
        ends[-1].start()
    for thread in ends:
        thread.join(WAIT_S)
    assert queue.held_bytes == 0


def test_clients_take_turns_and_each_is_first_in_first_out() -> None:
    queue = intake(100, *(job(f"a{number}", client="a") for number in range(3)), job("b0", client="b"))
    queue.put(job("c0", client="c"))
    assert [take(queue).id for _ in range(5)] == ["a0", "b0", "c0", "a1", "a2"]


def test_one_client_is_prepared_in_one_thread_at_a_time() -> None:
    first, second = job("a0", client="a"), job("a1", client="a")
    queue = intake(100, first, second)
    assert queue.take() is first
    taken = Taken(queue)
    other = job("b0", client="b")
    queue.put(other)
    assert taken.wait() is other
    taken = Taken(queue)
    queue.end_preparation(first)
    assert taken.wait() is second


def test_light_jobs_of_other_clients_are_prepared_beside_heavy_ones() -> None:
    heavy = [job(f"heavy-{client}", client=client, heavy=True) for client in "ab"]
    light = job("light", client="c")
    queue = intake(100, *heavy, light)
    assert queue.take() is heavy[0]  # takes long
    assert take(queue, takes_heavy=False) is light


def test_client_above_its_share_is_passed_over_while_another_waits() -> None:
    queue = intake(100, *(job(f"a{number}", client="a") for number in range(4)))
    for _ in range(2):  # alone, it may hold more than a share
        queue.hold(take(queue), 30)
    queue.put(job("b0", client="b"))
    queue.put(job("b1", client="b"))
    assert take(queue).id == "b0"
    assert take(queue).id == "b1"  # although the turn is the other client's
    assert take(queue).id == "a2"  # no other client waits
