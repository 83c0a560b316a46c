"""Reading masks, feathering their edges, and pasting repainted pixels into the caller's image."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovserve.errors import InvalidValue
from ovserve.pixels.images import Pixels
from ovserve.pixels.masks import (
    MAX_EROSIONS,
    Seam,
    check_not_empty,
    feather,
    mask_from_image,
    match_mask,
    pool,
)
from ovserve.settings.options import Resolution

CASES = Path(__file__).parent.parent / "data" / "cases"
NOISE = np.random.default_rng(11)


def rgba(colour: int, alpha: int) -> Pixels:
    return np.array([[[colour, colour, colour, alpha]]], np.uint8)


def rgb(*colour: int) -> Pixels:
    return np.array([[colour]], np.uint8)


def random_mask(width: int = 48, height: int = 40, share: float = 0.3) -> Pixels:
    return np.where(NOISE.random((height, width)) < share, 255, 0).astype(np.uint8)


def paste(original: Pixels, painted: Pixels, mask: Pixels, blur_px: int) -> Pixels:
    return Seam.plan(mask, blur_px).paste(original, painted)


# --- mask images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "mode", "repaint"),
    [
        (rgb(255, 255, 255), "auto", True),
        (rgb(0, 0, 0), "auto", False),
        (rgb(127, 127, 127), "luminance", False),
        (rgb(128, 128, 128), "luminance", True),
        (rgb(0, 255, 0), "luminance", True),  # luma of green is above one half (BT.601: 0.587)
        (rgb(255, 0, 0), "luminance", False),
        (rgb(255, 0, 255), "luminance", False),  # 0.413
        (rgba(255, 255), "luminance", True),
        (rgba(255, 255), "stencil", True),  # opaque: luminance decides
        (rgba(0, 255), "stencil", False),
        (rgba(0, 254), "stencil", True),
        (rgba(255, 0), "stencil", False),
        (rgb(255, 255, 255), "stencil", True),
        (rgb(0, 0, 0), "stencil", False),
        (rgba(255, 0), "luminance", False),  # white, but transparent
        (rgba(255, 0), "alpha", True),
        (rgba(0, 0), "auto", True),
        (rgba(0, 127), "alpha", True),
        (rgba(0, 128), "alpha", False),
        (rgba(255, 255), "auto", True),  # an alpha plane without transparency does not count
        (rgba(0, 255), "auto", False),
        (rgba(255, 254), "auto", True),  # lossy editors leave 250 to 254 in an opaque mask
        (rgba(0, 250), "auto", False),
        (rgba(255, 128), "auto", True),
        (rgba(255, 127), "auto", True),
        (rgba(0, 127), "auto", True),
        (rgb(255, 255, 255), "alpha", False),
    ],
)
def test_mask_from_image_modes(pixels: Pixels, mode: str, repaint: bool) -> None:
    assert mask_from_image(pixels, mode).tolist() == [[255 if repaint else 0]]


def test_auto_uses_only_alpha_if_the_mask_has_any_transparency() -> None:
    pixels = np.concatenate([rgba(255, 255), rgba(0, 0), rgba(255, 0), rgba(0, 255)], 1)
    assert mask_from_image(pixels, "auto").tolist() == [[0, 255, 255, 0]]


def test_empty_mask_is_rejected_naming_the_mask_field() -> None:
    check_not_empty(np.array([[0, 255]], np.uint8))
    with pytest.raises(InvalidValue, match="selects nothing to repaint") as caught:
        check_not_empty(np.zeros((2, 2), np.uint8))
    assert caught.value.param == "mask"


def test_mask_with_one_nearly_opaque_pixel_is_read_by_luminance() -> None:
    with Image.open(CASES / "mask_alpha254.png") as image:
        pixels = np.asarray(image)
    assert pixels[..., 3].min() == 254
    found = mask_from_image(pixels, "auto")
    assert np.array_equal(found > 0, pixels[..., 0] == 255)
    assert found.any()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "image"),
    [
        (Resolution(64, 64), Resolution(128, 128)),
        (Resolution(1024, 1024), Resolution(512, 512)),
        (Resolution(512, 384), Resolution(1024, 768)),
        (Resolution(683, 512), Resolution(1365, 1024)),  # rounded once
        (Resolution(341, 256), Resolution(1365, 1024)),
        (Resolution(100, 75), Resolution(1000, 750)),
    ],
)
def test_mask_of_the_image_aspect_ratio_is_scaled(mask: Resolution, image: Resolution) -> None:
    found = match_mask(np.full((mask.height, mask.width), 255, np.uint8), image)
    assert found.shape == (image.height, image.width)
    assert (found == 255).all()


@pytest.mark.parametrize(
    ("mask", "image"),
    [
        (Resolution(128, 64), Resolution(128, 128)),
        (Resolution(64, 128), Resolution(128, 64)),
        (Resolution(512, 500), Resolution(1024, 1024)),
        (Resolution(1, 2), Resolution(100, 100)),
    ],
)
def test_mask_of_another_aspect_ratio_is_rejected_with_both_sizes(mask: Resolution, image: Resolution) -> None:
    with pytest.raises(InvalidValue, match=f"{mask} does not match the image's {image}") as caught:
        match_mask(np.full((mask.height, mask.width), 255, np.uint8), image)
    assert caught.value.param == "mask"


# --- the latent grid --------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([8, 16]), st.data())
def test_pool_sets_exactly_the_cell_of_a_single_pixel(columns: int, rows: int, cell: int, data: st.DataObject) -> None:
    mask = np.zeros((rows * cell, columns * cell), np.uint8)
    row, column = data.draw(st.integers(0, rows * cell - 1)), data.draw(st.integers(0, columns * cell - 1))
    mask[row, column] = 255
    found = pool(mask, cell)
    expected = np.zeros_like(mask)
    top, left = row // cell * cell, column // cell * cell
    expected[top : top + cell, left : left + cell] = 255
    assert np.array_equal(found, expected)


def test_pool_sets_the_pixel_the_library_samples_in_each_cell() -> None:
    mask = random_mask(share=0.02)
    found = pool(mask, 8)
    cells = mask.reshape(5, 8, 6, 8).max((1, 3))
    assert np.array_equal(found[::8, ::8], cells)


# --- the seam ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_feather_is_positive_exactly_inside_the_mask(seed: int, blur: int) -> None:
    mask = np.where(np.random.default_rng(seed).random((20, 24)) < 0.7, 255, 0).astype(np.uint8)
    weight = feather(mask, blur)
    assert np.array_equal(weight > 0, mask > 0)


def erosions(mask: Pixels, blur_px: int) -> np.ndarray:
    """Compute a feather by its definition: the sum of repeated erosions, alternating with and without diagonals."""
    inside = mask > 0
    weight = inside.astype(np.uint16)
    for erosion in range(blur_px):
        padded = np.pad(inside, 1, mode="edge")
        height, width = inside.shape
        for down in range(3):
            for right in range(3):
                if erosion % 2 or 1 in (down, right):
                    inside = inside & padded[down : down + height, right : right + width]
        weight += inside
    return weight


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 48), st.integers(1, 48), st.sampled_from([0, 1, 3, 40, 400]), st.data()
)
def test_feather_of_any_width_equals_repeated_erosion(
    seed: int, height: int, width: int, kept: int, data: st.DataObject
) -> None:
    noise = np.random.default_rng(seed)
    mask = np.full((height, width), 255, np.uint8)
    mask[noise.integers(0, height, kept), noise.integers(0, width, kept)] = 0
    blur = data.draw(st.one_of(st.integers(0, 64), st.just(MAX_EROSIONS), st.just(MAX_EROSIONS + 1)))
    found = feather(mask, blur)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, erosions(mask, blur))


def test_feather_time_does_not_grow_with_the_width() -> None:
    mask = np.full((1024, 1024), 255, np.uint8)
    mask[:, :3] = 0

    def seconds(blur_px: int) -> float:
        began = time.process_time()
        feather(mask, blur_px)
        return time.process_time() - began

    assert min(seconds(256) for _ in range(3)) < 3 * min(seconds(40) for _ in range(3))


def test_feather_grows_from_the_mask_edge_inwards() -> None:
    mask = np.zeros((41, 41), np.uint8)
    mask[10:31, 10:31] = 255
    weight = feather(mask, 4)
    assert weight[20, 8:17].tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert weight.max() == 5


def test_picture_border_is_not_a_mask_edge() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :10] = 255
    assert feather(mask, 3)[5].tolist() == [4] * 7 + [3, 2, 1] + [0] * 10


def test_thin_mask_still_reaches_full_weight() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[4] = 255
    painted = np.full((9, 9, 3), 200, np.uint8)
    result = paste(np.zeros((9, 9, 3), np.uint8), painted, mask, 8)
    assert (result[4] == 200).all()


# --- pasting ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.sampled_from([3, 4]))
def test_paste_keeps_the_original_outside_the_mask_bit_for_bit(seed: int, blur: int, planes: int) -> None:
    noise = np.random.default_rng(seed)
    mask = np.where(noise.random((20, 24)) < 0.5, 255, 0).astype(np.uint8)
    original = noise.integers(0, 256, (20, 24, planes), np.uint8)
    kept = original.copy()
    painted = noise.integers(0, 256, (20, 24, 3), np.uint8)
    result = paste(original, painted, mask, blur)
    assert np.array_equal(result[mask == 0], original[mask == 0])
    assert np.array_equal(original, kept)
    if planes == 4:
        assert (result[mask > 0, 3] == 255).all()


def test_hard_seam_pastes_the_painted_pixels_unchanged() -> None:
    mask = random_mask()
    original = NOISE.integers(0, 256, (40, 48, 3), np.uint8)
    painted = NOISE.integers(0, 256, (40, 48, 3), np.uint8)
    assert np.array_equal(paste(original, painted, mask, 0)[mask > 0], painted[mask > 0])


def test_soft_seam_blends_from_original_to_painted() -> None:
    mask = np.zeros((9, 20), np.uint8)
    mask[:, 10:] = 255
    original = np.zeros((9, 20, 3), np.uint8)
    painted = np.full((9, 20, 3), 100, np.uint8)
    assert paste(original, painted, mask, 3)[4, 8:16, 0].tolist() == [0, 0, 25, 50, 75, 100, 100, 100]


def test_soft_seam_never_shows_the_colour_of_transparent_pixels() -> None:
    original = np.full((1, 9, 4), 255, np.uint8)
    original[0, 4:, 3] = 0
    mask = np.zeros((1, 9), np.uint8)
    mask[0, 4:] = 255
    result = paste(original, np.zeros((1, 9, 3), np.uint8), mask, 1)
    assert result[0, 4].tolist() == [0, 0, 0, 255]
    assert np.array_equal(result[0, :4], original[0, :4])


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.tuples(*[st.integers(0, 15)] * 4))
def test_seam_is_cropped_to_the_mask_without_changing_weights(
    seed: int, blur: int, corners: tuple[int, int, int, int]
) -> None:
    top, bottom, left, right = *sorted(corners[:2]), *sorted(corners[2:])
    mask = np.zeros((16, 16), np.uint8)
    mask[top : bottom + 1, left : right + 1] = 255
    mask[np.random.default_rng(seed).random((16, 16)) < 0.1] = 0
    seam = Seam.plan(mask, blur)
    whole = np.zeros((16, 16), np.uint16)
    whole[seam.rows, seam.columns] = seam.weight
    assert np.array_equal(whole, feather(mask, blur))
    assert seam.weight.shape <= (bottom - top + 3, right - left + 3)


def test_empty_mask_pastes_nothing() -> None:
    empty = np.zeros((8, 8), np.uint8)
    original = np.full((8, 8, 3), 7, np.uint8)
    assert np.array_equal(Seam.plan(empty, 3).paste(original, 255 - original), original)


def test_blending_in_strips_equals_blending_at_once() -> None:
    mask = np.zeros((700, 8), np.uint8)
    mask[20:680, 2:7] = 255
    original, painted = np.zeros((700, 8, 3), np.uint8), np.full((700, 8, 3), 90, np.uint8)
    result = paste(original, painted, mask, 2)
    assert [column.tolist() for column in result[100:600, :, 0]] == [[0, 0, 30, 60, 90, 60, 30, 0]] * 500
