"""The job runner with a flat engine: reported capacity and dropped previews."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovserve.settings.options import Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.link import MAX_CAPACITY
from ovserve.wire.messages import Done, Failed, Need, Picture, Prepared
from ovserve.worker.runner import prepare_limits
from tests import flatengine
from tests.workerbench import WorkerBench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerBench]:
    with WorkerBench(tmp_path_factory.mktemp("spool"), main=flatengine.main) as worker:
        worker.ready()
        yield worker


def partials_of(bench: WorkerBench, job: str, kind: type[Need | Picture]) -> list[int]:
    return [message.partial for message in bench.of(job, kind)]


def test_reported_capacity_is_limited_to_the_maximum(bench: WorkerBench) -> None:
    assert bench.ready().capacity == MAX_CAPACITY


def test_preview_without_a_segment_is_dropped_and_its_picture_is_made(bench: WorkerBench) -> None:
    bench.grants_previews = False
    try:
        job = bench.start(task="generation", prompt="grey", partial_images=2, num_inference_steps=4)
        end = bench.end(job)
    finally:
        bench.grants_previews = True
    assert isinstance(end, Done), end
    assert partials_of(bench, job, Need) == [0, 1, -1]
    assert partials_of(bench, job, Picture) == [-1]


def test_preview_that_cannot_be_encoded_is_dropped_and_its_picture_is_made(bench: WorkerBench) -> None:
    job = bench.start(task="generation", prompt=flatengine.BROKEN, partial_images=2, num_inference_steps=4)
    end = bench.end(job)
    assert isinstance(end, Done), end
    assert partials_of(bench, job, Picture) == [0, -1]


def test_edits_are_prepared_only_while_the_pixels_of_others_are_below_the_limit(tmp_path: Path) -> None:
    settings = Settings(max_prepared_bytes=1 << 20)
    large = np.full((1024, 1024, 4), 200, np.uint8)
    with WorkerBench(tmp_path, settings=settings, main=flatengine.main) as worker:
        worker.ready()
        worker.answers_needs = False  # so that no job ends
        values = {"images": (worker.image(large),), "background": "transparent"}
        first, second, third, cancelled = (worker.start(**values) for _ in range(4))
        worker.until(lambda: bool(worker.of(first, Need)))  # a job above the limit is prepared if it is alone
        worker.cancel(cancelled)
        assert isinstance(worker.end(cancelled), Failed)
        expired = worker.start(timeout_s=0.01, **values)
        assert isinstance(worker.end(expired), Failed)
        for job, waiting in ((first, second), (second, third)):
            assert not worker.of(waiting, Prepared)
            worker.answer(worker.of(job, Need)[0])
            assert isinstance(worker.end(job), Done)
            worker.until(lambda waiting=waiting: bool(worker.of(waiting, Need)))
        worker.cancel(third)  # on its way to the client: its bytes are free again
        worker.answer(worker.of(third, Need)[0])
        worker.end(third)
        last = worker.start(**values)
        worker.until(lambda: bool(worker.of(last, Prepared)))


@pytest.mark.parametrize("cpu_s", [0.1, 10, 3600])
@pytest.mark.parametrize("hang_s", [1, 20, 33, 60, 86400])
def test_decoding_may_use_its_cpu_time_however_low_the_hang_limit_is(hang_s: float, cpu_s: float) -> None:
    settings = Settings(hang_limit_s=hang_s, decode_cpu_limit_s=cpu_s)
    job_s, file_s = prepare_limits(WorkerSettings.of(settings))
    assert file_s >= cpu_s
    assert job_s >= hang_s
    assert job_s >= 3 * file_s  # image, mask, and an attempt to start the process


def test_work_that_has_ended_is_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    with WorkerBench(tmp_path, main=flatengine.counting_main) as worker:
        worker.ready()
        image, mask = worker.image(np.full((64, 64, 3), 90, np.uint8)), worker.image(np.full((64, 64), 255, np.uint8))
        for _ in range(6):
            (picture,) = worker.make(images=(image,), mask=mask, num_inference_steps=4, partial_images=2)
            alive = int(np.asarray(Image.open(io.BytesIO(picture)).convert("L")).max())
            assert alive <= 1  # the one before may still be a local variable of a thread
