from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ovserve.engines.schedulers.noise import Array, SchedulerConfig, karras_sigmas, spaced_timesteps
from ovserve.engines.schedulers.schedulers import SCHEDULERS, Plan, Scheduler, scheduler_name
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
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def walk(plan: Plan, latents: Array, predict: Any) -> Array:
    """All steps of a plan; `predict(scaled, timestep)` stands for the UNet."""
    history: tuple[Array, ...] = ()
    decoded = latents
    for index, timestep in enumerate(plan.timesteps):
        noise = normal(1000 + index) if plan.draws_noise(index) else None
        found = plan.step(predict(plan.scale_input(latents, index), timestep), latents, index, history, noise)
        latents, history = found.latents, found.history
        decoded = latents if found.decoded is None else found.decoded
    return decoded


class Oracle:
    """A UNet that knows the clean latents: it predicts exactly the noise, or v, that leads there."""

    def __init__(self, plan: Plan, clean: Array, prediction_type: str) -> None:
        self.plan, self.clean, self.prediction_type = plan, clean, prediction_type

    def __call__(self, scaled: Array, timestep: int) -> Array:
        alpha = self.plan.alphas[timestep]
        noise = (scaled - np.sqrt(alpha) * self.clean) / np.sqrt(1 - alpha)
        if self.prediction_type == "epsilon":
            return noise
        return np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * self.clean


# Karras levels lie between timesteps, where the oracle knows nothing; PNDM mixes predictions of several timesteps, which for v are
# not of one scale (so do the library and diffusers).
EXACT = [
    (name, prediction_type)
    for name in sorted(SCHEDULERS - {"dpmpp_2m_karras"})
    for prediction_type in ("epsilon", "v_prediction")
    if (name, prediction_type) != ("pndm", "v_prediction")
]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 25])
@pytest.mark.parametrize(("name", "prediction_type"), EXACT)
def test_a_perfect_prediction_leads_to_the_clean_latents(name: str, count: int, prediction_type: str) -> None:
    document = DOCUMENT | {"prediction_type": prediction_type, "set_alpha_to_one": True}
    plan = Scheduler(name, document).plan(count, 1.0)
    clean = normal(1)
    start = plan.add_noise(clean, normal(2), 0)
    found = walk(plan, start, Oracle(plan, clean, prediction_type))
    np.testing.assert_allclose(found, clean, atol=0.05 if name == "pndm" else 2e-3)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_step_is_a_pure_function(name: str) -> None:
    plan = Scheduler(name, DOCUMENT).plan(6, 1.0)
    latents, history = normal(1), ()
    for index in range(len(plan.timesteps)):
        prediction, noise = normal(10 + index), normal(50 + index)
        kept = [array.copy() for array in (prediction, latents, noise, *history)]
        first = plan.step(prediction, latents, index, history, noise)
        second = plan.step(prediction, latents, index, history, noise)
        for before, after in zip(kept, (prediction, latents, noise, *history), strict=True):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(first.latents, second.latents)
        assert first.latents.dtype == first.clean.dtype == np.float32
        latents, history = first.latents, first.history


@pytest.mark.parametrize("name", sorted(SCHEDULERS - {"lcm"}))
@pytest.mark.parametrize(("count", "strength", "run"), [(10, 1.0, 10), (10, 0.6, 6), (4, 0.3, 1), (50, 0.5, 25)])
def test_strength_leaves_out_the_first_steps(name: str, count: int, strength: float, run: int) -> None:
    whole = Scheduler(name, DOCUMENT).plan(count, 1.0)
    part = Scheduler(name, DOCUMENT).plan(count, strength)
    # PNDM takes its second timestep twice, so it makes one step more.
    assert part.timesteps == whole.timesteps[count - run :]
    assert len(part.timesteps) == run + (name == "pndm")
    assert list(part.timesteps) == sorted(part.timesteps, reverse=True)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_strength_that_leaves_no_step_is_refused(name: str) -> None:
    count = 3 if name == "lcm" else 1
    with pytest.raises(InvalidValue):
        Scheduler(name, DOCUMENT).plan(count, 0.01)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_a_number_of_steps_outside_training_is_refused(count: int) -> None:
    with pytest.raises(InvalidValue) as caught:
        Scheduler("ddim", DOCUMENT).plan(count, 1.0)
    assert caught.value.param == "num_inference_steps"


def test_lcm_refuses_more_steps_than_its_schedule_has() -> None:
    scheduler = Scheduler("lcm", DOCUMENT | {"original_inference_steps": 50})
    assert scheduler.plan(4, 1.0).timesteps == (999, 759, 499, 259)
    assert len(scheduler.plan(25, 0.5).timesteps) == 25
    with pytest.raises(InvalidValue):
        scheduler.plan(26, 0.5)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_stay_within_training_for_every_count(name: str, spacing: str) -> None:
    scheduler = Scheduler(name, DOCUMENT | {"timestep_spacing": spacing})
    for count in (*range(1, 101), 499, 500, 999, 1000):
        timesteps = scheduler.plan(count, 1.0).timesteps
        assert len(timesteps) == count + (name == "pndm" and count > 1)
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999
        if spacing == "trailing":
            assert timesteps[0] == 999  # pure noise is where training ended: arXiv:2305.08891


