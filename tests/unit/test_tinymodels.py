"""The packed models of the tests: their sizes, and that each has a profile or is refused for its class."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovserve.errors import ModelError
from ovserve.models.classes import CLASSES
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.tinymodels import PACKED, TINY_MODELS, copy_model, tiny_model

MAX_FILE_BYTES, MAX_TOTAL_BYTES = 2 * 1024 * 1024, 15 * 1024 * 1024


def test_fixtures_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in PACKED.parent.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= MAX_TOTAL_BYTES
    assert [path for path, size in sizes.items() if size > MAX_FILE_BYTES] == []


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tiny_model_is_complete(name: str) -> None:
    settings = ModelSettings(name=name, path=tiny_model(name))
    try:
        profile = read_profile(settings)
    except ModelError as error:  # a class that no engine serves yet
        refused = {row for row, served in CLASSES.items() if not served.engines}
        assert any(repr(row) in str(error) for row in refused), error
    else:
        assert profile.native == Resolution(64, 64)
        assert profile.component_tasks == {"text2image", "image2image", "inpainting"}


def test_copy_differs_in_the_named_values_only(tmp_path: Path) -> None:
    changes = {"model_index.json": {"is_distilled": False}, "scheduler/scheduler_config.json": {"shift": None}}
    directory = copy_model(tiny_model("klein"), tmp_path / "m", changes)
    assert "shift" not in (directory / "scheduler" / "scheduler_config.json").read_text("utf-8").replace("_shift", "")
    assert (directory / "vae_decoder" / "openvino_model.bin").is_file()
    assert not read_profile(ModelSettings(name="m", path=directory)).is_distilled
    assert read_profile(ModelSettings(name="m", path=tiny_model("klein"))).is_distilled
