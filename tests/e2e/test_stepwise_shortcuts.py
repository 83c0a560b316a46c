"""Shortcuts of guidance: the rows they save, and how near their pictures are to the exact ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.errors import InternalError, ModelError
from ovserve.models.profile import read_profile
from tests.pictures import directory_of, drive, load_stepwise, pixels_of, settings_of, with_scheduler, work_of
from tests.tinymodels import tiny_model

BUILTIN = directory_of("builtin")
PROFILE = read_profile(settings_of(BUILTIN))
PROMPTS = (
    "a red circle on a white background",
    "a blue star on a yellow background",
    "a green heart on a black background",
)


@pytest.fixture(scope="module")
def calls() -> list[Finished[Call]]:
    return []


@pytest.fixture(scope="module")
def engine(calls: list[Finished[Call]]) -> Iterator[StepwiseEngine]:
    made = load_stepwise(BUILTIN, "bf16", calls.append)
    yield made
    made.close()


def works(shortcuts: str = "") -> list[Work]:
    return [
        work_of(
            PROFILE,
            "text2image",
            place,
            prompt=prompt,
            negative_prompt="",
            num_inference_steps=12,
            shortcuts=shortcuts,
        )
        for place, prompt in enumerate(PROMPTS)
    ]


def rows_of(calls: list[Finished[Call]]) -> int:
    return sum(len(call.subject.rows) for call in calls if call.subject.kind == "denoise")


def decibels(first: Pixels, second: Pixels) -> float:
    error = np.mean((first.astype(float) - second) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize(
    ("shortcuts", "rows", "least_db"),
    [
        ("guidance_every=2", 18, 30),
        ("guidance_until=0.5", 18, 25),
        ("guidance_every=2,guidance_until=0.7", 17, 28),
        ("denoise_every=2", 14, 25),
        ("denoise_every=2,guidance_every=2", 13, 22),
    ],
)
def test_shortcuts_use_fewer_rows_and_stay_near_the_exact_picture(
    engine: StepwiseEngine, calls: list[Finished[Call]], shortcuts: str, rows: int, least_db: float
) -> None:
    calls.clear()
    exact = pixels_of(drive(engine, works()))
    assert rows_of(calls) == 24 * len(PROMPTS)
    calls.clear()
    near = pixels_of(drive(engine, works(shortcuts)))
    assert rows_of(calls) == rows * len(PROMPTS)
    # The median, because a small change can move a picture to another layout of its objects.
    assert np.median([decibels(first, second) for first, second in zip(exact, near, strict=True)]) > least_db
    assert not np.array_equal(exact, near)


@pytest.mark.parametrize("shortcuts", ["guidance_every=3", "denoise_every=3"])
def test_shortcuts_of_one_picture_do_not_change_others_in_the_batch(engine: StepwiseEngine, shortcuts: str) -> None:
    exact = pixels_of(drive(engine, works()))
    short = pixels_of(drive(engine, works(shortcuts)))
    mixed = [replace(work, cancelled=Event(), shortcuts=shortcuts * (place == 1)) for place, work in enumerate(works())]
    found = pixels_of(drive(engine, mixed))
    for place, expected in enumerate((exact, short, exact)):
        np.testing.assert_array_equal(found[place], expected[place])


def test_every_step_is_reported_with_its_preview_though_some_are_forecast(engine: StepwiseEngine) -> None:
    steps: list[int] = []
    previews: list[int] = []
    work = replace(
        works("denoise_every=4")[0],
        on_step=lambda step, _: steps.append(step),
        previews=frozenset({3, 4}),
        on_preview=lambda step, _: previews.append(step),
    )
    assert drive(engine, [work])[0].pixels is not None
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("name", ["fluxdev", "qwen"])
def test_forecast_steps_of_a_transformer_cost_no_call(name: str) -> None:
    calls: list[Finished[Call]] = []
    directory = tiny_model(name)
    profile = read_profile(settings_of(directory))
    engine = load_stepwise(directory, "f32", calls.append)

    def picture(shortcuts: str, place: int = 0) -> Work:
        return work_of(profile, "text2image", place, num_inference_steps=9, shortcuts=shortcuts)

    try:
        calls.clear()
        [alone] = pixels_of(drive(engine, [picture("denoise_every=3")]))
        rows = rows_of(calls)
        calls.clear()
        [exact] = pixels_of(drive(engine, [picture("")]))
        assert rows * 9 == rows_of(calls) * 5  # of the steps 0 to 8: 0, 1, 4, 7 and 8
        together = pixels_of(drive(engine, [picture("denoise_every=3"), picture("", 1)]))
    finally:
        engine.close()
    np.testing.assert_array_equal(together[0], alone)
    assert not np.array_equal(alone, exact)


def test_shortcuts_do_not_change_a_picture_without_guidance(engine: StepwiseEngine) -> None:
    plain, short = (
        pixels_of(drive(engine, [replace(works(text)[0], guidance_scale=1.0)]))[0] for text in ("", "guidance_every=2")
    )
    np.testing.assert_array_equal(plain, short)


def test_guidance_until_zero_equals_a_guidance_scale_of_one(engine: StepwiseEngine) -> None:
    without = pixels_of(drive(engine, [works("guidance_until=0")[0]]))[0]
    np.testing.assert_array_equal(without, pixels_of(drive(engine, [replace(works()[0], guidance_scale=1.0)]))[0])


def test_invalid_shortcuts_end_the_work_with_an_error(engine: StepwiseEngine) -> None:
    (outcome,) = drive(engine, [works("faster=please")[0]])
    assert isinstance(outcome.error, InternalError)


def test_preset_with_invalid_shortcuts_fails_the_load(tmp_path: Path) -> None:
    directory = with_scheduler("sd", tmp_path)
    (directory / "ovserve.json").write_text(json.dumps({"presets": {"low": {"shortcuts": "faster=please"}}}))
    settings = settings_of(directory)
    with pytest.raises(ModelError, match="preset low"):
        StepwiseEngine(read_profile(settings), settings).load(lambda _phase: None)
