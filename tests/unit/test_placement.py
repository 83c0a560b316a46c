"""The option `placement`."""

from __future__ import annotations

import pytest

from ovserve.errors import SettingsError
from ovserve.settings.placement import Placement, parse_placement
from ovserve.settings.sources import load_settings


@pytest.mark.parametrize(
    ("text", "placement"),
    [
        ("", Placement(1.0, 0, {})),
        ("cpus=4", Placement(4.0, 0, {})),
        ("cpus=0.5, memory=8GiB,ovserve_gpu=1", Placement(0.5, 8 << 30, {"ovserve_gpu": 1.0})),
        ("memory=1000", Placement(1.0, 1000, {})),
        ("cpus=0.0001,ovserve_gpu=0.250000", Placement(0.0001, 0, {"ovserve_gpu": 0.25})),
        ("memory=1.00001GiB", Placement(1.0, 1073752561, {})),
    ],
)
def test_placement_is_parsed(text: str, placement: Placement) -> None:
    assert parse_placement(text) == placement


@pytest.mark.parametrize(
    "text",
    ["cpus", "cpus=x", "cpus=-1", "gpu=1GiB", "cpus=9999999", "CPU=1", "GPU=1", "=1", "cpus=0.00001", "a=1.12345"],
)
def test_wrong_placement_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"NAME=NUMBER|at most|resource of Ray|decimals"):
        parse_placement(text)
    with pytest.raises(SettingsError, match="placement"):
        load_settings({"name": "m", "placement": text}, {})


def test_default_pool_is_that_of_models_without_one() -> None:
    assert load_settings({"default_pool": "ray"}, {}).models[0].pool == "ray"
    assert load_settings({"default_pool": "ray", "pool": "local"}, {}).models[0].pool == "local"
    assert not load_settings({}, {}).models[0].pool
