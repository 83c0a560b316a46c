"""The schedules and steps of flow matching."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.engines.schedulers.flow import (
    FlowConfig,
    FlowScheduler,
    constant_levels,
    shift_empirical,
    shift_linear,
)
from ovserve.errors import InvalidValue, ModelError

DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}
SHAPE = (1, 4, 8, 8)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def test_linear_shift_of_flux_is_1_15_at_1024_px() -> None:
    assert shift_linear(FlowConfig.parse(DEV), 4096, 28) == pytest.approx(1.15)
    assert shift_linear(FlowConfig.parse(DEV), 256, 28) == pytest.approx(0.5)


def test_empirical_shift_depends_on_steps_up_to_4300_tokens() -> None:
    config = FlowConfig.parse(DEV)
    assert shift_empirical(config, 4096, 28) == pytest.approx(2.15, abs=0.01)
    assert shift_empirical(config, 4096, 4) > shift_empirical(config, 4096, 50)
    assert shift_empirical(config, 5000, 4) == shift_empirical(config, 5000, 50)


@pytest.mark.parametrize(
    ("shift", "levels"), [(shift_linear, (1, 0.905, 0.760, 0.513)), (shift_empirical, (1, 0.967, 0.908, 0.767))]
)
def test_levels_at_1024_px_are_those_of_the_rule(shift: object, levels: tuple[float, ...]) -> None:
    # The values of diffusers for FLUX.1 dev and FLUX.2 klein, four steps.
    plan = FlowScheduler(DEV, shift).plan(4, 1.0, 128 * 128)  # type: ignore[arg-type]
    np.testing.assert_allclose(plan.sigmas, [*levels, 0], atol=1e-3)
    np.testing.assert_allclose(plan.timesteps, np.array(levels) * 1000, atol=1)


def test_constant_shift_applies_twice_for_sd3() -> None:
    levels = constant_levels(FlowConfig(shift=3.0), 28, 0.0)
    assert levels[0] == 1
    assert levels[-1] == pytest.approx(0.00893, abs=1e-5)  # diffusers, 28 steps


def test_schedule_is_stretched_to_its_last_level() -> None:
    plan = FlowScheduler(DEV | {"shift_terminal": 0.02}).plan(20, 1.0, 4096)
    assert plan.sigmas[0] == 1
    assert plan.sigmas[-2] == pytest.approx(0.02, abs=1e-6)
    assert FlowScheduler(DEV | {"shift_terminal": 0.02}).plan(1, 1.0, 4096).timesteps == (1000,)


@given(
    count=st.integers(1, 1000),
    strength=st.floats(0.001, 1.0),
    cells=st.integers(4, 40000),
    terminal=st.sampled_from([None, 0.02]),
    dynamic=st.booleans(),
)
def test_any_plan_falls_from_its_start_to_zero(
    count: int, strength: float, cells: int, terminal: float | None, dynamic: bool
) -> None:
    document = DEV | {"shift_terminal": terminal, "use_dynamic_shifting": dynamic}
    try:
        plan = FlowScheduler(document).plan(count, strength, cells)
    except InvalidValue:
        assert count * strength < 1
        return
    assert 1 <= len(plan.timesteps) <= count
    assert plan.start + len(plan.timesteps) == count
    assert len(plan.sigmas) == count + 1
    assert np.all(np.diff(plan.sigmas) <= 0)
    assert 0 <= plan.sigmas[-1] <= plan.sigmas[0] <= 1


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_steps_along_the_true_velocity_reach_the_picture(strength: float) -> None:
    clean, noise = normal(1), normal(2)
    plan = FlowScheduler(DEV).plan(9, strength, 256)
    latents = plan.add_noise(clean, noise, 0)
    for index in range(len(plan.timesteps)):
        found = plan.step(noise - clean, latents, index, (), None)
        np.testing.assert_allclose(found.clean, clean, atol=1e-5)
        latents = found.latents
    np.testing.assert_allclose(latents, clean, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1001])
def test_step_count_out_of_range_is_rejected(steps: int) -> None:
    with pytest.raises(InvalidValue, match=f"num_inference_steps is {steps}; this model allows 1 to 1000"):
        FlowScheduler(DEV).plan(steps, 1.0, 256)


@pytest.mark.parametrize("key", ["stochastic_sampling", "invert_sigmas", "use_karras_sigmas", "use_beta_sigmas"])
def test_configuration_that_no_plan_follows_is_rejected(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        FlowScheduler(DEV | {key: True})
    with pytest.raises(ModelError, match="EulerDiscreteScheduler"):
        FlowScheduler({"_class_name": "EulerDiscreteScheduler"})
    with pytest.raises(ModelError, match="max_image_seq_len"):
        FlowScheduler({"max_image_seq_len": 256})
