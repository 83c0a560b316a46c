"""Engine `stepwise`: failed calls, failed pictures and failed devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino import opset13 as ops

from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.errors import InternalError, InvalidValue
from ovserve.settings.options import Resolution
from tests.pictures import (
    drive,
    image_of,
    load_stepwise,
    pixels_of,
    settings_of,
    work_of,
)
from tests.stepwise import (
    NAN_STEPS,
    PROFILE,
    SD,
    STAGES,
    FaultyComponents,
    Traced,
    Watched,
    broken,
    load_watched,
    text,
    with_unet,
)


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.engine.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheduler": "heun"}, InvalidValue),
        ({"mode": "image2image", "strength": 0.0, "scheduler": "ddim"}, InvalidValue),
        ({"num_inference_steps": 1001}, InvalidValue),
        ({"mode": "outpainting"}, InvalidValue),
        ({"size": Resolution(64, 60)}, InternalError),
        ({"size": Resolution(72, 72)}, InternalError),  # 9 latents on a side, which the UNet cannot halve
    ],
)
def test_invalid_work_fails_without_affecting_other_pictures(
    traced: Traced, options: dict[str, Any], error: type[Exception]
) -> None:
    mode = options.pop("mode", "text2image")
    works = [text(0), work_of(PROFILE, mode, 1, **options), text(2)]
    first, second, third = traced.drive(works)
    assert isinstance(second.error, error)
    pixels_of([first, third])


def test_size_that_the_unet_cannot_do_does_not_change_later_pictures() -> None:
    # In one slot, so that the calls after the failed one have the shape of the last that worked: the plugin then fails
    # silently once more, and its output would still be that of another picture.
    engine = load_stepwise(SD, streams=1)
    works = [text(k, num_inference_steps=3) for k in range(3)]
    expected = [pixels_of(drive(engine, [work]))[0] for work in works]
    for one_with_shape in (works[0], text(0, guidance_scale=1.0)):
        for later, pixels in zip(works, expected, strict=True):
            pixels_of(drive(engine, [one_with_shape]))
            for failed in drive(engine, [text(k, size=Resolution(72, 72)) for k in range(3)]):
                assert isinstance(failed.error, InternalError)
            np.testing.assert_array_equal(pixels_of(drive(engine, [later]))[0], pixels)
    engine.close()


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[StepwiseEngine, Watched]]:
    engine, components = load_watched()
    yield engine, components
    engine.close()


def test_pictures_of_a_failed_shared_call_are_retried_alone(watched: tuple[StepwiseEngine, Watched]) -> None:
    engine, components = watched
    works = [text(k) for k in range(4)]
    expected = pixels_of(drive(engine, works))

    def seen(kind: str, inputs: Any) -> None:
        if kind == "unet" and len(inputs["sample"]) > 2:
            raise RuntimeError("no memory for so many rows")

    components.seen = seen
    found = pixels_of(drive(engine, works))
    components.seen = Watched.seen
    for first, second in zip(expected, found, strict=True):
        np.testing.assert_array_equal(first, second)


def fail_calls(
    engine: StepwiseEngine, components: Watched, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make each call of one kind fail that is made for a picture, and none that the check of the device makes."""
    check_device, checking = engine._check_device, threading.local()  # a call in another thread may run beside a check

    def check(slot: int) -> None:
        checking.is_true = True
        check_device(slot)
        checking.is_true = False

    def seen(seen_kind: str, _inputs: Any) -> None:
        if seen_kind == kind and not getattr(checking, "is_true", False):
            raise RuntimeError(reason)

    monkeypatch.setattr(engine, "_check_device", check)
    components.seen = seen


