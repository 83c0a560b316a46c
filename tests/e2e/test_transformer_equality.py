"""Engine `stepwise` makes the bytes of OpenVINO GenAI with transformers, alone and in mixed batches.

Where the library departs from diffusers, it is compared as far as it can be brought to the same: a scheduler without
the key that it misreads (FLUX.1), or the engine with the library's chat template (Z-Image).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og
import pytest
from openvino import opset13 as ops

from ovserve.engines.families.z_image import ZImage
from ovserve.engines.protocol import Pixels, Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import Resolution
from tests.pictures import directory_of, drive, load_stepwise, pixels_of, settings_of, work_of
from tests.tinymodels import copy_model, tiny_model

MODES = ("inpainting", "image2image", "text2image")
KINDS = {
    "inpainting": og.InpaintingPipeline,
    "image2image": og.Image2ImagePipeline,
    "text2image": og.Text2ImagePipeline,
}
SIZE = Resolution(64, 96)


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        modes: those that the library has.
        guidance: the guidance scale; the library keeps the number of rows of its first picture for some families.
        strength: whether an edit has a strength.
        negative_prompt: the negative prompt.
        dropped: keys of the scheduler's configuration that the library misreads.
        derives: the library can make the pipelines of other modes from the first one.
        levels: how many levels of 255 a pixel may differ.
    """

    modes: tuple[str, ...] = MODES
    guidance: float = 3.0
    strength: bool = True
    negative_prompt: str = ""
    dropped: tuple[str, ...] = ()
    derives: bool = True
    levels: int = 0


CASES = {
    "flux": Case(),
    "fluxdev": Case(dropped=("time_shift_type",)),
    "fluxfill": Case(modes=("inpainting",), strength=False, dropped=("time_shift_type",)),
    "klein": Case(modes=MODES[1:], strength=False),
    "kleinbase": Case(modes=MODES[1:], strength=False),
    "sd3": Case(negative_prompt="the red sky"),
    "sd35": Case(),
    "zimage": Case(modes=MODES[1:], guidance=4.0, negative_prompt="the red sky", derives=False),
    # numpy and the library add up the squares of a norm in a different order.
    "qwen": Case(modes=MODES[1:], negative_prompt="the red sky", levels=1),
}
VARIANTS = ("fluxdev", "kleinbase", "sd35")  # of families that others of CASES stand for
SCHEDULES = ((3, 1.0), (5, 0.6), (4, 0.8))  # steps and strength, which differ within one batch


def directory(model: str) -> Path:
    """Return the directory of a model."""
    return directory_of(model) if model in ("flux", "sd3") else tiny_model(model)


