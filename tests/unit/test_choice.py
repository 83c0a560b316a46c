"""The choice of a model's engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ovserve.engines.choice import choose_engine
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings
from tests.live import BUILTIN_PATH

PROFILE = read_profile(ModelSettings(name="shapes", path=Path(BUILTIN_PATH)))


def profile(family: str) -> ModelProfile:
    return dataclasses.replace(PROFILE, family=family)


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
