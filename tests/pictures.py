"""Works for engines that a test drives directly, and the library's pipelines to compare their pictures with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og

from ovserve.engines.protocol import Engine, Outcome, Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, builtin_directory, read_profile
from ovserve.settings.options import ModelSettings

MODELS = Path(__file__).parent / "fixtures" / "models"
TYPES = {
    "ddim": og.Scheduler.Type.DDIM,
    "pndm": og.Scheduler.Type.PNDM,
    "euler": og.Scheduler.Type.EULER_DISCRETE,
    "euler_ancestral": og.Scheduler.Type.EULER_ANCESTRAL_DISCRETE,
    "lcm": og.Scheduler.Type.LCM,
}
# What tests.conftest sets. Loading a network from there takes half of the time of compiling it.
COMPILED = Path(os.environ["CACHE_DIRECTORY"], "networks") if "CACHE_DIRECTORY" in os.environ else None
PROMPTS = ("a red circle", "the blue house in the sky", "photo of a cat on a tree, and a dog", "")


def directory_of(model: str) -> Path:
    """Return the directory of a fixture model or of the built-in model."""
    return builtin_directory() if model == "builtin" else MODELS / model


def settings_of(directory: Path, precision: str = "f32", **options: Any) -> ModelSettings:
    """Return settings that pin what decides bits, threads and precision; two slots, so that calls run concurrently.

    Tests share compiled networks, except those that measure a layout: it would be stored with them.
    """
    plugin = json.dumps({"INFERENCE_PRECISION_HINT": precision})
    pinned: dict[str, Any] = {"streams": 2, "threads": 1, "max_batch": 4, "plugin_config": plugin}
    if options.get("streams", 2):
        pinned["cache_dir"] = COMPILED
    return ModelSettings(name="model", path=directory, engine="stepwise", **(pinned | options))


def load_stepwise(
    directory: Path, precision: str = "f32", trace: Callable[[Finished[Call]], None] | None = None, **options: Any
) -> StepwiseEngine:
    """Return a loaded stepwise engine for a model."""
    settings = settings_of(directory, precision, **options)
    engine = StepwiseEngine(read_profile(settings), settings, trace)
    engine.load(lambda _phase: None)
    return engine


def with_scheduler(model: str, directory: Path, **changes: Any) -> Path:
    """Return a copy of a model, by links, with `changes` in its scheduler_config.json; None removes a key."""
    source = directory_of(model)
    for part in source.iterdir():
        if part.name != "scheduler":
            (directory / part.name).symlink_to(part)
    (directory / "scheduler").mkdir()
    document = json.loads((source / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    document = {key: value for key, value in (document | changes).items() if value is not None}
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(document), "utf-8")
    return directory


def image_of(width: int, height: int, seed: int = 0) -> Pixels:
    """Return random 8x8 blocks of colour: uint8 (H, W, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def mask_of(width: int, height: int) -> Pixels:
    """Return a mask of the middle, aligned to the latent grid: uint8 (H, W), 255 = repaint."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 // 8 * 8 : height // 2, width // 4 // 8 * 8 : width * 3 // 4 // 8 * 8] = 255
    return mask


def work_of(profile: ModelProfile, mode: str, index: int = 0, **options: Any) -> Work:
    """Return the work of one picture in a mode; what `options` do not give differs with `index`."""
    size = options.pop("size", profile.native)
    guided = profile.takes_negative_prompt and options.get("guidance_scale", 3.0) > 1
    values: dict[str, Any] = {
        "job": f"job-{index}",
        "picture": 0,
        "mode": mode,
        "prompt": PROMPTS[index % len(PROMPTS)],
        "negative_prompt": "the red sky" if guided and index % 2 else "",
        "width": size.width,
        "height": size.height,
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "seed": 100 + index,
        "initial_image": None if mode == "text2image" else image_of(size.width, size.height, index % 3),
        "mask_image": mask_of(size.width, size.height) if mode == "inpainting" else None,
    }
    return Work(**(values | options))


def drive(engine: Engine, works: Iterable[Work]) -> list[Outcome]:
    """Run works through an engine, admitting up to its capacity; return the outcomes in the order of the works."""
    waiting, in_flight, found = list(works), 0, {}
    order = list(waiting)
    while waiting or in_flight:
        while waiting and in_flight < engine.capacity:
            engine.admit(waiting.pop(0))
            in_flight += 1
        for outcome in engine.turn():
            assert outcome.work not in found, "one outcome for each piece of work"
            in_flight -= 1
            found[outcome.work] = outcome
    return [found[work] for work in order]


def pixels_of(outcomes: Sequence[Outcome]) -> list[Pixels]:
    """Return the pictures of outcomes, asserting that none has failed."""
    pictures = []
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.pixels is not None
        pictures.append(outcome.pixels)
    return pictures


class Library:
    """openvino_genai's pipelines for a model, with one thread and a pinned precision, as in `settings_of`.

    Args:
        directory: the model.
        precision: of the computation.
        cache_dir: of compiled networks; None: all are compiled.
    """

    def __init__(self, directory: Path, precision: str = "f32", cache_dir: Path | None = None) -> None:
        self._config = directory / "scheduler" / "scheduler_config.json"
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        properties["INFERENCE_PRECISION_HINT"] = precision
        if cache_dir:
            properties["CACHE_DIR"] = str(cache_dir)
        inpainting = og.InpaintingPipeline(str(directory), "CPU", **properties)
        self._pipelines = {"inpainting": inpainting}
        index = json.loads((directory / "model_index.json").read_text("utf-8"))
        if "Inpaint" not in index["_class_name"]:
            self._pipelines["text2image"] = og.Text2ImagePipeline(inpainting)
            self._pipelines["image2image"] = og.Image2ImagePipeline(inpainting)

    def picture(self, work: Work) -> Pixels:
        """Return the picture that one call of the library makes for this work alone."""
        kind = TYPES[work.scheduler] if work.scheduler else og.Scheduler.Type.AUTO
        pipeline = self._pipelines[work.mode]
        pipeline.set_scheduler(og.Scheduler.from_config(self._config, kind))
        arrays = [] if work.initial_image is None else [work.initial_image[None]]
        arrays += [] if work.mask_image is None else [work.mask_image[None, :, :, None]]
        options: dict[str, Any] = {} if work.mode == "text2image" else {"strength": work.strength}
        for name in ("negative_prompt", "negative_prompt_2", "prompt_2"):
            if getattr(work, name):
                options[name] = getattr(work, name)
        result = pipeline.generate(
            work.prompt,
            *(ov.Tensor(np.ascontiguousarray(array)) for array in arrays),
            width=work.width,
            height=work.height,
            num_inference_steps=work.num_inference_steps,
            guidance_scale=work.guidance_scale,
            rng_seed=work.seed,
            num_images_per_prompt=1,
            **options,
        )
        return np.array(result.data[0])
