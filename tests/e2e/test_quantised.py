"""Exports with int8 and int4 weights: both engines give the same bits, close to the float model's picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.genai import GenaiEngine
from ovserve.engines.protocol import Pixels
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.models.profile import read_profile
from tests.pictures import directory_of, settings_of, work_of
from tests.quantised import quantised_copy
from tests.tinymodels import tiny_model

ENGINES: dict[str, Any] = {"genai": GenaiEngine, "stepwise": StepwiseEngine}
# Mean difference, in levels of 255, from the float model's picture: between rounding and noise.
LARGEST_DIFFERENCE = {8: 8.0, 4: 40.0}


def picture(directory: Path, engine: str, mode: str) -> Pixels:
    """Return the picture that an engine makes of fixed work."""
    settings = dataclasses.replace(settings_of(directory), engine=engine)
    profile = read_profile(settings)
    made = ENGINES[engine](profile, settings)
    made.load(lambda _phase: None)
    try:
        made.admit(work_of(profile, mode, num_inference_steps=3))
        while True:
            for outcome in made.turn():
                assert outcome.pixels is not None, outcome.error
                return np.array(outcome.pixels)
    finally:
        made.close()


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.heavy)])
def test_quantised_unet_gives_the_same_bits_with_both_engines(tmp_path: Path, bits: int) -> None:
    directory, count = quantised_copy(directory_of("sd"), tmp_path / "m", "unet", bits)
    assert count > 10
    files = [path / "unet" / "openvino_model.bin" for path in (directory, directory_of("sd"))]
    assert files[0].stat().st_size < files[1].stat().st_size
    found = [picture(directory, engine, "image2image") for engine in ENGINES]
    assert np.array_equal(*found)
    exact = picture(directory_of("sd"), "stepwise", "image2image")
    difference = np.abs(found[0].astype(int) - exact).mean()
    assert 0 < difference < LARGEST_DIFFERENCE[bits]


@pytest.mark.heavy
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("model", "engine"), [("klein", "genai"), ("klein", "stepwise"), ("zimage", "genai")])
def test_quantised_transformer_is_served(tmp_path: Path, model: str, engine: str, bits: int) -> None:
    directory, count = quantised_copy(tiny_model(model), tmp_path / "m", "transformer", bits)
    assert count > 5
    found = picture(directory, engine, "text2image")
    exact = picture(tiny_model(model), engine, "text2image")
    assert 0 < np.abs(found.astype(int) - exact).mean() < 2 * LARGEST_DIFFERENCE[bits]