class TransformerLibrary:
    """openvino_genai's pipelines for a model, with one thread and a pinned precision."""

    def __init__(self, model: Path, case: Case, precision: str, scheduler: Path) -> None:
        document = json.loads((model / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        kept = {key: value for key, value in document.items() if key not in case.dropped}
        scheduler.write_text(json.dumps(kept), "utf-8")
        self._case = case
        self._pipelines: dict[str, Any] = {}
        properties = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
        first = None
        for mode in case.modes:
            if first is None or not case.derives:
                first = KINDS[mode](str(model), "CPU", **properties)
                self._pipelines[mode] = first
            else:
                self._pipelines[mode] = KINDS[mode](first)
            self._pipelines[mode].set_scheduler(og.Scheduler.from_config(scheduler))

    def picture(self, work: Work) -> Pixels:
        """Return the picture that one call of the library makes for this work alone."""
        arrays = [] if work.initial_image is None else [work.initial_image[None]]
        arrays += [] if work.mask_image is None else [work.mask_image[None, :, :, None]]
        options: dict[str, Any] = {}
        if work.mode != "text2image" and self._case.strength:
            options["strength"] = work.strength
        if work.negative_prompt:
            options["negative_prompt"] = work.negative_prompt
        result = self._pipelines[work.mode].generate(
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


def works_of(profile: ModelProfile, case: Case) -> list[Work]:
    """Return pictures of all modes whose prompts, steps, strengths and seeds differ."""
    return [
        work_of(
            profile,
            mode,
            place,
            size=SIZE,
            num_inference_steps=steps,
            strength=strength if case.strength and mode != "text2image" else 1.0,
            guidance_scale=case.guidance,
            negative_prompt=case.negative_prompt,
        )
        for place, (steps, strength) in enumerate(SCHEDULES)
        for mode in case.modes
    ]


def with_int8_weights(source: Path, target: Path) -> Path:
    """Return a copy of a model whose transformer has its matrices as int8 with a scale for each row."""
    copy_model(source, target, {"transformer/config.json": {}})
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (target / "transformer" / name).unlink()
    transformer = ov.Core().read_model(source / "transformer" / "openvino_model.xml")
    for node in transformer.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.shape) != 2 or not node.get_element_type().is_real():
            continue
        values = np.array(node.data, np.float32)
        scale = np.abs(values).max(axis=1, keepdims=True) / 127
        if values.size < 256 or not scale.all():
            continue
        whole = ops.convert(ops.constant(np.rint(values / scale).astype(np.int8)), "f32")
        scaled = ops.multiply(whole, ops.constant(scale.astype(np.float32)))
        for port in node.output(0).get_target_inputs():
            user = port.get_node()
            ports = user.output(0).get_target_inputs() if user.get_type_name() == "Convert" else {port}
            for each in ports:
                each.replace_source_output(scaled.output(0))
    ov.save_model(transformer, target / "transformer" / "openvino_model.xml", compress_to_fp16=False)
    return target


def check(model: str, precision: str, tmp_path: Path, path: Path | None = None) -> list[Call]:
    """Assert that pictures in mixed batches have the library's bytes; return the denoising calls."""
    case, calls = CASES[model], list[Finished[Call]]()
    path = path or directory(model)
    engine: StepwiseEngine = load_stepwise(path, precision, calls.append, streams=1)
    calls.clear()
    works = works_of(read_profile(settings_of(path)), case)
    pictures = pixels_of(drive(engine, works))
    engine.close()
    library = TransformerLibrary(path, case, precision, tmp_path / "scheduler_config.json")
    for work, pixels in zip(works, pictures, strict=True):
        values = (work.mode, work.num_inference_steps, work.strength)
        assert pixels.std() > 5, values
        difference = np.abs(pixels.astype(int) - library.picture(work))
        assert difference.max() <= case.levels, values
        assert (difference > 0).mean() < 0.001, values
    return [call.subject for call in calls if call.subject.kind == "denoise"]


def shares(calls: list[Call]) -> bool:
    """Return whether pictures at different steps have shared a call."""
    return any(len({row.index for row in call.rows}) > 1 and len(call.pictures) > 1 for call in calls)


@pytest.fixture(autouse=True)
def _library_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Z-Image the library's template."""
    monkeypatch.setattr(ZImage, "chat", {"enable_thinking": False})


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.heavy if model in VARIANTS else ()) for model in CASES]
)
def test_mixed_batch_has_the_librarys_bytes(model: str, tmp_path: Path) -> None:
    assert shares(check(model, "f32", tmp_path))


@pytest.mark.heavy
@pytest.mark.parametrize("model", CASES)
def test_mixed_batch_in_bfloat16_has_the_librarys_bytes(model: str, tmp_path: Path) -> None:
    assert shares(check(model, "bf16", tmp_path))


@pytest.mark.heavy
@pytest.mark.parametrize("model", CASES)
def test_mixed_batch_with_int8_weights_has_the_librarys_bytes(model: str, tmp_path: Path) -> None:
    # Rows with int8 weights can have other bits beside rows at another timestep; then only equal timesteps share calls.
    check(model, "f32", tmp_path, with_int8_weights(directory(model), tmp_path / model))


@pytest.mark.heavy
def test_pictures_of_one_masked_edit_equal_those_of_single_calls(tmp_path: Path) -> None:
    # The library rejects n > 1 for these models; picture k equals a single picture with seed + k.
    path, case = directory("flux"), CASES["flux"]
    engine = load_stepwise(path, "f32", streams=1)
    first = work_of(read_profile(settings_of(path)), "inpainting", 1, size=SIZE, num_inference_steps=3)
    works = [replace(first, picture=k, seed=first.seed + k, negative_prompt="") for k in range(3)]
    pictures = pixels_of(drive(engine, works))
    engine.close()
    library = TransformerLibrary(path, case, "f32", tmp_path / "scheduler_config.json")
    for work, pixels in zip(works, pictures, strict=True):
        np.testing.assert_array_equal(pixels, library.picture(work))
