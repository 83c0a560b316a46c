"""Step rules: how many steps run, and the minima of steps and strength."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.models.profile import ModelProfile, read_profile
from ovserve.models.steps import (
    default_strength,
    denoising_steps,
    min_steps_for,
    min_strength_for,
    raise_steps,
    smallest_strength,
    steps_run,
)
from ovserve.settings.options import ModelSettings
from tests.live import BUILTIN_PATH

PROFILE = read_profile(ModelSettings(name="m", path=BUILTIN_PATH))
DEFAULTS = PROFILE.defaults


def with_scheduler(name: str) -> ModelProfile:
    scheduling = dataclasses.replace(PROFILE.scheduling, name=name, original_inference_steps=50)
    return dataclasses.replace(PROFILE, scheduling=scheduling)


DDIM, PNDM, LCM = (with_scheduler(name) for name in ("DDIM", "PNDM", "LCM"))
FLUX = dataclasses.replace(PROFILE, family="flux")
COUNTS = st.integers(1, 1000)


@given(steps=COUNTS, strength=st.floats(0, 1))
def test_steps_run_equals_the_float32_product(steps: int, strength: float) -> None:
    assert steps_run(steps, strength) == min(int(np.float32(steps) * np.float32(strength)), steps)


@given(steps=COUNTS)
def test_min_strength_runs_a_step(steps: int) -> None:
    assert steps_run(steps, min_strength_for(steps)) >= 1


@given(strength=st.floats(0.001, 1))
def test_min_steps_run_one_step_and_one_fewer_runs_none(strength: float) -> None:
    count = min_steps_for(strength)
    assert steps_run(count, strength) == 1
    assert count == 1 or steps_run(count - 1, strength) == 0


@given(steps=COUNTS, strength=st.floats(0, 1))
def test_flow_matching_leaves_out_a_whole_number_of_steps(steps: int, strength: float) -> None:
    runs = denoising_steps(FLUX, "", steps, strength)
    left_out = int(np.float32(steps) - np.float32(steps) * np.float32(strength))
    assert runs == (steps - left_out if steps_run(steps, strength) else 0)


@given(steps=COUNTS, profile=st.sampled_from([DDIM, PNDM, LCM, FLUX]))
def test_text_to_image_runs_every_step(steps: int, profile: ModelProfile) -> None:
    is_too_long = profile is LCM and steps > 50
    extra = 1 if profile is PNDM and steps > 1 else 0  # PNDM takes its second step twice
    assert denoising_steps(profile, "", steps, 1.0) == (0 if is_too_long else steps + extra)


@pytest.mark.parametrize(
    ("profile", "scheduler", "steps", "strength", "runs"),
    [
        (DDIM, "", 12, 0.7, 8),
        (DDIM, "pndm", 12, 0.7, 9),  # the request's scheduler decides, not the model's own
        (PNDM, "ddim", 12, 0.7, 8),
        (DDIM, "", 12, 0.05, 0),
        (LCM, "", 4, 0.08, 4),
        (LCM, "", 4, 0.07, 0),
        (DDIM, "lcm", 4, 0.07, 0),
    ],
)
def test_steps_depend_on_the_scheduler(
    profile: ModelProfile, scheduler: str, steps: int, strength: float, runs: int
) -> None:
    assert denoising_steps(profile, scheduler, steps, strength) == runs


@given(steps=COUNTS, profile=st.sampled_from([DDIM, PNDM, LCM, FLUX]))
def test_smallest_strength_runs_a_step(steps: int, profile: ModelProfile) -> None:
    smallest = smallest_strength(profile, "", steps)
    assert smallest > 1 or denoising_steps(profile, "", steps, smallest)  # LCM cannot run more than 50 steps at all


@given(steps=COUNTS, strength=st.floats(0, 1), limit=COUNTS)
def test_default_steps_are_raised_until_one_runs(steps: int, strength: float, limit: int) -> None:
    raised = raise_steps(DDIM, "", steps, strength, limit)
    assert raised == steps or (raised > steps and denoising_steps(DDIM, "", raised, strength) == 1)
    assert denoising_steps(DDIM, "", raised, strength) or not steps_run(limit, strength)
    assert raise_steps(LCM, "", steps, strength, limit) == steps


@pytest.mark.parametrize(
    ("is_masked", "is_variation", "preferred", "strength"),
    [
        (False, False, None, DEFAULTS.strength),
        (False, True, None, DEFAULTS.strength_variation),
        (True, False, None, DEFAULTS.strength_inpainting),
        (False, False, 0.5, 0.5),
        (True, False, 0.5, DEFAULTS.strength_inpainting),  # input_fidelity is for edits of the whole image
    ],
)
def test_default_strength_depends_on_the_mode(
    is_masked: bool, is_variation: bool, preferred: float | None, strength: float
) -> None:
    found = default_strength(PROFILE, is_masked=is_masked, is_variation=is_variation, preferred=preferred)
    assert found == strength
