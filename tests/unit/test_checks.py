"""What each engine rejects before a request is prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovserve.engines.checks import WORKER_FIELDS, check_known_fields, runs_extra_step
from ovserve.engines.genai import GENAI_FIELDS, GenaiEngine
from ovserve.engines.protocol import Engine
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.errors import InternalError, InvalidValue
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.models.steps import is_lcm
from ovserve.settings.options import ModelSettings
from ovserve.wire.request import ImageRequest
from tests.live import BUILTIN_PATH

MakeEngine = Callable[[ModelProfile], Engine]

PROFILE = read_profile(ModelSettings(name="shapes", path=Path(BUILTIN_PATH)))


def profile(family: str = "stable-diffusion", **scheduling: Any) -> ModelProfile:
    found = dataclasses.replace(PROFILE.scheduling, **scheduling)
    return dataclasses.replace(PROFILE, family=family, scheduling=found)


def request(**values: Any) -> ImageRequest:
    return ImageRequest(
        **{"task": "generation", "prompt": "", "num_inference_steps": 10, "guidance_scale": 3.0, **values}
    )


def genai(model: ModelProfile) -> Engine:
    """Return the engine, not loaded: `check` needs no loaded model but for the names of schedulers."""
    return GenaiEngine(model, ModelSettings(name="shapes"))


def stepwise(model: ModelProfile) -> Engine:
    return StepwiseEngine(model, ModelSettings(name="shapes"))


ENGINES = [genai, stepwise]


def rejection(engine: Engine, **values: Any) -> InvalidValue:
    with pytest.raises(InvalidValue) as caught:
        engine.check(request(**values))
    return caught.value


@pytest.mark.parametrize("make", ENGINES)
def test_scheduler_that_the_engine_does_not_have_is_rejected(make: MakeEngine) -> None:
    error = rejection(make(PROFILE), scheduler="heun")
    assert error.param == "scheduler"
    assert error.message.startswith("scheduler: 'heun' is not served by this model; expected one of")


def test_stepwise_rejects_invalid_shortcuts_and_genai_ignores_them() -> None:
    genai(PROFILE).check(request(shortcuts="guidance_every=0"))
    stepwise(PROFILE).check(request(shortcuts="guidance_every=2"))
    with pytest.raises(InternalError, match="shortcuts is 'guidance_every=0': guidance_every is 0"):
        stepwise(PROFILE).check(request(shortcuts="guidance_every=0"))


def test_field_that_the_engine_does_not_read_is_rejected() -> None:
    values = {"prompt_2": "a red cat", "width": 64}
    check_known_fields(
        request(**values), frozenset({"prompt", "prompt_2", "num_inference_steps", "guidance_scale"}), "x"
    )
    with pytest.raises(InvalidValue, match="prompt_2: engine x, which serves this model, has no such parameter"):
        check_known_fields(request(**values), frozenset({"prompt", "num_inference_steps", "guidance_scale"}), "x")


def test_every_field_of_a_request_but_those_for_other_engines_is_served_by_genai() -> None:
    others = {"adapters", "image_guidance_scale"}  # fields that only other engines read
    for entry in dataclasses.fields(ImageRequest):
        if entry.name not in others | WORKER_FIELDS:
            check_known_fields(request(**{entry.name: object()}), GENAI_FIELDS, "genai")


@pytest.mark.parametrize("make", ENGINES)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_rejected(make: MakeEngine, steps: int) -> None:
    assert rejection(make(PROFILE), num_inference_steps=steps).param == "num_inference_steps"


@pytest.mark.parametrize("steps", [1, 1000])
def test_smallest_and_largest_step_counts_are_accepted(steps: int) -> None:
    genai(PROFILE).check(request(num_inference_steps=steps))


def test_trailing_spacing_rejects_counts_with_an_extra_step_and_suggests_others() -> None:
    model = profile(timestep_spacing="trailing")
    for steps in range(1, 101):
        if runs_extra_step(steps, 1000):
            message = rejection(genai(model), num_inference_steps=steps).message
            for named in message.rpartition("use ")[2].split(" or "):
                genai(model).check(request(num_inference_steps=int(named)))
        else:
            genai(model).check(request(num_inference_steps=steps))


@pytest.mark.parametrize(
    ("spacing", "name", "make"),
    [("leading", "DDIM", genai), ("trailing", "LCM", genai), ("trailing", "DDIM", stepwise)],
)
def test_other_spacings_schedulers_and_engines_accept_every_count(spacing: str, name: str, make: MakeEngine) -> None:
    make(profile(timestep_spacing=spacing, name=name)).check(request(num_inference_steps=12))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_max_sequence_length_is_fixed_at_the_models_window(family: str) -> None:
    model = dataclasses.replace(profile(family), prompt_tokens=256)
    for served in (0, 256):
        genai(model).check(request(max_sequence_length=served))
    assert rejection(genai(model), max_sequence_length=64).param == "max_sequence_length"


def test_sd3_accepts_guidance_only_as_its_default_has_it() -> None:
    with_guidance = profile("sd3")
    genai(with_guidance).check(request(guidance_scale=1.5))
    for scale in (0.0, 1.0):
        assert rejection(genai(with_guidance), guidance_scale=scale).param == "guidance_scale"
    turbo = dataclasses.replace(with_guidance, defaults=dataclasses.replace(PROFILE.defaults, guidance_scale=1.0))
    genai(turbo).check(request(guidance_scale=0.0))
    assert rejection(genai(turbo), guidance_scale=1.5).param == "guidance_scale"


def test_other_families_accept_any_guidance() -> None:
    for family in ("stable-diffusion", "flux", "lcm", "sdxl"):
        for scale in (0.0, 1.0, 7.0):
            genai(profile(family)).check(request(guidance_scale=scale))


def test_is_lcm_by_the_scheduler_of_the_model_or_the_request() -> None:
    assert is_lcm(profile(name="LCM"), "")
    assert is_lcm(PROFILE, "lcm")
    assert not is_lcm(PROFILE, "")
    assert not is_lcm(profile(name="LCM"), "ddim")
