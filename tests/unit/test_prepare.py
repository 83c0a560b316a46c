"""One request through the pixels: what is refused, what an engine is given, what comes back."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ovserve import __version__
from ovserve.engines.protocol import Engine
from ovserve.errors import ApiError, ImageError, InvalidValue, MissingParameter, PromptTooLong, UnsupportedParameter
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.pixels import masks
from ovserve.pixels.frames import size_of
from ovserve.pixels.images import Pixels
from ovserve.pixels.masks import feather
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.blobs import Blob
from ovserve.wire.local.spool import Spool
from ovserve.wire.request import ImageRequest
from ovserve.worker.prepare import PreparedRequest, prepare

MODEL = ModelSettings(name="shapes")
PROFILE = read_profile(MODEL)
WIDE = dataclasses.replace(
    PROFILE, native=Resolution(64, 64), min_side_px=64, max_side_px=256
)  # 64..256 px, multiples of 16
NOISE = np.random.default_rng(5)


class WordCounter:
    """An engine as far as preparing needs one: a token is a word (two for CLIP's encoder), and two mark begin and end."""

    name = "words"
    capacity = 1
    schedulers = frozenset({"ddim", "lcm"})

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        return len(prompt.split()) * (2 if clip else 1) + 2

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        return " ".join(prompt.split()[: 37 if clip else PROFILE.prompt_tokens - 2])


ENGINE: Engine = WordCounter()  # type: ignore[assignment]  # preparing never loads or runs one


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[Callable[[bytes], Blob]]:
    spool = Spool(tmp_path, 1 << 30)

    def lay_down(data: bytes) -> Blob:
        return spool.store(data).blob(0, len(data))

    yield lay_down
    spool.close()


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, planes: int = 3) -> Pixels:
    return NOISE.integers(0, 256, (height, width, planes), np.uint8)


def request(**values: Any) -> ImageRequest:
    return ImageRequest(
        **{"task": "edit", "prompt": "a cat", "num_inference_steps": 12, "guidance_scale": 3.0, **values}
    )


def edit(profile: ModelProfile = WIDE, model: ModelSettings = MODEL, **values: Any) -> PreparedRequest:
    return prepare(request(**values), profile, model, Settings(), ENGINE)


def refused(kind: type[ApiError], param: str, *texts: str, profile: ModelProfile = WIDE, **values: Any) -> None:
    with pytest.raises(kind) as caught:
        edit(profile, **values)
    assert caught.value.param == param
    assert caught.value.status in (400, 413)
    for text in texts:
        assert text in caught.value.message


Lay = Callable[[bytes], Blob]


# --- modes ------------------------------------------------------------------------------------------------------------


def test_the_mode_follows_from_what_was_sent(blob: Lay) -> None:
    image, mask = blob(png(noise(64, 64))), blob(png(np.full((64, 64), 255, np.uint8)))
    assert edit(task="generation").mode == "text2image"
    assert edit(images=(image,)).mode == "image2image"
    assert edit(images=(image,), mask=mask).mode == "inpainting"
    assert edit(task="variation", images=(image,)).mode == "image2image"


def test_an_image_with_holes_is_its_own_mask_unless_its_alpha_is_kept(blob: Lay) -> None:
    pixels = noise(64, 64, 4)
    pixels[..., 3] = 255
    pixels[10:20, 30:50, 3] = 0
    image = blob(png(pixels))
    found = edit(images=(image,))
    assert found.mode == "inpainting"
    assert found.mask is not None
    assert np.array_equal(found.mask > 0, pixels[..., 3] == 0)
    assert edit(images=(image,), background="transparent").mode == "image2image"
    assert edit(images=(image,), task="variation").mode == "image2image"


def test_a_model_that_only_fills_masks_asks_for_one(blob: Lay) -> None:
    inpainting = dataclasses.replace(WIDE, tasks=frozenset({"inpainting"}))
    refused(MissingParameter, "mask", profile=inpainting, images=(blob(png(noise(64, 64))),))
    refused(UnsupportedParameter, "model", "text2image", profile=inpainting, task="generation")


def test_several_images_are_refused_not_silently_dropped(blob: Lay) -> None:
    image = blob(png(noise(64, 64)))
    refused(InvalidValue, "image", "2 images", images=(image, image))


