"""The choice of a model's engine, the checks of requests that depend on it, and how prompts are truncated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ovserve.engines.choice import choose_engine
from ovserve.engines.protocol import check_served, runs_extra_step, truncate_to_window
from ovserve.errors import InvalidValue, ModelError
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.models.steps import is_lcm
from ovserve.settings.options import ModelSettings
from ovserve.wire.request import ImageRequest

PROFILE = read_profile(ModelSettings(name="shapes"))


def profile(family: str = "stable-diffusion", **scheduling: Any) -> ModelProfile:
    found = dataclasses.replace(PROFILE.scheduling, **scheduling)
    return dataclasses.replace(PROFILE, family=family, scheduling=found)


def request(**values: Any) -> ImageRequest:
    return ImageRequest(
        **{"task": "generation", "prompt": "", "num_inference_steps": 10, "guidance_scale": 3.0, **values}
    )


def rejection(engine: str, model: ModelProfile, **values: Any) -> InvalidValue:
    with pytest.raises(InvalidValue) as caught:
        check_served(engine, model, request(**values))
    return caught.value


@pytest.mark.parametrize("family", ["stable-diffusion", "lcm", "sdxl"])
@pytest.mark.parametrize("name", ["genai", "stepwise"])
def test_configured_engine_is_used(family: str, name: str) -> None:
    assert choose_engine(profile(family), ModelSettings(engine=name)) == (name, "configured")


@pytest.mark.parametrize("family", ["stable-diffusion", "lcm", "sdxl"])
def test_auto_chooses_stepwise_for_unets_except_on_an_npu(family: str) -> None:
    assert choose_engine(profile(family), ModelSettings())[0] == "stepwise"
    assert choose_engine(profile(family), ModelSettings(device="CPU NPU CPU"))[0] == "genai"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_served_by_genai_only(family: str) -> None:
    assert choose_engine(profile(family), ModelSettings(engine="genai"))[0] == "genai"
    assert choose_engine(profile(family), ModelSettings(engine="auto"))[0] == "genai"
    with pytest.raises(ModelError, match=family):
        choose_engine(profile(family), ModelSettings(engine="stepwise"))


@pytest.mark.parametrize("engine", ["genai", "stepwise"])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_rejected(engine: str, steps: int) -> None:
    assert rejection(engine, PROFILE, num_inference_steps=steps).param == "num_inference_steps"


@pytest.mark.parametrize("steps", [1, 1000])
def test_smallest_and_largest_step_counts_are_accepted(steps: int) -> None:
    check_served("genai", PROFILE, request(num_inference_steps=steps))


def test_trailing_spacing_rejects_counts_with_an_extra_step_and_suggests_others() -> None:
    model = profile(timestep_spacing="trailing")
    for steps in range(1, 101):
        if runs_extra_step(steps, 1000):
            message = rejection("genai", model, num_inference_steps=steps).message
            for named in message.rpartition("use ")[2].split(" or "):
                check_served("genai", model, request(num_inference_steps=int(named)))
        else:
            check_served("genai", model, request(num_inference_steps=steps))


@pytest.mark.parametrize(
    ("spacing", "name", "engine"),
    [("leading", "DDIM", "genai"), ("trailing", "LCM", "genai"), ("trailing", "DDIM", "stepwise")],
)
def test_other_spacings_schedulers_and_engines_accept_every_count(spacing: str, name: str, engine: str) -> None:
    check_served(engine, profile(timestep_spacing=spacing, name=name), request(num_inference_steps=12))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_max_sequence_length_is_fixed_at_the_models_window(family: str) -> None:
    model = dataclasses.replace(profile(family), prompt_tokens=256)
    for served in (0, 256):
        check_served("genai", model, request(max_sequence_length=served))
    assert rejection("genai", model, max_sequence_length=64).param == "max_sequence_length"


def test_sd3_accepts_guidance_only_as_its_default_has_it() -> None:
    with_guidance = profile("sd3")
    check_served("genai", with_guidance, request(guidance_scale=1.5))
    for scale in (0.0, 1.0):
        assert rejection("genai", with_guidance, guidance_scale=scale).param == "guidance_scale"
    turbo = dataclasses.replace(with_guidance, defaults=dataclasses.replace(PROFILE.defaults, guidance_scale=1.0))
    check_served("genai", turbo, request(guidance_scale=0.0))
    assert rejection("genai", turbo, guidance_scale=1.5).param == "guidance_scale"


def test_other_families_accept_any_guidance() -> None:
    for family in ("stable-diffusion", "flux", "lcm", "sdxl"):
        for scale in (0.0, 1.0, 7.0):
            check_served("genai", profile(family), request(guidance_scale=scale))


def test_is_lcm_by_the_scheduler_of_the_model_or_the_request() -> None:
    assert is_lcm(profile(name="LCM"), "")
    assert is_lcm(PROFILE, "lcm")
    assert not is_lcm(PROFILE, "")
    assert not is_lcm(profile(name="LCM"), "ddim")


@pytest.mark.parametrize(("window", "cut"), [(0, ""), (1, "a"), (2, "a  b"), (3, "a  b\tc"), (9, "a  b\tc")])
def test_prompt_is_cut_after_the_last_word_that_fits(window: int, cut: str) -> None:
    assert truncate_to_window("a  b\tc ", lambda text: len(text.split()), window) == cut


@pytest.mark.parametrize(
    ("prompt", "window", "cut"),
    [
        ("一个红色的圆圈", 4, "一个红色"),  # a language without spaces
        ("a,b,c,d", 4, "a,b,"),
        ("ab cdefghij", 10, "ab cdefghi"),  # the first word alone leaves most of the window unused
        ("abcdefg hijk", 10, "abcdefg"),
        ("e\u0301e\u0301e\u0301", 3, "e\u0301"),  # never between a letter and its accent
        ("\U0001f468\u200d\U0001f469x", 2, ""),  # nor inside a joined character
    ],
)
def test_prompt_without_spaces_is_cut_inside_a_word(prompt: str, window: int, cut: str) -> None:
    assert truncate_to_window(prompt, len, window) == cut
