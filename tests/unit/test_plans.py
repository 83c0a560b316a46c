"""The stored plan of a model: what it changes, and when it is used, ignored or refused."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ovserve.api.replies import model_object
from ovserve.cli import check
from ovserve.cli.commands import ExitCode
from ovserve.errors import ModelError
from ovserve.fleet.desired import DesiredModel, desired_models
from ovserve.models.catalog import ServedModel
from ovserve.models.plans import PLAN_FILE, Plan, write_plan
from ovserve.models.profile import ModelProfile, builtin_directory, read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.worker.compiled_cache import cache_key
from tests.tinymodels import copy_model

F32 = Plan({"INFERENCE_PRECISION_HINT": "f32"}, {"vae_tile_px": 256})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the built-in model with a plan for the device CPU."""
    directory = copy_model(builtin_directory(), tmp_path / "m", {"unet/config.json": {}})
    write_plan(directory, "unet", "CPU", F32)
    return directory


def read(directory: Path, **options: Any) -> ModelProfile:
    return read_profile(ModelSettings(name="m", path=directory, **({"plan": "measured"} | options)))


def change(directory: Path, **changes: Any) -> None:
    path = directory / PLAN_FILE
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_stored_plan_is_used_only_with_the_option(model: Path) -> None:
    assert read(model).plan == F32
    assert read(model, plan="exact").plan is None


@pytest.mark.parametrize(
    ("given", "properties", "tile"),
    [
        ({}, {"INFERENCE_PRECISION_HINT": "f32"}, 256),
        ({"vae_tile_px": 512}, {"INFERENCE_PRECISION_HINT": "f32"}, 512),
        (
            {"plugin_config": '{"INFERENCE_PRECISION_HINT": "bf16", "X": 1}'},
            {"INFERENCE_PRECISION_HINT": "bf16", "X": 1},
            256,
        ),
    ],
)
def test_operators_options_win(given: dict[str, Any], properties: dict[str, Any], tile: int) -> None:
    found = F32.apply(ModelSettings(**given))
    assert (json.loads(found.plugin_config), found.vae_tile_px) == (properties, tile)


def test_default_plan_changes_nothing() -> None:
    assert Plan().apply(ModelSettings()) == ModelSettings()
    assert str(Plan()) == "default"


def test_missing_plan_is_an_error_that_names_the_command(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ModelError, match=r"none is stored for device 'GPU'; measure one with `ovserve tune .* --write`"
    ):
        read(model, device="GPU")
    (model / PLAN_FILE).unlink()
    assert check.run(["--model_path", str(model), "--plan", "measured"]) == ExitCode.USAGE
    assert "ovserve tune" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["graph", "openvino", "processor"])
def test_plan_that_was_measured_elsewhere_is_ignored_with_a_warning(
    model: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads((model / PLAN_FILE).read_text("utf-8"))
    change(model, measured_on=document["measured_on"] | {name: "another"})
    with caplog.at_level(logging.WARNING):
        assert read(model).plan is None
    assert f"measured with another {name}; measure one with `ovserve tune" in caplog.text


def test_changed_graph_makes_a_plan_stale(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = model / "unet" / "openvino_model.xml"
    content = graph.read_bytes()
    graph.unlink()
    graph.write_bytes(content + b"<!-- -->")
    assert read(model).plan is None
    assert "another graph" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"plans": []}',
        '{"plans": {"CPU": {"properties": {}, "options": {}}}}',
        '{"plans": {"CPU": {"properties": {"LOG_LEVEL": 1}, "options": {}}}, "measured_on": {}}',
        '{"plans": {"CPU": {"properties": {"INFERENCE_PRECISION_HINT": "f64"}, "options": {}}}, "measured_on": {}}',
        '{"plans": {"CPU": {"properties": {}, "options": {"vae_tile_px": -1}}}, "measured_on": {}}',
        '{"plans": {"CPU": {"properties": {}, "options": {"vae_tile_px": 63}}}, "measured_on": {}}',
        '{"plans": {"CPU": {"properties": {}, "options": {"port": 1}}}, "measured_on": {}}',
        '{"plans": {"CPU": {"properties": [], "options": {}}}, "measured_on": {}}',
        '{"plans": {"CPU": {"properties": {}, "options": {}}}, "measured_on": []}',
    ],
)
def test_invalid_file_is_refused(model: Path, content: str) -> None:
    (model / PLAN_FILE).write_text(content, "utf-8")
    with pytest.raises(ModelError, match=f"{PLAN_FILE}: not a stored plan"):
        read(model)


