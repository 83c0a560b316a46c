from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovserve.engines.protocol import Outcome, Preview, Work
from ovserve.engines.stepwise.compiled import Components, Layout, Requests
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.errors import InternalError, InvalidValue, ModelError
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.pictures import (
    directory_of,
    drive,
    image_of,
    load_stepwise,
    pixels_of,
    settings_of,
    with_scheduler,
    work_of,
)

SD = directory_of("sd")
PROFILE: ModelProfile = read_profile(settings_of(SD))


class Traced:
    """An engine and the calls it has made."""

    def __init__(self) -> None:
        self.calls: list[Finished[Call]] = []
        self.engine = load_stepwise(SD, trace=self.calls.append)

    def drive(self, works: list[Work]) -> list[Outcome]:
        self.calls.clear()
        return drive(self.engine, works)

    @property
    def denoising(self) -> list[Call]:
        return [call.subject for call in self.calls if call.subject.kind == "denoise"]


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.engine.close()


def text(place: int = 0, **options: Any) -> Work:
    return work_of(PROFILE, "text2image", place, **options)


# --- sharing, joining, leaving ----------------------------------------------------------------------------------------


def test_two_requests_at_different_timesteps_share_one_call(traced: Traced) -> None:
    traced.drive([text(k, num_inference_steps=5 + 3 * k) for k in range(6)])
    shared = [call for call in traced.denoising if len(call.pictures) > 1]
    assert any(
        len({picture.plan.timesteps[row.index] for row in call.rows for picture in [row.picture]}) > 1
        for call in shared
    )
    assert max(len(call.rows) for call in traced.denoising) <= 8  # max_batch 4, two rows for each


def test_a_short_job_that_comes_in_behind_a_long_one_leaves_before_it(traced: Traced) -> None:
    ended: list[str] = []
    steps: list[int] = []
    long = text(0, job="long", num_inference_steps=50, on_step=lambda step, _: steps.append(step))
    traced.engine.admit(long)
    while len(steps) < 5:
        traced.engine.turn()
    began = len(steps)
    traced.engine.admit(text(1, job="short", num_inference_steps=4))
    while "short" not in ended:
        ended += [outcome.work.job for outcome in traced.engine.turn()]
    assert ended == ["short"]
    # It got its share of the device at once: the long one made about as many steps meanwhile, encoding and decoding aside.
    assert len(steps) - began <= 20
    while "long" not in ended:
        ended += [outcome.work.job for outcome in traced.engine.turn()]
    assert len(steps) == 51  # PNDM


@pytest.fixture(scope="module", params=[2, 1])
def narrow(request: pytest.FixtureRequest) -> Iterator[StepwiseEngine]:
    """An engine whose calls hold one picture each, or one row each in two slots."""
    engine = load_stepwise(SD, streams=request.param, max_batch=1)
    yield engine
    engine.close()


def test_a_short_job_goes_ahead_of_a_long_one(narrow: StepwiseEngine) -> None:
    order: list[str] = []

    def follow(name: str) -> Callable[[int, int], None]:
        return lambda _step, _steps: order.append(name)

    long = text(0, job="long", num_inference_steps=50, on_step=follow("long"))
    narrow.admit(long)
    while len(order) < 5:
        narrow.turn()
    narrow.admit(text(1, job="short", num_inference_steps=10, on_step=follow("short")))
    while order.count("short") < 11:  # PNDM
        narrow.turn()
    between = order[order.index("short") :]
    assert between.count("long") <= 6  # one for each two of the short one's; in turn they would be as many
    long.cancelled.set()
    while narrow.phase() != "idle":
        narrow.turn()


def test_a_long_job_keeps_its_pace_however_many_short_ones_go_ahead(narrow: StepwiseEngine) -> None:
    steps = {"long": 0, "short": 0}

    def follow(name: str) -> Callable[[int, int], None]:
        def on_step(_step: int, _steps: int) -> None:
            steps[name] += 1

        return on_step

    narrow.admit(text(0, job="long", num_inference_steps=40, on_step=follow("long")))
    in_flight, admitted = 1, 0
    while steps["long"] < 41:
        while in_flight < narrow.capacity:
            admitted += 1
            narrow.admit(text(admitted, job="short", num_inference_steps=4, on_step=follow("short")))
            in_flight += 1
        in_flight -= len(narrow.turn())
    # Three others take their turns with it; it lets nobody else by.
    assert steps["short"] <= 41 * 4
    while in_flight:
        in_flight -= len(narrow.turn())


