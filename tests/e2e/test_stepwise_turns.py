"""Engine `stepwise`: how pictures join, share calls, overtake and leave, and how they are cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ovserve.engines.stepwise.engine import StepwiseEngine
from tests.pictures import (
    drive,
    load_stepwise,
    pixels_of,
    work_of,
)
from tests.stepwise import PROFILE, SD, Traced, text


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.engine.close()


# --- sharing calls ----------------------------------------------------------------------------------------


def test_two_requests_at_different_timesteps_share_one_call(traced: Traced) -> None:
    traced.drive([text(k, num_inference_steps=5 + 3 * k) for k in range(6)])
    shared = [call for call in traced.denoising if len(call.pictures) > 1]
    assert any(
        len({picture.plan.timesteps[row.index] for row in call.rows for picture in [row.picture]}) > 1
        for call in shared
    )
    assert max(len(call.rows) for call in traced.denoising) <= 8  # max_batch 4, two rows for each


def test_short_job_that_arrives_during_a_long_one_ends_before_it(traced: Traced) -> None:
    ended: list[str] = []
    steps: list[int] = []
    long = text(0, job="long", num_inference_steps=50, on_step=lambda step, _: steps.append(step))
    traced.engine.admit(long)
    while len(steps) < 5:
        traced.engine.turn()
    began = len(steps)
    traced.engine.admit(text(1, job="short", num_inference_steps=4))
    while "short" not in ended:
        ended += [outcome.work.job for outcome in traced.engine.turn()]
    assert ended == ["short"]
    # Both got the same share of the device at once: apart from encoding and decoding, both made about as many steps.
    assert len(steps) - began <= 20
    while "long" not in ended:
        ended += [outcome.work.job for outcome in traced.engine.turn()]
    assert len(steps) == 51  # PNDM runs one step more


@pytest.fixture(scope="module", params=[2, 1])
def narrow(request: pytest.FixtureRequest) -> Iterator[StepwiseEngine]:
    """An engine whose calls have one picture each, or one row each in two slots."""
    engine = load_stepwise(SD, streams=request.param, max_batch=1)
    yield engine
    engine.close()


def test_short_job_overtakes_a_long_one(narrow: StepwiseEngine) -> None:
    order: list[str] = []

    def follow(name: str) -> Callable[[int, int], None]:
        return lambda _step, _steps: order.append(name)

    long = text(0, job="long", num_inference_steps=50, on_step=follow("long"))
    narrow.admit(long)
    while len(order) < 5:
        narrow.turn()
    narrow.admit(text(1, job="short", num_inference_steps=10, on_step=follow("short")))
    while order.count("short") < 11:  # PNDM runs one step more
        narrow.turn()
    between = order[order.index("short") :]
    assert (
        between.count("long") <= 6
    )  # one for each two steps of the short one; without overtaking there would be as many
    long.cancelled.set()
    while narrow.phase() != "idle":
        narrow.turn()


def test_long_job_keeps_its_pace_with_any_number_of_short_ones(narrow: StepwiseEngine) -> None:
    steps = {"long": 0, "short": 0}

    def follow(name: str) -> Callable[[int, int], None]:
        def on_step(_step: int, _steps: int) -> None:
            steps[name] += 1

        return on_step

    narrow.admit(text(0, job="long", num_inference_steps=40, on_step=follow("long")))
    in_flight, admitted = 1, 0
    while steps["long"] < 41:
        while in_flight < narrow.capacity:
            admitted += 1
            narrow.admit(text(admitted, job="short", num_inference_steps=4, on_step=follow("short")))
            in_flight += 1
        in_flight -= len(narrow.turn())
    # The three other pictures in flight get as many steps each; there is no further overtaking.
    assert steps["short"] <= 41 * 4
    while in_flight:
        in_flight -= len(narrow.turn())


def test_long_job_does_not_starve_among_short_ones(traced: Traced) -> None:
    engine, ended = traced.engine, list[str]()
    engine.admit(text(0, job="long", num_inference_steps=20))
    in_flight, admitted = 1, 0
    while "long" not in ended:
        while in_flight < engine.capacity:
            admitted += 1
            engine.admit(text(admitted, job="short", num_inference_steps=2))
            in_flight += 1
        outcomes = engine.turn()
        in_flight -= len(outcomes)
        ended += [outcome.work.job for outcome in outcomes]
        # Pictures take turns: while the long one makes 21 steps, each other picture in flight makes about as many.
        assert len(ended) < 21 * engine.capacity
    while in_flight:
        in_flight -= len(engine.turn())


def test_work_marked_alone_shares_no_call(traced: Traced) -> None:
    works = [text(k, alone=k == 2) for k in range(5)]
    pixels_of(traced.drive(works))
    for call in traced.denoising:
        assert len(call.pictures) == 1 or works[2] not in [picture.work for picture in call.pictures]


def test_single_picture_uses_a_slot_for_each_row(traced: Traced) -> None:
    pixels_of(traced.drive([text(0)]))
    assert {len(call.rows) for call in traced.denoising} == {1}
    for first, second in zip(*[iter(call for call in traced.calls if call.subject.kind == "denoise")] * 2, strict=True):
        assert first.slot != second.slot
        assert {row.condition for call in (first, second) for row in call.subject.rows} == {0, 1}


@pytest.mark.parametrize("options", [{"streams": 1}, {"streams": 3}, {"max_batch": 1}, {"streams": 1, "max_batch": 16}])
def test_pictures_do_not_depend_on_load_or_layout(traced: Traced, options: dict[str, int]) -> None:
    works = [
        work_of(PROFILE, mode, k, num_inference_steps=3 + k) for k, mode in enumerate(["text2image", "inpainting"] * 3)
    ]
    alone = [pixels_of(traced.drive([work]))[0] for work in works]
    together = pixels_of(traced.drive(works))
    other = load_stepwise(SD, **options)
    elsewhere = pixels_of(drive(other, works))
    other.close()
    for first, second, third in zip(alone, together, elsewhere, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


def test_turn_of_an_idle_engine_returns_nothing(traced: Traced) -> None:
    assert traced.engine.phase() == "idle"
    assert list(traced.engine.turn()) == []


def test_phases_of_a_picture_are_encode_denoise_decode(traced: Traced) -> None:
    seen = []
    traced.engine.admit(text(0, prompt="not encoded before"))
    while (phase := traced.engine.phase()) != "idle":
        seen.append(phase)
        traced.engine.turn()
    assert list(dict.fromkeys(seen)) == ["encode", "denoise", "decode"]


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelled_picture_stops_after_the_current_step(traced: Traced) -> None:
    steps: list[int] = []
    works = [text(k, num_inference_steps=30) for k in range(3)]

    def after_step(step: int, _steps: int) -> None:
        steps.append(step)
        if step == 7:
            works[1].cancelled.set()

    works[1].on_step = after_step
    first, second, third = traced.drive(works)
    assert steps == list(range(1, 8))
    assert (second.pixels, second.error) == (None, None)
    assert first.pixels is not None
    assert third.pixels is not None


@pytest.mark.parametrize("when", ["before", "last step"])
def test_picture_cancelled_before_or_after_its_steps_has_no_pixels(traced: Traced, when: str) -> None:
    work = text(0, num_inference_steps=2)
    if when == "before":
        work.cancelled.set()
    else:
        work.on_step = lambda step, steps: work.cancelled.set() if step == steps else None
    (outcome,) = traced.drive([work])
    assert (outcome.pixels, outcome.error) == (None, None)
    # PNDM runs three steps for two, with a call for each row.
    assert len(traced.denoising) == (0 if when == "before" else 6)
