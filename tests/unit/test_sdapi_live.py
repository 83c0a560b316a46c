"""The jobs of each client of AUTOMATIC1111's API: progress, previews, and who may end which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.api.sdapi.live import LiveJob, LiveJobs
from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import Client, Job, Partial, Result, State
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import Progress
from ovserve.wire.request import ImageRequest

ONE, TWO = Client("one"), Client("two")


@pytest.fixture
def made() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.close()


def add(live: LiveJobs, jobs: list[Job], client: Client, n: int = 1) -> LiveJob:
    request = ImageRequest(task="generation", prompt="x", progress=True, n=n, num_inference_steps=20)
    jobs.append(Job("id", "toy", client, request, Deadline.after(60)))
    added = LiveJob(jobs[-1], "txt2img")
    live.add(added)
    return added


def test_client_without_jobs_has_none(made: list[Job]) -> None:
    live = LiveJobs()
    add(live, made, ONE)
    assert live.snapshot(TWO) is None
    assert live.interrupt(TWO) == []


def test_snapshot_is_that_of_the_running_job_else_of_the_oldest(made: list[Job]) -> None:
    live = LiveJobs()
    first, second = add(live, made, ONE, n=2), add(live, made, ONE, n=3)
    found = live.snapshot(ONE)
    assert found
    assert (found.jobs, found.pictures, found.progress, found.elapsed_s, found.steps) == (2, 2, 0, 0, 20)
    second.job.move(State.RUNNING)
    found = live.snapshot(ONE)
    assert found
    assert found.pictures == 3
    live.remove(second)
    live.remove(first)
    assert live.snapshot(ONE) is None


def test_progress_is_the_mean_of_the_pictures(made: list[Job], tmp_path: Path) -> None:
    live, spool = LiveJobs(), Spool(tmp_path, 1 << 20)
    job = add(live, made, ONE, n=2)
    segment = spool.create(16, reserve=16)
    segment.view[:4] = b"done"
    live.note(job, [Progress("id", 0, 5, 10), Partial(0, 0, segment, 4)])
    found = live.snapshot(ONE)
    assert found
    assert (found.progress, found.step, found.steps, found.finished) == (0.25, 5, 10, 0)
    assert found.preview == b"done"
    live.note(job, [Result(segment, 4, 1, 0), Progress("id", 1, 10, 10)])
    segment.release()  # the preview is a copy
    found = live.snapshot(ONE)
    assert found
    assert (found.progress, found.finished, found.preview) == (1.0, 1, b"done")
    spool.close()


def test_interrupt_marks_only_the_client_s_jobs(made: list[Job]) -> None:
    live = LiveJobs()
    mine, other = add(live, made, ONE), add(live, made, TWO)
    assert live.interrupt(ONE) == [mine.job]
    assert (mine.is_interrupted, other.is_interrupted) == (True, False)
