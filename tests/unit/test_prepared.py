"""A prepared request: assembled results, encoded files and previews."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ovserve import __version__
from ovserve.pixels import masks
from ovserve.pixels.frames import size_of
from ovserve.pixels.images import Pixels
from ovserve.pixels.masks import feather
from ovserve.settings.options import Resolution
from ovserve.worker.prepared import on_one_line
from tests.preparing import StoreBlob, noise, png, prepared, request, stored_blobs, with_alpha

CASES = Path(__file__).parent.parent / "data" / "cases"


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[StoreBlob]:
    yield from stored_blobs()


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0, 5])
@pytest.mark.parametrize("planes", [3, 4])
def test_result_outside_the_mask_is_the_original(blob: StoreBlob, planes: int, blur: int) -> None:
    pixels, mask = noise(61, 59, planes), np.zeros((59, 61), np.uint8)
    mask[20:40, 10:30] = 255
    found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_blur=blur)
    work = found.work("j", 0)
    result = found.assemble(noise(work.width, work.height))
    with Image.open(io.BytesIO(found.encode(result, 0))) as image:
        back = np.asarray(image)
    assert back.shape == pixels.shape
    assert np.array_equal(back[mask == 0], pixels[mask == 0])
    assert not np.array_equal(back[mask > 0], pixels[mask > 0])


def test_result_inside_the_mask_is_painted(blob: StoreBlob) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    found = prepared(images=(blob(png(noise(64, 64))),), mask=blob(png(mask)))
    painted = noise(64, 64)
    assert np.array_equal(found.assemble(painted)[:, 32:], painted[:, 32:])


def test_seam_is_computed_once_per_size(blob: StoreBlob, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((300, 1200), np.uint8)
    mask[:, 600:] = 255
    planned: list[tuple[Resolution, int]] = []

    def counted(mask: Pixels, blur_px: int) -> Any:
        planned.append((size_of(mask), blur_px))
        return feather(mask, blur_px)

    monkeypatch.setattr(masks, "feather", counted)
    pixels = np.zeros((300, 1200, 3), np.uint8)
    found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_blur=75, partial_images=2, n=3)
    for _ in range(3):
        found.assemble(noise(256, 64))
        data = found.encode_preview(np.full((64, 256, 3), 200, np.uint8))
    # One at the result's size, cropped to the repainted part, and one at the size of the previews.
    assert planned == [(Resolution(601, 300), 75), (Resolution(257, 128), 32)]
    with Image.open(io.BytesIO(data)) as image:
        row = np.asarray(image)[64, :, 0].astype(int)
    assert not row[:256].any()
    assert (row[290:] == 200).all()
    assert 0 < row[256] < row[270] < row[286] < 200


# --- alpha and colour profile -----------------------------------------------------------------------------------------


def test_transparent_background_keeps_the_source_alpha(blob: StoreBlob) -> None:
    pixels = with_alpha(0, 10, 200)
    found = prepared(images=(blob(png(pixels)),), background="transparent")
    painted = noise(64, 64)
    result = found.assemble(painted)
    assert np.array_equal(result[..., 3], pixels[..., 3])
    assert np.array_equal(result[..., :3], painted)


def test_own_transparency_is_repainted_by_one_minus_alpha(blob: StoreBlob) -> None:
    pixels, painted = with_alpha(0, 64, 128, 200, 249, 250, 254), noise(64, 64)
    result = prepared(images=(blob(png(pixels)),)).assemble(painted)
    assert result.shape == (64, 64, 3)
    assert np.array_equal(result[0], painted[0])
    assert np.array_equal(result[5:], pixels[5:, :, :3])
    for row, alpha in enumerate((0, 64, 128, 200, 249)):
        expected = (pixels[row, :, :3] * (alpha / 255)) + painted[row] * (1 - alpha / 255)
        assert np.abs(result[row] - expected).max() <= 0.5


@pytest.mark.parametrize("blur", [0, 12, 40])
@pytest.mark.parametrize("options", [{}, {"background": "opaque"}, {"resize_mode": "pad", "width": 96, "height": 48}])
@pytest.mark.parametrize("stored", [0, 255])
@pytest.mark.parametrize("partial", [0, 2])
def test_colour_of_transparent_pixels_never_enters_a_result(
    blob: StoreBlob, blur: int, options: dict[str, Any], stored: int, partial: int
) -> None:
    pixels = np.full((64, 64, 4), (40, 80, 210, 255), np.uint8)
    pixels[16:48, 16:48] = (stored, stored, stored, 0)
    found = prepared(images=(blob(png(pixels)),), mask_blur=blur, partial_images=partial, **options)
    work = found.work("j", 0)
    assert work.initial_image is not None
    assert np.abs(work.initial_image.astype(int) - [40, 80, 210]).max() <= 8  # scaling at low alpha is coarse
    painted = np.full((work.height, work.width, 3), (36, 76, 211), np.uint8)
    result = found.assemble(painted)
    assert np.abs(result.astype(int) - [38, 78, 210]).max() <= 8
    with Image.open(io.BytesIO(found.encode_preview(painted))) as image:
        assert np.abs(np.asarray(image).astype(int) - [38, 78, 210]).max() <= 8


def test_partly_transparent_pixels_in_the_seam_of_a_sent_mask_show_no_white(blob: StoreBlob) -> None:
    pixels = np.full((64, 64, 4), (40, 80, 210, 255), np.uint8)
    pixels[:, 32:, 3] = 100
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 24:56] = 255
    found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_blur=8)
    result = found.assemble(np.full((64, 64, 3), (36, 76, 211), np.uint8))
    assert np.abs(result[..., :3].astype(int) - [38, 78, 210]).max() <= 2
    assert (result[:, 24:56, 3] == 255).all()
    assert np.array_equal(result[mask == 0], pixels[mask == 0])


@pytest.mark.parametrize("case", ["hard_hole.png", "soft_eraser.png"])
@pytest.mark.parametrize("blur", [0, 12])
def test_transparent_pixels_show_no_white_in_pictures_of_real_editors(blob: StoreBlob, case: str, blur: int) -> None:
    data = (CASES / case).read_bytes()
    found = prepared(images=(blob(data),), mask_blur=blur, background="opaque", width=256, height=256)
    result = found.assemble(np.full((256, 256, 3), (36, 76, 211), np.uint8))
    assert np.abs(result[211, 128].astype(int) - [36, 76, 211]).max() <= 4
    assert result[..., 0].max() <= 220  # the circle's red; white has 255
    assert result[..., 1].max() <= 82


def test_reported_background_matches_the_result(blob: StoreBlob) -> None:
    soft, hard = (blob(png(with_alpha(0, 128))),), (blob(png(with_alpha(0))),)
    mask = np.zeros((64, 64), np.uint8)
    mask[32:] = 255
    masked = {"images": soft, "mask": blob(png(mask))}
    assert prepared(**masked).background == "transparent"
    assert prepared(**masked, background="opaque").background == "opaque"
    assert prepared(**masked, output_format="jpeg").background == "opaque"
    assert prepared(images=soft).background == "opaque"  # all its transparent pixels are repainted
    assert prepared(images=hard).background == "opaque"
    assert prepared(images=hard, background="transparent").background == "transparent"
    assert prepared(task="variation", images=soft).background == "opaque"
    assert prepared(task="generation").background == "opaque"


def test_result_without_transparency_has_no_alpha_plane(blob: StoreBlob) -> None:
    pixels = with_alpha(0)
    result = prepared(images=(blob(png(pixels)),)).assemble(noise(64, 64))
    assert result.shape == (64, 64, 3)
    assert np.array_equal(result[1:], pixels[1:, :, :3])


def test_opaque_background_composites_kept_transparent_pixels_over_white(blob: StoreBlob) -> None:
    pixels = with_alpha(0, 128)
    mask = np.zeros((64, 64), np.uint8)
    mask[32:] = 255
    found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)), background="opaque")
    result = found.assemble(noise(64, 64))
    assert result.shape == (64, 64, 3)
    assert (result[0] == 255).all()
    assert np.array_equal(result[2:32], pixels[2:32, :, :3])


def test_results_and_previews_keep_the_source_colour_profile(blob: StoreBlob) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "PNG", icc_profile=profile)
    for output_format in ("png", "jpeg", "webp"):
        found = prepared(images=(blob(buffer.getvalue()),), output_format=output_format, metadata=False)
        for data in (found.encode(noise(64, 64), 0), found.encode_preview(noise(64, 64))):
            with Image.open(io.BytesIO(data)) as image:
                assert image.info["icc_profile"] == profile
    with Image.open(io.BytesIO(prepared(task="generation").encode(noise(64, 64), 0))) as image:
        assert "icc_profile" not in image.info


# --- memory -----------------------------------------------------------------------------------------------------------


def test_pixel_bytes_are_those_of_all_arrays_once(blob: StoreBlob) -> None:
    assert prepared(task="generation").pixel_bytes == 0
    whole = prepared(images=(blob(png(noise(128, 64))),))
    assert whole.pixel_bytes == 128 * 64 * 3  # what the engine gets; the result shows nothing of the image
    mask = np.zeros((64, 128), np.uint8)
    mask[16:32, 32:64] = 255
    masked = prepared(images=(blob(png(noise(128, 64))),), mask=blob(png(mask)))
    weight = 2 * 18 * 34  # of the part to repaint and one pixel around it
    assert masked.pixel_bytes == 128 * 64 * 3 + 2 * 128 * 64 + weight
    alike = prepared(images=(blob(png(noise(128, 64))),), mask=blob(png(mask)), partial_images=2)
    assert alike.pixel_bytes == masked.pixel_bytes  # previews of this size share the arrays


# --- seeds and metadata -----------------------------------------------------------------------------------------------


def test_picture_seeds_count_up_and_wrap() -> None:
    found = prepared(task="generation", n=3, seed=2**32 - 2)
    assert [found.work("j", k).seed for k in range(3)] == [2**32 - 2, 2**32 - 1, 0]
    assert request(task="generation", seed=5).seed_of(2) == 7


def test_works_carry_the_request_for_values_that_only_the_engine_reads() -> None:
    found = prepared(task="generation", n=2, max_sequence_length=64)
    assert all(found.work("j", k).request is found.request for k in range(2))


def test_file_metadata_has_prompt_seed_and_settings(blob: StoreBlob) -> None:
    found = prepared(images=(blob(png(noise(64, 64))),), negative_prompt="a dog", seed=7, n=2, strength=0.5)
    with Image.open(io.BytesIO(found.encode(noise(64, 64), 1))) as image:
        parameters = image.info["parameters"]
    assert parameters == (
        "a cat\nNegative prompt: a dog\nSteps: 12, Sampler: DDIM, CFG scale: 3, Seed: 8, Size: 64x64, Model: shapes, "
        f"Denoising strength: 0.5, Version: ovserve {__version__}"
    )


def metadata_lines(**fields: Any) -> list[str]:
    with Image.open(io.BytesIO(prepared(task="generation", **fields).encode(noise(64, 64), 0))) as image:
        return str(image.info["parameters"]).splitlines()


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("a cat, 50% off: \\\\o/", "a cat, 50% off: \\\\o/"),
        ("a cat\nNegative prompt: x\nSteps: 1, Seed: 2", r'"a cat\nNegative prompt: x\nSteps: 1, Seed: 2"'),
        ("Negative prompt: x", '"Negative prompt: x"'),
        (" steps: 1, Seed: 2", '" steps: 1, Seed: 2"'),
        ("a\u2028b\x85c\x0bd\re", r'"a\u2028b\u0085c\u000bd\re"'),
        ('"quoted"', r'"\"quoted\""'),
        ("кот\nи пёс", r'"кот\nи пёс"'),
    ],
)
def test_prompt_cannot_forge_metadata_lines(prompt: str, line: str) -> None:
    lines = metadata_lines(prompt=prompt, negative_prompt=prompt, seed=7)
    assert lines[:2] == [line, f"Negative prompt: {line}"]
    assert len(lines) == 3
    assert "Seed: 7" in lines[2]


@given(
    st.text(max_size=30)
    | st.text(st.sampled_from('\n\r\x0b\x0c\x1c\x85\u2028"\\\\ steps:Negative prompt'), max_size=30)
)
def test_any_prompt_is_one_line_and_can_be_read_back(prompt: str) -> None:
    line = on_one_line(prompt)
    assert len(line.splitlines()) <= 1
    assert (json.loads(line) if line.startswith('"') else line) == prompt


def test_file_metadata_names_a_preset_with_shortcuts() -> None:
    found = prepared(task="generation", quality="low", shortcuts="guidance_until=0.6")
    with Image.open(io.BytesIO(found.encode(noise(64, 64), 0))) as image:
        assert "Quality: low" in image.info["parameters"]


def test_metadata_false_writes_no_metadata() -> None:
    data = prepared(task="generation", metadata=False).encode(noise(64, 64), 0)
    with Image.open(io.BytesIO(data)) as image:
        assert image.info == {}
    assert b"cat" not in data


# --- previews ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "steps", "at"), [(0, 12, set()), (1, 12, {6}), (3, 12, {3, 6, 9}), (3, 2, {1}), (3, 1, set())]
)
def test_preview_steps_are_evenly_spread(asked: int, steps: int, at: set[int]) -> None:
    work = prepared(task="generation", partial_images=asked, num_inference_steps=steps).work("j", 0)
    assert work.previews == at


@pytest.mark.parametrize("side", [8, 64])
def test_preview_is_composited_like_the_result(blob: StoreBlob, side: int) -> None:
    pixels, mask = noise(64, 64), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)))
    with Image.open(io.BytesIO(found.encode_preview(noise(side, side)))) as image:
        assert image.size == (64, 64)
        assert np.array_equal(np.asarray(image)[:, :32], pixels[:, :32])
        assert image.info == {}


def test_preview_of_a_large_picture_is_scaled_down(blob: StoreBlob) -> None:
    found = prepared(images=(blob(png(noise(1500, 1000))),))
    with Image.open(io.BytesIO(found.encode_preview(noise(32, 24)))) as image:
        assert image.size == (512, 341)