# --- strength and steps -----------------------------------------------------------------------------------------------


def test_strength_defaults_by_mode(blob: Lay) -> None:
    image, mask = blob(png(noise(64, 64))), blob(png(np.full((64, 64), 255, np.uint8)))
    defaults = PROFILE.defaults
    assert edit(task="generation").strength == 1.0
    assert edit(task="generation", strength=0.3).strength == 1.0
    assert edit(images=(image,)).strength == defaults.strength
    assert edit(images=(image,), mask=mask).strength == defaults.strength_inpainting
    assert edit(images=(image,), task="variation").strength == defaults.strength_variation
    assert edit(images=(image,), mask=mask, strength=0.25).strength == 0.25


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(12, 0.7, 8), (12, 1.0, 12), (10, 0.1, 1), (50, 0.05, 2), (1, 1.0, 1)]
)
def test_steps_are_those_the_library_runs(blob: Lay, steps: int, strength: float, run: int) -> None:
    assert edit(images=(blob(png(noise(64, 64))),), num_inference_steps=steps, strength=strength).steps == run


@pytest.mark.parametrize(
    ("steps", "strength", "least"), [(12, 0.05, "0.09"), (1, 0.9, "1"), (4, 0.2, "0.25"), (12, 0.0, "0.09")]
)
def test_less_than_a_step_is_refused_with_the_strength_that_works(
    blob: Lay, steps: int, strength: float, least: str
) -> None:
    image = (blob(png(noise(64, 64))),)
    refused(InvalidValue, "strength", f"is {least}", images=image, num_inference_steps=steps, strength=strength)
    assert edit(images=image, num_inference_steps=steps, strength=float(least)).steps >= 1


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_strength_outside_its_range_is_refused(blob: Lay, strength: float) -> None:
    refused(InvalidValue, "strength", images=(blob(png(noise(64, 64))),), strength=strength)


def test_no_steps_and_more_steps_than_were_trained_are_refused() -> None:
    refused(InvalidValue, "num_inference_steps", task="generation", num_inference_steps=0)
    refused(InvalidValue, "num_inference_steps", "1000", task="generation", num_inference_steps=1001)


def test_lcm_counts_its_steps_on_a_longer_schedule(blob: Lay) -> None:
    scheduling = dataclasses.replace(PROFILE.scheduling, name="LCM", original_inference_steps=50)
    lcm = dataclasses.replace(WIDE, family="lcm", scheduling=scheduling)
    image = (blob(png(noise(64, 64))),)
    assert edit(lcm, images=image, num_inference_steps=4, strength=0.1).steps == 4
    refused(InvalidValue, "strength", "0.08", profile=lcm, images=image, num_inference_steps=4, strength=0.07)
    refused(InvalidValue, "strength", "0.08", profile=lcm, images=image, num_inference_steps=4, strength=0.0)


def test_pndm_takes_one_step_more(blob: Lay) -> None:
    pndm = dataclasses.replace(WIDE, scheduling=dataclasses.replace(PROFILE.scheduling, name="PNDM"))
    image = (blob(png(noise(64, 64))),)
    assert edit(pndm, task="generation", num_inference_steps=4).steps == 5
    assert edit(pndm, images=image, num_inference_steps=4, strength=0.6).steps == 3
    assert edit(pndm, task="generation", num_inference_steps=1).steps == 1


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(5, 0.5, 3), (4, 0.6, 3), (10, 0.1, 1), (10, 0.7, 7), (4, 1.0, 4)]
)
def test_flow_matching_rounds_up(blob: Lay, steps: int, strength: float, run: int) -> None:
    flux = dataclasses.replace(WIDE, family="flux")
    assert edit(flux, images=(blob(png(noise(64, 64))),), num_inference_steps=steps, strength=strength).steps == run


def test_an_unknown_scheduler_is_refused_with_the_names_there_are() -> None:
    refused(InvalidValue, "scheduler", "ddim, lcm", task="generation", scheduler="heun")
    assert edit(task="generation", scheduler="ddim").work("j", 0).scheduler == "ddim"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_over_the_window_is_refused_with_its_tokens() -> None:
    refused(PromptTooLong, "prompt", "42 tokens", "reads 32", task="generation", prompt="word " * 40)
    refused(PromptTooLong, "negative_prompt", "42 tokens", task="generation", negative_prompt="word " * 40)


