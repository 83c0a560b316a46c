"""Admission of jobs, Retry-After, draining, failed and removed models."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, State
from ovserve.errors import Draining, ModelFailed, ModelNotFound, NotReady, QueueFull, SpoolFull
from ovserve.wire.blobs import Segment
from ovserve.wire.messages import Done, Run, Stop
from tests.dispatcherharness import PATIENCE_S, SPOOL_BYTES, DispatcherHarness


@pytest.fixture
def harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness() as made:
        yield made


def test_unknown_model_is_not_found(harness: DispatcherHarness) -> None:
    with pytest.raises(ModelNotFound):
        harness.admit(model="unknown")
    with pytest.raises(ModelNotFound):
        harness.dispatcher.status("unknown")


def test_model_without_a_ready_worker_is_loading(harness: DispatcherHarness) -> None:
    harness.add_worker(ready=False)
    with pytest.raises(NotReady, match="loading"):
        harness.admit()
    status = harness.dispatcher.status("toy")
    assert (status.ready, status.reason, status.workers) == (False, "loading", 0)


def test_model_whose_worker_restarts_accepts_and_keeps_jobs(harness: DispatcherHarness) -> None:
    harness.add_worker().die()
    harness.wait_until(lambda: harness.dispatcher.status("toy").reason == "restarting")
    job = harness.admit()
    assert harness.add_worker().serve() == job.id


def test_full_queue_rejects_with_retry_after_from_measured_job_times(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    slow = harness.admit()
    worker.expect(Run)
    time.sleep(0.3)  # becomes the measured time of a job
    worker.deliver(slow.id)
    worker.send(Done(slow.id, 0, 0, 0))
    harness.wait_settled(slow)
    assert 0.3 <= harness.dispatcher.status("toy").job_s < 0.6
    harness.dispatcher.add_model("toy", 8)
    for number in range(10):
        harness.admit(client=str(number))
        harness.wait_until(lambda number=number: harness.dispatcher.status("toy").running == min(2, number + 1))  # type: ignore[misc]
    assert harness.dispatcher.status("toy").queued == 8
    with pytest.raises(QueueFull) as caught:
        harness.admit()
    assert caught.value.retry_after_s in (2, 3, 4)  # eight jobs of 0.3 s one after another
    assert caught.value.should_retry
    assert harness.dispatcher.in_flight() == 10


@pytest.mark.parametrize(("limit", "wait_s"), [(1, 1), (100, 60)])
def test_retry_after_is_within_1_to_60_s(harness: DispatcherHarness, limit: int, wait_s: int) -> None:
    harness.dispatcher.add_model("toy", limit)
    harness.add_worker()
    for number in range(limit + 2):  # one runs, and a second client's gets the place beyond the capacity
        harness.admit(client=str(number))
        harness.wait_until(lambda number=number: harness.dispatcher.status("toy").running == min(2, number + 1))  # type: ignore[misc]
    with pytest.raises(QueueFull) as caught:
        harness.admit()
    assert caught.value.retry_after_s == wait_s


def test_rejected_job_leaves_nothing_in_the_spool(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("toy", 1)
    worker = harness.add_worker()
    harness.admit()
    worker.expect(Run)
    harness.admit()
    used = harness.spool.used_bytes
    refused = harness.make_job()
    with pytest.raises(QueueFull):
        harness.dispatcher.admit(refused)
    refused.close()
    assert harness.spool.used_bytes == used
    assert harness.dispatcher.in_flight() == 2


def test_one_client_cannot_fill_the_queue(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("toy", 27)
    harness.add_worker().die()
    harness.wait_until(lambda: harness.dispatcher.status("toy").workers == 0)
    for _ in range(22):
        harness.admit(client="greedy")
    with pytest.raises(QueueFull):
        harness.admit(client="greedy")
    harness.admit(client="modest")


def test_request_that_does_not_fit_in_the_spool_is_spool_full(harness: DispatcherHarness) -> None:
    harness.add_worker()
    filler = harness.spool.create(SPOOL_BYTES, reserve=SPOOL_BYTES)
    with pytest.raises(SpoolFull):
        harness.admit()
    filler.release()
    assert harness.dispatcher.in_flight() == 0


def test_draining_rejects_new_jobs_and_finishes_admitted_ones(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    running, waiting = harness.admit(), harness.admit()
    harness.dispatcher.drain()
    with pytest.raises(Draining) as caught:
        harness.admit()
    assert caught.value.retry_after_s
    assert harness.dispatcher.status("toy").reason == "draining"
    assert not harness.dispatcher.wait_idle(Deadline.after(0))
    assert [worker.serve(), worker.serve()] == [running.id, waiting.id]
    assert harness.dispatcher.wait_idle(Deadline.after(PATIENCE_S))


def test_failed_model_fails_queued_jobs_and_rejects_new_ones_with_the_reason(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    running, waiting = harness.admit(), harness.admit()
    worker.expect(Run)
    harness.dispatcher.fail_model("toy", "no such device")
    assert harness.wait_settled(waiting) is State.FAILED
    assert isinstance(waiting.error, ModelFailed)
    with pytest.raises(ModelFailed, match="no such device"):
        harness.admit()
    assert harness.dispatcher.status("toy").failed
    assert not running.is_settled
    worker.die()
    assert harness.wait_settled(running) is State.FAILED
    assert isinstance(running.error, ModelFailed)
    harness.dispatcher.clear_failure("toy")
    harness.wait_until(lambda: harness.dispatcher.status("toy").workers == 0)
    job = harness.admit()
    assert harness.add_worker().serve() == job.id


def test_model_that_failed_admits_jobs_as_soon_as_a_worker_is_ready(harness: DispatcherHarness) -> None:
    harness.add_worker().die()
    harness.dispatcher.fail_model("toy", "no such device")
    worker = harness.add_worker()
    assert harness.dispatcher.status("toy").workers
    harness.wait_until(lambda: not harness.dispatcher.status("toy").failed)
    job = harness.admit()
    assert worker.serve() == job.id


def test_removed_model_finishes_its_queue_and_is_deleted(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    jobs = [harness.admit(), harness.admit()]
    harness.dispatcher.remove_model("toy")
    with pytest.raises(NotReady, match="unloaded"):
        harness.admit()
    assert [worker.serve(), worker.serve()] == [job.id for job in jobs]
    harness.dispatcher.retire(worker.link)
    worker.expect(Stop)
    worker.die()
    harness.wait_until(lambda: harness.dispatcher.models() == [])


class RemovingJob(Job):
    """A job whose model is removed while it is requeued."""

    dispatcher: Dispatcher

    def drop_results(self, segments: Collection[Segment]) -> None:
        self.dispatcher.remove_model(self.model)
        Job.drop_results(self, segments)


def test_model_removed_while_a_job_is_requeued_keeps_the_job(harness: DispatcherHarness) -> None:
    dying = harness.add_worker()
    job = RemovingJob("removing", "toy", Client("c"), harness.make_job().request, Deadline.after(60))
    job.dispatcher = harness.dispatcher
    harness.jobs.append(job)
    harness.dispatcher.admit(job)
    dying.expect(Run)
    dying.die()
    harness.wait_until(lambda: bool(dying.link.state.lost))
    assert harness.dispatcher.models() == ["toy"]
    worker = harness.add_worker()
    assert worker.serve() == job.id
    assert harness.wait_settled(job) is State.DONE
    worker.die()
    harness.wait_until(lambda: harness.dispatcher.models() == [])


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_removed_model_without_workers_is_deleted_with_its_last_job(
    harness: DispatcherHarness, is_cancelled: bool
) -> None:
    harness.add_worker().die()
    harness.wait_until(lambda: harness.dispatcher.status("toy").workers == 0)
    job = harness.admit(timeout_s=60.0 if is_cancelled else 0.2)
    harness.dispatcher.remove_model("toy")
    assert harness.dispatcher.models() == ["toy"]
    if is_cancelled:
        harness.dispatcher.cancel(job)
    harness.wait_until(lambda: harness.dispatcher.models() == [])
    assert job.state is (State.CANCELLED if is_cancelled else State.EXPIRED)


def test_model_without_a_place_refuses_its_jobs_until_there_is_one(harness: DispatcherHarness) -> None:
    harness.add_worker().die()
    harness.wait_until(lambda: harness.dispatcher.status("toy").reason == "restarting")
    queued = harness.admit()
    harness.dispatcher.set_unplaced({"toy": "no node has room for it"})
    assert harness.wait_settled(queued) is State.FAILED
    assert isinstance(queued.error, NotReady)
    with pytest.raises(NotReady, match="no node has room") as refused:
        harness.admit()
    assert refused.value.retry_after_s
    status = harness.dispatcher.status("toy")
    assert (status.ready, status.reason, status.waits_for) == (False, *["no node has room for it"] * 2)
    harness.dispatcher.set_unplaced({})
    job = harness.admit()
    assert harness.add_worker().serve() == job.id
