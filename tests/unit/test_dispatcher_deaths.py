"""Jobs of workers that die."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovserve.dispatch.jobs import State
from ovserve.errors import DeadlineExceeded, WorkerCrashed
from ovserve.wire.messages import Done, Run
from tests.dispatcherharness import DispatcherHarness, events


@pytest.fixture
def harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness() as made:
        yield made


def test_job_of_a_dead_worker_runs_again_alone_and_first(harness: DispatcherHarness) -> None:
    first = harness.add_worker()
    job, waiting = harness.admit(), harness.admit()
    first.expect(Run)
    first.deliver(job.id)
    first.die()
    harness.wait_until(lambda: bool(first.link.state.lost))
    second = harness.add_worker(capacity=4)
    run = second.expect(Run)
    assert (run.job, run.alone) == (job.id, True)
    second.expect_nothing()
    second.deliver(job.id, data=b"again")
    second.send(Done(job.id, 0, 0, 0))
    assert harness.wait_settled(job) is State.DONE
    assert job.attempts == 2
    assert bytes(job.results[0].segment.view[:5]) == b"again"
    run = second.expect(Run)
    assert (run.job, run.alone) == (waiting.id, False)


def test_each_picture_is_posted_once_over_both_workers(harness: DispatcherHarness) -> None:
    first = harness.add_worker()
    job = harness.admit(partial_images=1)
    first.expect(Run)
    first.deliver(job.id, partial=0)
    first.deliver(job.id)
    assert len(events(job)) >= 1
    first.die()
    second = harness.add_worker()
    second.expect(Run)
    job.take_events()
    second.deliver(job.id, partial=0)
    second.deliver(job.id)
    second.send(Done(job.id, 0, 0, 0))
    assert events(job, until_settled=True) == []
    assert set(job.results) == {0}


def test_job_whose_second_worker_dies_is_failed(harness: DispatcherHarness) -> None:
    job = None
    for number in range(2):
        worker = harness.add_worker()
        job = job or harness.admit()
        assert worker.expect(Run).alone == bool(number)
        worker.die()
        harness.wait_until(lambda worker=worker: bool(worker.link.state.lost))  # type: ignore[misc]
        state = worker.link.state
        assert (state.jobs_lost, state.lost_retried_job, state.lost_client) == (1, bool(number), "c")
    assert job is not None
    assert harness.wait_settled(job) is State.FAILED
    assert isinstance(job.error, WorkerCrashed)
    assert job.error.should_retry is False


def test_worker_deaths_do_not_count_for_a_job_that_was_not_read(harness: DispatcherHarness) -> None:
    job = None
    for _ in range(3):
        dying = harness.add_worker(reads=False)
        job = job or harness.admit()
        harness.wait_until(lambda: harness.dispatcher.status("toy").running == 1)
        dying.die()
        harness.wait_until(lambda dying=dying: bool(dying.link.state.lost))  # type: ignore[misc]
        assert (dying.link.state.jobs_lost, dying.link.state.lost_retried_job) == (0, False)
    assert job
    last = harness.add_worker()
    run = last.expect(Run)
    assert (run.job, run.alone) == (job.id, False)
    last.deliver(job.id)
    last.send(Done(job.id, 1, 2, 3))
    assert harness.wait_settled(job) is State.DONE


def test_unread_job_of_a_dead_worker_precedes_others_and_runs_beside_them(harness: DispatcherHarness) -> None:
    dying = harness.add_worker(reads=False)
    unread_job = harness.admit(client="a")
    harness.wait_until(lambda: harness.dispatcher.status("toy").running == 1)
    later = harness.admit(client="b")
    dying.die()
    worker = harness.add_worker(capacity=2)
    assert [worker.expect(Run).job for _ in range(2)] == [unread_job.id, later.id]


def test_jobs_beside_a_job_that_kills_workers_are_done(harness: DispatcherHarness) -> None:
    first = harness.add_worker(capacity=3)
    killer, *others = [harness.admit() for _ in range(3)]
    for _ in range(3):
        first.expect(Run)
    first.die()
    second = harness.add_worker(capacity=3)
    assert second.expect(Run).job == killer.id
    second.expect_nothing()
    second.die()
    assert harness.wait_settled(killer) is State.FAILED
    third = harness.add_worker(capacity=3)
    assert [third.serve(), third.serve()] == [job.id for job in others]
    assert [harness.wait_settled(job) for job in others] == [State.DONE, State.DONE]


def test_worker_is_reserved_for_a_job_that_must_run_alone(harness: DispatcherHarness) -> None:
    dying, busy = harness.add_worker(capacity=1), harness.add_worker(capacity=2)
    running = harness.admit()  # dispatched to the worker with the newest heartbeat
    busy.expect(Run)
    requeued = harness.admit()
    dying.expect(Run)
    dying.die()
    harness.wait_until(lambda: bool(dying.link.state.lost))
    waiting = harness.admit()
    busy.expect_nothing()
    busy.deliver(running.id)
    busy.send(Done(running.id, 0, 0, 0))
    assert [busy.serve(), busy.serve()] == [requeued.id, waiting.id]


def test_death_with_jobs_of_several_clients_is_no_clients_fault(harness: DispatcherHarness) -> None:
    worker = harness.add_worker(capacity=2)
    for client in "ab":
        harness.admit(client=client)
        worker.expect(Run)
    worker.die()
    harness.wait_until(lambda: bool(worker.link.state.lost))
    assert (worker.link.state.jobs_lost, worker.link.state.lost_client) == (2, "")


def test_jobs_of_a_client_that_kills_workers_wait_while_those_of_others_are_served(harness: DispatcherHarness) -> None:
    for attempt in range(3):
        worker = harness.add_worker()
        if attempt != 1:
            hostile = harness.admit(client="hostile")
        worker.expect(Run)
        worker.die()
        harness.wait_until(lambda worker=worker: bool(worker.link.state.lost))  # type: ignore[misc]
    last = harness.add_worker()
    fresh = [harness.admit(client=client) for client in ("hostile", "a", "b")]
    assert [last.expect(Run).job for _ in range(2)] == [fresh[1].id, fresh[2].id]
    for job in fresh[1:]:
        last.deliver(job.id)
        last.send(Done(job.id, 0, 0, 0))
    last.expect_nothing()  # for a second
    assert [last.serve(), last.serve()] == [hostile.id, fresh[0].id]


def test_reports_sent_before_death_are_applied(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.deliver(job.id)
    worker.send(Done(job.id, 0, 0, 0))
    worker.die()
    harness.dispatcher.detach(worker.link, "killed")
    assert harness.wait_settled(job) is State.DONE
    harness.wait_until(lambda: bool(worker.link.state.lost))
    assert worker.link.state.jobs_lost == 0


def test_jobs_of_a_detached_hung_worker_are_requeued(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    harness.dispatcher.detach(worker.link, "hung")
    harness.dispatcher.detach(worker.link, "called again")
    harness.wait_until(lambda: bool(worker.link.state.lost))
    assert harness.add_worker().serve() == job.id
    assert worker.link.state.lost == "hung"


def test_requeued_job_expires_in_the_queue(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit(timeout_s=0.3)
    worker.expect(Run)
    worker.die()
    assert harness.wait_settled(job) is State.EXPIRED
    assert isinstance(job.error, DeadlineExceeded)


def test_cancelled_job_is_not_requeued(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    harness.dispatcher.cancel(job)
    worker.die()
    harness.wait_until(lambda: bool(worker.link.state.lost))
    assert worker.link.state.jobs_lost == 0
    second = harness.add_worker()
    second.expect_nothing()