@pytest.mark.parametrize("name", ["prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"])
def test_a_prompt_of_another_encoder_is_counted_where_there_is_one(name: str) -> None:
    three = dataclasses.replace(WIDE, text_encoders=3)
    refused(PromptTooLong, name, f"{name}: 42 tokens", profile=three, task="generation", **{name: "word " * 40})
    assert edit(three, task="generation", **{name: "word"})
    assert edit(WIDE, task="generation", **{name: "word " * 40})


@pytest.mark.parametrize(
    ("family", "encoders", "name", "others"),
    [
        ("sd3", 3, "prompt", {"prompt_3": "word"}),
        ("sd3", 3, "negative_prompt", {"negative_prompt_3": "word"}),
        ("sd3", 3, "prompt_2", {}),
        ("sd3", 3, "negative_prompt_2", {}),
        ("flux", 2, "prompt", {"prompt_2": "word"}),
    ],
)
def test_what_clip_reads_alone_is_held_to_its_window_and_the_rest_to_t5_s(
    family: str, encoders: int, name: str, others: dict[str, str]
) -> None:
    profile = dataclasses.replace(WIDE, family=family, text_encoders=encoders, prompt_tokens=256)
    long = {"task": "generation", **others, name: "word " * 40}
    refused(PromptTooLong, name, f"{name}: 82 tokens", "reads 77", profile=profile, **long)
    assert edit(profile, **(long | {name: "word " * 37}))
    whole = "prompt_3" if family == "sd3" else "prompt_2"
    assert edit(profile, task="generation", prompt="word " * 200).text_tokens == 202
    assert edit(profile, task="generation", **{whole: "word " * 200})
    refused(PromptTooLong, whole, f"{whole}: 302 tokens", profile=profile, task="generation", **{whole: "word " * 300})


def test_a_prompt_that_clip_reads_alone_is_cut_to_its_window() -> None:
    profile = dataclasses.replace(WIDE, family="flux", text_encoders=2, prompt_tokens=512)
    found = edit(profile, task="generation", prompt="word " * 40, prompt_2="word", truncate_prompt=True)
    assert found.revised_prompt == " ".join(["word"] * 37)
    assert found.text_tokens == 76


def test_it_is_logged_that_clip_reads_only_the_beginning_of_a_long_prompt(caplog: pytest.LogCaptureFixture) -> None:
    profile = dataclasses.replace(WIDE, family="sd3", text_encoders=3, prompt_tokens=256)
    with caplog.at_level("INFO"):
        edit(profile, task="generation", prompt="word " * 37)
        assert not caplog.records
        edit(profile, task="generation", prompt="word " * 38)
    assert [record.message for record in caplog.records] == ["a text is read whole by T5, and its beginning by CLIP"]


def test_a_prompt_is_cut_when_that_was_asked_for() -> None:
    found = edit(task="generation", prompt="word " * 40, truncate_prompt=True)
    assert found.prompt == found.revised_prompt == " ".join(["word"] * 30)
    assert found.text_tokens == 32
    assert edit(task="generation", truncate_prompt=True).revised_prompt == ""


def test_a_negative_prompt_is_dropped_where_it_has_no_effect() -> None:
    assert edit(task="generation", negative_prompt="dog").work("j", 0).negative_prompt == "dog"
    assert edit(task="generation", negative_prompt="dog", guidance_scale=1.0).work("j", 0).negative_prompt == ""
    flux = dataclasses.replace(WIDE, takes_negative_prompt=False)
    assert edit(flux, task="generation", negative_prompt="dog").work("j", 0).negative_prompt == ""


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (61, 59), (300, 40), (1000, 700)])
def test_without_a_size_the_result_has_the_images(blob: Lay, size: tuple[int, int]) -> None:
    found = edit(images=(blob(png(noise(*size))),))
    assert found.frame == Resolution(*size)
    work = found.work("j", 0)
    assert work.width % 8 == work.height % 8 == 0
    assert 64 <= work.width <= 256
    assert 64 <= work.height <= 256
    assert work.initial_image is not None
    assert work.initial_image.shape == (work.height, work.width, 3)
    assert found.assemble(noise(work.width, work.height)).shape == (size[1], size[0], 3)


