"""The traps of openvino_genai that a request could reach: what the library does without our guard, and with it.

Calls that end the process run unguarded in a child process, and the test requires that they end it: if a new version of
the library fixes one, its test fails, and the guard can be removed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og
import pytest
from numpy.typing import NDArray
from PIL import Image

from ovserve.engines.checks import runs_extra_step
from ovserve.engines.genai import GenaiEngine, generation_options
from ovserve.engines.protocol import Work
from ovserve.errors import ApiError, InvalidValue
from ovserve.models.profile import ModelProfile, builtin_directory, read_profile
from ovserve.settings.options import ModelSettings
from ovserve.wire.messages import Done, Prepared, Progress
from tests.live import BUILTIN_PATH
from tests.reader import Figure, draw_scene, read_picture
from tests.workerbench import WorkerBench, pixels_of

MODEL = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai")
CIRCLE = draw_scene("blue", [Figure("red", "circle", 64, 64, 34)])
GREEN = "a green circle on a blue background"
SETTINGS: dict[str, Any] = {
    "width": 128,
    "height": 128,
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "rng_seed": 1,
}

CHILD = """
import sys, threading
import numpy as np, openvino as ov, openvino_genai as og
from pathlib import Path
folder = Path(sys.argv[1])
options = dict(width=128, height=128, num_inference_steps=4, guidance_scale=3.0, rng_seed=1)
image = ov.Tensor(np.zeros((1, 128, 128, 3), np.uint8))
mask = ov.Tensor(np.full((1, 128, 128, 1), 255, np.uint8))
inpainting = og.InpaintingPipeline(str(folder)); inpainting.compile("CPU")
image2image = og.Image2ImagePipeline(inpainting)
text2image = og.Text2ImagePipeline(inpainting)
"""


def run_unguarded(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run unguarded calls of the library in a child process."""
    command = [sys.executable, "-c", CHILD + code, str(folder or builtin_directory())]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def tensor(pixels: NDArray[np.uint8]) -> ov.Tensor:
    return ov.Tensor(np.ascontiguousarray(pixels if pixels.ndim == 4 else pixels[None]))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerBench]:
    with WorkerBench(tmp_path_factory.mktemp("spool"), MODEL) as bench:
        bench.ready()
        yield bench


@pytest.fixture(scope="module")
def library() -> dict[str, Any]:
    """The library's pipelines, for traps that do not end the process."""
    inpainting = og.InpaintingPipeline(str(builtin_directory()))
    inpainting.compile("CPU")
    return {
        "inpainting": inpainting,
        "image2image": og.Image2ImagePipeline(inpainting),
        "text2image": og.Text2ImagePipeline(inpainting),
    }


@pytest.fixture(scope="module")
def engine() -> GenaiEngine:
    return loaded(read_profile(MODEL), MODEL)


def loaded(profile: ModelProfile, settings: ModelSettings) -> GenaiEngine:
    found = GenaiEngine(profile, settings)
    found.load(lambda phase: None)
    return found


def work(**values: Any) -> Work:
    standard: dict[str, Any] = {
        "job": "a",
        "picture": 0,
        "mode": "text2image",
        "prompt": GREEN,
        "negative_prompt": "",
        "width": 128,
        "height": 128,
        "num_inference_steps": 12,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "seed": 1,
    }
    return Work(**{**standard, **values})


def picture_of(engine: GenaiEngine, piece: Work) -> NDArray[np.uint8]:
    """Return the picture of work that must succeed."""
    engine.admit(piece)
    [outcome] = engine.turn()
    assert outcome.error is None, outcome.error
    assert outcome.pixels is not None
    return outcome.pixels


def error_of(engine: GenaiEngine, piece: Work) -> ApiError:
    """Return the error of work that must be rejected."""
    engine.admit(piece)
    [outcome] = engine.turn()
    assert outcome.pixels is None
    assert outcome.error is not None
    return outcome.error


# --- calls that end the process ---------------------------------------------------------------------------------------


def test_zero_steps_divide_by_zero(worker: WorkerBench, engine: GenaiEngine) -> None:
    child = run_unguarded('text2image.generate("a", **{**options, "num_inference_steps": 0})')
    assert child.returncode == -signal.SIGFPE
    assert worker.fail(task="generation", num_inference_steps=0)["param"] == "num_inference_steps"
    assert error_of(engine, work(num_inference_steps=0)).param == "num_inference_steps"


