"""Schedulers: timesteps, noise levels and steps.

The solvers that the library lacks are compared with vectors that diffusers computed. The other tests need no
reference: they check properties that hold for any prediction, or predictions whose result is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.schedulers.noise import Array, SchedulerConfig, karras_sigmas, spaced_timesteps
from ovserve.engines.schedulers.schedulers import (
    LIBRARY_SCHEDULERS,
    SCHEDULERS,
    Plan,
    Scheduler,
    StepResult,
    scheduler_name,
)
from ovserve.errors import InvalidValue, ModelError

DOCUMENT: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SHAPE = (1, 4, 8, 8)


def normal(seed: int) -> Array:
    """Return standard normal latents: float32 SHAPE."""
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def run_plan(plan: Plan, latents: Array, predict: Callable[[Array, int], Array]) -> list[StepResult]:
    """Return the results of all steps of a plan; `predict(scaled, timestep)` stands for the UNet."""
    history: tuple[Array, ...] = ()
    results = []
    for index, timestep in enumerate(plan.timesteps):
        noise = normal(1000 + index) if plan.draws_noise(index) else None
        result = plan.step(predict(plan.scale_input(latents, index), timestep), latents, index, history, noise)
        latents, history = result.latents, result.history
        results.append(result)
    return results


def decoder_input(result: StepResult) -> Array:
    """Return what the VAE decoder gets if this step was the last."""
    return result.latents if result.decoded is None else result.decoded


class PerfectModel:
    """Stands for a UNet without error: predicts exactly the noise, or v, that leads to the clean latents."""

    def __init__(self, plan: Plan, clean: Array, prediction_type: str) -> None:
        self.plan, self.clean, self.prediction_type = plan, clean, prediction_type

    def __call__(self, scaled: Array, timestep: int) -> Array:
        alpha = self.plan.alphas[timestep]
        noise = (scaled - np.sqrt(alpha) * self.clean) / np.sqrt(1 - alpha)
        if self.prediction_type == "epsilon":
            return noise
        return np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * self.clean


# Karras noise levels lie between timesteps, where PerfectModel has no alpha. PNDM mixes predictions of several
# timesteps, and those of v differ in scale; the library and diffusers do the same.
EXACT = [
    (name, prediction_type)
    for name in sorted(SCHEDULERS - {"dpmpp_2m_karras"})
    for prediction_type in ("epsilon", "v_prediction")
    if (name, prediction_type) != ("pndm", "v_prediction")
]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 25])
@pytest.mark.parametrize(("name", "prediction_type"), EXACT)
def test_perfect_predictions_lead_to_the_clean_latents(name: str, count: int, prediction_type: str) -> None:
    document = DOCUMENT | {"prediction_type": prediction_type, "set_alpha_to_one": True}
    plan = Scheduler(name, document).plan(count, 1.0)
    clean = normal(1)
    start = plan.add_noise(clean, normal(2), 0)
    results = run_plan(plan, start, PerfectModel(plan, clean, prediction_type))
    np.testing.assert_allclose(decoder_input(results[-1]), clean, atol=0.05 if name == "pndm" else 2e-3)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_step_is_a_pure_function(name: str) -> None:
    plan = Scheduler(name, DOCUMENT).plan(6, 1.0)
    latents, history = normal(1), ()
    for index in range(len(plan.timesteps)):
        prediction, noise = normal(10 + index), normal(50 + index)
        copies = [array.copy() for array in (prediction, latents, noise, *history)]
        first = plan.step(prediction, latents, index, history, noise)
        second = plan.step(prediction, latents, index, history, noise)
        for before, after in zip(copies, (prediction, latents, noise, *history), strict=True):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(first.latents, second.latents)
        assert first.latents.dtype == first.clean.dtype == np.float32
        latents, history = first.latents, first.history


@pytest.mark.parametrize("name", sorted(SCHEDULERS - {"lcm"}))
@pytest.mark.parametrize(("count", "strength", "steps"), [(10, 1.0, 10), (10, 0.6, 6), (4, 0.3, 1), (50, 0.5, 25)])
def test_strength_skips_the_first_steps(name: str, count: int, strength: float, steps: int) -> None:
    whole = Scheduler(name, DOCUMENT).plan(count, 1.0)
    part = Scheduler(name, DOCUMENT).plan(count, strength)
    assert part.timesteps == whole.timesteps[count - steps :]
    # PNDM visits its second timestep twice, so it runs one step more.
    assert len(part.timesteps) == steps + (name == "pndm")
    assert list(part.timesteps) == sorted(part.timesteps, reverse=True)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_strength_that_leaves_no_step_is_rejected(name: str) -> None:
    count = 3 if name == "lcm" else 1
    with pytest.raises(InvalidValue):
        Scheduler(name, DOCUMENT).plan(count, 0.01)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_step_count_outside_the_training_timesteps_is_rejected(count: int) -> None:
    with pytest.raises(InvalidValue) as caught:
        Scheduler("ddim", DOCUMENT).plan(count, 1.0)
    assert caught.value.param == "num_inference_steps"


def test_lcm_rejects_more_steps_than_its_schedule_has() -> None:
    scheduler = Scheduler("lcm", DOCUMENT | {"original_inference_steps": 50})
    assert scheduler.plan(4, 1.0).timesteps == (999, 759, 499, 259)
    assert len(scheduler.plan(25, 0.5).timesteps) == 25
    with pytest.raises(InvalidValue):
        scheduler.plan(26, 0.5)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_stay_within_the_training_range(name: str, spacing: str) -> None:
    scheduler = Scheduler(name, DOCUMENT | {"timestep_spacing": spacing})
    for count in (*range(1, 101), 499, 500, 999, 1000):
        timesteps = scheduler.plan(count, 1.0).timesteps
        assert len(timesteps) == count + (name == "pndm" and count > 1)
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999
        if spacing == "trailing":
            assert timesteps[0] == 999  # the last training timestep, where latents are pure noise: arXiv:2305.08891


def test_trailing_timesteps_do_not_go_below_zero() -> None:
    config = SchedulerConfig.parse(DOCUMENT | {"timestep_spacing": "trailing"}, "ddim")
    # At these counts a float32 countdown from 1000 by 1000 / count ends above zero, which would add a timestep of -1.
    for count in (9, 11, 12, 18, 21, 22, 30, 31, 34, 35, 36, 42, 43, 48, 49):
        exact = tuple(int(np.rint(1000 - k * 1000 / count)) - 1 for k in range(count))
        assert len(spaced_timesteps(config, count)) == count
        assert max(abs(a - b) for a, b in zip(spaced_timesteps(config, count), exact, strict=True)) <= 1


def test_initial_noise_has_the_level_of_the_first_timestep() -> None:
    leading = Scheduler("euler", DOCUMENT).plan(10, 1.0)
    trailing = Scheduler("euler", DOCUMENT | {"timestep_spacing": "trailing"}).plan(10, 1.0)
    sigma = np.sqrt((1 - trailing.alphas[999]) / trailing.alphas[999])
    assert trailing.init_sigma == pytest.approx(sigma, rel=1e-6)
    sigma = np.sqrt((1 - leading.alphas[901]) / leading.alphas[901])
    assert leading.init_sigma == pytest.approx(np.sqrt(sigma**2 + 1), rel=1e-6)
    assert Scheduler("ddim", DOCUMENT).plan(10, 1.0).init_sigma == 1


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("count", [999, 1000])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_solvers_step_across_repeated_noise_levels(name: str, count: int, spacing: str, final: str) -> None:
    # With so many steps two of them are at the same timestep: the slope between them divided by zero.
    document = DOCUMENT | {"timestep_spacing": spacing, "final_sigmas_type": final}
    plan = Scheduler(name, document).plan(count, 1.0)
    clean = normal(1)
    start = plan.add_noise(clean, normal(2), 0)
    results = run_plan(plan, start, PerfectModel(plan, clean, "epsilon"))
    level = plan.sigmas[-1]
    expected = (clean + level * normal(2)) / np.sqrt(level**2 + 1)
    np.testing.assert_allclose(results[-1].latents, expected, atol=2e-3)


def test_karras_levels_fall_from_highest_to_lowest() -> None:
    levels = karras_sigmas(0.03, 14.6, 10)
    assert levels[0] == pytest.approx(14.6)
    assert levels[-1] == pytest.approx(0.03)
    assert (np.diff(levels) < 0).all()
    # arXiv:2206.00364, table 1: steps are smallest near the data.
    assert np.diff(levels)[-1] > np.diff(levels)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "random"},
        {"thresholding": True},
        {"use_karras_sigmas": True},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
    ],
)
def test_unsupported_configuration_is_rejected_at_load(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        Scheduler("euler", DOCUMENT | changes)
    assert next(iter(changes)) in str(caught.value)


def test_pndm_with_runge_kutta_steps_is_rejected() -> None:
    with pytest.raises(ModelError):
        Scheduler("pndm", DOCUMENT | {"skip_prk_steps": False})


def test_scheduler_name_maps_the_class_name_of_a_model() -> None:
    assert scheduler_name({"_class_name": "EulerAncestralDiscreteScheduler"}, "PNDM") == "euler_ancestral"
    assert scheduler_name({}, "PNDM") == "pndm"
    with pytest.raises(ModelError):
        scheduler_name({"_class_name": "HeunDiscreteScheduler"}, "PNDM")


# --- against diffusers ------------------------------------------------------------------------------------------------
# The vectors are timesteps, noise levels and latents that diffusers computed.
# scripts/fixtures/make_scheduler_vectors.py makes them and describes the file.

TOLERANCE = 2e-6  # of the largest value: float32 rounding over up to 40 steps; measured: 1.4e-6
SIGMA_TOLERANCE = 5e-6  # relative: torch and numpy round the cumulative product of alphas differently; measured: 3.4e-6
SOLVERS = sorted(SCHEDULERS - set(LIBRARY_SCHEDULERS.values()))
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
CASES = [  # scheduler, prediction type, timestep spacing, final sigma type
    *product(SOLVERS, PREDICTION_TYPES, SPACINGS, ("zero",)),
    *product(SOLVERS, ("epsilon",), ("leading",), ("sigma_min",)),
]
RUNS = [  # num_inference_steps, strength
    *((count, 1.0) for count in (1, 2, 3, 4, 5, 10, 12, 25, 30)),
    *((3, 0.7), (4, 0.3), (4, 0.5), (9, 0.6), (10, 0.3), (25, 0.5), (50, 0.8)),
]


@pytest.fixture(scope="module")
def vectors(data: Path) -> dict[str, Any]:
    """Return the arrays of the file by name."""
    with np.load(data / "scheduler_vectors.npz") as file:
        return dict(file)


def test_vectors_cover_every_case(vectors: dict[str, Any]) -> None:
    assert sorted(map(tuple, vectors["cases"].tolist())) == sorted(CASES)
    assert list(zip(vectors["counts"].tolist(), vectors["strengths"].tolist(), strict=True)) == RUNS
    assert vectors["steps"].tolist() == [1, 2, 3, 4, 5, 10, 12, 25, 30, 2, 1, 2, 5, 3, 12, 40]
    rows = len(RUNS) + sum(vectors["steps"].tolist())
    for name in ("timesteps", "sigmas", "latents"):
        assert vectors[name].shape[:2] == (len(vectors["cases"]), rows)
        assert np.isfinite(vectors[name]).all()
    assert json.loads(vectors["about"].item())["made_with"].keys() >= {"diffusers", "torch"}


@pytest.mark.parametrize(("count", "strength"), RUNS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_solvers_agree_with_diffusers(
    vectors: dict[str, Any], case: tuple[str, ...], count: int, strength: float
) -> None:
    about = json.loads(vectors["about"].item())
    place = vectors["cases"].tolist().index(list(case))
    name, prediction_type, spacing, final = case
    # A run of s steps has s + 1 rows: the noised start, then the latents after each step.
    run = RUNS.index((count, strength))
    first = int(np.sum(vectors["steps"][:run] + 1))
    rows = slice(first, first + int(vectors["steps"][run]) + 1)
    timesteps, sigmas, latents = (vectors[key][place, rows] for key in ("timesteps", "sigmas", "latents"))

    def predict(scaled: Array, timestep: int) -> Array:  # the same formula as in the script
        mixed = np.einsum("ij,bjhw->bihw", vectors["mixing"].astype(np.float64), scaled.astype(np.float64))
        return np.tanh(mixed + about["timestep_weight"] * timestep).astype(np.float32)

    document = about["config"] | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    document["final_sigmas_type"] = final
    plan = Scheduler(name, document).plan(count, strength)
    assert [*plan.timesteps, -1] == timesteps.tolist()
    np.testing.assert_allclose(plan.sigmas[plan.start :], sigmas, rtol=SIGMA_TOLERANCE)
    start = plan.add_noise(vectors["clean"], vectors["noise"], 0)
    results = run_plan(plan, start, predict)
    computed = [start, *(result.latents for result in results)]
    for index, (ours, theirs) in enumerate(zip(computed, latents, strict=True)):
        tolerance = TOLERANCE * max(1.0, float(abs(theirs).max())) if index > 0 else TOLERANCE
        np.testing.assert_allclose(ours, theirs[None], rtol=0, atol=tolerance, err_msg=f"after {index} steps")
    np.testing.assert_array_equal(decoder_input(results[-1]), results[-1].latents)
