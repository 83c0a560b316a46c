"""The choice of streams, threads and rows: which layouts are compiled and measured, and which is chosen."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovserve.engines.families.unet import run_unet
from ovserve.engines.stepwise import compiled, tuning
from ovserve.engines.stepwise.compiled import Components, Layout
from ovserve.engines.stepwise.tuning import Tuning, tune
from ovserve.models.profile import read_profile
from tests.pictures import directory_of, settings_of, with_scheduler

pytestmark = pytest.mark.engine

SD = directory_of("sd")


class Counted(Components):
    """Components on a CPU of four cores; `layouts` lists those the UNet was compiled for."""

    def cpu_threads(self) -> int:
        return 4

    def compile_denoiser(self, layout: Layout) -> list[object]:
        self.layouts = [*getattr(self, "layouts", []), layout]
        return super().compile_denoiser(layout)


def read_components(directory: Path = SD, **options: int) -> Counted:
    settings = settings_of(directory, **({"streams": 0, "threads": 0, "max_batch": 0} | options))
    components = Counted(read_profile(settings), settings)
    components.read()
    return components


def tuned(components: Components) -> Tuning:
    return tune(components, lambda _phase: None)


@pytest.fixture
def not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TINY_DENOISER_BYTES", 0)


def test_tiny_model_gets_single_threads_and_the_most_rows_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TINY_ROW_S", 60.0)
    monkeypatch.setattr(tuning, "MEASURE_S", 60.0)  # a single measurement would take this long
    started = time.monotonic()
    components = read_components()
    found = tuned(components)
    assert time.monotonic() - started < tuning.MEASURE_S
    assert (found.layout, found.rows) == (Layout(4, 1), max(tuning.ROW_CHOICES))
    assert components.layouts == [Layout(4, 1)]


def test_rows_of_a_tiny_model_keep_their_bits(
    crowded: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TINY_ROW_S", 60.0)
    assert tuned(read_components(crowded)).rows == 2
    assert warns_of_other_bits(caplog)


def test_small_model_that_is_not_tiny_is_compiled_once_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TINY_ROW_S", 0.0)
    monkeypatch.setattr(tuning, "CLEAR_GAIN", 1e-9)
    components = read_components()
    tuned(components)
    assert components.layouts == [Layout(4, 1), Layout(1, 4)]


@pytest.mark.usefixtures("not_tiny")
def test_large_model_is_compiled_once_and_gets_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LARGE_CALL_S", 0.0)
    components = read_components()
    assert tuned(components).layout == Layout(1, 4)
    components.compile(Layout(1, 4), lambda _phase: None)
    assert components.layouts == [Layout(1, 4)]


@pytest.mark.usefixtures("not_tiny")
def test_layouts_between_are_not_compiled_if_single_threads_win_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CLEAR_GAIN", 1e-9)
    components = read_components()
    tuned(components)
    assert components.layouts == [Layout(1, 4), Layout(4, 1)]


@pytest.mark.usefixtures("not_tiny")
def test_all_layouts_are_compiled_and_single_threads_kept_if_none_wins_clearly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "CLEAR_GAIN", 1e9)
    monkeypatch.setattr(tuning, "BUDGET_S", 600.0)  # also on a busy machine, where each measurement takes long
    components = read_components()
    assert tuned(components).layout == Layout(4, 1)
    assert components.layouts == [Layout(1, 4), Layout(4, 1), Layout(2, 2)]


@pytest.mark.usefixtures("not_tiny")
def test_small_model_gets_single_threads_and_short_calls_after_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BUDGET_S", 0.0)
    monkeypatch.setattr(tuning, "MEASURE_S", 60.0)  # a single measurement would take this long
    started = time.monotonic()
    found = tuned(read_components())
    assert time.monotonic() - started < tuning.MEASURE_S
    assert found.layout == Layout(4, 1)
    assert found.rows in tuning.ROW_CHOICES


def test_pinned_layout_is_the_only_one_compiled() -> None:
    components = read_components(streams=3, threads=1, max_batch=2)
    found = tuned(components)
    assert (found.layout, found.rows) == (Layout(3, 1), 4)
    assert components.layouts == [Layout(3, 1)]


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """Return a model whose UNet gives other bits in calls of more than two rows."""
    directory = with_scheduler("sd", tmp_path)
    (directory / "unet").unlink()
    (directory / "unet").mkdir()
    (directory / "unet" / "config.json").symlink_to(SD / "unet" / "config.json")
    model = ov.Core().read_model(SD / "unet" / "openvino_model.xml")
    sample = next(node for node in model.get_parameters() if "sample" in node.output(0).get_names())
    readers = list(sample.output(0).get_target_inputs())
    rows = ops.gather(ops.shape_of(sample), ops.constant(np.array(0)), ops.constant(np.array(0)))
    beyond = ops.subtract(ops.maximum(rows, ops.constant(np.array(2))), ops.constant(np.array(2)))
    moved = ops.add(sample, ops.convert(beyond, "f32"))
    for reader in readers:
        reader.replace_source_output(moved.output(0))
    ov.save_model(model, directory / "unet" / "openvino_model.xml", compress_to_fp16=True)
    return directory


def warns_of_other_bits(caplog: pytest.LogCaptureFixture) -> bool:
    return "differ from those of a call of 2" in caplog.text


@pytest.mark.parametrize(("max_batch", "is_warned"), [(1, False), (2, True), (4, True)])
def test_pinned_rows_with_other_bits_are_kept_with_a_warning(
    crowded: Path, caplog: pytest.LogCaptureFixture, max_batch: int, is_warned: bool
) -> None:
    assert tuned(read_components(crowded, streams=1, threads=1, max_batch=max_batch)).rows == 2 * max_batch
    assert warns_of_other_bits(caplog) is is_warned


def test_no_warning_if_pinned_rows_have_the_same_bits(caplog: pytest.LogCaptureFixture) -> None:
    tuned(read_components(streams=1, threads=1, max_batch=4))
    assert not warns_of_other_bits(caplog)


@pytest.mark.parametrize("limit", ["BUDGET_S", "LONGEST_CALL_S"])
def test_pinned_rows_are_not_checked_after_the_budget_or_if_calls_are_long(
    crowded: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(tuning, limit, 0.0)
    assert tuned(read_components(crowded, streams=1, threads=1, max_batch=2)).rows == 4
    assert not warns_of_other_bits(caplog)


@pytest.mark.usefixtures("not_tiny")
def test_heavy_unet_is_measured_on_a_quarter_of_the_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "HEAVY_DENOISER_BYTES", 0)
    monkeypatch.setattr(tuning, "LARGE_CALL_S", 0.0)
    components = read_components()
    small, times = components.feeds.quarter()
    assert times * small.of(1)["sample"].size == components.feeds.of(1)["sample"].size or times == 1
    found = tuned(components)
    assert found.splits
    assert found.timestep_per_row


@pytest.mark.parametrize("limit", [0, compiled.EXPORT_LIMIT_BYTES])
def test_every_slot_computes_the_same_bits(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(compiled, "EXPORT_LIMIT_BYTES", limit)
    components = read_components()
    first, *others = components.compile_denoiser(Layout(3, 1))
    feed = components.feeds.of(4)
    expected = run_unet(first, feed)
    for other in others:
        np.testing.assert_array_equal(run_unet(other, feed), expected)
