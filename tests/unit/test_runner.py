"""The job runner with a flat engine: reported capacity and dropped previews."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovserve.wire.link import MAX_CAPACITY
from ovserve.wire.messages import Done, Need, Picture
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
