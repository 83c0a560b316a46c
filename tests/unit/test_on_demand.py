"""Text encoders that are freed between prompts: the rule, and that pictures keep their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.stepwise.compiled import Components
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.engines.stepwise.on_demand import MIN_RELEASED_BYTES, OnDemand, is_released
from ovserve.models.profile import read_profile
from ovserve.models.weights import estimated_bytes
from ovserve.settings.loras import LoraSettings
from tests.loras import ORACLE, oracle_model
from tests.pictures import directory_of, drive, pixels_of, settings_of, work_of

SDXL = directory_of("sdxl")  # two text encoders


def test_rule_compares_the_models_memory_with_the_free_one() -> None:
    expected = estimated_bytes(SDXL)
    assert is_released("auto", SDXL, MIN_RELEASED_BYTES, expected - 1)
    assert not is_released("auto", SDXL, MIN_RELEASED_BYTES, expected)
    assert not is_released("auto", SDXL, MIN_RELEASED_BYTES - 1, 0)
    assert is_released("release", SDXL, 1, 1 << 60)
    assert not is_released("keep", SDXL, MIN_RELEASED_BYTES, 0)


def test_request_is_made_by_its_first_call_and_again_after_release() -> None:
    class Request:
        def infer(self, inputs: Any, **_: Any) -> Any:
            return inputs

        def get_tensor(self, name: str) -> str:
            return f"tensor {name}"

    made: list[Request] = []

    def make() -> Request:
        made.append(Request())
        return made[-1]

    request = OnDemand(make)
    assert not request.is_loaded
    for count in (1, 2):
        assert request.infer({"a": count}) == {"a": count}
        assert request.infer({"a": 0}) == {"a": 0}
        assert request.get_tensor("b") == "tensor b"
        assert len(made) == count
        request.release()
        assert not request.is_loaded


def load(directory: Path, choice: str, **options: Any) -> tuple[StepwiseEngine, list[Any]]:
    """Return a loaded engine, and the infer requests of its text encoders."""
    settings = settings_of(directory, text_encoder=choice, **options)
    profile = read_profile(settings)
    components = Components(profile, settings)
    engine = StepwiseEngine(profile, settings, components=components)
    engine.load(lambda _phase: None)
    return engine, [request for requests in components.requests for request in requests.text_encoders]


@pytest.mark.parametrize("streams", [1, 2])
def test_pictures_have_the_bytes_of_an_engine_that_keeps_its_text_encoders(streams: int) -> None:
    profile = read_profile(settings_of(SDXL))
    works = [work_of(profile, "text2image", place, num_inference_steps=2) for place in range(4)]
    pictures = {}
    for choice in ("keep", "release"):
        engine, found = load(SDXL, choice, streams=streams)
        assert len(found) == 2 * streams
        assert all(isinstance(each, OnDemand) for each in found) is (choice == "release")
        pictures[choice] = pixels_of(drive(engine, works))
        assert not any(each.is_loaded for each in found if isinstance(each, OnDemand))
        engine.close()
    for one, other in zip(*pictures.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_text_encoder_with_adapters_is_kept(tmp_path: Path) -> None:
    adapter = LoraSettings(alias="a", path=ORACLE / "a_peft.safetensors")
    engine, found = load(oracle_model(tmp_path), "release", lora=(adapter,))
    assert not any(isinstance(each, OnDemand) for each in found)
    engine.close()
