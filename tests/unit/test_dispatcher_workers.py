"""Attached and retired workers, model status, shutdown, concurrency."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job, State
from ovserve.errors import BlobGone, Draining, NotReady
from ovserve.wire.messages import (
    Counts,
    Done,
    Failed,
    Grant,
    Heartbeat,
    LogLevel,
    Need,
    Picture,
    Prepared,
    Ready,
    Run,
    Stop,
)
from ovserve.wire.request import ImageRequest
from tests.dispatcherharness import PATIENCE_S, DispatcherHarness, FakeWorker


@pytest.fixture
def harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness() as made:
        yield made


def test_retired_worker_finishes_its_jobs_and_gets_no_others(harness: DispatcherHarness) -> None:
    old = harness.add_worker()
    job = harness.admit()
    old.expect(Run)
    new = harness.add_worker()
    harness.dispatcher.retire(old.link)
    harness.dispatcher.retire(old.link)
    old.expect(Stop)
    waiting = harness.admit()
    assert new.expect(Run).job == waiting.id
    old.deliver(job.id)
    old.send(Done(job.id, 0, 0, 0))
    assert harness.wait_settled(job) is State.DONE
    old.expect_nothing()


def test_worker_retired_before_it_was_ready_does_not_make_the_model_ready(harness: DispatcherHarness) -> None:
    late = harness.add_worker(ready=False)
    harness.dispatcher.retire(late.link)
    late.expect(Stop)
    late.send(Ready(1, "fake"), Heartbeat("denoise"))
    harness.wait_until(lambda: late.link.state.phase == "denoise")
    with pytest.raises(NotReady, match="loading"):
        harness.admit()


def test_worker_of_a_removed_model_is_detached(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("other", 1)
    harness.dispatcher.remove_model("other")
    late = harness.add_worker(model="other", ready=False)
    late.expect_closed()
    assert "removed" in late.link.state.lost
    harness.dispatcher.retire(late.link)
    harness.dispatcher.detach(late.link, "gone")
    worker = harness.add_worker()
    job = harness.admit()
    assert worker.serve() == job.id


def test_status_counts_workers_capacity_and_jobs(harness: DispatcherHarness) -> None:
    harness.add_worker(capacity=2)
    third = [harness.admit() for _ in range(3)][2]
    harness.wait_until(lambda: harness.dispatcher.status("toy").running == 2)
    status = harness.dispatcher.status("toy")
    assert (status.ready, status.reason, status.failed) == (True, "", False)
    assert (status.workers, status.capacity, status.queued, status.running) == (1, 2, 1, 2)
    assert status.engine == "fake"
    assert harness.dispatcher.cancel(third)


def test_close_fails_the_remaining_jobs(tmp_path: Path) -> None:
    harness = DispatcherHarness()
    worker = harness.add_worker()
    running, waiting = harness.admit(), harness.admit()
    worker.expect(Run)
    harness.dispatcher.close()
    harness.dispatcher.close()
    assert isinstance(running.error, Draining)
    assert isinstance(waiting.error, Draining)
    worker.expect_closed()
    assert not harness.dispatcher.cancel(running)
    harness.close()


def test_close_fails_the_remaining_jobs_even_if_queued_calls_fail(tmp_path: Path) -> None:
    harness = DispatcherHarness()
    harness.add_worker().expect_nothing()
    job = harness.admit()
    unusable = [FakeWorker("toy", index, harness.worker_blobs, pipes=True) for index in (1, 2)]
    harness.workers += unusable
    for worker in unusable:
        worker.link.close()
        harness.dispatcher.attach(worker.link)
    harness.dispatcher.close()
    assert isinstance(job.error, Draining)
    harness.close()


def test_loop_runs_without_events(harness: DispatcherHarness) -> None:
    before = harness.dispatcher.polled_at
    deadline = Deadline.after(PATIENCE_S)
    while harness.dispatcher.polled_at == before:
        assert not deadline.is_expired()
        threading.Event().wait(0.1)


def test_heartbeats_are_recorded_on_the_link(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    worker.send(Heartbeat("denoise", 3.0))
    harness.wait_until(lambda: worker.link.state.phase == "denoise")
    assert worker.link.state.allow_s == 3.0


def test_many_threads_admit_and_cancel_without_losing_a_job(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("toy", 10_000)
    worker = harness.add_worker(capacity=8)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set() or not worker.commands.empty():
            try:
                message = worker.commands.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(message, Run):
                worker.send(Prepared(message.job, "image2image", 8, 8, 1, 1, 1, 1), Need(message.job, 0, 3))
            elif isinstance(message, Grant) and message.storage:
                try:
                    worker.blobs.fill(message.storage, b"abc")
                except BlobGone:
                    worker.send(Failed(message.job, {}))
                else:
                    worker.send(Picture(message.job, 0, 1, 3), Done(message.job, 0, 0, 0))
            elif isinstance(message, Grant):
                worker.send(Failed(message.job, {}))

    server = threading.Thread(target=serve)
    server.start()
    outcomes: list[State] = []

    def client(number: int) -> None:
        for k in range(50):
            job = Job(
                f"{number}-{k}", "toy", Client(str(number)), ImageRequest(task="edit", prompt="x"), Deadline.after(30)
            )
            harness.dispatcher.admit(job)
            if k % 3 == 0:
                harness.dispatcher.cancel(job)
            outcomes.append(harness.wait_settled(job))
            job.close()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    assert len(outcomes) == 300
    assert set(outcomes) == {State.DONE, State.CANCELLED}
    assert outcomes.count(State.DONE) >= 6 * 33
    harness.wait_until(lambda: harness.dispatcher.status("toy").running == 0)
    assert harness.dispatcher.in_flight() == 0
    stop.set()
    server.join(PATIENCE_S)


def test_counts_of_all_workers_are_added_up_over_their_lives(harness: DispatcherHarness) -> None:
    def counted(name: str) -> int:
        return harness.dispatcher.counts()["toy"].get(name, 0)

    first, second = harness.add_worker(), harness.add_worker()
    first.send(Counts(calls=2, rows=5), Counts(calls=3, rows=9, prompt_hits=1))
    second.send(Counts(calls=10, rows=10))
    harness.wait_until(lambda: counted("calls") == 13)
    assert (counted("rows"), counted("prompt_hits"), counted("image_hits")) == (19, 1, 0)
    first.die()
    third = harness.add_worker()
    third.send(Counts(calls=1, rows=1))
    harness.wait_until(lambda: counted("calls") == 14)


def test_worker_whose_count_decreases_is_detached(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    worker.send(Counts(calls=2), Counts(calls=1, rows=3))
    worker.expect_closed()
    assert "a count has decreased" in worker.link.state.lost
    assert harness.dispatcher.counts()["toy"]["calls"] == 2


def test_job_whose_worker_dies_counts_as_retried(harness: DispatcherHarness) -> None:
    first = harness.add_worker()
    job = harness.admit()
    first.expect(Run)
    first.die()
    second = harness.add_worker()
    assert second.serve() == job.id
    assert harness.wait_settled(job) is State.DONE
    assert harness.dispatcher.counts()["toy"]["retried"] == 1


def test_level_of_the_log_reaches_all_workers_once_and_later_ones(harness: DispatcherHarness) -> None:
    first = harness.add_worker()
    harness.dispatcher.set_log_level("info")  # it has that level already
    harness.dispatcher.set_log_level("debug")
    assert first.expect(LogLevel).level == "debug"
    second = harness.add_worker()
    assert second.expect(LogLevel).level == "debug"
    harness.dispatcher.set_log_level("info")
    assert (first.expect(LogLevel).level, second.expect(LogLevel).level) == ("info", "info")
    harness.add_worker().expect_nothing()


def test_jobs_in_flight_are_listed_those_that_run_first(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    waiting_for, jobs = harness.admit(n=2), []
    worker.expect(Run)
    # One more than the capacity runs, for a client that has none there.
    jobs = [harness.admit(client="c"), harness.admit(client="c")]
    jobs[1].key_name = "design"
    worker.deliver(waiting_for.id, 0)
    harness.wait_until(lambda: harness.dispatcher.job_statuses()[0][0].pictures_done == 1)
    found, left_out = harness.dispatcher.job_statuses()
    assert left_out == 0
    assert [(each.id, each.state, each.worker) for each in found] == [
        (waiting_for.id, "running", worker.link.name),
        (jobs[0].id, "queued", ""),
        (jobs[1].id, "queued", ""),
    ]
    assert (found[0].pictures, found[0].is_prepared, found[0].attempts) == (2, True, 1)
    assert (found[2].key_name, found[2].client, found[2].dispatched_at) == ("design", "c", 0)
    assert found[0].admitted_at <= found[0].dispatched_at < found[0].deadline_at
