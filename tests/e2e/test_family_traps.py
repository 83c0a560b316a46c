"""The traps of openvino_genai in today's families: what the library does without our guard, and with it.

As in test_traps.py, calls that end the process run in a child process, and a test fails when the library is mended.
"""

from __future__ import annotations

import functools
import json
import os
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
from openvino import opset13 as ops

from ovserve.engines.genai import GenaiEngine, generation_options, make_scheduler
from ovserve.engines.protocol import LARGE_DENOISER_BYTES, WARM_UP_SIDE_PX, Work, warm_up_size
from ovserve.engines.templates import templated
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.tinymodels import copy_model, tiny_model

SIGMAS = Path(__file__).parent.parent / "data" / "flux_sigmas.json"
NOISE: NDArray[np.uint8] = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
HALF = np.zeros((64, 64), np.uint8)
HALF[:, 32:] = 255
OPTIONS: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "rng_seed": 1, "guidance_scale": 1.0}


def settings_of(name: str) -> ModelSettings:
    return ModelSettings(name=name, path=tiny_model(name), engine="genai", threads=1)


@functools.cache
def profile_of(name: str) -> ModelProfile:
    return read_profile(settings_of(name))


class Engines:
    """Loaded engines and unguarded pipelines by model, made when a test first needs them."""

    def __init__(self) -> None:
        self._engines: dict[str, GenaiEngine] = {}

    def __getitem__(self, name: str) -> GenaiEngine:
        if name not in self._engines:
            engine = GenaiEngine(profile_of(name), settings_of(name))
            engine.load(lambda _phase: None)
            self._engines[name] = engine
        return self._engines[name]

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    found = Engines()
    yield found
    found.close()


@functools.cache
def library(name: str, kind: Any) -> Any:
    """Return an unguarded pipeline of the library."""
    pipeline = kind(str(tiny_model(name)))
    pipeline.compile("CPU", INFERENCE_NUM_THREADS=1)
    return pipeline


def drawn(pipeline: Any, *images: NDArray[np.uint8], prompt: str = "a cat", **values: Any) -> NDArray[np.uint8]:
    """Return the picture that a pipeline of the library makes."""
    tensors = [ov.Tensor(image[None] if image.ndim == 3 else image[None, :, :, None]) for image in images]
    return np.array(pipeline.generate(prompt, *tensors, **{**OPTIONS, **values}).data[0])


def work(mode: str, **values: Any) -> Work:
    standard: dict[str, Any] = {
        "job": "a",
        "picture": 0,
        "mode": mode,
        "prompt": "a cat",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "strength": 1.0,
        "seed": 1,
        "initial_image": None if mode == "text2image" else NOISE,
        "mask_image": HALF if mode == "inpainting" else None,
    }
    return Work(**{**standard, **values})


def made(engine: GenaiEngine, mode: str, **values: Any) -> NDArray[np.uint8]:
    """Return the picture that our engine makes."""
    engine.admit(work(mode, **values))
    [outcome] = engine.turn()
    assert outcome.error is None, outcome.error
    assert outcome.pixels is not None
    return outcome.pixels


CHILD = """
import sys
import numpy as np, openvino as ov, openvino_genai as og
options = dict(width=64, height=64, num_inference_steps=2, rng_seed=1)
pipeline = og.Image2ImagePipeline(sys.argv[1]); pipeline.compile("CPU")
og.Text2ImagePipeline(pipeline).generate("a", **options)
"""


# --- construction -----------------------------------------------------------------------------------------------------


HEAVY = pytest.mark.heavy  # of cases that show the same for one more model


@pytest.mark.parametrize("name", ["klein", "zimage", "qwen"])
def test_model_without_inpainting_is_built_from_its_image_to_image_pipeline(engines: Engines, name: str) -> None:
    with pytest.raises(RuntimeError, match="Unsupported inpainting pipeline"):
        og.InpaintingPipeline(str(tiny_model(name)))
    engine = engines[name]
    assert engine.features.tasks == {"text2image", "image2image"}
    for mode in ("text2image", "image2image"):
        assert made(engine, mode).shape == (64, 64, 3)


