"""Every spelling of the CPU as a device gives the same picture, with both engines."""

from __future__ import annotations

import numpy as np
import pytest

from ovserve.engines.protocol import Pixels, warm_up_work
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings
from ovserve.worker.main import create_engine
from tests.pictures import directory_of


def picture(engine_name: str, device: str) -> Pixels:
    known = {"name": "m", "path": directory_of("sd"), "streams": 1, "threads": 1, "max_batch": 2}
    settings = ModelSettings(**known, device=device, engine=engine_name)
    profile = read_profile(settings)
    engine, _ = create_engine(profile, settings)
    engine.load(lambda _: None)
    try:
        engine.admit(warm_up_work(profile, num_inference_steps=2))
        outcomes = engine.turn()
        while not outcomes:
            outcomes = engine.turn()
        pixels = outcomes[0].pixels
        assert pixels is not None
        return pixels
    finally:
        engine.close()


@pytest.mark.parametrize("engine", ["stepwise", "genai"])
def test_device_names_that_mean_the_cpu_give_the_same_picture(engine: str) -> None:
    expected = picture(engine, "CPU")
    for device in ("auto", "AUTO", "HETERO:CPU", "CPU CPU CPU"):
        assert np.array_equal(picture(engine, device), expected), device
