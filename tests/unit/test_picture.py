"""The state of one picture: latents that are not finite are an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ovserve.engines.families.blend import Blend
from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.protocol import Conditions, Start
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.schedulers.schedulers import Scheduler
from ovserve.engines.stepwise.picture import Picture
from ovserve.errors import InternalError

SHAPE = (1, 4, 8, 8)
BAD = [np.nan, np.inf, -np.inf]


def array(value: float = 0.5, one: float | None = None) -> Array:
    """Return latents of one value, with another one in a single cell if it is given."""
    found = np.full(SHAPE, value, np.float32)
    if one is not None:
        found[0, 2, 3, 5] = one
    return found


def start(latents: Array, **values: Any) -> Start:
    return Start(Conditions({}, 1), latents, lambda shape: np.zeros(shape, np.float32), **values)


def picture(scheduler: str = "ddim", steps: int = 3) -> Picture:
    work = Work("job", 0, "text2image", "", "", 64, 64, steps, 1.0, 1.0, 0)
    document = {"num_train_timesteps": 1000, "skip_prk_steps": True}
    return Picture(work, Scheduler(scheduler, document).plan(steps, 1.0), RowGuidance())


def advance(made: Picture, prediction: Array) -> None:
    made.predictions = {0: prediction}
    made.advance()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "euler_ancestral", "lcm", "dpmpp_2m", "unipc"])
def test_step_to_latents_that_are_not_finite_is_an_error_that_names_it(scheduler: str, bad: float) -> None:
    made = picture(scheduler)
    made.begin(start(array()))
    advance(made, array())
    with pytest.raises(InternalError, match=rf"after step 2 of {made.steps}.*INFERENCE_PRECISION_HINT"):
        advance(made, array(one=bad))


@pytest.mark.parametrize("bad", BAD)
def test_part_of_the_latents_outside_the_mask_counts_too(bad: float) -> None:
    made = picture()
    blend = Blend(np.zeros((1, 1, 8, 8), np.float32), array(), array(one=bad))
    made.begin(start(array(), blend=blend))
    with pytest.raises(InternalError, match="after step 1 of 3"):
        advance(made, array())


@pytest.mark.parametrize("bad", BAD)
def test_last_step_to_a_result_that_is_not_finite_is_an_error(bad: float) -> None:
    made = picture(steps=1)
    made.begin(start(array()))
    plan = made.plan

    class Plan:
        def __getattr__(self, name: str) -> Any:
            return getattr(plan, name)

        def step(self, *values: Any) -> Any:
            return replace(plan.step(*values), decoded=array(one=bad))

    made.plan = Plan()
    with pytest.raises(InternalError, match="after step 1 of 1"):
        advance(made, array())


@pytest.mark.parametrize("bad", BAD)
def test_first_latents_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(InternalError, match="after encoding"):
        picture().begin(start(array(one=bad)))


def test_large_finite_latents_are_no_error() -> None:
    made = picture()
    made.begin(start(array(1e30)))
    advance(made, array(1e37))
    assert made.index == 1