def test_a_long_job_does_not_starve_behind_short_ones(traced: Traced) -> None:
    engine, ended = traced.engine, list[str]()
    engine.admit(text(0, job="long", num_inference_steps=20))
    in_flight, admitted = 1, 0
    while "long" not in ended:
        while in_flight < engine.capacity:
            admitted += 1
            engine.admit(text(admitted, job="short", num_inference_steps=2))
            in_flight += 1
        outcomes = engine.turn()
        in_flight -= len(outcomes)
        ended += [outcome.work.job for outcome in outcomes]
        # Pictures take turns: while the long one makes 21 steps, each of the other places makes about as many.
        assert len(ended) < 21 * engine.capacity
    while in_flight:
        in_flight -= len(engine.turn())


def test_work_that_is_to_run_alone_shares_no_call(traced: Traced) -> None:
    works = [text(k, alone=k == 2) for k in range(5)]
    pixels_of(traced.drive(works))
    for call in traced.denoising:
        assert len(call.pictures) == 1 or works[2] not in [picture.work for picture in call.pictures]


def test_a_lone_picture_takes_a_slot_for_each_row(traced: Traced) -> None:
    pixels_of(traced.drive([text(0)]))
    assert {len(call.rows) for call in traced.denoising} == {1}
    for first, second in zip(*[iter(call for call in traced.calls if call.subject.kind == "denoise")] * 2, strict=True):
        assert first.slot != second.slot
        assert {row.place for call in (first, second) for row in call.subject.rows} == {0, 1}


@pytest.mark.parametrize("options", [{"streams": 1}, {"streams": 3}, {"max_batch": 1}, {"streams": 1, "max_batch": 16}])
def test_no_division_of_the_device_and_no_load_changes_a_picture(traced: Traced, options: dict[str, int]) -> None:
    works = [
        work_of(PROFILE, mode, k, num_inference_steps=3 + k) for k, mode in enumerate(["text2image", "inpainting"] * 3)
    ]
    alone = [pixels_of(traced.drive([work]))[0] for work in works]
    together = pixels_of(traced.drive(works))
    other = load_stepwise(SD, **options)
    elsewhere = pixels_of(drive(other, works))
    other.close()
    for first, second, third in zip(alone, together, elsewhere, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


def test_an_idle_engine_has_nothing_to_say(traced: Traced) -> None:
    assert traced.engine.phase() == "idle"
    assert list(traced.engine.turn()) == []


def test_phases_follow_a_picture(traced: Traced) -> None:
    seen = []
    traced.engine.admit(text(0, prompt="a phase of its own"))
    while (phase := traced.engine.phase()) != "idle":
        seen.append(phase)
        traced.engine.turn()
    assert list(dict.fromkeys(seen)) == ["encode", "denoise", "decode"]


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_a_cancelled_picture_stops_within_a_step(traced: Traced) -> None:
    steps: list[int] = []
    works = [text(k, num_inference_steps=30) for k in range(3)]

    def after_step(step: int, _steps: int) -> None:
        steps.append(step)
        if step == 7:
            works[1].cancelled.set()

    works[1].on_step = after_step
    first, second, third = traced.drive(works)
    assert steps == list(range(1, 8))
    assert (second.pixels, second.error) == (None, None)
    assert first.pixels is not None
    assert third.pixels is not None


@pytest.mark.parametrize("when", ["before", "last step"])
def test_a_picture_cancelled_at_either_end_gives_nothing(traced: Traced, when: str) -> None:
    work = text(0, num_inference_steps=2)
    if when == "before":
        work.cancelled.set()
    else:
        work.on_step = lambda step, steps: work.cancelled.set() if step == steps else None
    (outcome,) = traced.drive([work])
    assert (outcome.pixels, outcome.error) == (None, None)
    assert len(traced.denoising) == (
        0 if when == "before" else 6
    )  # PNDM takes three steps for two, a call for each row


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheduler": "heun"}, InvalidValue),
        ({"mode": "image2image", "strength": 0.0, "scheduler": "ddim"}, InvalidValue),
        ({"num_inference_steps": 1001}, InvalidValue),
        ({"mode": "outpainting"}, InvalidValue),
        ({"size": Resolution(64, 60)}, InternalError),
        ({"size": Resolution(72, 72)}, InternalError),  # 9 latents, which the UNet cannot halve
    ],
)
def test_work_that_cannot_be_done_ends_alone(traced: Traced, options: dict[str, Any], error: type[Exception]) -> None:
    mode = options.pop("mode", "text2image")
    works = [text(0), work_of(PROFILE, mode, 1, **options), text(2)]
    first, second, third = traced.drive(works)
    assert isinstance(second.error, error)
    pixels_of([first, third])


