"""Finishing without a desk: which encoded pictures are kept in memory until their Grant comes, and which are let go of."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.deadline import Deadline
from ovserve.engines.protocol import Outcome, Preview
from ovserve.errors import ApiError, InternalError
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.pipes import Link, open_link
from ovserve.wire.messages import Grant, Need, Picture, Run
from ovserve.wire.request import ImageRequest
from ovserve.worker.finish import Finisher, WorkerJob
from ovserve.worker.prepare import PreparedRequest, prepare
from ovserve.worker.reports import ReportSender
from tests.flatengine import FlatEngine

MODEL = ModelSettings(name="shapes")
PROFILE = read_profile(MODEL)
PIXELS = np.zeros((PROFILE.native.height, PROFILE.native.width, 3), np.uint8)
LAST = Grant("the last item", 0, "")
FAILURE = InternalError("the engine failed")


class Followed:
    """An edit that tells how many of its encoded pictures are still in memory."""

    def __init__(self, edit: PreparedRequest) -> None:
        self._edit = edit
        self._made: list[weakref.ref[memoryview]] = []

    @property
    def in_memory(self) -> int:
        return sum(picture() is not None for picture in self._made)

    def encode(self, *arguments: Any) -> memoryview:
        data = memoryview(self._edit.encode(*arguments))
        self._made.append(weakref.ref(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._edit, name)


class NothingLeft(Exception):
    """Everything that was given to the finish thread is dealt with."""


class Bench:
    """What a finish thread works with, run here: the jobs that have not ended, and the front end's side of the link."""

    def __init__(self, link: Link, replies: ReportSender) -> None:
        self.held: dict[str, WorkerJob] = {}
        self.finish = Finisher(self, replies)
        self._link = link

    def add(self, job: str) -> Followed:
        """A job with two pictures on the device."""
        request = ImageRequest(task="generation", prompt="", num_inference_steps=4, guidance_scale=1.0, n=2)
        edit: Any = Followed(prepare(request, PROFILE, MODEL, Settings(), FlatEngine()))
        self.held[job] = WorkerJob(job, Run(job, "", 60.0), Deadline.after(60.0), edit, is_preparing=False, given=2)
        return edit

    def deliver(self, job: str, picture: int, error: ApiError | None = None) -> None:
        """An outcome of the device loop."""
        work = self.held[job].edit.work(job, picture)
        assert self.finish.deliver(Outcome(work, None if error else PIXELS, error), 0.1)

    def run(self) -> None:
        """Finish everything that was given."""
        self.finish.room(LAST)
        with pytest.raises(NothingLeft):
            self.finish.run()

    def said(self, kind: type[Need | Picture]) -> list[tuple[str, int]]:
        return [(said.job, said.picture) for said in self._link.receive() if isinstance(said, kind)]

    # --- finish.Jobs ---

    def find(self, job: str) -> WorkerJob | None:
        if job == LAST.job:
            raise NothingLeft
        return self.held.get(job)

    def fail(self, held: WorkerJob, error: ApiError) -> None:
        held.error = held.error or error
        held.stopped.set()

    def settle(self, held: WorkerJob, *, returned: int = 0) -> None:
        held.returned += returned


@pytest.fixture
def bench() -> Iterator[Bench]:
    link, end = open_link(multiprocessing.get_context("spawn"), MODEL.name, 0, 0)
    yield Bench(link, ReportSender(end))
    link.close()
    end.close()


def test_a_failed_jobs_pictures_are_let_go_of_and_its_neighbours_are_kept(bench: Bench, tmp_path: Path) -> None:
    failing, other = bench.add("failing"), bench.add("other")
    bench.deliver("failing", 0)
    bench.deliver("other", 0)
    bench.run()
    assert bench.said(Need) == [("failing", 0), ("other", 0)]
    assert (failing.in_memory, other.in_memory) == (1, 1)
    bench.deliver("failing", 1, FAILURE)
    bench.run()
    assert (failing.in_memory, other.in_memory) == (0, 1)
    segment = tmp_path / "segment"
    segment.touch()
    bench.finish.room(Grant("other", 0, str(segment)))
    bench.run()
    assert bench.said(Picture) == [("other", 0)]
    assert segment.stat().st_size
    assert other.in_memory == 0


@pytest.mark.parametrize("late", ["room", "preview"])
def test_pictures_of_a_job_that_ended_while_they_waited_are_let_go_of_with_what_comes_late(
    bench: Bench, late: str
) -> None:
    edit = bench.add("cancelled")
    bench.deliver("cancelled", 0)
    bench.deliver("cancelled", 1)
    bench.run()
    assert edit.in_memory == 2
    del bench.held["cancelled"]  # as the desk does, in another thread
    if late == "room":
        bench.finish.room(Grant("cancelled", 0, ""))
    else:
        bench.finish.preview(edit.work("cancelled", 1), Preview(1, PIXELS))
    bench.run()
    assert edit.in_memory == 0


def test_pictures_denoised_at_the_same_time_count_once() -> None:
    held = WorkerJob("a", Run("a", "", 60.0), Deadline.after(60.0))
    for begun_at, ended_at in ((10.0, 11.0), (10.5, 12.0), (9.5, 12.5), (20.0, 21.0)):
        held.note_denoised(begun_at, ended_at)
    assert held.denoise_ms == pytest.approx(4000)  # 9.5 to 12.5, and 20 to 21
