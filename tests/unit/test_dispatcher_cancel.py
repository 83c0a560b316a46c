"""Deadlines and cancellation of queued and running jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovserve.dispatch.jobs import State
from ovserve.errors import BlobGone, DeadlineExceeded
from ovserve.wire.messages import Cancel, Done, Failed, Grant, Need, Picture, Prepared, Progress, Run
from tests.dispatcherharness import DispatcherHarness


@pytest.fixture
def harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness() as made:
        yield made


@pytest.fixture
def short_hang_harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness(hang_limit_s=1.0) as made:
        yield made


def test_job_that_expires_in_the_queue_is_not_dispatched(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    running = harness.admit()
    late = harness.admit(timeout_s=0.1)
    worker.expect(Run)
    assert harness.wait_settled(late) is State.EXPIRED
    assert isinstance(late.error, DeadlineExceeded)
    worker.deliver(running.id)
    worker.send(Done(running.id, 0, 0, 0))
    worker.expect_nothing()


def test_job_that_expires_on_a_worker_is_settled_at_once_and_cancelled(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    late = harness.admit(timeout_s=0.1)
    worker.expect(Run)
    assert harness.wait_settled(late) is State.EXPIRED
    assert worker.expect(Cancel).job == late.id
    next_job = harness.admit()
    worker.expect_nothing()
    worker.send(Failed(late.id, DeadlineExceeded("stopped").to_wire()))
    assert worker.expect(Run).job == next_job.id


def test_cancelled_queued_job_is_removed_at_once(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    harness.admit()
    waiting = harness.admit()
    worker.expect(Run)
    harness.wait_until(lambda: harness.dispatcher.status("toy").running == 1)
    assert harness.dispatcher.cancel(waiting)
    assert waiting.state is State.CANCELLED
    assert harness.dispatcher.status("toy").queued == 0
    worker.expect_nothing()
    assert not harness.dispatcher.cancel(waiting)


def test_cancelled_running_job_occupies_its_worker_until_the_worker_ends_it(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    assert harness.dispatcher.cancel(job)
    assert worker.expect(Cancel).job == job.id
    next_job = harness.admit()
    worker.expect_nothing()
    worker.send(Done(job.id, 0, 0, 0))
    assert worker.serve() == next_job.id
    assert job.state is State.CANCELLED


def test_job_cancelled_while_its_result_is_written(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.send(Need(job.id, 0, 7))
    grant = worker.expect(Grant)
    harness.dispatcher.cancel(job)
    job.close()
    with pytest.raises(BlobGone):
        worker.blobs.fill(grant.storage, b"picture")
    worker.expect(Cancel)
    worker.send(Picture(job.id, 0, 1, 7), Done(job.id, 0, 0, 0))  # sent before it read the cancellation
    assert harness.admit().id == worker.expect(Run).job


def test_need_of_a_cancelled_job_gets_an_empty_grant(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    harness.dispatcher.cancel(job)
    worker.expect(Cancel)
    worker.send(Need(job.id, 0, 7))
    assert worker.expect(Grant) == Grant(job.id, 0, "")


def test_job_whose_exchange_ended_before_admission_is_dropped(harness: DispatcherHarness) -> None:
    harness.add_worker()
    job = harness.make_job()
    job.close()
    harness.dispatcher.admit(job)
    assert harness.dispatcher.in_flight() == 0


@pytest.mark.parametrize("late", ["progress", "picture", "need", "prepared"])
def test_late_report_of_a_failed_job_is_ignored(harness: DispatcherHarness, late: str) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    harness.dispatcher.cancel(job)
    worker.expect(Cancel)
    worker.send(Failed(job.id, {}))
    worker.send(
        {
            "progress": Progress(job.id, 0, 1, 2),
            "picture": Picture(job.id, 0, 1, 7),
            "need": Need(job.id, 0, 7),
            "prepared": Prepared(job.id, "x", 1, 1, 1, 1, 1, 1),
        }[late]
    )
    assert harness.admit().id == worker.serve()


def test_worker_that_does_not_end_cancelled_jobs_is_detached(short_hang_harness: DispatcherHarness) -> None:
    worker = short_hang_harness.add_worker()
    job = short_hang_harness.admit()
    worker.expect(Run)
    short_hang_harness.dispatcher.cancel(job)
    waiting = short_hang_harness.admit()
    short_hang_harness.wait_until(lambda: bool(worker.link.state.lost))
    assert "cancelled" in worker.link.state.lost
    assert worker.link.state.is_broken
    assert short_hang_harness.add_worker().serve() == waiting.id


def test_worker_with_other_jobs_is_not_stuck(short_hang_harness: DispatcherHarness) -> None:
    worker = short_hang_harness.add_worker(capacity=2)
    cancelled, wanted = short_hang_harness.admit(), short_hang_harness.admit()
    worker.expect(Run)
    worker.expect(Run)
    short_hang_harness.dispatcher.cancel(cancelled)
    worker.expect(Cancel)
    dispatcher = short_hang_harness.dispatcher
    polled_at = dispatcher.polled_at
    # Two checks for stuck workers, both after the hang limit.
    short_hang_harness.wait_until(lambda: dispatcher.polled_at > polled_at + 2.1)
    assert not worker.link.state.lost
    worker.deliver(wanted.id)