@pytest.mark.parametrize("kind", [og.Text2ImagePipeline, og.Image2ImagePipeline])
def test_fill_model_is_served_for_inpainting_alone(engines: Engines, kind: Any) -> None:
    with pytest.raises(RuntimeError, match="Unsupported"):
        kind(str(tiny_model("fluxfill")))
    assert engines["fluxfill"].features.tasks == {"inpainting"}
    first = made(engines["fluxfill"], "inpainting", guidance_scale=30.0)
    assert np.array_equal(first, made(engines["fluxfill"], "inpainting", guidance_scale=30.0))
    assert not np.array_equal(first, made(engines["fluxfill"], "inpainting", guidance_scale=30.0, seed=2))
    other = made(engines["fluxfill"], "inpainting", guidance_scale=30.0, initial_image=255 - NOISE)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["qwen", pytest.param("klein", marks=HEAVY)])
def test_derived_pipeline_without_a_scheduler_ends_the_process(engines: Engines, name: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny_model(name))], capture_output=True, timeout=120, check=False
    )
    assert child.returncode == -signal.SIGSEGV
    direct = drawn(library(name, og.Text2ImagePipeline))
    assert np.array_equal(made(engines[name], "text2image"), direct)


def test_z_image_cannot_be_derived_and_generates_the_same_bits_through_its_edit_pipeline(engines: Engines) -> None:
    edits = library("zimage", og.Image2ImagePipeline)
    with pytest.raises(RuntimeError, match="Cannot convert"):
        og.Text2ImagePipeline(edits)
    second_copy = library("zimage", og.Text2ImagePipeline)
    for scale in (0.0, 4.0):
        direct = drawn(second_copy, guidance_scale=scale)
        assert np.array_equal(made(engines["zimage"], "text2image", guidance_scale=scale), direct)
    assert not np.array_equal(made(engines["zimage"], "image2image", strength=0.6), direct)


# --- what the library ignores or gets wrong in silence ----------------------------------------------------------------


def test_klein_ignores_strength_and_no_strength_is_passed_to_it(engines: Engines) -> None:
    edits = library("klein", og.Image2ImagePipeline)
    weak, strong = (drawn(edits, NOISE, strength=strength) for strength in (0.1, 1.0))
    assert np.array_equal(weak, strong)
    assert "strength" not in generation_options(work("image2image", strength=0.5), profile_of("klein"))
    assert np.array_equal(made(engines["klein"], "image2image"), strong)


def test_reference_changes_the_picture_of_klein(engines: Engines) -> None:
    pictures = [made(engines["klein"], "image2image", initial_image=image) for image in (NOISE, 255 - NOISE)]
    plain = made(engines["klein"], "text2image")
    assert not np.array_equal(*pictures)
    assert not np.array_equal(pictures[0], plain)


@pytest.mark.heavy
def test_klein_rejects_a_negative_prompt_and_never_gets_one(engines: Engines) -> None:
    for name in ("klein", "kleinbase"):
        assert not profile_of(name).takes_negative_prompt
    with pytest.raises(RuntimeError, match="not used by Flux2KleinPipeline"):
        drawn(library("klein", og.Text2ImagePipeline), negative_prompt="", guidance_scale=4.0)
    guided = made(engines["kleinbase"], "text2image", guidance_scale=4.0, negative_prompt="dog")
    assert not np.array_equal(guided, made(engines["kleinbase"], "text2image"))


def test_guidance_scale_of_the_distilled_klein_has_no_effect(engines: Engines) -> None:
    assert profile_of("klein").guidance == "none"
    plain, scaled = (made(engines["klein"], "text2image", guidance_scale=scale) for scale in (1.0, 4.0))
    assert np.array_equal(plain, scaled)


