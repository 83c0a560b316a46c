from __future__ import annotations

import dataclasses
import errno
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job, Partial, Result, State
from ovserve.errors import DeadlineExceeded, SpoolFull, WorkerCrashed
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import Prepared, Progress
from ovserve.wire.request import ImageRequest

PREPARED = Prepared("id", "image2image", 64, 64, 4, 5, 0, 0)
SETTLED = [State.DONE, State.FAILED, State.CANCELLED, State.EXPIRED]


def make_job(progress: bool = True) -> Job:
    return Job(
        "id", "toy", Client("client"), ImageRequest(task="edit", prompt="x", progress=progress), Deadline.after(60)
    )


def is_awake(job: Job) -> bool:
    return bool(select.select([job.wakeup], [], [], 0)[0])


@pytest.fixture
def job() -> Iterator[Job]:
    made = make_job()
    yield made
    made.close()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path, 1 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_job_without_a_descriptor_is_spool_full_with_retry_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "eventfd", refuse)
    with pytest.raises(SpoolFull, match=os.strerror(number)) as caught:
        make_job()
    assert caught.value.retry_after_s


def test_running_job_can_be_done(job: Job) -> None:
    assert job.move(State.RUNNING)
    assert not job.is_settled
    assert job.settle(State.DONE)
    assert job.is_settled
    assert job.timings.settled_at > 0


def test_running_job_can_be_requeued(job: Job) -> None:
    assert job.move(State.RUNNING)
    assert job.move(State.QUEUED)
    assert job.move(State.RUNNING)


@pytest.mark.parametrize("last", SETTLED)
@pytest.mark.parametrize("later", list(State))
def test_settled_job_does_not_change_state(last: State, later: State) -> None:
    job = make_job()
    job.move(State.RUNNING)
    error = WorkerCrashed("first")
    assert job.settle(last, error)
    assert not job.move(later)
    assert not job.settle(later, DeadlineExceeded("second"))
    assert (job.state, job.error) == (last, error)
    job.close()


def test_queued_job_cannot_become_done(job: Job) -> None:
    assert not job.settle(State.DONE)
    assert job.state is State.QUEUED


def test_settle_rejects_a_state_that_is_not_final(job: Job) -> None:
    assert not job.settle(State.RUNNING)
    assert job.state is State.QUEUED


def test_only_one_of_many_threads_settles_a_job() -> None:
    job = make_job()
    job.move(State.RUNNING)
    barrier, won = threading.Barrier(8), []

    def settle(number: int) -> None:
        barrier.wait()
        if job.settle(State.FAILED, WorkerCrashed(str(number))):
            won.append(number)

    threads = [threading.Thread(target=settle, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert job.error is not None
    assert job.error.message == str(won[0])
    job.close()


@given(st.lists(st.sampled_from(list(State)), max_size=12), st.booleans())
def test_no_sequence_of_moves_leaves_a_final_state(moves: list[State], settles: bool) -> None:
    job = make_job()
    for state in moves:
        before = job.state
        moved = job.settle(state) if settles else job.move(state)
        if before in SETTLED:
            assert not moved
        if not moved:
            assert job.state is before
    job.close()


def test_events_and_settlement_wake_the_handler(job: Job) -> None:
    assert not is_awake(job)
    job.post(PREPARED)
    assert is_awake(job)
    assert job.take_events() == [PREPARED]
    assert job.prepared is PREPARED
    assert not is_awake(job)
    job.settle(State.CANCELLED)
    assert is_awake(job)
    assert job.take_events() == []


def test_handler_without_streaming_is_woken_only_by_settlement() -> None:
    job = make_job(progress=False)
    job.post(PREPARED)
    assert not is_awake(job)
    job.move(State.RUNNING)
    job.settle(State.DONE)
    assert is_awake(job)
    assert job.take_events() == [PREPARED]
    assert job.prepared is PREPARED
    job.close()


def test_unread_progress_is_replaced_by_the_next(job: Job) -> None:
    for step in range(1000):
        job.post(Progress("id", 0, step, 1000))
    assert job.take_events() == [Progress("id", 0, 999, 1000)]


def test_progress_does_not_replace_other_events(job: Job, spool: Spool) -> None:
    partial = Partial(0, 0, spool.put(b"x"), 1)
    for event in (Progress("id", 0, 1, 9), partial, Progress("id", 0, 2, 9), Progress("id", 0, 3, 9)):
        job.post(event)
    assert job.take_events() == [Progress("id", 0, 1, 9), partial, Progress("id", 0, 3, 9)]


def test_close_releases_what_the_job_owns(spool: Spool) -> None:
    job = make_job()
    segment = spool.put(b"x" * 100)
    assert job.add_segment(segment)
    job.results[0] = Result(segment, 100, 7)
    job.close()
    job.close()
    assert spool.used_bytes == 0
    assert job.results == {}


def test_closed_job_rejects_segments_and_events(spool: Spool) -> None:
    job = make_job()
    job.close()
    assert not job.add_segment(spool.put(b"late"))
    assert spool.used_bytes == 0
    job.post(PREPARED)
    assert job.take_events() == []
    assert job.settle(State.CANCELLED)


def test_drop_results_removes_the_results(job: Job, spool: Spool) -> None:
    job.results[0] = Result(spool.put(b"x"), 1, 7)
    job.drop_results(())
    assert job.results == {}


@pytest.mark.parametrize("progress", [False, True])
def test_drop_results_frees_the_space_unless_a_handler_may_read_it(spool: Spool, progress: bool) -> None:
    job = make_job()
    job.request = dataclasses.replace(job.request, progress=progress)
    request, result = spool.put(b"request"), spool.put(b"result")
    job.add_segment(request)
    job.add_segment(result)
    job.drop_results([result])
    assert job.spool_bytes == request.reserved + progress * result.reserved
    job.close()
    assert spool.used_bytes == 0


def test_state_and_events_are_of_one_moment(job: Job) -> None:
    job.post(PREPARED)
    assert job.take_with_state() == ([PREPARED], False)
    assert not is_awake(job)
    job.post(Progress("id", 0, 1, 4))
    job.settle(State.CANCELLED)
    assert is_awake(job)  # a settlement after the last call wakes its handler
    assert job.take_with_state() == ([Progress("id", 0, 1, 4)], True)
    assert job.take_with_state() == ([], True)


def test_no_settlement_is_missed_between_events_and_state() -> None:
    for _ in range(300):
        job = make_job()
        settling = threading.Thread(target=job.settle, args=(State.CANCELLED,))
        settling.start()
        while not job.take_with_state()[1]:
            assert select.select([job.wakeup], [], [], 10)[0], "the handler sleeps, but the job is settled"
        settling.join()
        job.close()
