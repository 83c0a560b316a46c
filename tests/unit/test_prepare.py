"""Preparing a request: what is rejected, what an engine gets."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovserve.errors import ImageError, InvalidValue, MissingParameter, UnsupportedParameter
from ovserve.settings.options import Resolution
from tests.preparing import (
    MODEL,
    PROFILE,
    WIDE,
    StoreBlob,
    engine_of,
    noise,
    png,
    prepared,
    rejected,
    stored_blobs,
    with_alpha,
)


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[StoreBlob]:
    yield from stored_blobs()


# --- modes ------------------------------------------------------------------------------------------------------------


def test_mode_follows_from_the_uploads(blob: StoreBlob) -> None:
    image, mask = blob(png(noise(64, 64))), blob(png(np.full((64, 64), 255, np.uint8)))
    assert prepared(task="generation").mode == "text2image"
    assert prepared(images=(image,)).mode == "image2image"
    assert prepared(images=(image,), mask=mask).mode == "inpainting"
    assert prepared(task="variation", images=(image,)).mode == "image2image"


def test_transparent_pixels_are_the_mask_unless_alpha_is_kept(blob: StoreBlob) -> None:
    pixels = noise(64, 64, 4)
    pixels[..., 3] = 255
    pixels[10:20, 30:50, 3] = 0
    image = blob(png(pixels))
    found = prepared(images=(image,))
    assert found.mode == "inpainting"
    assert found.mask is not None
    assert np.array_equal(found.mask > 0, pixels[..., 3] == 0)
    assert prepared(images=(image,), background="transparent").mode == "image2image"
    assert prepared(images=(image,), task="variation").mode == "image2image"
    assert prepared(images=(blob(png(with_alpha(128, 254))),)).mode == "image2image"


def test_inpainting_only_model_requires_a_mask(blob: StoreBlob) -> None:
    inpainting = dataclasses.replace(WIDE, tasks=frozenset({"inpainting"}))
    rejected(MissingParameter, "mask", profile=inpainting, images=(blob(png(noise(64, 64))),))
    rejected(UnsupportedParameter, "model", "text2image", profile=inpainting, task="generation")


def test_several_images_are_rejected(blob: StoreBlob) -> None:
    image = blob(png(noise(64, 64)))
    rejected(UnsupportedParameter, "image", "2 images", images=(image, image))


# --- strength, steps and schedulers -----------------------------------------------------------------------------------


def test_default_strength_depends_on_the_mode(blob: StoreBlob) -> None:
    image, mask = blob(png(noise(64, 64))), blob(png(np.full((64, 64), 255, np.uint8)))
    defaults = PROFILE.defaults
    assert prepared(task="generation").strength == 1.0
    assert prepared(task="generation", strength=0.3).strength == 1.0
    assert prepared(images=(image,)).strength == defaults.strength
    assert prepared(images=(image,), mask=mask).strength == defaults.strength_inpainting
    assert prepared(images=(image,), task="variation").strength == defaults.strength_variation
    assert prepared(images=(image,), mask=mask, strength=0.25).strength == 0.25


def test_preferred_strength_applies_only_without_a_mask(blob: StoreBlob) -> None:
    assert prepared(images=(blob(png(noise(64, 64))),), preferred_strength=0.5).strength == 0.5
    assert prepared(images=(blob(png(with_alpha(0))),), preferred_strength=0.5).strength == 1.0
    assert prepared(images=(blob(png(noise(64, 64))),), preferred_strength=0.5, strength=0.9).strength == 0.9


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(12, 0.7, 8), (12, 1.0, 12), (10, 0.1, 1), (50, 0.05, 2), (1, 1.0, 1)]
)
def test_steps_equal_those_the_library_runs(blob: StoreBlob, steps: int, strength: float, run: int) -> None:
    assert prepared(images=(blob(png(noise(64, 64))),), num_inference_steps=steps, strength=strength).steps == run


@pytest.mark.parametrize(
    ("steps", "strength", "least"), [(12, 0.05, "0.09"), (1, 0.9, "1"), (4, 0.2, "0.25"), (12, 0.001, "0.09")]
)
def test_less_than_one_step_is_rejected_with_the_smallest_strength(
    blob: StoreBlob, steps: int, strength: float, least: str
) -> None:
    image = (blob(png(noise(64, 64))),)
    rejected(InvalidValue, "strength", f"is {least}", images=image, num_inference_steps=steps, strength=strength)
    assert prepared(images=image, num_inference_steps=steps, strength=float(least)).steps >= 1


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf")])
def test_strength_out_of_range_is_rejected(blob: StoreBlob, strength: float) -> None:
    rejected(InvalidValue, "strength", images=(blob(png(noise(64, 64))),), strength=strength)


def test_zero_steps_and_more_than_trained_steps_are_rejected() -> None:
    rejected(InvalidValue, "num_inference_steps", task="generation", num_inference_steps=0)
    rejected(InvalidValue, "num_inference_steps", "1000", task="generation", num_inference_steps=1001)


def test_operator_can_serve_an_opaque_result_where_there_is_no_alpha(blob: StoreBlob) -> None:
    opaque = dataclasses.replace(MODEL, missing_alpha="opaque")
    image = blob(png(noise(64, 64)))
    for values in ({"images": (image,)}, {"task": "generation"}):
        rejected(InvalidValue, "background", "needs an image with an alpha channel", background="transparent", **values)
        found = prepared(model=opaque, background="transparent", **values)
        assert (found.background, found.backdrop.keeps_alpha) == ("opaque", False)
    kept = prepared(model=opaque, background="transparent", images=(blob(png(with_alpha(0))),))
    assert kept.background == "transparent"


def test_strength_zero_runs_no_step_and_gives_the_source(blob: StoreBlob) -> None:
    source = noise(64, 96)
    found = prepared(images=(blob(png(source)),), strength=0.0, partial_images=2)
    assert (found.steps, found.strength, found.background) == (0, 0.0, "opaque")
    work = found.work("j", 0)
    assert not work.previews
    assert np.array_equal(found.assemble(np.zeros_like(work.initial_image)), source)
    mask = blob(png(np.full((96, 64, 3), 255, np.uint8)))
    assert np.array_equal(prepared(images=(blob(png(source)),), mask=mask, strength=0.0).unchanged, source)
    fitted = prepared(images=(blob(png(source)),), strength=0.0, width=32, height=48)
    assert fitted.unchanged.shape == (48, 32, 3)


def test_strength_zero_keeps_alpha_unless_it_is_removed(blob: StoreBlob) -> None:
    source = with_alpha(0, 255)
    kept = prepared(images=(blob(png(source)),), strength=0.0)
    assert np.array_equal(kept.unchanged, source)
    assert kept.background == "transparent"
    for removed in ({"background": "opaque"}, {"output_format": "jpeg"}):
        found = prepared(images=(blob(png(source)),), strength=0.0, **removed)
        assert found.background == "opaque"
    assert prepared(images=(blob(png(source)),), strength=0.0, background="opaque").unchanged.shape[2] == 3


def test_lcm_takes_its_steps_from_a_longer_schedule(blob: StoreBlob) -> None:
    scheduling = dataclasses.replace(PROFILE.scheduling, name="LCM", original_inference_steps=50)
    lcm = dataclasses.replace(WIDE, family="lcm", scheduling=scheduling)
    image = (blob(png(noise(64, 64))),)
    assert prepared(lcm, images=image, num_inference_steps=4, strength=0.1).steps == 4
    rejected(InvalidValue, "strength", "0.08", profile=lcm, images=image, num_inference_steps=4, strength=0.07)
    assert prepared(lcm, images=image, num_inference_steps=4, strength=0.0).steps == 0


def test_pndm_runs_one_step_more(blob: StoreBlob) -> None:
    pndm = dataclasses.replace(WIDE, scheduling=dataclasses.replace(PROFILE.scheduling, name="PNDM"))
    image = (blob(png(noise(64, 64))),)
    assert prepared(pndm, task="generation", num_inference_steps=4).steps == 5
    assert prepared(pndm, images=image, num_inference_steps=4, strength=0.6).steps == 3
    assert prepared(pndm, task="generation", num_inference_steps=1).steps == 1


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(5, 0.5, 3), (4, 0.6, 3), (10, 0.1, 1), (10, 0.7, 7), (4, 1.0, 4)]
)
def test_flow_matching_rounds_steps_up(blob: StoreBlob, steps: int, strength: float, run: int) -> None:
    flux = dataclasses.replace(WIDE, family="flux")
    assert prepared(flux, images=(blob(png(noise(64, 64))),), num_inference_steps=steps, strength=strength).steps == run


def test_unknown_scheduler_is_rejected_with_the_known_names() -> None:
    rejected(InvalidValue, "scheduler", "ddim, lcm", task="generation", scheduler="heun")
    assert prepared(task="generation", scheduler="ddim").work("j", 0).scheduler == "ddim"


@pytest.mark.parametrize(
    ("asked", "preferred", "taken"),
    [("", "lcm", "lcm"), ("ddim", "lcm", "ddim"), ("", "dpmpp_2m", ""), ("", "", "")],
)
def test_preferred_scheduler_applies_if_supported_and_none_is_requested(asked: str, preferred: str, taken: str) -> None:
    made = prepared(scheduler=asked, preferred_scheduler=preferred)
    assert made.work("job", 0).scheduler == taken
    assert made.sampler == (taken or PROFILE.scheduling.name)


# --- what the engine can do ---------------------------------------------------------------------------------------


def test_previews_are_prepared_only_for_an_engine_that_makes_them() -> None:
    values = {"task": "generation", "num_inference_steps": 4, "partial_images": 3}
    assert prepared(**values).work("j", 0).previews == {1, 2, 3}
    assert prepared(engine=engine_of(WIDE, previews=False), **values).work("j", 0).previews == set()


def test_tasks_are_those_of_the_engine(blob: StoreBlob) -> None:
    engine = engine_of(WIDE, tasks=frozenset({"inpainting"}))
    rejected(MissingParameter, "mask", engine=engine, images=(blob(png(noise(64, 64))),))
    rejected(UnsupportedParameter, "model", "text2image", engine=engine, task="generation")


def test_engine_rejects_a_request_before_its_images_are_decoded(blob: StoreBlob) -> None:
    rejected(InvalidValue, "scheduler", images=(blob(b"no image"),), scheduler="heun")
    rejected(InvalidValue, "num_inference_steps", images=(blob(b"no image"),), num_inference_steps=1001)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (61, 59), (300, 40), (1000, 700)])
def test_result_without_a_size_has_the_size_of_the_image(blob: StoreBlob, size: tuple[int, int]) -> None:
    found = prepared(images=(blob(png(noise(*size))),))
    assert found.frame == Resolution(*size)
    work = found.work("j", 0)
    assert work.width % 8 == work.height % 8 == 0
    assert 64 <= work.width <= 256
    assert 64 <= work.height <= 256
    assert work.initial_image is not None
    assert work.initial_image.shape == (work.height, work.width, 3)
    assert found.assemble(noise(work.width, work.height)).shape == (size[1], size[0], 3)


def test_image_over_max_resolution_is_scaled_down(blob: StoreBlob) -> None:
    small = dataclasses.replace(MODEL, max_resolution=Resolution(100, 80))
    assert prepared(model=small, images=(blob(png(noise(400, 200))),)).frame == Resolution(100, 50)


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_requested_size_is_exact(blob: StoreBlob, mode: str) -> None:
    found = prepared(images=(blob(png(noise(120, 80))),), width=91, height=133, resize_mode=mode)
    work = found.work("j", 0)
    assert found.assemble(noise(work.width, work.height)).shape == (133, 91, 3)


def test_mask_of_another_aspect_ratio_is_rejected(blob: StoreBlob) -> None:
    image = (blob(png(noise(64, 64))),)
    rejected(InvalidValue, "mask", "64x32", "64x64", images=image, mask=blob(png(np.full((32, 64), 255, np.uint8))))
    assert prepared(images=image, mask=blob(png(np.full((128, 128), 255, np.uint8)))).mode == "inpainting"


def test_mask_is_compared_with_the_upright_image(blob: StoreBlob) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 96)).save(buffer, "PNG", exif=exif)
    found = prepared(images=(blob(buffer.getvalue()),), mask=blob(png(np.full((64, 96), 255, np.uint8))))
    assert found.frame == Resolution(96, 64)


def test_mask_outside_the_crop_is_rejected(blob: StoreBlob) -> None:
    mask = np.zeros((64, 256), np.uint8)
    mask[:, :10] = 255
    image = (blob(png(noise(256, 64))),)
    rejected(
        InvalidValue,
        "mask",
        "in the part of the image that is used",
        images=image,
        mask=blob(png(mask)),
        width=64,
        height=64,
    )


def test_damaged_upload_is_rejected_naming_its_field(blob: StoreBlob) -> None:
    image = blob(png(noise(64, 64)))
    rejected(ImageError, "image", images=(blob(b"no image"),))
    rejected(ImageError, "mask", images=(image,), mask=blob(b"no image"))


# --- masks and alpha --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (1000, 1000)])
def test_one_pixel_line_of_a_mask_reaches_the_latent_grid(blob: StoreBlob, size: tuple[int, int]) -> None:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[size[1] // 2 + 3] = 255
    found = prepared(images=(blob(png(noise(*size))),), mask=blob(png(mask)))
    seen = found.work("j", 0).mask_image
    assert seen is not None
    assert seen[::8, ::8].any(1).sum() in (1, 2)  # what the library looks at
    assert seen[::8, ::8].any(0).all()


def test_mask_blur_without_a_mask_is_rejected(blob: StoreBlob) -> None:
    assert prepared(images=(blob(png(with_alpha(0))),), mask_blur=4).mode == "inpainting"
    rejected(InvalidValue, "mask_blur", images=(blob(png(noise(64, 64))),), mask_blur=4)


def test_initial_image_has_kept_transparent_pixels_over_white(blob: StoreBlob) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[32:] = 255
    for values in ({"mask": blob(png(mask))}, {"task": "variation"}, {"background": "transparent"}):
        seen = prepared(images=(blob(png(with_alpha(0))),), **values).work("j", 0).initial_image
        assert seen is not None
        assert (seen[0] == 255).all()


def test_transparent_background_requires_alpha_in_image_and_format(blob: StoreBlob) -> None:
    rejected(InvalidValue, "background", images=(blob(png(noise(64, 64))),), background="transparent")
    rejected(InvalidValue, "background", task="generation", background="transparent")
    alpha = (blob(png(with_alpha(0))),)
    rejected(InvalidValue, "background", "png or webp", images=alpha, background="transparent", output_format="jpeg")


# --- usage ------------------------------------------------------------------------------------------------------------


def test_picture_tokens_are_cells_of_the_latent_grid(blob: StoreBlob) -> None:
    found = prepared(images=(blob(png(noise(64, 128))),), n=3)
    assert (found.image_tokens, found.output_tokens) == (32, 96)
    assert prepared(task="generation").image_tokens == 0