class Wrapped:
    """An infer request that reports each call before it runs; what the report raises is raised by the call."""

    def __init__(self, request: Any, report: Callable[[Any], None]) -> None:
        self._request, self._report = request, report

    def infer(self, inputs: Any, **options: Any) -> Any:
        self._report(inputs)
        return self._request.infer(inputs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class Watched(Components):
    """Components whose infer requests report to `seen(kind, inputs)`."""

    seen: Callable[[str, Any], None] = staticmethod(lambda _kind, _inputs: None)

    def compile(self, layout: Layout, beat: Callable[[str], None]) -> None:
        super().compile(layout, beat)

        def watched(kind: str, request: Any) -> Any:
            return Wrapped(request, lambda inputs: self.seen(kind, inputs))

        self.requests = [
            Requests(
                unet=watched("unet", each.unet),
                text_encoders=tuple(watched("text_encoder", request) for request in each.text_encoders),
                vae_encoder=watched("vae_encoder", each.vae_encoder),
                vae_decoder=watched("vae_decoder", each.vae_decoder),
            )
            for each in self.requests
        ]


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[StepwiseEngine, Watched]]:
    settings = settings_of(SD)
    components = Watched(PROFILE, settings)
    engine = StepwiseEngine(PROFILE, settings, components=components)
    engine.load(lambda _phase: None)
    yield engine, components
    engine.close()


