"""Dispatch of jobs to workers and the way of their results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovserve.dispatch.jobs import Partial, Result, State
from ovserve.errors import DeadlineExceeded, ImageError
from ovserve.wire.messages import Done, Failed, Heartbeat, Prepared, Progress, Run
from ovserve.wire.request import ImageRequest
from tests.dispatcherharness import DispatcherHarness, events


@pytest.fixture
def harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness() as made:
        yield made


def test_job_runs_and_returns_its_pictures(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit(n=2, timeout_s=30.0)
    run = worker.expect(Run)
    assert run.job == job.id
    assert 25 < run.timeout_s <= 30
    assert not run.alone
    assert ImageRequest.from_json(harness.worker_blobs.read(run.request)) == job.request
    for picture in range(2):
        worker.deliver(job.id, picture, f"picture {picture}".encode())
    worker.send(Done(job.id, 1.5, 2.5, 3.5))
    assert harness.wait_settled(job) is State.DONE
    shown = {k: (bytes(r.segment.view[: r.size]), r.seed) for k, r in job.results.items()}
    assert shown == {0: (b"picture 0", 40), 1: (b"picture 1", 41)}
    assert (job.timings.prepare_ms, job.timings.denoise_ms, job.timings.finish_ms) == (1.5, 2.5, 3.5)
    assert job.timings.admitted_at <= job.timings.dispatched_at <= job.timings.settled_at
    assert harness.dispatcher.in_flight() == 0
    assert worker.link.state.jobs_done == 1


def test_handler_receives_progress_previews_and_results(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit(partial_images=1)
    worker.expect(Run)
    prepared = Prepared(job.id, "image2image", 8, 8, 4, 1, 1, 1)
    worker.send(prepared)
    assert events(job) == [prepared]
    worker.send(Progress(job.id, 0, 1, 4))
    assert events(job) == [Progress(job.id, 0, 1, 4)]
    worker.deliver(job.id, data=b"preview", partial=0)
    [partial] = events(job)
    assert isinstance(partial, Partial)
    assert bytes(partial.segment.view[: partial.size]) == b"preview"
    worker.deliver(job.id, data=b"whole")
    [result] = events(job)
    assert isinstance(result, Result)
    assert result.picture == 0
    worker.send(Done(job.id, 0, 0, 0))
    assert harness.wait_settled(job) is State.DONE


def test_error_of_a_worker_becomes_the_error_of_the_job(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.send(Failed(job.id, ImageError("not an image", param="image").to_wire()))
    assert harness.wait_settled(job) is State.FAILED
    assert isinstance(job.error, ImageError)
    assert job.error.param == "image"


def test_deadline_reported_by_the_worker_expires_the_job(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.send(Failed(job.id, DeadlineExceeded("late").to_wire()))
    assert harness.wait_settled(job) is State.EXPIRED


def test_worker_gets_jobs_up_to_its_capacity(harness: DispatcherHarness) -> None:
    worker = harness.add_worker(capacity=2)
    jobs = [harness.admit() for _ in range(3)]
    assert [worker.expect(Run).job for _ in range(2)] == [jobs[0].id, jobs[1].id]
    worker.expect_nothing()
    assert harness.dispatcher.status("toy").queued == 1
    worker.deliver(jobs[1].id)
    worker.send(Done(jobs[1].id, 0, 0, 0))
    assert worker.expect(Run).job == jobs[2].id


def test_jobs_go_to_the_least_loaded_worker(harness: DispatcherHarness) -> None:
    first, second = harness.add_worker(capacity=3), harness.add_worker(capacity=3)
    for _ in range(4):
        harness.admit()
    for worker in (first, second):
        worker.expect(Run)
        worker.expect(Run)
        worker.expect_nothing()


def test_equally_loaded_workers_are_ordered_by_newest_heartbeat(harness: DispatcherHarness) -> None:
    first, second = harness.add_worker(), harness.add_worker()
    beat_at = first.link.state.beat_at
    first.send(Heartbeat("idle"))
    harness.wait_until(lambda: first.link.state.beat_at > beat_at)
    harness.admit()
    first.expect(Run)
    second.expect_nothing()


def test_clients_take_turns(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("toy", 100)
    worker = harness.add_worker()
    running = harness.admit(client="greedy")
    worker.expect(Run)
    greedy = [harness.admit(client="greedy") for _ in range(4)]
    modest = [harness.admit(client="modest") for _ in range(2)]
    assert worker.expect(Run).job == modest[0].id  # in the place that one client alone cannot take
    for job in (running, modest[0]):
        worker.deliver(job.id)
        worker.send(Done(job.id, 0, 0, 0))
    assert {worker.serve() for _ in range(2)} == {greedy[0].id, modest[1].id}
    assert [worker.serve() for _ in range(3)] == [job.id for job in greedy[1:]]


def test_client_with_as_many_pictures_as_a_worker_has_capacity_gets_no_more_jobs_there(
    harness: DispatcherHarness,
) -> None:
    harness.dispatcher.add_model("toy", 100)
    worker = harness.add_worker(capacity=3)
    greedy = [harness.admit(client="greedy", n=n) for n in (1, 4, 4)]
    assert [worker.expect(Run).job for _ in range(2)] == [greedy[0].id, greedy[1].id]
    worker.expect_nothing()  # it has five pictures there, and the capacity is three
    modest = harness.admit(client="modest")
    assert worker.expect(Run).job == modest.id
    worker.deliver(modest.id)
    worker.send(Done(modest.id, 0, 0, 0))
    worker.deliver(greedy[0].id)
    worker.send(Done(greedy[0].id, 0, 0, 0))
    for picture in range(2):
        worker.expect_nothing()
        worker.deliver(greedy[1].id, picture)
    harness.dispatcher.admit(harness.make_job(client="another"))  # makes the dispatcher assign jobs, as any report does
    assert {worker.expect(Run).job for _ in range(2)} == {greedy[2].id, harness.jobs[-1].id}


def test_only_client_keeps_every_worker_busy_with_jobs_of_many_pictures(harness: DispatcherHarness) -> None:
    workers = [harness.add_worker(capacity=3) for _ in range(2)]
    for _ in range(3):
        harness.admit(n=10)
    for worker in workers:
        worker.expect(Run)
        worker.expect_nothing()


def test_jobs_of_one_model_do_not_wait_for_another_model(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("other", 4)
    busy, free = harness.add_worker(), harness.add_worker(model="other")
    harness.admit()
    busy.expect(Run)
    harness.admit()
    assert harness.admit(model="other").id == free.expect(Run).job