def test_trailing_timesteps_do_not_run_past_zero() -> None:
    config = SchedulerConfig.parse(DOCUMENT | {"timestep_spacing": "trailing"}, "ddim")
    # Those counts at which counting down in float32 leaves a rest.
    for count in (9, 11, 12, 18, 21, 22, 30, 31, 34, 35, 36, 42, 43, 48, 49):
        exact = tuple(int(np.rint(1000 - k * 1000 / count)) - 1 for k in range(count))
        assert len(spaced_timesteps(config, count)) == count
        assert max(abs(a - b) for a, b in zip(spaced_timesteps(config, count), exact, strict=True)) <= 1


def test_the_first_step_starts_from_noise_of_the_schedule_s_own_level() -> None:
    leading = Scheduler("euler", DOCUMENT).plan(10, 1.0)
    trailing = Scheduler("euler", DOCUMENT | {"timestep_spacing": "trailing"}).plan(10, 1.0)
    sigma = np.sqrt((1 - trailing.alphas[999]) / trailing.alphas[999])
    assert trailing.init_sigma == pytest.approx(sigma, rel=1e-6)
    sigma = np.sqrt((1 - leading.alphas[901]) / leading.alphas[901])
    assert leading.init_sigma == pytest.approx(np.sqrt(sigma**2 + 1), rel=1e-6)
    assert Scheduler("ddim", DOCUMENT).plan(10, 1.0).init_sigma == 1


def test_karras_levels_fall_from_the_highest_to_the_lowest() -> None:
    levels = karras_sigmas(0.03, 14.6, 10)
    assert levels[0] == pytest.approx(14.6)
    assert levels[-1] == pytest.approx(0.03)
    assert (np.diff(levels) < 0).all()
    # Karras et al., table 1: the steps near the data are the smallest.
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
def test_what_is_not_computed_is_refused_when_the_model_is_loaded(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        Scheduler("euler", DOCUMENT | changes)
    assert next(iter(changes)) in str(caught.value)


def test_pndm_is_refused_where_it_would_need_runge_kutta_steps() -> None:
    with pytest.raises(ModelError):
        Scheduler("pndm", DOCUMENT | {"skip_prk_steps": False})


def test_the_model_s_scheduler_has_a_name_of_ours() -> None:
    assert scheduler_name({"_class_name": "EulerAncestralDiscreteScheduler"}, "PNDM") == "euler_ancestral"
    assert scheduler_name({}, "PNDM") == "pndm"
    with pytest.raises(ModelError):
        scheduler_name({"_class_name": "HeunDiscreteScheduler"}, "PNDM")


# --- against diffusers ------------------------------------------------------------------------------------------------

TOLERANCE = 5e-6  # of the largest value: float32 rounding over up to 50 steps
DIFFUSERS = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@pytest.fixture
def diffusers() -> ModuleType:
    pytest.importorskip("torch", reason="the oracle of these tests needs torch")
    return pytest.importorskip("diffusers", reason="the oracle of these tests")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", sorted(DIFFUSERS))
@pytest.mark.filterwarnings("ignore")
def test_solvers_agree_with_diffusers(diffusers: ModuleType, name: str, spacing: str, prediction_type: str) -> None:
    torch = importlib.import_module("torch")
    mixing = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * 0.3

    def predict(latents: Array, timestep: int) -> Array:
        return np.tanh(np.einsum("ij,bjhw->bihw", mixing, latents) + np.float32(0.001 * timestep))

    class_name, extra = DIFFUSERS[name]
    document = DOCUMENT | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    for count, strength in ((1, 1.0), (2, 1.0), (3, 0.7), (5, 1.0), (9, 0.6), (12, 1.0), (30, 1.0), (50, 0.8)):
        plan = Scheduler(name, document).plan(count, strength)
        theirs = getattr(diffusers, class_name).from_config(document | extra)
        theirs.set_timesteps(count)
        theirs.set_begin_index(plan.start)
        timesteps = theirs.timesteps[plan.start :]
        assert plan.timesteps == tuple(int(t) for t in timesteps)
        ours = plan.add_noise(normal(1), normal(2), 0)
        other = theirs.add_noise(torch.tensor(normal(1)), torch.tensor(normal(2)), timesteps[:1])
        np.testing.assert_allclose(ours, other.numpy(), atol=TOLERANCE)
        for timestep in timesteps:
            prediction = torch.tensor(predict(other.numpy(), int(timestep)))
            other = theirs.step(prediction, timestep, other, return_dict=False)[0]
        found = walk(plan, ours, predict)
        np.testing.assert_allclose(found, other.numpy(), atol=TOLERANCE * max(1.0, float(abs(found).max())))