def test_an_image_over_the_largest_resolution_is_fitted_into_it(blob: Lay) -> None:
    small = dataclasses.replace(MODEL, max_resolution=Resolution(100, 80))
    assert edit(model=small, images=(blob(png(noise(400, 200))),)).frame == Resolution(100, 50)


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_a_size_is_served_exactly(blob: Lay, mode: str) -> None:
    found = edit(images=(blob(png(noise(120, 80))),), width=91, height=133, resize_mode=mode)
    work = found.work("j", 0)
    assert found.assemble(noise(work.width, work.height)).shape == (133, 91, 3)


def test_the_mask_has_to_have_the_images_shape(blob: Lay) -> None:
    image = (blob(png(noise(64, 64))),)
    refused(InvalidValue, "mask", "64x32", "64x64", images=image, mask=blob(png(np.full((32, 64), 255, np.uint8))))
    assert edit(images=image, mask=blob(png(np.full((128, 128), 255, np.uint8)))).mode == "inpainting"


def test_image_and_mask_are_compared_upright(blob: Lay) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 96)).save(buffer, "PNG", exif=exif)
    found = edit(images=(blob(buffer.getvalue()),), mask=blob(png(np.full((64, 96), 255, np.uint8))))
    assert found.frame == Resolution(96, 64)


def test_a_mask_that_crop_cuts_away_is_refused(blob: Lay) -> None:
    mask = np.zeros((64, 256), np.uint8)
    mask[:, :10] = 255
    image = (blob(png(noise(256, 64))),)
    refused(
        InvalidValue,
        "mask",
        "in the part of the image that is used",
        images=image,
        mask=blob(png(mask)),
        width=64,
        height=64,
    )


def test_damaged_uploads_are_refused_by_field(blob: Lay) -> None:
    image = blob(png(noise(64, 64)))
    refused(ImageError, "image", images=(blob(b"no image"),))
    refused(ImageError, "mask", images=(image,), mask=blob(b"no image"))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (1000, 1000)])