def test_qwen_image_has_no_guidance_without_a_negative_prompt(engines: Engines) -> None:
    pipeline = library("qwen", og.Text2ImagePipeline)
    off, silent = (drawn(pipeline, guidance_scale=scale) for scale in (1.0, 4.0))
    assert np.array_equal(off, silent)
    blank = profile_of("qwen").traits.empty_negative_prompt
    guided = made(engines["qwen"], "text2image", guidance_scale=4.0, negative_prompt=blank)
    assert not np.array_equal(guided, off)
    assert np.array_equal(guided, drawn(pipeline, guidance_scale=4.0, negative_prompt=blank))


def test_z_images_guidance_scale_is_one_less_in_diffusers() -> None:
    # Library: u + g (c - u), so g = 1 is the prediction with the prompt. diffusers: c + g (c - u), so g = 0 is.
    pipeline = library("zimage", og.Text2ImagePipeline)
    off, one, two = (drawn(pipeline, guidance_scale=scale).astype(int) for scale in (0.0, 1.0, 2.0))
    assert np.abs(one - off).max() <= 8  # two rows in one call round differently
    assert np.abs(two - off).max() > 8
    traits = profile_of("zimage").traits
    assert [traits.engine_guidance(scale) for scale in (0.0, 0.5, 1.0, 4.0)] == [0.0, 1.5, 2.0, 5.0]


@pytest.mark.parametrize(("name", "read"), [("zimage", 506), pytest.param("klein", 506, marks=HEAVY), ("qwen", 397)])
def test_library_cuts_a_prompt_in_silence_and_we_count_its_template(engines: Engines, name: str, read: int) -> None:
    """A token of the tiny tokenizers is a byte; `read` is how many of them the library reads after its template."""
    pipeline = library(name, og.Text2ImagePipeline)
    small = {"width": 32, "height": 32, "num_inference_steps": 1}
    long = "a" * 600
    cut, other = (drawn(pipeline, prompt=long[:read] + end, **small) for end in ("b", "zzz"))
    assert np.array_equal(cut, other)
    engine, window = engines[name], profile_of(name).prompt_tokens
    suffix = engine.count_tokens("a" * read) - window  # tokens of the template after the prompt, which are cut first
    assert suffix > 0
    assert engine.count_tokens("a" * (read - suffix)) == window
    assert engine.count_tokens(engine.cut_prompt("a" * 600)) == window
    text = templated(og.Tokenizer(str(tiny_model(name) / "tokenizer")), profile_of(name).traits, "a cat")
    assert text.count("<|im_start|>") >= 2
    assert "<|im_start|>user\na cat<|im_end|>" in text


# --- FLUX.1's schedule ------------------------------------------------------------------------------------------------


class Silence(og.Generator):
    """A source of noise that is zero everywhere."""

    def __init__(self) -> None:
        super().__init__()

    def next(self) -> float:
        return 0.0

    def randn_tensor(self, shape: ov.Shape) -> ov.Tensor:
        return ov.Tensor(np.zeros(tuple(shape), np.float32))

    def seed(self, value: int) -> None:
        """Do nothing."""


