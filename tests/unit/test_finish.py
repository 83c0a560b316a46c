"""The finisher without a job runner: which encoded pictures stay in memory until their Grant, and which are freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.deadline import Deadline
from ovserve.engines.protocol import Outcome, Preview
from ovserve.errors import ApiError, InternalError, SpoolFull
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.link import Link
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.memory.link import open_memory_link
from ovserve.wire.messages import Grant, Need, Picture, Run
from ovserve.wire.request import ImageRequest
from ovserve.worker.finish import Finisher
from ovserve.worker.jobs import WorkerJob
from ovserve.worker.prepare import prepare
from ovserve.worker.prepared import PreparedRequest
from ovserve.worker.reports import ReportSender
from tests.flatengine import FlatEngine
from tests.live import BUILTIN_PATH

MODEL = ModelSettings(name="shapes", path=Path(BUILTIN_PATH))
PROFILE = read_profile(MODEL)
PIXELS = np.zeros((PROFILE.native.height, PROFILE.native.width, 3), np.uint8)
END_MARK = Grant("the last item", 0, "")
FAILURE = InternalError("the engine failed")


class CountingRequest:
    """A prepared request that counts how many of its encoded pictures are still in memory."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self._prepared = prepared
        self._made: list[weakref.ref[memoryview]] = []

    @property
    def in_memory(self) -> int:
        return sum(picture() is not None for picture in self._made)

    def encode(self, *arguments: Any) -> memoryview:
        data = memoryview(self._prepared.encode(*arguments))
        self._made.append(weakref.ref(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prepared, name)


class QueueEmpty(Exception):
    """Raised to end the finish thread's loop when every queued item is finished."""


class Bench:
    """A finisher run in the test's thread, its job table, and the front end's side of the link."""

    def __init__(self, link: Link, reports: ReportSender) -> None:
        self.blobs = MemoryBlobs()
        self.jobs: dict[str, WorkerJob] = {}
        self.finisher = Finisher(self, reports, self.blobs)
        self._link = link

    def add(self, job_id: str, **fields: Any) -> CountingRequest:
        """Add a job with two pictures on the device."""
        request = ImageRequest(task="generation", prompt="", num_inference_steps=4, guidance_scale=1.0, n=2, **fields)
        prepared: Any = CountingRequest(
            prepare(request, PROFILE, MODEL, WorkerSettings.of(Settings()), FlatEngine(), blobs=self.blobs)
        )
        run = Run(job_id, "", 60.0)
        self.jobs[job_id] = WorkerJob(job_id, run, Deadline.after(60.0), prepared, is_preparing=False, added=2)
        return prepared

    def deliver(self, job_id: str, picture: int, error: ApiError | None = None) -> None:
        """Deliver an outcome as the device loop does."""
        work = self.jobs[job_id].prepared.work(job_id, picture)
        assert self.finisher.deliver(Outcome(work, None if error else PIXELS, error), 0.1)

    def run(self) -> None:
        """Finish every queued item."""
        self.finisher.grant(END_MARK)
        with pytest.raises(QueueEmpty):
            self.finisher.run()

    def sent(self, kind: type[Need | Picture]) -> list[tuple[str, int]]:
        """Return job and picture of the messages of one kind that were sent since the last call."""
        return [(message.job, message.picture) for message in self._link.receive() if isinstance(message, kind)]

    # --- jobs.Jobs ---

    def find(self, job_id: str) -> WorkerJob | None:
        if job_id == END_MARK.job:
            raise QueueEmpty
        return self.jobs.get(job_id)

    def fail(self, job: WorkerJob, error: ApiError) -> None:
        job.error = job.error or error
        job.stopped.set()

    def settle_if_complete(self, job: WorkerJob, *, returned: int = 0) -> None:
        job.returned += returned


@pytest.fixture
def bench() -> Iterator[Bench]:
    link, end = open_memory_link(MODEL.name, 0, 0)
    yield Bench(link, ReportSender(end))
    link.close()
    end.close()


def test_failed_job_frees_its_encoded_pictures_and_no_others(bench: Bench) -> None:
    failing, other = bench.add("failing"), bench.add("other")
    bench.deliver("failing", 0)
    bench.deliver("other", 0)
    bench.run()
    assert bench.sent(Need) == [("failing", 0), ("other", 0)]
    assert (failing.in_memory, other.in_memory) == (1, 1)
    bench.deliver("failing", 1, FAILURE)
    bench.run()
    assert (failing.in_memory, other.in_memory) == (0, 1)
    segment = bench.blobs.create(1 << 20)
    bench.finisher.grant(Grant("other", 0, segment.id))
    bench.run()
    assert bench.sent(Picture) == [("other", 0)]
    assert segment.data.startswith(b"\x89PNG")
    assert other.in_memory == 0


@pytest.mark.parametrize("late", ["grant", "preview"])
def test_late_item_of_an_ended_job_frees_its_encoded_pictures(bench: Bench, late: str) -> None:
    prepared = bench.add("cancelled")
    bench.deliver("cancelled", 0)
    bench.deliver("cancelled", 1)
    bench.run()
    assert prepared.in_memory == 2
    del bench.jobs["cancelled"]  # as the job runner does, in another thread
    if late == "grant":
        bench.finisher.grant(Grant("cancelled", 0, ""))
    else:
        bench.finisher.preview("cancelled", 1, Preview(1, PIXELS))
    bench.run()
    assert prepared.in_memory == 0


def needs(bench: Bench) -> list[Need]:
    return [message for message in bench._link.receive() if isinstance(message, Need)]


def test_announced_result_is_filled_whichever_of_grant_and_result_comes_first(bench: Bench) -> None:
    bench.add("a")
    bench.finisher.announce("a", 0)
    bench.finisher.announce("a", 1)
    bench.run()
    announced = needs(bench)
    assert [(need.picture, need.partial) for need in announced] == [(0, -1), (1, -1)]
    first, second = (bench.blobs.create(need.size) for need in announced)
    bench.finisher.grant(Grant("a", 0, first.id))  # before its result
    bench.run()
    assert bench.sent(Picture) == []
    bench.deliver("a", 0)
    bench.deliver("a", 1)
    bench.run()
    assert bench.sent(Picture) == [("a", 0)]
    assert first.data.startswith(b"\x89PNG")
    bench.finisher.grant(Grant("a", 1, second.id))
    bench.run()
    assert bench.sent(Picture) == [("a", 1)]
    assert second.data.startswith(b"\x89PNG")
    assert bench.jobs["a"].filled == 2


def test_announcement_is_sent_once_and_only_for_small_pngs(bench: Bench) -> None:
    bench.add("png")
    for _ in range(2):
        bench.finisher.announce("png", 0)
    bench.add("jpeg", output_format="jpeg")
    bench.finisher.announce("jpeg", 0)
    bench.add("large", width=1024, height=1024)
    bench.finisher.announce("large", 0)
    bench.run()
    assert [(need.job, need.partial) for need in needs(bench)] == [("png", -1)]
    bench.deliver("jpeg", 0)
    bench.run()
    assert bench.sent(Need) == [("jpeg", 0)]


def test_result_with_previews_is_not_announced_so_that_they_come_first(bench: Bench) -> None:
    bench.add("a", partial_images=2)
    bench.finisher.announce("a", 0)
    bench.finisher.preview("a", 0, Preview(3, PIXELS))  # its steps are done: the thread of previews was busy
    bench.deliver("a", 0)
    bench.run()
    assert [need.partial for need in needs(bench)] == [0, -1]
    preview, result = bench.blobs.create(1 << 20), bench.blobs.create(1 << 20)
    bench.finisher.grant(Grant("a", 0, preview.id))
    bench.finisher.grant(Grant("a", 0, result.id))
    bench.run()
    filled = [message for message in bench._link.receive() if isinstance(message, Picture)]
    assert [picture.partial for picture in filled] == [0, -1]
    assert preview.data.startswith(b"\x89PNG")
    assert result.data.startswith(b"\x89PNG")


def test_grants_answer_needs_in_their_order(bench: Bench) -> None:
    bench.add("a", partial_images=1)
    bench.finisher.preview("a", 0, Preview(1, PIXELS))
    bench.deliver("a", 0)
    bench.run()
    assert [need.partial for need in needs(bench)] == [0, -1]
    bench.finisher.grant(Grant("a", 0, ""))  # the preview is dropped, the result is not
    segment = bench.blobs.create(1 << 20)
    bench.finisher.grant(Grant("a", 0, segment.id))
    bench.run()
    assert bench.sent(Picture) == [("a", 0)]
    assert segment.data.startswith(b"\x89PNG")
    assert bench.jobs["a"].error is None


def test_announced_result_without_space_fails_its_job_at_once(bench: Bench) -> None:
    bench.add("a")
    bench.finisher.announce("a", 0)
    bench.run()
    bench.finisher.grant(Grant("a", 0, ""))
    bench.run()
    assert isinstance(bench.jobs["a"].error, SpoolFull)


def test_overlapping_denoise_time_counts_once() -> None:
    job = WorkerJob("a", Run("a", "", 60.0), Deadline.after(60.0))
    for begun_at, ended_at in ((10.0, 11.0), (10.5, 12.0), (9.5, 12.5), (20.0, 21.0)):
        job.add_denoise_interval(begun_at, ended_at)
    assert job.denoise_ms == pytest.approx(4000)  # 9.5 to 12.5, and 20 to 21
