"""Requests and results that do not fit in the spool."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.allocator import LARGE_BYTES
from ovserve.dispatch.jobs import Client, Job, State
from ovserve.errors import ContentTooLarge, InternalError, SpoolFull, SpoolUnusable
from ovserve.wire.blobs import Blob
from ovserve.wire.messages import Done, Failed, Grant, Need, Picture, Prepared, Run
from ovserve.wire.request import ImageRequest
from tests.dispatcherharness import PATIENCE_S, SPOOL_BYTES, DispatcherHarness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[DispatcherHarness]:
    with DispatcherHarness(tmp_path) as made:
        yield made


def test_result_that_does_not_fit_is_spool_full_and_the_worker_gets_an_empty_grant(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    filler = harness.spool.create(SPOOL_BYTES, reserve=SPOOL_BYTES - harness.spool.used_bytes - 3)
    worker.send(Need(job.id, 0, 7))
    assert worker.expect(Grant).storage == ""
    assert harness.wait_settled(job) is State.FAILED
    assert isinstance(job.error, SpoolFull)
    worker.send(Failed(job.id, SpoolFull("no room").to_wire()))
    filler.release()
    assert harness.admit().id == worker.serve()


def test_request_that_can_never_fit_with_its_uploads_is_content_too_large(harness: DispatcherHarness) -> None:
    harness.add_worker()
    uploads = (Blob("one", 0, 9 << 20), Blob("two", 0, 4 << 20))
    request = ImageRequest(task="edit", prompt="x", images=uploads, mask=Blob("mask", 0, 3 << 20))
    job = Job("large", "toy", Client("c"), request, Deadline.after(60))
    harness.jobs.append(job)
    with pytest.raises(ContentTooLarge):
        harness.dispatcher.admit(job)


def test_results_that_can_never_fit_together_are_content_too_large(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit(n=4)
    worker.expect(Run)
    worker.send(*(Need(job.id, picture, 5 << 20) for picture in range(4)))
    paths = [worker.expect(Grant).storage for _ in range(4)]
    assert [bool(path) for path in paths] == [True, True, True, False]
    assert harness.wait_settled(job) is State.FAILED
    assert isinstance(job.error, ContentTooLarge)


def test_segment_that_cannot_be_created_fails_only_its_job(harness: DispatcherHarness) -> None:
    worker = harness.add_worker(capacity=2)
    job, other = harness.admit(), harness.admit()
    worker.expect(Run)
    worker.expect(Run)
    worker.deliver(other.id)
    shutil.rmtree(harness.spool.directory)
    harness.spool.directory.write_bytes(b"in the way")
    worker.send(Need(job.id, 0, 7), Done(other.id, 0, 0, 0))
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert harness.wait_settled(job) is State.FAILED
    assert isinstance(job.error, SpoolUnusable)
    assert harness.wait_settled(other) is State.DONE
    assert not worker.link.state.lost
    harness.spool.directory.unlink()


def test_no_model_is_ready_while_the_spool_is_unusable(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    shutil.rmtree(harness.spool.directory)
    harness.spool.directory.write_bytes(b"in the way")
    with pytest.raises(SpoolUnusable):
        harness.admit()
    status = harness.dispatcher.status("toy")
    assert (status.ready, status.workers) == (False, 1)
    assert "cannot be used" in status.reason
    assert [status.ready for status in harness.dispatcher.statuses()] == [False]
    harness.spool.directory.unlink()
    assert harness.dispatcher.status("toy").ready
    assert harness.admit().id == worker.serve()


def test_result_above_the_largest_picture_fails_the_job_and_not_the_worker(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.send(Need(job.id, 0, 512 * 512 * 5 + (4 << 20)))
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert harness.wait_settled(job) is State.FAILED
    assert isinstance(job.error, InternalError)
    worker.send(Failed(job.id, SpoolFull("no room").to_wire()))
    assert harness.admit().id == worker.serve()


def test_allocation_of_a_large_result_does_not_block_other_workers(
    harness: DispatcherHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.dispatcher.add_model("other", 4)
    worker, other = harness.add_worker(), harness.add_worker(model="other")
    may_allocate, create = threading.Event(), harness.spool.create

    def slow_create(max_bytes: int, reserve: int = 0, *account: Any) -> Any:
        if reserve >= LARGE_BYTES:
            assert may_allocate.wait(PATIENCE_S)
        return create(max_bytes, reserve, *account)

    monkeypatch.setattr(harness.spool, "create", slow_create)
    job = harness.admit()
    worker.expect(Run)
    worker.send(Prepared(job.id, "image2image", 8, 8, 1, 1, 1, 1), Need(job.id, 0, LARGE_BYTES))
    assert harness.admit(model="other").id == other.serve()
    may_allocate.set()
    assert worker.expect(Grant).storage
    worker.send(Picture(job.id, 0, 1, LARGE_BYTES), Done(job.id, 0, 0, 0))
    assert harness.wait_settled(job) is State.DONE


def test_segment_allocated_after_its_worker_died_is_released(
    harness: DispatcherHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = harness.add_worker()
    may_allocate, created, create = threading.Event(), threading.Event(), harness.spool.create

    def slow_create(max_bytes: int, reserve: int = 0, *account: Any) -> Any:
        segment = create(max_bytes, reserve, *account)
        if reserve >= LARGE_BYTES:
            created.set()
            assert may_allocate.wait(PATIENCE_S)
        return segment

    monkeypatch.setattr(harness.spool, "create", slow_create)
    job = harness.admit()
    worker.expect(Run)
    worker.send(Need(job.id, 0, LARGE_BYTES))
    assert created.wait(PATIENCE_S)
    worker.die()
    harness.wait_until(lambda: bool(worker.link.state.lost))
    may_allocate.set()
    assert harness.add_worker().serve() == job.id
    assert harness.wait_settled(job) is State.DONE  # the harness checks at its end that no segment is left


def test_a_need_is_answered_though_its_job_ended_during_the_allocation(
    harness: DispatcherHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = harness.add_worker()
    may_allocate, created, create = threading.Event(), threading.Event(), harness.spool.create

    def slow_create(max_bytes: int, reserve: int = 0, *account: Any) -> Any:
        if reserve >= LARGE_BYTES:
            created.set()
            assert may_allocate.wait(PATIENCE_S)
        return create(max_bytes, reserve, *account)

    monkeypatch.setattr(harness.spool, "create", slow_create)
    job = harness.admit()
    worker.expect(Run)
    worker.send(Need(job.id, 0, LARGE_BYTES))
    assert created.wait(PATIENCE_S)
    worker.send(Failed(job.id, SpoolFull("no room").to_wire()))
    assert harness.wait_settled(job) is State.FAILED
    may_allocate.set()
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert harness.admit().id == worker.serve()


def test_small_picture_with_the_longest_prompts_is_granted(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit()
    worker.expect(Run)
    worker.send(Need(job.id, 0, 512 * 512 * 4 + 2 * 2 * 2 * 256 * 1024))
    assert worker.expect(Grant).storage


def test_preview_that_does_not_fit_is_skipped_and_its_picture_is_made(harness: DispatcherHarness) -> None:
    worker = harness.add_worker()
    job = harness.admit(partial_images=1)
    worker.expect(Run)
    filler = harness.spool.create(SPOOL_BYTES, reserve=SPOOL_BYTES - harness.spool.used_bytes - 3)
    worker.send(Need(job.id, 0, 7, 0))
    assert worker.expect(Grant) == Grant(job.id, 0, "")
    assert not job.is_settled
    filler.release()
    worker.deliver(job.id)
    worker.send(Done(job.id, 0, 0, 0))
    assert harness.wait_settled(job) is State.DONE