SLOW_STEP_SIDE = 1400  # elements; a product of two such matrices takes about 50 ms on one core


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A FLUX.1 pipeline whose transformer predicts 1 everywhere: latents are then the noise level minus 1.

    A product of large matrices makes each step last long enough for the library's thread to report the latents: the
    library drops the reports that are still queued when it ends.
    """
    directory = copy_model(
        tiny_model("fluxdev"), tmp_path_factory.mktemp("steady") / "m", {"transformer/config.json": {}}
    )
    path = directory / "transformer" / "openvino_model.xml"
    model = ov.Core().read_model(path)
    hidden = next(port for port in model.inputs if port.any_name == "hidden_states").node
    zero, one = ops.constant(np.float32(0)), ops.constant(np.float32(1))
    mean = ops.reduce_mean(hidden, ops.constant(np.array([0, 1, 2], np.int32)), keep_dims=False)
    square = ops.broadcast(mean, ops.constant(np.array([SLOW_STEP_SIDE] * 2, np.int64)))
    slow = ops.reduce_mean(
        ops.matmul(square, square, transpose_a=False, transpose_b=True),
        ops.constant(np.array([0, 1], np.int32)),
        keep_dims=False,
    )
    steady = ops.add(ops.multiply(ops.add(hidden, slow), zero), one)
    steady.output(0).get_tensor().set_names({model.output(0).any_name})
    parameters = [port.node for port in model.inputs]
    for file in (path, path.with_suffix(".bin")):
        file.unlink()
    ov.save_model(ov.Model([ops.result(steady)], parameters), path, compress_to_fp16=False)
    pipeline = og.Text2ImagePipeline(str(directory))
    pipeline.compile("CPU", INFERENCE_NUM_THREADS=1)
    return pipeline


def noise_levels(pipeline: Any, side_px: int, steps: int) -> dict[int, float]:
    """Return the noise level after each step of which the library's thread has reported the latents."""
    found: dict[int, float] = {}

    def after_step(step: int, _steps: int, latents: ov.Tensor) -> bool:
        found[step + 1] = 1 + float(latents.data.mean())
        return False

    pipeline.generate(
        "a", width=side_px, height=side_px, num_inference_steps=steps, generator=Silence(), callback=after_step
    )
    return found


@pytest.mark.parametrize(
    "run",
    json.loads(SIGMAS.read_text("utf-8"))["runs"],
    ids=lambda run: f"{run['side_px']}-{run['num_inference_steps']}",
)
def test_noise_levels_of_flux_are_those_of_diffusers(steady: Any, run: dict[str, Any]) -> None:
    expected = run["sigmas"]
    steady.set_scheduler(make_scheduler(profile_of("fluxdev")))
    levels: dict[int, float] = {}
    for _ in range(20):  # the library drops the reports that are still queued when it ends
        levels |= noise_levels(steady, run["side_px"], run["num_inference_steps"])
        if len(levels) >= run["num_inference_steps"] - 1:
            break
    assert len(levels) >= run["num_inference_steps"] - 1
    for step, level in levels.items():
        assert level == pytest.approx(expected[step], abs=2e-6)


def test_library_computes_another_schedule_from_the_key_time_shift_type(steady: Any) -> None:
    [run] = [
        run
        for run in json.loads(SIGMAS.read_text("utf-8"))["runs"]
        if (run["side_px"], run["num_inference_steps"]) == (256, 4)
    ]
    steady.set_scheduler(og.Scheduler.from_config(tiny_model("fluxdev") / "scheduler" / "scheduler_config.json"))
    levels = noise_levels(steady, 256, 4)
    assert levels
    assert all(abs(level - run["sigmas"][step]) > 0.05 for step, level in levels.items() if step < 4)


@pytest.mark.parametrize("name", ["fluxdev", "fluxfill", "kontext"])
def test_key_is_left_out_for_flux_1_only(name: str) -> None:
    assert profile_of("fluxfill").traits.misreads_time_shift
    assert not profile_of("klein").traits.misreads_time_shift  # its schedule needs the key
    config = json.loads((tiny_model(name) / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert config["time_shift_type"] == "exponential"


# --- warm-up ----------------------------------------------------------------------------------------------------------


def test_large_transformer_warms_up_with_a_small_picture(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "ovserve.json": {"sizes": {"native": "1024x768"}},
        "transformer/config.json": {},
    }
    directory = copy_model(tiny_model("klein"), tmp_path / "m", changes)
    profile = read_profile(ModelSettings(name="m", path=directory, engine="genai"))
    assert warm_up_size(profile) == Resolution(1024, 768)
    weights = directory / "transformer" / "openvino_model.bin"
    weights.unlink()
    weights.touch()
    os.truncate(weights, LARGE_DENOISER_BYTES)
    assert warm_up_size(profile) == Resolution(WARM_UP_SIDE_PX, 192)