@pytest.mark.parametrize(
    "callback",
    ["lambda *reported: 1 / 0", "lambda step: False", 'lambda *reported: "no bool"'],
    ids=["raises", "wrong arity", "returns no bool"],
)
def test_invalid_callback_aborts_the_process(callback: str) -> None:
    child = run_unguarded(f'text2image.generate("a", callback={callback}, **options)')
    assert child.returncode == -signal.SIGABRT


def test_our_callback_survives_an_exception_in_on_step(engine: GenaiEngine) -> None:
    def fail(step: int, steps: int) -> None:
        raise ArithmeticError(f"{step} of {steps}")

    assert np.array_equal(picture_of(engine, work(on_step=fail)), picture_of(engine, work()))


def test_inpainting_derived_from_image_to_image_has_no_mask_processor(worker: WorkerBench) -> None:
    child = run_unguarded(
        'og.InpaintingPipeline(og.Image2ImagePipeline(str(folder), "CPU")).generate("a", image, mask, **options)'
    )
    assert child.returncode == -signal.SIGSEGV
    values = {"prompt": GREEN, "seed": 1}
    assert worker.make(images=(worker.image(CIRCLE),), mask=worker.image(np.full((128, 128), 255, np.uint8)), **values)
    assert worker.make(images=(worker.image(CIRCLE),), **values)
    assert worker.make(task="generation", **values)


def test_lcm_on_a_model_not_distilled_for_it_writes_to_a_missing_input(
    worker: WorkerBench, engine: GenaiEngine
) -> None:
    child = run_unguarded(
        'text2image.set_scheduler(og.Scheduler.from_config(folder / "scheduler/scheduler_config.json", '
        "og.Scheduler.Type.LCM))\n"
        'text2image.generate("a", **options)'
    )
    assert child.returncode == -signal.SIGSEGV
    assert "lcm" not in engine.features.schedulers
    assert worker.fail(task="generation", scheduler="lcm")["param"] == "scheduler"
    assert error_of(engine, work(scheduler="lcm")).param == "scheduler"


def fixture(kind: str) -> ModelSettings:
    """Return the settings of a small random model of another family."""
    return ModelSettings(name=kind, engine="genai", path=Path(__file__).parent.parent / "fixtures" / "models" / kind)


def test_lcm_with_too_few_timesteps_ends_the_process(tmp_path: Path) -> None:
    settings = fixture("lcm")
    assert settings.path is not None
    child = run_unguarded('image2image.generate("a", image, strength=0.0, **options)', settings.path)
    assert child.returncode == -signal.SIGSEGV
    engine = loaded(read_profile(settings), settings)
    for strength in (0.0, 0.05):  # 0.05 leaves two of fifty timesteps for four steps
        edit = work(mode="image2image", initial_image=CIRCLE, strength=strength, num_inference_steps=4)
        assert error_of(engine, edit).param == "strength"
    assert picture_of(
        engine, work(mode="image2image", initial_image=CIRCLE, strength=0.08, num_inference_steps=4)
    ).any()


SMALL = "options.update(width=64, height=64)\nimage = ov.Tensor(np.zeros((1, 64, 64, 3), np.uint8))\n"


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize(
    "call", ['text2image.generate("a", **options)', 'image2image.generate("a", image, strength=1.0, **options)']
)
def test_derived_transformer_pipeline_has_no_scheduler(kind: str, call: str) -> None:
    settings = fixture(kind)
    child = run_unguarded(SMALL + call, settings.path)
    assert child.returncode == -signal.SIGSEGV
    engine = loaded(read_profile(settings), settings)
    gray = np.full((64, 64, 3), 127, np.uint8)
    for mode, image in (("text2image", None), ("image2image", gray)):
        assert picture_of(engine, work(mode=mode, initial_image=image, width=64, height=64)).shape == (64, 64, 3)


