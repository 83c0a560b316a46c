"""Engine `stepwise`: loading, the choice of a layout, models it cannot drive, prompts and caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.errors import ModelError
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.pictures import (
    drive,
    image_of,
    load_stepwise,
    pixels_of,
    settings_of,
    with_scheduler,
    work_of,
)
from tests.stepwise import PROFILE, SD, Traced, Watched, load_watched, text, with_unet
from tests.tinymodels import tiny_model


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.engine.close()


def test_layout_is_measured_once_and_stored_in_the_cache(tmp_path: Path) -> None:
    free = {"streams": 0, "threads": 0, "max_batch": 0, "cache_dir": tmp_path}
    work = text(3)
    beats: list[str] = []
    pictures = []
    for _ in range(2):
        settings = settings_of(SD, **free)
        engine = StepwiseEngine(PROFILE, settings)
        engine.load(beats.append)
        assert engine.capacity >= 4
        pictures += pixels_of(drive(engine, [work]))
        engine.close()
    (kept,) = tmp_path.glob("ovserve-division-*.json")
    assert '"threads"' in kept.read_text()
    np.testing.assert_array_equal(*pictures)
    assert set(beats) == {"load", "warm-up"}


def test_idle_time_makes_the_kernels_of_shared_calls_and_no_more() -> None:
    engine, components = load_watched()
    rows: list[int] = []

    def seen(kind: str, inputs: Any) -> None:
        assert kind == "unet"
        rows.append(len(inputs["sample"]))

    expected = pixels_of(drive(engine, [text(3)]))
    components.seen = seen
    while engine.use_idle_time():
        pass
    components.seen = Watched.seen
    slots, most = engine.tuned["streams"], 2 * engine.tuned["max_batch"]
    assert sorted(rows) == sorted([*range(4, most + 1, 2)] * slots)
    np.testing.assert_array_equal(pixels_of(drive(engine, [text(3)]))[0], expected[0])
    engine.close()


def test_kernels_that_cannot_be_made_in_idle_time_end_nothing() -> None:
    engine, components = load_watched()

    def seen(kind: str, inputs: Any) -> None:
        if kind == "unet" and len(inputs["sample"]) > 2:
            raise RuntimeError("no memory for so many rows")

    components.seen = seen
    assert engine.use_idle_time()
    assert not engine.use_idle_time()
    assert len(pixels_of(drive(engine, [text(k) for k in range(4)]))) == 4
    engine.close()


def test_idle_time_is_not_used_beside_the_other_row_of_a_picture_that_failed() -> None:
    engine, components = load_watched()
    may_end, here = threading.Event(), threading.get_ident()

    def seen(kind: str, inputs: Any) -> None:
        if kind == "unet" and threading.get_ident() != here:
            may_end.wait(20)
        elif kind == "unet" and len(inputs["sample"]) == 1:
            raise MemoryError("no memory")

    components.seen = seen
    engine.admit(text(0, guidance_scale=5.0))
    while not (outcomes := engine.turn()):
        pass
    assert "no memory" in str(outcomes[0].error)
    is_used = engine.use_idle_time()
    may_end.set()
    assert not is_used
    engine.close()


def test_idle_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovserve.engines.stepwise.engine.IDLE_LIMIT_S", 0.0)
    engine, _ = load_watched()
    assert engine.use_idle_time()
    assert not engine.use_idle_time()
    engine.close()


def test_unreadable_stored_layout_is_measured_again(tmp_path: Path) -> None:
    load_stepwise(SD, cache_dir=tmp_path).close()
    (kept,) = tmp_path.glob("ovserve-division-*.json")
    kept.write_text("{")
    load_stepwise(SD, cache_dir=tmp_path).close()
    assert '"threads"' in kept.read_text()


@pytest.mark.usefixtures("leak_guard")
def test_closed_engine_leaves_nothing_behind() -> None:
    engine = load_stepwise(SD)
    pixels_of(drive(engine, [text(0, previews=frozenset({2}))]))
    engine.close()


def test_prompts_are_counted_and_cut_by_the_models_tokens(traced: Traced) -> None:
    engine = traced.engine
    assert engine.count_tokens("") == 2
    assert engine.count_tokens("a red circle") == 5
    long = "a red circle " * 60
    assert engine.count_tokens(long) == 182
    cut = engine.cut_prompt(long)
    assert long.startswith(cut)
    assert engine.count_tokens(cut) == 77
    assert engine.cut_prompt("a red circle") == "a red circle"


@pytest.mark.parametrize(
    "changes",
    [{"_class_name": "HeunDiscreteScheduler"}, {"prediction_type": "sample"}, {"beta_schedule": "squaredcos_cap_v2"}],
)
def test_unsupported_scheduler_configuration_is_rejected(tmp_path: Path, changes: dict[str, str]) -> None:
    directory = with_scheduler("sd", tmp_path, **changes)
    settings = settings_of(directory)
    with pytest.raises(ModelError):
        StepwiseEngine(read_profile(settings), settings).load(lambda _phase: None)


@pytest.mark.parametrize("device", ["NPU", "CPU NPU CPU"])
def test_npu_is_rejected(device: str) -> None:
    settings = ModelSettings(name="model", path=SD, device=device)
    with pytest.raises(ModelError) as caught:
        StepwiseEngine(PROFILE, settings).load(lambda _phase: None)
    assert "NPU" in str(caught.value)


def test_invalid_model_file_is_rejected(tmp_path: Path) -> None:
    directory = with_scheduler("sd", tmp_path)
    (directory / "unet").unlink()
    (directory / "unet").mkdir()
    (directory / "unet" / "config.json").write_text('{"in_channels": 4}')
    (directory / "unet" / "openvino_model.xml").write_text("<net/>")
    (directory / "unet" / "openvino_model.bin").write_bytes(b"")
    settings = settings_of(directory)
    with pytest.raises(ModelError) as caught:
        StepwiseEngine(read_profile(settings), settings).load(lambda _phase: None)
    assert "unet" in str(caught.value)


def test_failed_load_leaves_no_threads_behind() -> None:
    def fail(_call: Finished[Call]) -> None:
        raise KeyError("failed halfway")

    before = set(threading.enumerate())
    engine = StepwiseEngine(PROFILE, settings_of(SD), trace=fail)
    engine.close()
    with pytest.raises(KeyError):
        engine.load(lambda _phase: None)
    engine.close()
    assert not set(threading.enumerate()) - before


def test_prompts_and_images_are_encoded_once() -> None:
    engine, components = load_watched()
    counts = {"text_encoder": 0, "vae_encoder": 0, "unet": 0, "vae_decoder": 0}

    def seen(kind: str, _inputs: Any) -> None:
        counts[kind] += 1

    work = work_of(PROFILE, "image2image", 0, prompt="not encoded before", initial_image=image_of(64, 64, 9))
    components.seen = seen
    first, *others = (pixels_of(drive(engine, [replace(work, cancelled=threading.Event())]))[0] for _ in range(3))
    engine.close()
    assert (counts["text_encoder"], counts["vae_encoder"], counts["vae_decoder"]) == (1, 1, 3)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.fixture(scope="module")
def editor() -> Iterator[StepwiseEngine]:
    """Yield an engine with a transformer that edits by reference."""
    engine = load_stepwise(tiny_model("kontext"), streams=1)
    yield engine
    engine.close()


def edit_of(*references: Pixels, **options: Any) -> Work:
    profile = read_profile(settings_of(tiny_model("kontext")))
    values: dict[str, Any] = {"size": Resolution(64, 64), "num_inference_steps": 1, "guidance_scale": 1.0}
    images = tuple(each.copy() for each in references)
    return work_of(profile, "image2image", 0, reference_images=images, **values | options)


def test_references_are_encoded_once_by_their_content(editor: StepwiseEngine) -> None:
    first, second, third = (image_of(64, 64, seed) for seed in (21, 22, 23))
    before = editor.counts()
    requests = [(first, second), (second, first), (first, third, second), (first, second)]
    pictures = [pixels_of(drive(editor, [edit_of(*references)]))[0] for references in requests]
    counts = editor.counts()
    assert (counts.image_misses - before.image_misses, counts.image_hits - before.image_hits) == (3, 6)
    assert np.array_equal(pictures[0], pictures[3])
    assert not np.array_equal(pictures[0], pictures[1])


def test_cancelled_picture_of_a_transformer_stops_after_the_current_step(editor: StepwiseEngine) -> None:
    steps = []

    def on_step(step: int, _steps: int) -> None:
        steps.append(step)
        if step == 2:
            work.cancelled.set()

    work = edit_of(image_of(64, 64, 24), num_inference_steps=6, on_step=on_step)
    other = edit_of(image_of(64, 64, 25), num_inference_steps=6)
    [alone] = pixels_of(drive(editor, [other]))
    cancelled, kept = drive(editor, [work, replace(other, cancelled=threading.Event())])
    assert (cancelled.pixels, cancelled.error, steps) == (None, None, [1, 2])
    np.testing.assert_array_equal(pixels_of([kept])[0], alone)


def one_timestep(model: Any) -> Any:
    model.reshape({"timestep": ov.PartialShape([1])})
    return model


def first_timestep_only(model: Any) -> Any:
    # A graph that takes a vector and uses its first value for all rows.
    parameter = next(node for node in model.get_parameters() if "timestep" in node.output(0).get_names())
    readers = list(parameter.output(0).get_target_inputs())
    first = ops.gather(parameter, ops.constant(np.array([0], np.int64)), ops.constant(np.array(0, np.int64)))
    for reader in readers:
        reader.replace_source_output(first.output(0))
    model.validate_nodes_and_infer_types()
    return model


@pytest.mark.parametrize("change", [one_timestep, first_timestep_only])
def test_export_with_one_timestep_for_all_rows_makes_the_same_pictures(
    traced: Traced, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    calls: list[Finished[Call]] = []
    engine = load_stepwise(with_unet(tmp_path, change), trace=calls.append)
    works = [text(k, num_inference_steps=3 + 2 * k) for k in range(4)]
    expected = pixels_of(traced.drive(works))
    calls.clear()
    for first, second in zip(expected, pixels_of(drive(engine, works)), strict=True):
        np.testing.assert_array_equal(first, second)
    engine.close()
    if change is first_timestep_only:
        for call in calls:
            if call.subject.kind == "denoise":
                assert len({row.picture.plan.timesteps[row.index] for row in call.subject.rows}) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: (
            model.reshape({"sample": [2, 4, 8, 8], "timestep": [2], "encoder_hidden_states": [2, 77, 16]}) or model
        ),
        lambda model: model.input("encoder_hidden_states").get_tensor().set_names({"context"}) or model,
    ],
    ids=["static rows", "unknown input"],
)
def test_unet_with_static_rows_or_unknown_inputs_is_rejected(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    settings = settings_of(with_unet(tmp_path, change))
    with pytest.raises(ModelError, match="unet"):
        StepwiseEngine(read_profile(settings), settings).load(lambda _phase: None)
