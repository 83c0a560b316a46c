"""What is known of the memory of devices, and what models take there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ovserve.fleet.desired import DesiredModel
from ovserve.fleet.devices import DeviceMemory
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Settings
from tests.live import BUILTIN_PATH

PROFILE = read_profile(ModelSettings(name="m", path=Path(BUILTIN_PATH)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, size in (("text_encoder", 300), ("unet", 2000), ("vae_decoder", 40), ("vae_encoder", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "openvino_model.bin").write_bytes(bytes(size))
    return tmp_path


def record(directory: Path, **options: Any) -> DesiredModel:
    profile = dataclasses.replace(PROFILE, directory=directory)
    return DesiredModel(profile, ModelSettings(name="m", path=directory, **options), Settings())


def known(**totals: int) -> DeviceMemory:
    found = DeviceMemory()
    found.note({name.replace("_", "."): [size, 1] for name, size in totals.items()})
    return found


@pytest.mark.parametrize(
    ("device", "needs"),
    [
        ("CPU", {}),
        ("GPU", {"GPU.0": 2350}),
        ("GPU.1", {"GPU.1": 2350}),
        ("auto", {"GPU.0": 2350}),
        ("CPU GPU.1 GPU", {"GPU.1": 2000, "GPU.0": 50}),
        ("AUTO", {}),
    ],
)
def test_weights_are_counted_on_the_devices_that_have_reported_their_memory(
    directory: Path, device: str, needs: dict[str, int]
) -> None:
    assert known(GPU_0=10_000, GPU_1=10_000).needs(record(directory, device=device)) == needs


def test_nothing_is_needed_where_no_memory_is_known_and_never_more_than_a_device_has(directory: Path) -> None:
    assert DeviceMemory().needs(record(directory, device="GPU")) == {}
    assert known(GPU_0=2000).needs(record(directory, device="GPU")) == {"GPU.0": 2000}


def test_workers_on_other_machines_use_no_device_of_this_one(directory: Path) -> None:
    assert known(GPU_0=10_000).needs(record(directory, device="GPU", pool="ray")) == {}


def test_reports_of_another_form_are_ignored() -> None:
    found = DeviceMemory()
    found.note({"GPU.0": [8, 1], "GPU.1": 8, "GPU.2": [8], "GPU.3": ["8", 1], "GPU.4": [0, 1], "GPU.5": [True, 1]})
    assert found.totals == {"GPU.0": 8}


def test_auto_counts_nothing_until_the_first_gpu_is_known(directory: Path) -> None:
    assert known(GPU_1=10_000).needs(record(directory, device="auto")) == {}