def test_two_threads_in_pipelines_of_one_model_collide(worker: WorkerBench) -> None:
    collided = run_unguarded(
        """
def run(make):
    for _ in range(20):
        try:
            make()
        except RuntimeError:
            print("busy")
threads = [
    threading.Thread(target=run, args=(lambda: text2image.generate("a", **options),)),
    threading.Thread(target=run, args=(lambda: text2image.generate("a", **options),)),
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    )
    assert collided.returncode < 0 or "busy" in collided.stdout
    image, mask = worker.image(CIRCLE), worker.image(np.full((128, 128), 255, np.uint8))
    jobs = [worker.start(task="generation"), worker.start(images=(image,)), worker.start(images=(image,), mask=mask)]
    assert all(isinstance(worker.end(job), Done) for job in jobs)


# --- calls that the library rejects, with its message or with none ----------------------------------------------------


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_strength_out_of_range_is_rejected(worker: WorkerBench, library: dict[str, Any], strength: float) -> None:
    with pytest.raises(RuntimeError, match=r"within \[0, 1\]"):
        library["image2image"].generate("a", tensor(CIRCLE), strength=strength, **SETTINGS)
    assert worker.fail(images=(worker.image(CIRCLE),), strength=strength)["param"] == "strength"


def test_strength_that_leaves_no_step_is_rejected(worker: WorkerBench, library: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="less then 1"):
        library["image2image"].generate("a", tensor(CIRCLE), strength=0.05, **SETTINGS)
    error = worker.fail(images=(worker.image(CIRCLE),), strength=0.05)
    assert (error["error"], error["param"]) == ("InvalidValue", "strength")
    assert "0.09" in error["message"]


def test_more_steps_than_training_timesteps_are_rejected(worker: WorkerBench, library: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="num_train_timesteps"):
        library["text2image"].generate("a", **{**SETTINGS, "num_inference_steps": 1001})
    assert worker.fail(task="generation", num_inference_steps=1001)["param"] == "num_inference_steps"


def test_negative_prompt_without_guidance_is_not_passed_on(worker: WorkerBench, library: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="ignores negative prompt"):
        library["text2image"].generate("a", negative_prompt="", **{**SETTINGS, "guidance_scale": 1.0})
    assert worker.make(task="generation", negative_prompt="a dog", guidance_scale=1.0)


def test_sides_that_are_not_a_multiple_of_eight_are_served(worker: WorkerBench, library: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="divisible by 16"):
        library["text2image"].generate("a", **{**SETTINGS, "width": 100})
    [data] = worker.make(task="generation", width=100, height=61)
    assert pixels_of(data).shape == (61, 100, 3)


def test_image_smaller_than_eight_pixels_is_served(worker: WorkerBench, library: dict[str, Any]) -> None:
    options = {key: value for key, value in SETTINGS.items() if key not in ("width", "height")}
    with pytest.raises(RuntimeError):
        library["image2image"].generate("a", tensor(CIRCLE[:4, :4]), strength=1.0, **options)
    [data] = worker.make(images=(worker.image(CIRCLE[:4, :4]),))
    assert pixels_of(data).shape == (4, 4, 3)


def test_image_with_alpha_is_served(worker: WorkerBench, library: dict[str, Any]) -> None:
    opaque = np.dstack([CIRCLE, np.full((128, 128), 255, np.uint8)])
    with pytest.raises(RuntimeError):
        library["image2image"].generate("a", tensor(opaque), strength=1.0, **SETTINGS)
    assert worker.make(images=(worker.image(opaque),), seed=4) == worker.make(images=(worker.image(CIRCLE),), seed=4)


def test_several_pictures_of_a_masked_edit_are_served(worker: WorkerBench, library: dict[str, Any]) -> None:
    whole = np.full((128, 128, 1), 255, np.uint8)
    with pytest.raises(RuntimeError, match="must match"):
        library["inpainting"].generate("a", tensor(CIRCLE), tensor(whole), num_images_per_prompt=2, **SETTINGS)
    assert len(worker.make(images=(worker.image(CIRCLE),), mask=worker.image(whole[..., 0]), n=2)) == 2


def test_prompt_with_half_a_surrogate_pair_is_rejected(engine: GenaiEngine, library: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        library["text2image"].generate("\ud83d", **SETTINGS)
    with pytest.raises(InvalidValue, match="surrogate"):
        engine.count_tokens("\ud83d")


def changed_model(tmp_path: Path, **scheduler: Any) -> ModelSettings:
    """Return the settings of the built-in model with a changed scheduler configuration."""
    folder = tmp_path / "model"
    shutil.copytree(builtin_directory(), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    return ModelSettings(name="changed", engine="genai", path=folder)


@pytest.mark.parametrize(
    ("scheduler", "kind", "values"),
    [
        ("ddim", "DDIM", {"clip_sample": True}),
        ("ddim", "DDIM", {"thresholding": True}),
        ("pndm", "PNDM", {"skip_prk_steps": False}),
        ("euler", "EULER_DISCRETE", {"use_karras_sigmas": True}),
        ("euler_ancestral", "EULER_ANCESTRAL_DISCRETE", {"prediction_type": "sample"}),
    ],
)
def test_scheduler_that_does_not_support_the_configuration_is_not_offered(
    tmp_path: Path, library: dict[str, Any], scheduler: str, kind: str, values: dict[str, Any]
) -> None:
    own = "EulerDiscreteScheduler" if scheduler != "euler" else "EulerAncestralDiscreteScheduler"
    settings = changed_model(tmp_path, _class_name=own, **values)
    assert settings.path is not None
    config = settings.path / "scheduler" / "scheduler_config.json"
    library["text2image"].set_scheduler(og.Scheduler.from_config(config, getattr(og.Scheduler.Type, kind)))
    try:
        with pytest.raises(RuntimeError, match=r"support|must be one of"):
            library["text2image"].generate("a", **SETTINGS)
    finally:
        default = builtin_directory() / "scheduler" / "scheduler_config.json"
        library["text2image"].set_scheduler(og.Scheduler.from_config(default))
    engine = loaded(read_profile(settings), settings)
    assert scheduler not in engine.features.schedulers
    for name in sorted(engine.features.schedulers):
        assert picture_of(engine, work(scheduler=name)).shape == (128, 128, 3)


def test_failure_inside_a_network_is_permanent() -> None:
    settings = fixture("sd")
    pipeline = og.Text2ImagePipeline(str(settings.path))
    pipeline.compile("CPU")
    own, odd = ({**SETTINGS, "width": width, "height": height} for width, height in ((64, 64), (72, 56)))
    assert pipeline.generate("a", **own).shape
    for options in (odd, own, own):  # the size that worked before fails now
        with pytest.raises(RuntimeError, match="Shape inference"):
            pipeline.generate("a", **options)
    engine = loaded(read_profile(settings), settings)
    assert error_of(engine, work(width=72, height=56)).status == 500
    assert picture_of(engine, work(width=64, height=64)).shape == (64, 64, 3)


def unguarded_sd3() -> Any:
    pipeline = og.Text2ImagePipeline(str(fixture("sd3").path))
    pipeline.compile("CPU")
    return pipeline


SD3: dict[str, Any] = {**SETTINGS, "width": 64, "height": 64, "num_inference_steps": 2}


def test_guidance_of_sd3_is_fixed_by_its_first_picture() -> None:
    pipeline = unguarded_sd3()
    assert pipeline.generate("a", **SD3).shape
    with pytest.raises(RuntimeError, match="must be the same"):
        pipeline.generate("a", **{**SD3, "guidance_scale": 1.0})
    settings = fixture("sd3")
    engine = loaded(read_profile(settings), settings)
    assert error_of(engine, work(width=64, height=64, guidance_scale=1.0)).param == "guidance_scale"


def test_sequence_length_of_t5_is_fixed_by_its_first_picture() -> None:
    pipeline = unguarded_sd3()
    assert pipeline.generate("a", **SD3).shape
    with pytest.raises(RuntimeError, match="max_sequence_length"):
        pipeline.generate("a", max_sequence_length=64, **SD3)
    settings = fixture("sd3")
    engine = loaded(read_profile(settings), settings)
    assert error_of(engine, work(width=64, height=64, max_sequence_length=64)).param == "max_sequence_length"


# --- calls that silently do something else ----------------------------------------------------------------------------


def test_trailing_spacing_runs_an_extra_step_for_some_counts(tmp_path: Path) -> None:
    settings = changed_model(tmp_path, timestep_spacing="trailing", steps_offset=0)
    pipeline = og.Text2ImagePipeline(str(settings.path))
    pipeline.compile("CPU")
    run: dict[int, list[int]] = {}

    def record(asked: int) -> Any:
        return lambda step, steps, latents: run.setdefault(asked, []).append(steps) or False

    pictures = {}
    for asked in (10, 12):
        result = pipeline.generate(GREEN, callback=record(asked), **{**SETTINGS, "num_inference_steps": asked})
        pictures[asked] = np.array(result.data[0])
    assert set(run[10]) == {10}
    assert set(run[12]) == {13}
    assert read_picture(pictures[10]).background == "blue"
    assert np.abs(pictures[12].astype(int) - pictures[10]).mean() > 20
    engine = loaded(read_profile(settings), settings)
    error = error_of(engine, work(num_inference_steps=12))
    assert error.param == "num_inference_steps"
    assert "use 10 or 13" in error.message
    assert np.array_equal(picture_of(engine, work(num_inference_steps=10)), pictures[10])


def test_counts_with_an_extra_step_are_those_measured() -> None:
    measured = [9, 11, 12, 18, 21, 22, 30, 31, 34, 35, 36, 42, 43, 48, 49]
    assert [steps for steps in range(1, 51) if runs_extra_step(steps, 1000)] == measured


def test_all_options_are_known_to_the_library(library: dict[str, Any]) -> None:
    assert library["text2image"].generate("a", guidance=9, nonsense=1, **SETTINGS).shape  # silently ignored
    full = work(mode="inpainting", negative_prompt="a", prompt_2="b", prompt_3="c")
    full = dataclasses.replace(full, negative_prompt_2="d", negative_prompt_3="e")
    for profile in (read_profile(MODEL), dataclasses.replace(read_profile(MODEL), family="sd3", text_encoders=3)):
        assert generation_options(full, profile).keys() <= set(dir(og.ImageGenerationConfig))


def test_every_picture_without_a_seed_is_the_same(worker: WorkerBench, library: dict[str, Any]) -> None:
    options = {key: value for key, value in SETTINGS.items() if key != "rng_seed"}
    first, second = (np.array(library["text2image"].generate("a", **options).data) for _ in range(2))
    assert np.array_equal(first, second)
    assert worker.make(task="generation", seed=1) != worker.make(task="generation", seed=2)


def test_result_is_overwritten_by_the_next_call(engine: GenaiEngine, library: dict[str, Any]) -> None:
    result = library["text2image"].generate("a red circle", **SETTINGS)
    before = np.array(result.data)
    library["text2image"].generate("a yellow square", **SETTINGS)
    assert not np.array_equal(before, result.data)
    picture = picture_of(engine, work(prompt="a red circle"))
    kept = picture.copy()
    picture_of(engine, work(prompt="a yellow square"))
    assert np.array_equal(picture, kept)


def test_cancelled_call_returns_a_scalar(engine: GenaiEngine, library: dict[str, Any]) -> None:
    result = library["text2image"].generate("a", callback=lambda step, steps, latents: step == 1, **SETTINGS)
    assert list(result.shape) == []
    piece = work(num_inference_steps=100)
    reached = []

    def stop(step: int, steps: int) -> None:
        reached.append(step)
        if step == 2:
            piece.cancelled.set()

    piece.on_step = stop
    engine.admit(piece)
    [outcome] = engine.turn()
    assert (outcome.pixels, outcome.error) == (None, None)
    assert max(reached) < 20
    assert picture_of(engine, work()).shape == (128, 128, 3)


def test_prompt_longer_than_the_window_is_silently_cut(worker: WorkerBench, library: dict[str, Any]) -> None:
    words = "a red circle on a white background with " + "very " * 40
    long, longer = (
        np.array(library["text2image"].generate(words + end, **SETTINGS).data) for end in ("", "a green star")
    )
    assert np.array_equal(long, longer)
    error = worker.fail(task="generation", prompt=words)
    assert (error["error"], error["param"]) == ("PromptTooLong", "prompt")
    job = worker.start(task="generation", prompt=words, truncate_prompt=True)
    assert isinstance(worker.end(job), Done)
    assert words.startswith(worker.of(job, Prepared)[0].revised_prompt)


def test_default_size_of_inpainting_is_the_models_not_the_images(worker: WorkerBench, library: dict[str, Any]) -> None:
    options = {key: value for key, value in SETTINGS.items() if key not in ("width", "height")}
    wide = np.ascontiguousarray(CIRCLE[32:96])
    whole = np.full((64, 128, 1), 255, np.uint8)
    assert list(library["inpainting"].generate("a", tensor(wide), tensor(whole), **options).shape) == [1, 256, 256, 3]
    [data] = worker.make(images=(worker.image(wide),), mask=worker.image(whole[..., 0]))
    assert pixels_of(data).shape == (64, 128, 3)


def test_thin_mask_vanishes_between_the_pixels_that_the_library_samples(
    worker: WorkerBench, library: dict[str, Any]
) -> None:
    thin = np.zeros((128, 128), np.uint8)
    thin[4::8] = 255  # lines of one pixel, between the sampled rows 0, 8, 16, ...
    none = np.zeros((128, 128), np.uint8)
    seen = [
        np.array(library["inpainting"].generate(GREEN, tensor(CIRCLE), tensor(mask[..., None]), **SETTINGS).data)
        for mask in (thin, none)
    ]
    assert np.array_equal(*seen)
    [data] = worker.make(prompt=GREEN, images=(worker.image(CIRCLE),), mask=worker.image(thin), seed=1)
    painted = pixels_of(data)
    assert np.array_equal(painted[thin == 0], CIRCLE[thin == 0])
    lines = np.repeat(painted[4::8], 8, axis=0)
    assert [found.colour for found in read_picture(lines).objects] == ["green"]


def test_decoder_changes_pixels_outside_the_mask(worker: WorkerBench, library: dict[str, Any]) -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[24:104, 24:104] = 255
    result = np.array(
        library["inpainting"].generate(GREEN, tensor(CIRCLE), tensor(mask[..., None]), **SETTINGS).data[0]
    )
    outside = mask == 0
    assert not np.array_equal(result[outside], CIRCLE[outside])
    [data] = worker.make(prompt=GREEN, images=(worker.image(CIRCLE),), mask=worker.image(mask), seed=1)
    assert np.array_equal(pixels_of(data)[outside], CIRCLE[outside])
    assert [found.colour for found in read_picture(pixels_of(data)).objects] == ["green"]


def test_pictures_of_one_call_differ_from_those_of_the_next_seeds(worker: WorkerBench, library: dict[str, Any]) -> None:
    both = np.array(library["text2image"].generate(GREEN, num_images_per_prompt=2, **SETTINGS).data)
    alone = np.array(library["text2image"].generate(GREEN, **{**SETTINGS, "rng_seed": 2}).data[0])
    assert not np.array_equal(both[1], alone)
    together = worker.make(task="generation", prompt=GREEN, n=2, seed=1)
    assert together[1:] == worker.make(task="generation", prompt=GREEN, seed=2)


def test_seeds_are_used_modulo_2_to_the_32(worker: WorkerBench, library: dict[str, Any]) -> None:
    large, small = (
        np.array(library["text2image"].generate(GREEN, **{**SETTINGS, "rng_seed": seed}).data)
        for seed in (2**40 + 1, 1)
    )
    assert np.array_equal(large, small)
    assert worker.make(task="generation", seed=2**40 + 1) == worker.make(task="generation", seed=1)


def test_scheduler_of_one_picture_does_not_stay_set_for_the_next(engine: GenaiEngine) -> None:
    before = picture_of(engine, work())
    picture_of(engine, work(scheduler="euler_ancestral"))
    assert np.array_equal(picture_of(engine, work()), before)


def test_steps_are_reported_in_order_though_the_library_drops_some(worker: WorkerBench) -> None:
    job = worker.start(task="generation", num_inference_steps=200, progress=True)
    end = worker.end(job)
    assert isinstance(end, Done)
    steps = [message.step for message in worker.of(job, Progress)]
    assert steps == sorted(steps)  # some may be missing; none is late or reported twice
    assert len(set(steps)) == len(steps)


def test_image_with_too_many_pixels_is_rejected_by_its_header(worker: WorkerBench) -> None:
    buffer = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(buffer, "PNG")
    error = worker.fail(images=(worker.blob(buffer.getvalue()),))
    assert (error["error"], error["param"]) == ("ImageError", "image")


def test_size_far_above_the_native_size_is_served_exactly(worker: WorkerBench) -> None:
    [data] = worker.make(
        images=(worker.image(CIRCLE),), width=4096, height=2000, output_format="jpeg", output_compression=80
    )
    assert pixels_of(data).shape == (2000, 4096, 3)
