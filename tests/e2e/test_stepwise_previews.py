"""Engine `stepwise`: previews of pictures in flight."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from ovserve.engines.protocol import Preview
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.models.profile import read_profile
from tests.pictures import (
    directory_of,
    drive,
    load_stepwise,
    pixels_of,
    settings_of,
    work_of,
)
from tests.stepwise import Traced, text


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def builtin() -> Iterator[StepwiseEngine]:
    engine = load_stepwise(directory_of("builtin"), "bf16")
    yield engine
    engine.close()


@pytest.mark.parametrize("mode", ["text2image", "image2image", "inpainting"])
def test_previews_are_in_order_and_approach_the_picture(builtin: StepwiseEngine, mode: str) -> None:
    profile = read_profile(settings_of(directory_of("builtin")))
    got: list[Preview] = []
    works = [
        work_of(
            profile,
            mode,
            k,
            num_inference_steps=12,
            previews=frozenset({3, 6, 9}),
            on_preview=got.append if k == 0 else None,
        )
        for k in range(3)
    ]
    picture = pixels_of(drive(builtin, works))[0]
    assert [preview.step for preview in got] == sorted(preview.step for preview in got)
    assert {preview.step for preview in got} <= {3, 6, 9}
    assert got
    for preview in got:
        assert preview.pixels.dtype == np.uint8
        assert preview.pixels.shape[2] == 3
    shrink = picture.shape[0] // got[-1].pixels.shape[0]
    small = picture.reshape(-1, shrink, picture.shape[1] // shrink, shrink, 3).mean(axis=(1, 3))
    distances = [np.abs(preview.pixels - small).mean() for preview in got]
    noise = np.abs(np.random.default_rng(0).integers(0, 256, small.shape) - small).mean()
    assert distances[-1] < noise / 3
    assert distances[-1] == min(distances)
    # In inpainting most of the picture is right from the start, and a later preview of the rest may be farther away.
    assert mode == "inpainting" or distances == sorted(distances, reverse=True)


def test_no_preview_is_reported_after_the_picture(traced: Traced) -> None:
    ended = threading.Event()
    late: list[int] = []

    def on_preview(preview: Preview) -> None:
        if ended.is_set():
            late.append(preview.step)

    for k in range(5):
        ended.clear()
        pixels_of(traced.drive([text(k, previews=frozenset(range(1, 6)), on_preview=on_preview)]))
        ended.set()
    assert late == []


def test_exception_in_on_preview_does_not_change_the_picture(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    def on_preview(_preview: Preview) -> None:
        raise ValueError("preview rejected")

    work = text(0, previews=frozenset({1, 2}), on_preview=on_preview)
    expected = pixels_of(traced.drive([text(0)]))[0]
    with caplog.at_level(logging.CRITICAL):
        np.testing.assert_array_equal(pixels_of(traced.drive([work]))[0], expected)
