"""The choice of a model's engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ovserve.engines.choice import choose_engine
from ovserve.errors import ModelError
from ovserve.models.classes import CLASSES
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings
from tests.live import BUILTIN_PATH

PROFILE = read_profile(ModelSettings(name="shapes", path=Path(BUILTIN_PATH)))
UNETS = ["StableDiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionXLPipeline"]


def profile(class_name: str) -> ModelProfile:
    return dataclasses.replace(PROFILE, pipeline_class=class_name)


@pytest.mark.parametrize("class_name", UNETS)
@pytest.mark.parametrize("name", ["genai", "stepwise"])
def test_configured_engine_is_used(class_name: str, name: str) -> None:
    assert choose_engine(profile(class_name), ModelSettings(engine=name)) == (name, "configured")


@pytest.mark.parametrize("class_name", UNETS)
def test_auto_chooses_stepwise_for_unets_except_on_an_npu(class_name: str) -> None:
    assert choose_engine(profile(class_name), ModelSettings())[0] == "stepwise"
    assert choose_engine(profile(class_name), ModelSettings(device="CPU NPU CPU"))[0] == "genai"


def test_class_that_only_genai_serves_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class_name = "OnlyGenaiPipeline"
    row = dataclasses.replace(CLASSES["FluxPipeline"], stepwise=None)
    monkeypatch.setattr("ovserve.models.classes.CLASSES", {**CLASSES, class_name: row})
    assert choose_engine(profile(class_name), ModelSettings(engine="genai"))[0] == "genai"
    assert choose_engine(profile(class_name), ModelSettings(engine="auto"))[0] == "genai"
    with pytest.raises(ModelError, match=f"engine stepwise does not serve class {class_name}; set engine to auto or"):
        choose_engine(profile(class_name), ModelSettings(engine="stepwise"))