@pytest.mark.parametrize("kind", ["text_encoder", "vae_encoder", "unet", "vae_decoder"])
def test_picture_whose_calls_fail_alone_ends_with_an_error(
    watched: tuple[StepwiseEngine, Watched], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, components = watched
    fail_calls(engine, components, kind, "the device is gone", monkeypatch)
    works = [
        work_of(
            PROFILE,
            "image2image",
            k,
            prompt=f"fails in the {kind}",
            initial_image=image_of(64, 64, len(kind) + 100 * k),
        )
        for k in range(2)
    ]
    outcomes = drive(engine, works)
    components.seen = Watched.seen
    assert [type(outcome.error) for outcome in outcomes] == [InternalError, InternalError]
    assert "the device is gone" in str(outcomes[0].error)
    pixels_of(drive(engine, works))


@pytest.mark.parametrize("kind", ["vae_encoder", "unet", "vae_decoder"])
def test_failed_device_ends_the_engine_instead_of_failing_each_picture(kind: str) -> None:
    engine, components = load_watched()

    def seen(seen_kind: str, _inputs: Any) -> None:
        if seen_kind == kind:
            raise RuntimeError("the device is gone")

    components.seen = seen
    with pytest.raises(RuntimeError, match="the device is gone"):
        drive(engine, [work_of(PROFILE, "image2image", 0, initial_image=image_of(64, 64, 3))])
    engine.close()


# --- a picture that fails in the device thread ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> Iterator[StepwiseEngine]:
    settings = settings_of(SD)
    engine = StepwiseEngine(PROFILE, settings, components=FaultyComponents(PROFILE, settings))
    engine.load(lambda _phase: None)
    yield engine
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_exception_in_a_step_of_one_picture_fails_only_that_picture(
    faulty: StepwiseEngine, traced: Traced, stage: str
) -> None:
    works = [text(k, num_inference_steps=4 + k) for k in range(3)]
    expected = pixels_of(traced.drive(works))
    *neighbours, failed = drive(faulty, [*works, broken(stage)])
    assert isinstance(failed.error, InternalError)
    assert f"{stage} broke" in failed.error.message
    assert failed.error.status == 500
    for pixels, other in zip(expected, pixels_of(neighbours), strict=True):
        np.testing.assert_array_equal(pixels, other)
    assert faulty.phase() == "idle"
    pixels_of(drive(faulty, works))


@pytest.mark.parametrize("stage", STAGES)
def test_exception_in_a_step_of_a_picture_alone_fails_it_once(faulty: StepwiseEngine, stage: str) -> None:
    [failed] = drive(faulty, [broken(stage)])
    assert f"{stage} broke" in str(failed.error)
    assert faulty.phase() == "idle"


def test_latents_that_are_not_finite_fail_only_their_picture(faulty: StepwiseEngine, traced: Traced) -> None:
    works = [text(k, num_inference_steps=4 + k) for k in range(3)]
    expected = pixels_of(traced.drive(works))
    *neighbours, failed = drive(faulty, [*works, text(0, num_inference_steps=NAN_STEPS)])
    assert isinstance(failed.error, InternalError)
    assert "step 2 of 15" in failed.error.message  # PNDM runs one step more
    for pixels, other in zip(expected, pixels_of(neighbours), strict=True):
        np.testing.assert_array_equal(pixels, other)


def scalar_timestep(model: Any) -> Any:
    # A graph that reshapes its timestep to a scalar first, and so fails with two timesteps.
    parameter = next(node for node in model.get_parameters() if "timestep" in node.output(0).get_names())
    readers = list(parameter.output(0).get_target_inputs())
    scalar = ops.reshape(parameter, ops.constant(np.array([], np.int64)), special_zero=False)
    for reader in readers:
        reader.replace_source_output(ops.unsqueeze(scalar, ops.constant(np.array([0]))).output(0))
    model.validate_nodes_and_infer_types()
    return model


class OneTimestep(Watched):
    """Components of an export that takes one timestep for all rows."""

    def read(self) -> None:
        super().read()
        self.timestep_per_row = False


def test_device_check_uses_one_timestep_for_all_rows_if_the_export_requires_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, components = load_watched(with_unet(tmp_path, scalar_timestep), OneTimestep)
    fail_calls(engine, components, "unet", "no memory for this picture", monkeypatch)
    [outcome] = drive(engine, [text()])
    components.seen = Watched.seen
    assert "no memory for this picture" in str(outcome.error)
    pixels_of(drive(engine, [text()]))
    engine.close()