def test_a_line_of_one_pixel_reaches_the_latent_grid(blob: Lay, size: tuple[int, int]) -> None:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[size[1] // 2 + 3] = 255
    found = edit(images=(blob(png(noise(*size))),), mask=blob(png(mask)))
    seen = found.work("j", 0).mask_image
    assert seen is not None
    assert seen[::8, ::8].any(1).sum() in (1, 2)  # what the library looks at
    assert seen[::8, ::8].any(0).all()


@pytest.mark.parametrize("blur", [0, 5])
@pytest.mark.parametrize("planes", [3, 4])
def test_outside_the_mask_the_result_is_the_callers(blob: Lay, planes: int, blur: int) -> None:
    pixels, mask = noise(61, 59, planes), np.zeros((59, 61), np.uint8)
    mask[20:40, 10:30] = 255
    found = edit(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_blur=blur)
    work = found.work("j", 0)
    result = found.assemble(noise(work.width, work.height))
    with Image.open(io.BytesIO(found.encode(result, 0))) as image:
        back = np.asarray(image)
    assert back.shape == pixels.shape
    assert np.array_equal(back[mask == 0], pixels[mask == 0])
    assert not np.array_equal(back[mask > 0], pixels[mask > 0])


def test_inside_the_mask_the_result_is_painted(blob: Lay) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    found = edit(images=(blob(png(noise(64, 64))),), mask=blob(png(mask)))
    painted = noise(64, 64)
    assert np.array_equal(found.assemble(painted)[:, 32:], painted[:, 32:])


# --- background -------------------------------------------------------------------------------------------------------


def with_alpha(*alphas: int) -> Pixels:
    pixels = noise(64, 64, 4)
    pixels[..., 3] = 255
    for row, alpha in enumerate(alphas):
        pixels[row, :, 3] = alpha
    return pixels


def test_a_transparent_background_keeps_the_sources_alpha(blob: Lay) -> None:
    pixels = with_alpha(0, 10, 200)
    found = edit(images=(blob(png(pixels)),), background="transparent")
    painted = noise(64, 64)
    result = found.assemble(painted)
    assert np.array_equal(result[..., 3], pixels[..., 3])
    assert np.array_equal(result[..., :3], painted)


def test_filled_holes_are_opaque_and_soft_edges_stay(blob: Lay) -> None:
    pixels = with_alpha(0, 128)
    result = edit(images=(blob(png(pixels)),)).assemble(noise(64, 64))
    assert result[0, :, 3].tolist() == [255] * 64
    assert np.array_equal(result[1:], pixels[1:])


def test_the_background_is_told_as_it_comes_out(blob: Lay) -> None:
    soft, hard = (blob(png(with_alpha(0, 128))),), (blob(png(with_alpha(0))),)
    assert edit(images=soft).background == "transparent"
    assert edit(images=soft, background="opaque").background == "opaque"
    assert edit(images=soft, output_format="jpeg").background == "opaque"
    assert edit(images=hard).background == "opaque"  # its only holes are filled
    assert edit(images=hard, background="transparent").background == "transparent"
    assert edit(task="variation", images=soft).background == "opaque"
    assert edit(task="generation").background == "opaque"


def test_a_soft_seam_needs_something_to_lie_in(blob: Lay) -> None:
    assert edit(images=(blob(png(with_alpha(0))),), mask_blur=4).mode == "inpainting"
    refused(InvalidValue, "mask_blur", images=(blob(png(noise(64, 64))),), mask_blur=4)


def test_a_preferred_strength_is_for_whole_images(blob: Lay) -> None:
    assert edit(images=(blob(png(noise(64, 64))),), preferred_strength=0.5).strength == 0.5
    assert edit(images=(blob(png(with_alpha(0))),), preferred_strength=0.5).strength == 1.0
    assert edit(images=(blob(png(noise(64, 64))),), preferred_strength=0.5, strength=0.9).strength == 0.9


def test_the_colour_profile_goes_with_the_pixels(blob: Lay) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "PNG", icc_profile=profile)
    for output_format in ("png", "jpeg", "webp"):
        found = edit(images=(blob(buffer.getvalue()),), output_format=output_format, metadata=False)
        for data in (found.encode(noise(64, 64), 0), found.encode_preview(noise(64, 64))):
            with Image.open(io.BytesIO(data)) as image:
                assert image.info["icc_profile"] == profile
    with Image.open(io.BytesIO(edit(task="generation").encode(noise(64, 64), 0))) as image:
        assert "icc_profile" not in image.info


def test_a_result_without_transparency_has_no_alpha_plane(blob: Lay) -> None:
    pixels = with_alpha(0)
    result = edit(images=(blob(png(pixels)),)).assemble(noise(64, 64))
    assert result.shape == (64, 64, 3)
    assert np.array_equal(result[1:], pixels[1:, :, :3])


def test_an_opaque_background_shows_soft_edges_on_white(blob: Lay) -> None:
    pixels = with_alpha(0, 128)
    result = edit(images=(blob(png(pixels)),), background="opaque").assemble(noise(64, 64))
    assert result.shape == (64, 64, 3)
    assert np.array_equal(result[2:], pixels[2:, :, :3])


def test_the_model_sees_transparent_pixels_as_white(blob: Lay) -> None:
    seen = edit(images=(blob(png(with_alpha(0))),)).work("j", 0).initial_image
    assert seen is not None
    assert (seen[0] == 255).all()


def test_a_transparent_background_needs_transparency_to_keep(blob: Lay) -> None:
    refused(InvalidValue, "background", images=(blob(png(noise(64, 64))),), background="transparent")
    refused(InvalidValue, "background", task="generation", background="transparent")
    alpha = (blob(png(with_alpha(0))),)
    refused(InvalidValue, "background", "png or webp", images=alpha, background="transparent", output_format="jpeg")


# --- pictures of one request ------------------------------------------------------------------------------------------


def test_each_picture_has_its_own_seed_and_seeds_wrap() -> None:
    found = edit(task="generation", n=3, seed=2**32 - 2)
    assert [found.work("j", k).seed for k in range(3)] == [2**32 - 2, 2**32 - 1, 0]
    assert request(task="generation", seed=5).seed_of(2) == 7


