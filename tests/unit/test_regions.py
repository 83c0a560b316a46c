"""The part of an image around its mask: where it is, and what a request that works on it alone returns."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.errors import InvalidValue
from ovserve.pixels.images import Pixels
from ovserve.pixels.regions import Region
from ovserve.settings.options import ModelSettings, Resolution
from tests.live import BUILTIN_PATH
from tests.preparing import StoreBlob, noise, png, prepared, rejected, stored_blobs, with_alpha


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[StoreBlob]:
    yield from stored_blobs()


def mask_of(width: int, height: int, box: tuple[int, int, int, int]) -> Pixels:
    """Return a mask that repaints a box: left, top, right, bottom."""
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return mask


@st.composite
def masks(draw: st.DrawFn) -> Pixels:
    width, height = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return mask_of(width, height, (left, top, right, bottom))


SIDES = st.integers(1, 4096)


@given(masks(), st.integers(0, 80), st.none() | st.builds(Resolution, SIDES, SIDES))
def test_box_holds_the_mask_and_lies_in_the_picture(mask: Pixels, padding: int, shape: Resolution | None) -> None:
    region = Region.around(mask, padding, shape)
    assert region.crop(mask).sum() == mask.sum()
    assert region.crop(mask).shape == (region.size.height, region.size.width)
    assert 0 <= region.left <= region.left + region.size.width <= mask.shape[1]
    assert 0 <= region.top <= region.top + region.size.height <= mask.shape[0]


@given(masks(), st.builds(Resolution, SIDES, SIDES))
def test_box_has_the_shape_where_the_picture_allows_it(mask: Pixels, shape: Resolution) -> None:
    size = Region.around(mask, 0, shape).size
    fills = size.width == mask.shape[1] or size.height == mask.shape[0]
    # Rounding adds less than a pixel to one side.
    assert fills or abs(size.width * shape.height - size.height * shape.width) < max(shape.width, shape.height)


def test_box_is_padded_and_centred() -> None:
    mask = mask_of(100, 80, (40, 30, 50, 60))
    assert Region.around(mask, 0) == Region(Resolution(100, 80), 40, 30, Resolution(10, 30))
    assert Region.around(mask, 5) == Region(Resolution(100, 80), 35, 25, Resolution(20, 40))
    assert Region.around(mask, 0, Resolution(512, 512)) == Region(Resolution(100, 80), 30, 30, Resolution(30, 30))
    at_edge = mask_of(100, 80, (0, 0, 10, 40))
    assert Region.around(at_edge, 0, Resolution(512, 512)) == Region(Resolution(100, 80), 0, 0, Resolution(40, 40))


@given(masks(), st.integers(0, 20))
def test_placed_picture_is_in_the_box(mask: Pixels, padding: int) -> None:
    region = Region.around(mask, padding)
    painted = np.full((region.size.height, region.size.width, 3), 7, np.uint8)
    placed = region.place(painted)
    assert placed.shape == (*mask.shape, 3)
    assert placed.sum() == painted.sum()
    assert np.array_equal(region.crop(placed), painted)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0, 4])
@pytest.mark.parametrize("padding", [0, 8])
def test_masked_area_is_painted_alone_and_pasted_back(blob: StoreBlob, padding: int, blur: int) -> None:
    pixels, mask = noise(200, 120), mask_of(200, 120, (90, 40, 130, 80))
    found = prepared(
        images=(blob(png(pixels)),),
        mask=blob(png(mask)),
        mask_area="masked",
        mask_padding=padding,
        mask_blur=blur,
        width=128,
        height=128,
    )
    work = found.work("j", 0)
    assert (work.width, work.height) == (128, 128)
    assert (found.frame.width, found.frame.height) == (200, 120)
    assert found.initial_image is not None
    assert found.initial_image.shape == (128, 128, 3)
    side = 40 + 2 * padding
    region = pixels[40 - padding : 80 + padding, 90 - padding : 130 + padding]
    enlarged = np.asarray(Image.fromarray(region).resize((128, 128), Image.Resampling.LANCZOS))
    assert np.array_equal(found.initial_image, enlarged)
    painted = noise(128, 128)
    result = found.assemble(painted)
    assert np.array_equal(result[mask == 0], pixels[mask == 0])
    back = np.asarray(Image.fromarray(painted).resize((side, side), Image.Resampling.LANCZOS))
    inner = slice(40 + blur, 80 - blur), slice(90 + blur, 130 - blur)
    cut = slice(padding + blur, side - padding - blur)
    assert np.array_equal(result[inner], back[cut, cut])
    if blur:  # the soft edge is inside the mask, at the edge of the part too
        edge = result[40, 90:130].astype(int)
        assert not np.array_equal(edge, pixels[40, 90:130])
        assert (
            abs(edge - pixels[40, 90:130]).max()
            <= abs(back[padding, padding : -padding or None].astype(int) - pixels[40, 90:130]).max()
        )


def test_masked_area_without_a_size_keeps_its_shape(blob: StoreBlob) -> None:
    mask = mask_of(200, 120, (0, 0, 100, 50))
    found = prepared(images=(blob(png(noise(200, 120))),), mask=blob(png(mask)), mask_area="masked")
    work = found.work("j", 0)
    assert (work.width, work.height) == (128, 64)  # the nearest size in the range of the model
    assert found.frame == Resolution(200, 120)


def test_result_of_a_masked_area_is_limited_like_any_other(blob: StoreBlob) -> None:
    model = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), max_resolution=Resolution(100, 100))
    mask = mask_of(200, 120, (10, 10, 60, 60))
    found = prepared(model=model, images=(blob(png(noise(200, 120))),), mask=blob(png(mask)), mask_area="masked")
    assert found.frame == Resolution(100, 60)
    assert found.assemble(noise(found.work("j", 0).width, found.work("j", 0).height)).shape == (60, 100, 3)


def test_masked_area_of_transparent_pixels(blob: StoreBlob) -> None:
    pixels = with_alpha(*[0] * 20)
    found = prepared(images=(blob(png(pixels)),), mask_area="masked")
    result = found.assemble(noise(found.work("j", 0).width, found.work("j", 0).height))
    assert np.array_equal(result[20:], pixels[20:, :, : result.shape[2]])


def test_preview_of_a_masked_area_shows_the_part(blob: StoreBlob) -> None:
    mask = mask_of(200, 120, (90, 40, 130, 80))
    found = prepared(images=(blob(png(noise(200, 120))),), mask=blob(png(mask)), mask_area="masked", partial_images=1)
    painted = noise(64, 64)
    with Image.open(io.BytesIO(found.encode_preview(painted))) as image:
        assert image.size == (40, 40)


@pytest.mark.parametrize(("name", "value"), [("mask_area", "masked"), ("mask_fill", "surroundings"), ("mask_blur", 3)])
def test_fields_of_masks_need_a_mask(blob: StoreBlob, name: str, value: object) -> None:
    rejected(InvalidValue, name, "needs a mask", images=(blob(png(noise(64, 64))),), **{name: value})


def test_inverted_mask_repaints_the_rest(blob: StoreBlob) -> None:
    pixels, mask = noise(64, 64), mask_of(64, 64, (10, 10, 50, 50))
    found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_invert=True)
    painted = noise(64, 64)
    result = found.assemble(painted)
    assert np.array_equal(result[mask > 0], pixels[mask > 0])
    assert np.array_equal(result[mask == 0], painted[mask == 0])
    white = mask_of(64, 64, (0, 0, 64, 64))
    rejected(InvalidValue, "mask", "nothing", images=(blob(png(pixels)),), mask=blob(png(white)), mask_invert=True)


def test_surroundings_replace_what_the_model_sees_inside_the_mask_only(blob: StoreBlob) -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    mask = mask_of(64, 64, (20, 20, 40, 40))
    pixels[mask > 0] = (255, 0, 0)
    for fill, colour in (("original", (255, 0, 0)), ("surroundings", (200, 200, 200))):
        found = prepared(images=(blob(png(pixels)),), mask=blob(png(mask)), mask_fill=fill)
        assert found.initial_image is not None
        assert np.array_equal(found.initial_image[mask == 0], pixels[mask == 0])
        assert abs(found.initial_image[mask > 0].astype(int) - colour).max() <= 1


def test_mask_mode_none_edits_the_whole_image(blob: StoreBlob) -> None:
    found = prepared(images=(blob(png(with_alpha(*[0] * 20))),), mask_mode="none")
    assert found.mode == "image2image"
    painted = noise(64, 64)
    assert np.array_equal(found.assemble(painted), painted)
