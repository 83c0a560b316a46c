"""The one shape of a model with one `resolution`, and what an NPU needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ovserve.engines.static_shapes import StaticShape
from ovserve.errors import InternalError, ModelError
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.pictures import directory_of
from tests.tinymodels import tiny_model

SIZE = Resolution(64, 96)


def shape_of(path: Path, **options: Any) -> StaticShape | None:
    settings = ModelSettings(name="m", path=path, engine="genai", **options)
    return StaticShape.of(read_profile(settings), settings)


def test_one_resolution_is_a_static_shape_with_the_models_guidance() -> None:
    assert shape_of(directory_of("sd"), resolution=(SIZE,)) == StaticShape(64, 96, 7.5)
    assert shape_of(directory_of("sd"), resolution=(SIZE,), guidance_scale=1.0) == StaticShape(64, 96, 1.0)
    assert shape_of(directory_of("sd"), resolution=(SIZE, Resolution(64, 64))) is None
    assert shape_of(directory_of("sd")) is None


def test_shape_is_the_working_size_of_the_resolution() -> None:
    profile = read_profile(ModelSettings(name="m", path=directory_of("sd")))
    size = Resolution(70, 90)
    found = shape_of(directory_of("sd"), resolution=(size,))
    assert found is not None
    assert Resolution(found.width, found.height) == profile.working_size(70, 90) != size


def test_guidance_is_that_of_the_engine() -> None:
    assert shape_of(tiny_model("zimage"), resolution=(SIZE,), guidance_scale=3.0) == StaticShape(64, 96, 4.0)


@pytest.mark.parametrize("device", ["NPU", "CPU NPU CPU", "NPU.0"])
def test_npu_needs_exactly_one_resolution(device: str) -> None:
    for sizes in ((), (SIZE, Resolution(64, 64))):
        with pytest.raises(ModelError, match="set `resolution` to exactly one size"):
            shape_of(directory_of("sd"), device=device, resolution=sizes)
    assert shape_of(directory_of("sd"), device=device, resolution=(SIZE,)) is not None


def test_model_with_references_has_no_static_shape() -> None:
    assert shape_of(tiny_model("klein"), resolution=(SIZE,)) is None
    with pytest.raises(ModelError, match="takes reference images"):
        shape_of(tiny_model("klein"), device="NPU", resolution=(SIZE,))


def test_other_shapes_never_reach_the_library() -> None:
    shape = StaticShape(64, 96, 7.5)
    shape.check(64, 96, 3.0)
    with pytest.raises(InternalError, match="compiled for 64x96"):
        shape.check(96, 64, 7.5)
    with pytest.raises(InternalError, match="guidance 1"):
        shape.check(64, 96, 1.0)