def test_tokens_of_pictures_are_cells_of_the_latent_grid(blob: Lay) -> None:
    found = edit(images=(blob(png(noise(64, 128))),), n=3)
    assert (found.image_tokens, found.output_tokens) == (32, 96)
    assert edit(task="generation").image_tokens == 0


def test_the_file_tells_how_it_was_made(blob: Lay) -> None:
    found = edit(images=(blob(png(noise(64, 64))),), negative_prompt="a dog", seed=7, n=2, strength=0.5)
    with Image.open(io.BytesIO(found.encode(noise(64, 64), 1))) as image:
        told = image.info["parameters"]
    assert told == (
        "a cat\nNegative prompt: a dog\nSteps: 12, Sampler: DDIM, CFG scale: 3, Seed: 8, Size: 64x64, Model: shapes, "
        f"Denoising strength: 0.5, Version: ovserve {__version__}"
    )


def test_a_preset_that_takes_shortcuts_is_named_in_the_file() -> None:
    found = edit(task="generation", quality="low", shortcuts="guidance_until=0.6")
    with Image.open(io.BytesIO(found.encode(noise(64, 64), 0))) as image:
        assert "Quality: low" in image.info["parameters"]


def test_the_file_tells_nothing_when_told_not_to() -> None:
    data = edit(task="generation", metadata=False).encode(noise(64, 64), 0)
    with Image.open(io.BytesIO(data)) as image:
        assert image.info == {}
    assert b"cat" not in data


@pytest.mark.parametrize(
    ("asked", "steps", "at"), [(0, 12, set()), (1, 12, {6}), (3, 12, {3, 6, 9}), (3, 2, {1}), (3, 1, set())]
)
def test_previews_are_spread_over_the_steps(asked: int, steps: int, at: set[int]) -> None:
    work = edit(task="generation", partial_images=asked, num_inference_steps=steps).work("j", 0)
    assert work.previews == at


@pytest.mark.parametrize("side", [8, 64])
def test_a_preview_shows_what_the_result_will_show(blob: Lay, side: int) -> None:
    pixels, mask = noise(64, 64), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    found = edit(images=(blob(png(pixels)),), mask=blob(png(mask)))
    with Image.open(io.BytesIO(found.encode_preview(noise(side, side)))) as image:
        assert image.size == (64, 64)
        assert np.array_equal(np.asarray(image)[:, :32], pixels[:, :32])
        assert image.info == {}


def test_a_preview_of_a_large_picture_is_small(blob: Lay) -> None:
    found = edit(images=(blob(png(noise(1500, 1000))),))
    with Image.open(io.BytesIO(found.encode_preview(noise(32, 24)))) as image:
        assert image.size == (512, 341)


def test_the_seam_is_worked_out_once_and_not_for_each_picture(blob: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((300, 1200), np.uint8)
    mask[:, 600:] = 255
    planned: list[tuple[Resolution, int]] = []

    def counted(mask: Pixels, blur_px: int) -> Any:
        planned.append((size_of(mask), blur_px))
        return feather(mask, blur_px)

    monkeypatch.setattr(masks, "feather", counted)
    pixels = np.zeros((300, 1200, 3), np.uint8)
    found = edit(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_blur=75, partial_images=2, n=3)
    for _ in range(3):
        found.assemble(noise(256, 64))
        data = found.encode_preview(np.full((64, 256, 3), 200, np.uint8))
    # The large one at the result's size and only where it repaints, the small one at the previews'.
    assert planned == [(Resolution(601, 300), 75), (Resolution(257, 128), 32)]
    with Image.open(io.BytesIO(data)) as image:
        row = np.asarray(image)[64, :, 0].astype(int)
    assert not row[:256].any()
    assert (row[290:] == 200).all()
    assert 0 < row[256] < row[270] < row[286] < 200


@pytest.mark.parametrize(
    ("asked", "preferred", "taken"),
    [("", "lcm", "lcm"), ("ddim", "lcm", "ddim"), ("", "dpmpp_2m", ""), ("", "", "")],
)
def test_a_preferred_scheduler_is_taken_where_the_engine_has_it_and_none_is_asked_for(
    asked: str, preferred: str, taken: str
) -> None:
    made = edit(scheduler=asked, preferred_scheduler=preferred)
    assert made.work("job", 0).scheduler == taken
    assert made.sampler == (taken or PROFILE.scheduling.name)