def test_a_call_that_fails_is_tried_again_for_each_picture_alone(watched: tuple[StepwiseEngine, Watched]) -> None:
    engine, components = watched
    works = [text(k) for k in range(4)]
    expected = pixels_of(drive(engine, works))

    def seen(kind: str, inputs: Any) -> None:
        if kind == "unet" and len(inputs["sample"]) > 2:
            raise RuntimeError("no memory for so many rows")

    components.seen = seen
    found = pixels_of(drive(engine, works))
    components.seen = Watched.seen
    for first, second in zip(expected, found, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", ["text_encoder", "vae_encoder", "unet", "vae_decoder"])
def test_a_picture_whose_own_calls_fail_ends_with_an_error(watched: tuple[StepwiseEngine, Watched], kind: str) -> None:
    engine, components = watched

    def seen(seen_kind: str, _inputs: Any) -> None:
        # Not when the device is asked to prove itself, which happens in its own thread.
        if seen_kind == kind and threading.current_thread().name.startswith("slot"):
            raise RuntimeError("the device is gone")

    works = [
        work_of(
            PROFILE,
            "image2image",
            k,
            prompt=f"fails in the {kind}",
            initial_image=image_of(64, 64, len(kind) + 100 * k),
        )
        for k in range(2)
    ]
    components.seen = seen
    outcomes = drive(engine, works)
    components.seen = Watched.seen
    assert [type(outcome.error) for outcome in outcomes] == [InternalError, InternalError]
    assert "the device is gone" in str(outcomes[0].error)
    pixels_of(drive(engine, works))


@pytest.mark.parametrize("kind", ["vae_encoder", "unet", "vae_decoder"])
def test_a_device_that_has_failed_ends_the_engine_and_not_one_picture_after_the_other(kind: str) -> None:
    settings = settings_of(SD)
    components = Watched(PROFILE, settings)
    engine = StepwiseEngine(PROFILE, settings, components=components)
    engine.load(lambda _phase: None)

    def seen(seen_kind: str, _inputs: Any) -> None:
        if seen_kind == kind:
            raise RuntimeError("the device is gone")

    components.seen = seen
    with pytest.raises(RuntimeError, match="the device is gone"):
        drive(engine, [work_of(PROFILE, "image2image", 0, initial_image=image_of(64, 64, 3))])
    engine.close()


def test_an_engine_that_failed_to_load_leaves_no_threads_behind() -> None:
    def fail(_call: Finished[Call]) -> None:
        raise KeyError("half loaded")

    before = set(threading.enumerate())
    engine = StepwiseEngine(PROFILE, settings_of(SD), trace=fail)
    engine.close()
    with pytest.raises(KeyError):
        engine.load(lambda _phase: None)
    engine.close()
    assert not set(threading.enumerate()) - before


def test_prompts_and_images_are_encoded_once(watched: tuple[StepwiseEngine, Watched]) -> None:
    engine, components = watched
    counts = {"text_encoder": 0, "vae_encoder": 0, "unet": 0, "vae_decoder": 0}

    def seen(kind: str, _inputs: Any) -> None:
        counts[kind] += 1

    work = work_of(PROFILE, "image2image", 0, prompt="seen for the first time", initial_image=image_of(64, 64, 9))
    components.seen = seen
    first, *others = (pixels_of(drive(engine, [replace(work, cancelled=threading.Event())]))[0] for _ in range(3))
    components.seen = Watched.seen
    assert (counts["text_encoder"], counts["vae_encoder"], counts["vae_decoder"]) == (1, 1, 3)
    for other in others:
        np.testing.assert_array_equal(first, other)


# --- previews ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin() -> Iterator[StepwiseEngine]:
    engine = load_stepwise(directory_of("builtin"), "bf16")
    yield engine
    engine.close()


@pytest.mark.parametrize("mode", ["text2image", "image2image", "inpainting"])
def test_previews_come_in_order_and_approach_the_picture(builtin: StepwiseEngine, mode: str) -> None:
    profile = read_profile(settings_of(directory_of("builtin")))
    got: list[Preview] = []
    works = [
        work_of(
            profile,
            mode,
            k,
            num_inference_steps=12,
            previews=frozenset({3, 6, 9}),
            on_preview=got.append if k == 0 else None,
        )
        for k in range(3)
    ]
    picture = pixels_of(drive(builtin, works))[0]
    assert [preview.step for preview in got] == sorted(preview.step for preview in got)
    assert {preview.step for preview in got} <= {3, 6, 9}
    assert got
    for preview in got:
        assert preview.pixels.dtype == np.uint8
        assert preview.pixels.shape[2] == 3
    shrink = picture.shape[0] // got[-1].pixels.shape[0]
    small = picture.reshape(-1, shrink, picture.shape[1] // shrink, shrink, 3).mean(axis=(1, 3))
    distances = [np.abs(preview.pixels - small).mean() for preview in got]
    noise = np.abs(np.random.default_rng(0).integers(0, 256, small.shape) - small).mean()
    assert distances[-1] < noise / 3
    assert distances[-1] == min(distances)
    # Beside a mask most of the picture is right from the start, and what is painted in may change its mind once.
    assert mode == "inpainting" or distances == sorted(distances, reverse=True)


def test_no_preview_comes_after_the_picture(traced: Traced) -> None:
    ended = threading.Event()
    late: list[int] = []

    def on_preview(preview: Preview) -> None:
        if ended.is_set():
            late.append(preview.step)

    for k in range(5):
        ended.clear()
        pixels_of(traced.drive([text(k, previews=frozenset(range(1, 6)), on_preview=on_preview)]))
        ended.set()
    assert late == []


def test_a_preview_that_raises_does_not_touch_the_picture(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    def on_preview(_preview: Preview) -> None:
        raise ValueError("nobody looks")

    work = text(0, previews=frozenset({1, 2}), on_preview=on_preview)
    expected = pixels_of(traced.drive([text(0)]))[0]
    with caplog.at_level(logging.CRITICAL):
        np.testing.assert_array_equal(pixels_of(traced.drive([work]))[0], expected)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_division_of_the_device_is_measured_once_and_kept(tmp_path: Path) -> None:
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


def test_a_kept_division_that_cannot_be_read_is_measured_again(tmp_path: Path) -> None:
    load_stepwise(SD, cache_dir=tmp_path).close()
    (kept,) = tmp_path.glob("ovserve-division-*.json")
    kept.write_text("{")
    load_stepwise(SD, cache_dir=tmp_path).close()
    assert '"threads"' in kept.read_text()


@pytest.mark.usefixtures("leak_guard")
def test_a_closed_engine_leaves_nothing_behind() -> None:
    engine = load_stepwise(SD)
    pixels_of(drive(engine, [text(0, previews=frozenset({2}))]))
    engine.close()


def test_prompts_are_counted_and_cut_by_the_model_s_own_tokens(traced: Traced) -> None:
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
def test_a_model_it_has_no_loop_for_is_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    directory = with_scheduler("sd", tmp_path, **changes)
    settings = settings_of(directory)
    with pytest.raises(ModelError):
        StepwiseEngine(read_profile(settings), settings).load(lambda _phase: None)


@pytest.mark.parametrize("device", ["NPU", "CPU NPU CPU"])
def test_a_device_of_static_shapes_is_refused(device: str) -> None:
    settings = ModelSettings(name="model", path=SD, device=device)
    with pytest.raises(ModelError) as caught:
        StepwiseEngine(PROFILE, settings).load(lambda _phase: None)
    assert "NPU" in str(caught.value)


def test_a_model_that_is_no_model_is_refused(tmp_path: Path) -> None:
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


def with_unet(tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    directory = with_scheduler("sd", tmp_path)
    (directory / "unet").unlink()
    (directory / "unet").mkdir()
    (directory / "unet" / "config.json").write_bytes((SD / "unet" / "config.json").read_bytes())
    model = change(ov.Core().read_model(SD / "unet" / "openvino_model.xml"))
    ov.save_model(model, directory / "unet" / "openvino_model.xml", compress_to_fp16=True)
    return directory


def one_timestep(model: Any) -> Any:
    model.reshape({"timestep": ov.PartialShape([1])})
    return model


def first_timestep_only(model: Any) -> Any:
    # A graph that takes a vector and reads its first value, for all rows.
    parameter = next(node for node in model.get_parameters() if "timestep" in node.output(0).get_names())
    readers = list(parameter.output(0).get_target_inputs())
    first = ops.gather(parameter, ops.constant(np.array([0], np.int64)), ops.constant(np.array(0, np.int64)))
    for reader in readers:
        reader.replace_source_output(first.output(0))
    model.validate_nodes_and_infer_types()
    return model


def lone_timestep(model: Any) -> Any:
    # A graph that makes its timestep a lone number first: two of them it cannot take.
    parameter = next(node for node in model.get_parameters() if "timestep" in node.output(0).get_names())
    readers = list(parameter.output(0).get_target_inputs())
    lone = ops.reshape(parameter, ops.constant(np.array([], np.int64)), special_zero=False)
    for reader in readers:
        reader.replace_source_output(ops.unsqueeze(lone, ops.constant(np.array([0]))).output(0))
    model.validate_nodes_and_infer_types()
    return model


class OneTimestep(Watched):
    """Components of an export that is known to take one timestep for all rows."""

    def read(self) -> None:
        super().read()
        self.timestep_per_row = False


def test_a_device_that_works_proves_it_with_the_one_timestep_that_the_export_takes(tmp_path: Path) -> None:
    settings = settings_of(with_unet(tmp_path, lone_timestep))
    profile = read_profile(settings)
    components = OneTimestep(profile, settings)
    engine = StepwiseEngine(profile, settings, components=components)
    engine.load(lambda _phase: None)

    def seen(kind: str, _inputs: Any) -> None:
        if kind == "unet" and threading.current_thread().name.startswith("slot"):
            raise RuntimeError("no memory for this picture")

    components.seen = seen
    [outcome] = drive(engine, [text()])
    components.seen = Watched.seen
    assert "no memory for this picture" in str(outcome.error)
    pixels_of(drive(engine, [text()]))
    engine.close()


@pytest.mark.parametrize("change", [one_timestep, first_timestep_only])
def test_an_export_with_one_timestep_for_all_rows_makes_the_same_pictures(
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
def test_a_unet_that_it_cannot_drive_is_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    settings = settings_of(with_unet(tmp_path, change))
    with pytest.raises(ModelError, match="unet"):
        StepwiseEngine(read_profile(settings), settings).load(lambda _phase: None)
