"""What workers are expected to take: files first, then measurements, which survive a restart and any damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovserve.errors import SettingsError
from ovserve.fleet.budget import check_budget
from ovserve.fleet.desired import DesiredModel
from ovserve.fleet.estimates import Estimates
from ovserve.models.weights import estimated_bytes, weights_bytes
from ovserve.settings.options import ModelSettings, Settings
from tests.toys import toy_profile

MIB = 1 << 20


def record_of(directory: Path, size: int = 3 * MIB, files: str = "f", **options: object) -> DesiredModel:
    (directory / "unet").mkdir(parents=True, exist_ok=True)
    with (directory / "unet" / "openvino_model.bin").open("wb") as weights:
        weights.truncate(size)
    profile = dataclasses.replace(toy_profile("m"), directory=directory)
    return DesiredModel(profile, ModelSettings(name="m", **options), Settings(), files)  # type: ignore[arg-type]


def test_estimate_grows_with_the_weight_files(tmp_path: Path) -> None:
    small, large = record_of(tmp_path / "s"), record_of(tmp_path / "l", 1000 * MIB)
    assert weights_bytes(tmp_path / "s") == 3 * MIB
    assert weights_bytes(tmp_path / "missing") == 0
    estimates = Estimates()
    assert estimates.worker_bytes(small) == estimated_bytes(tmp_path / "s")
    assert estimates.worker_bytes(large) - estimates.worker_bytes(small) > 2 * 997 * MIB


def test_measurement_replaces_the_estimate_and_survives_a_restart(tmp_path: Path) -> None:
    record, path = record_of(tmp_path / "m"), tmp_path / "cache" / "measured.json"
    first = Estimates(path)
    first.note(record, 100 * MIB, 2.5)
    first.write()
    second = Estimates(path)
    assert (second.worker_bytes(record), second.load_s(record)) == (100 * MIB, 2.5)
    assert second.worker_bytes(dataclasses.replace(record, files="changed")) == estimated_bytes(tmp_path / "m")
    assert second.load_s(dataclasses.replace(record, model=ModelSettings(name="m", device="GPU"))) == 0
    assert second.load_s(dataclasses.replace(record, model=ModelSettings(name="m", vae_tile_px=256))) == 0


def test_peak_grows_while_a_worker_runs_and_is_corrected_when_it_has_ended(tmp_path: Path) -> None:
    record, estimates = record_of(tmp_path), Estimates()
    for size, expected in ((200, 200), (100, 200), (300, 300)):
        estimates.note(record, size * MIB)
        assert estimates.worker_bytes(record) == expected * MIB
    estimates.note(record, 150 * MIB, is_final=True)
    assert estimates.worker_bytes(record) == 150 * MIB


def test_answers_read_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor asks in each of its turns, so hundreds of times a second under load."""
    record, estimates = record_of(tmp_path), Estimates()
    known = estimates.worker_bytes(record)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a file is read")

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    monkeypatch.setattr("os.scandir", fail)
    assert (estimates.worker_bytes(record), estimates.load_s(record)) == (known, 0.0)


def test_options_that_no_worker_reads_share_a_measurement(tmp_path: Path) -> None:
    estimates = Estimates()
    estimates.note(record_of(tmp_path), 7 * MIB)
    assert estimates.worker_bytes(record_of(tmp_path, queue_limit=3, load="lazy")) == 7 * MIB


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_file_of_measurements_is_read_or_ignored(tmp_path: Path, content: bytes) -> None:
    record, path = record_of(tmp_path / "m"), tmp_path / "measured.json"
    path.write_bytes(content)
    assert Estimates(path).worker_bytes(record) > 0


def test_directory_that_cannot_be_written_costs_only_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    estimates = Estimates(tmp_path / "file" / "measured.json")
    estimates.note(record_of(tmp_path / "m"), MIB)
    estimates.write()
    assert "measured memory not stored" in caplog.text


def budget(tmp_path: Path, *models: ModelSettings, mib: int, size: int = 100 * MIB) -> list[str]:
    profiles = {model.name: record_of(tmp_path / model.name, size).profile for model in models}
    return check_budget(Settings(models=models, memory_budget_bytes=mib * MIB), profiles)


def test_model_whose_weights_exceed_the_budget_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    lazy = ModelSettings(name="m", load="lazy")
    with pytest.raises(SettingsError, match=r"m: its weight files take 100 MiB, more than .* \(99 MiB\)"):
        budget(tmp_path, lazy, mib=99)
    assert "may take" in budget(tmp_path, lazy, mib=100)[0]
    assert budget(tmp_path, lazy, mib=1000) == []
    assert budget(tmp_path, lazy, mib=0) == []


def test_pinned_models_that_exceed_the_budget_together_are_refused(tmp_path: Path) -> None:
    models = (ModelSettings(name="a"), ModelSettings(name="b"))
    with pytest.raises(SettingsError, match=r"take 200 MiB \(a 100 MiB \+ b 100 MiB\), more than"):
        budget(tmp_path, *models, mib=199)
    assert len(budget(tmp_path, models[0], dataclasses.replace(models[1], pinned=False), mib=199)) == 2
