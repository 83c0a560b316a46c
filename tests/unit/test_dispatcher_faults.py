"""Workers that violate the protocol, or do not read their commands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job, JobEvent, State
from ovserve.errors import LinkClosed
from ovserve.settings.options import Settings
from ovserve.wire.messages import (
    Cancel,
    Done,
    Failed,
    Grant,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Stop,
)
from tests.dispatcherharness import DispatcherHarness


@pytest.fixture
def harness() -> Iterator[DispatcherHarness]:
    with DispatcherHarness() as made:
        yield made


@pytest.mark.parametrize(
    "reports",
    [
        lambda job: [Done("unknown", 0, 0, 0)],
        lambda job: [Failed("unknown", {})],
        lambda job: [Progress("unknown", 0, 1, 2)],
        lambda job: [Picture("unknown", 0, 1, 1)],
        lambda job: [Need("unknown", 0, 1)],
        lambda job: [Done(job, 0, 0, 0)],
        lambda job: [Picture(job, 0, 1, 7)],
        lambda job: [Need(job, 0, 10), Picture(job, 0, 1, 11)],
        lambda job: [Need(job, 0, 10), Picture(job, 0, 1, 0)],
        lambda job: [Need(job, 0, 10), Need(job, 0, 10)],
        lambda job: [Need(job, 0, 10), Picture(job, 0, 1, 10, 0)],
        lambda job: [Need(job, 1, 10)],
        lambda job: [Need(job, -1, 10)],
        lambda job: [Need(job, 0, 10, 0)],
        lambda job: [Need(job, 0, 10, -2)],
        lambda job: [Need(job, 0, 0)],
        lambda job: [Need(job, 0, -5)],
        lambda job: [Need(job, 0, 1 << 45)],
        lambda job: [Run(job, "/etc/passwd", 1.0)],
        lambda job: [Cancel(job)],
        lambda job: [Grant(job, 0, "/etc/passwd")],
        lambda job: [Stop()],
        lambda job: [Ready(0, "x")],
        lambda job: [Ready(-1, "x")],
        lambda job: [Ready(1 << 30, "x")],
    ],
)
def test_worker_that_violates_the_protocol_is_detached_and_its_job_requeued(
    harness: DispatcherHarness, reports: Callable[[str], list[Message]]
) -> None:
    faulty = harness.add_worker()
    job = harness.admit()
    faulty.expect(Run)
    faulty.send(*reports(job.id))
    faulty.expect_closed()
    assert faulty.link.state.is_broken
    assert "protocol" in faulty.link.state.lost
    assert faulty.link.state.jobs_done == 0  # a crash loop is counted in deaths without a finished job
    assert harness.add_worker().serve() == job.id
    assert harness.wait_settled(job) is State.DONE


def test_worker_that_reports_done_twice_is_detached_and_the_first_counts(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.deliver(job.id)
    worker.send(Done(job.id, 0, 0, 0))
    worker.send(Done(job.id, 0, 0, 0))
    worker.expect_closed()
    assert job.state is State.DONE


@pytest.mark.parametrize("data", [b"\x80\x04K\x01.\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000])
def test_worker_that_sends_garbage_is_detached(harness: DispatcherHarness, data: bytes) -> None:
    worker = harness.add_worker(pipes=True)
    job = harness.admit()
    worker.expect(Run)
    os.write(worker.end.reports.fileno(), data)
    worker.expect_closed()
    assert harness.add_worker().serve() == job.id


def test_protocol_violation_does_not_affect_other_workers(harness: DispatcherHarness) -> None:
    faulty, other = harness.add_worker(), harness.add_worker()
    job = harness.admit()
    other.expect(Run)
    faulty.send(Stop())
    faulty.expect_closed()
    other.deliver(job.id)
    other.send(Done(job.id, 0, 0, 0))
    assert harness.wait_settled(job) is State.DONE


def test_hang_limit_is_that_of_the_settings_a_worker_was_started_with(harness: DispatcherHarness) -> None:
    short_hang = Settings(models=harness.settings.models, hang_limit_s=1.0)
    old = harness.add_worker()
    harness.dispatcher.add_model("toy", 4, short_hang)
    new = harness.add_worker()
    jobs = [harness.admit(), harness.admit()]
    old.expect(Run)
    new.expect(Run)
    for job in jobs:
        harness.dispatcher.cancel(job)
    harness.wait_until(lambda: bool(new.link.state.lost))
    polled_at = harness.dispatcher.polled_at
    harness.wait_until(lambda: harness.dispatcher.polled_at > polled_at + 1.1)  # one more check, after the new limit
    assert (old.link.state.lost, new.link.state.lost) == ("", "cancelled jobs not ended within the hang limit")


def test_worker_that_does_not_read_does_not_block_others(harness: DispatcherHarness) -> None:
    harness.dispatcher.add_model("toy", 1000)
    harness.dispatcher.add_model("other", 1)
    stopped, other = harness.add_worker(capacity=1000, reads=False, pipes=True), harness.add_worker(model="other")
    jobs = [harness.admit(client=str(number)) for number in range(900)]  # their Run commands fill its pipe
    harness.wait_until(lambda: harness.dispatcher.status("toy").running == 900)
    assert stopped.link.sent - stopped.link.consumed > 65536  # more than the pipe holds
    assert harness.admit(model="other").id == other.serve()
    stopped.reader.start()
    assert [stopped.expect(Run).job for _ in jobs] == [job.id for job in jobs]
    harness.wait_until(lambda: stopped.link.sent == stopped.link.consumed)


def test_worker_that_sends_reports_without_reading_commands_is_detached(harness: DispatcherHarness) -> None:
    not_reading = harness.add_worker(capacity=2, reads=False)
    running, waiting = harness.admit(n=8000), harness.admit(client="other")
    harness.wait_until(lambda: harness.dispatcher.status("toy").running == 2)
    harness.dispatcher.cancel(running)
    with contextlib.suppress(LinkClosed):
        not_reading.send(*(Need(running.id, picture, 1) for picture in range(8000)))
    harness.wait_until(lambda: bool(not_reading.link.state.lost))
    assert (not_reading.link.state.lost, not_reading.link.state.is_broken) == ("commands not read", True)
    assert harness.add_worker().serve() == waiting.id


class FailingJob(Job):
    """A job whose `post` raises on the first attempt."""

    def post(self, event: JobEvent) -> None:
        if self.attempts == 1:
            raise RuntimeError("a bug")
        Job.post(self, event)


def test_report_that_cannot_be_applied_detaches_the_worker_and_requeues_its_jobs(harness: DispatcherHarness) -> None:
    worker = harness.add_worker(capacity=2)
    normal = harness.make_job()
    failing = FailingJob("failing", "toy", Client("c"), normal.request, Deadline.after(60))
    harness.jobs.append(failing)
    harness.dispatcher.admit(failing)
    harness.dispatcher.admit(normal)
    worker.expect(Run)
    worker.expect(Run)
    with contextlib.suppress(LinkClosed):  # the first report may have closed the link
        worker.send(*(Prepared(job.id, "image2image", 8, 8, 1, 1, 1, 1) for job in (failing, normal)))
    worker.expect_closed()
    assert worker.link.state.is_broken
    second = harness.add_worker()
    assert {second.serve(), second.serve()} == {failing.id, normal.id}
    assert [harness.wait_settled(failing), harness.wait_settled(normal)] == [State.DONE, State.DONE]