@pytest.mark.parametrize(("option", "is_replaced"), [("exact", False), ("measured", True)])
def test_another_plan_changes_what_workers_are_started_with_only_where_it_is_used(
    model: Path, option: str, is_replaced: bool
) -> None:
    settings = ModelSettings(name="m", path=model, plan=option)

    def record() -> DesiredModel:
        return desired_models(Settings(models=(settings,)), {"m": read_profile(settings)})["m"]

    before, cache = record(), model.parent / "cache"
    key = cache_key(before.profile, cache)
    write_plan(model, "unet", "CPU", Plan())
    after = record()
    assert (after.worker_key != before.worker_key) is is_replaced
    assert after.files == before.files
    assert cache_key(after.profile, cache) == key  # compiled models stay: OpenVINO tells properties apart


@pytest.mark.parametrize("value", ["1", "63", '"red"'])
def test_name_in_an_error_message_is_quoted_and_cut(model: Path, value: str) -> None:
    name = "line\nfeed" + "x" * 10_000
    properties = f'{{"properties": {{{json.dumps(name)}: {value}}}, "options": {{}}}}'
    (model / PLAN_FILE).write_text(f'{{"plans": {{"CPU": {properties}}}, "measured_on": {{}}}}', "utf-8")
    with pytest.raises(ModelError) as raised:
        read(model)
    assert "line\\nfeedxx" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_largest_group_is_one_that_openvino_takes(model: Path) -> None:
    largest = Plan({"DYNAMIC_QUANTIZATION_GROUP_SIZE": (1 << 63) - 1})
    write_plan(model, "unet", "CPU", largest)
    assert read(model).plan == largest
    write_plan(model, "unet", "CPU", Plan({"DYNAMIC_QUANTIZATION_GROUP_SIZE": 1 << 63}))
    with pytest.raises(ModelError, match="cannot be in a plan"):
        read(model)


def test_plan_is_not_written_through_a_link(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (model / f".{PLAN_FILE}.new").symlink_to(kept)
    write_plan(model, "unet", "CPU", Plan())
    monkeypatch.setattr("secrets.token_hex", lambda _count: "guessed")
    (model / f".{PLAN_FILE}.guessed.new").symlink_to(kept)
    with pytest.raises(FileExistsError):
        write_plan(model, "unet", "CPU", F32)
    assert (kept.read_text(), read(model).plan) == ("kept", Plan())


def test_plans_that_are_stored_at_once_are_all_kept(model: Path) -> None:
    devices = [f"GPU.{number}" for number in range(16)]
    with ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(lambda device: write_plan(model, "unet", device, Plan()), devices))
    assert sorted(json.loads((model / PLAN_FILE).read_text("utf-8"))["plans"]) == sorted(["CPU", *devices])
    assert not list(model.glob(f".{PLAN_FILE}*"))


def test_plans_of_other_devices_are_kept_unless_they_are_stale(model: Path) -> None:
    write_plan(model, "unet", "GPU", Plan())
    assert (read(model).plan, read(model, device="GPU").plan) == (F32, Plan())
    change(model, measured_on={})
    write_plan(model, "unet", "GPU", Plan())
    with pytest.raises(ModelError, match="none is stored for device 'CPU'"):
        read(model)


def test_plan_is_shown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run(["--model_path", str(model), "--plan", "measured"]) == ExitCode.OK
    shown = "INFERENCE_PRECISION_HINT=f32 vae_tile_px=256"
    assert f"measured plan: {shown}\n" in capsys.readouterr().out
    for plan, text in (("measured", shown), ("exact", "exact")):
        settings = ModelSettings(name="m", path=model, plan=plan)
        assert model_object(ServedModel(read_profile(settings), settings), "m", 0, {})["plan"] == text
