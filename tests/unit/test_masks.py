"""Which pixels are repainted, and the caller's own everywhere else."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import InvalidValue
from ovserve.pixels.images import Pixels
from ovserve.pixels.masks import RINGS_LIMIT_PX, Seam, check_selects, feather, holes, match_mask, pool, read_mask
from ovserve.settings.options import Resolution

NOISE = np.random.default_rng(11)


def rgba(colour: int, alpha: int) -> Pixels:
    return np.array([[[colour, colour, colour, alpha]]], np.uint8)


def rgb(*colour: int) -> Pixels:
    return np.array([[colour]], np.uint8)


def random_mask(width: int = 48, height: int = 40, share: float = 0.3) -> Pixels:
    return np.where(NOISE.random((height, width)) < share, 255, 0).astype(np.uint8)


def paste_back(original: Pixels, painted: Pixels, mask: Pixels, blur_px: int) -> Pixels:
    return Seam.plan(mask, blur_px).paste(original, painted)


# --- what a mask means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "mode", "repaint"),
    [
        (rgb(255, 255, 255), "auto", True),
        (rgb(0, 0, 0), "auto", False),
        (rgb(127, 127, 127), "luminance", False),
        (rgb(128, 128, 128), "luminance", True),
        (rgb(0, 255, 0), "luminance", True),  # green is lighter than half (BT.601: 0.587)
        (rgb(255, 0, 0), "luminance", False),
        (rgb(255, 0, 255), "luminance", False),  # 0.413
        (rgba(255, 255), "luminance", True),
        (rgba(255, 0), "luminance", False),  # unseen white
        (rgba(255, 0), "alpha", True),
        (rgba(0, 0), "auto", True),
        (rgba(0, 127), "alpha", True),
        (rgba(0, 128), "alpha", False),
        (rgba(255, 255), "auto", True),  # an alpha plane without transparency is none
        (rgba(0, 255), "auto", False),
        (rgb(255, 255, 255), "alpha", False),
    ],
)
def test_mask_modes(pixels: Pixels, mode: str, repaint: bool) -> None:
    assert read_mask(pixels, mode).tolist() == [[255 if repaint else 0]]


def test_auto_reads_a_mask_with_any_transparency_by_its_alpha_alone() -> None:
    pixels = np.concatenate([rgba(255, 255), rgba(0, 0), rgba(255, 0), rgba(0, 255)], 1)
    assert read_mask(pixels, "auto").tolist() == [[0, 255, 255, 0]]


def test_holes_are_the_fully_transparent_pixels() -> None:
    pixels = np.concatenate([rgba(9, 0), rgba(9, 1), rgba(9, 255)], 1)
    found = holes(pixels)
    assert found is not None
    assert found.tolist() == [[255, 0, 0]]
    assert holes(pixels[:, 1:]) is None
    assert holes(rgb(1, 2, 3)) is None


def test_a_mask_that_selects_nothing_is_refused_by_name() -> None:
    check_selects(np.array([[0, 255]], np.uint8))
    with pytest.raises(InvalidValue, match="selects nothing to repaint") as caught:
        check_selects(np.zeros((2, 2), np.uint8))
    assert caught.value.param == "mask"


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
def test_a_mask_of_the_images_shape_is_scaled_to_it(mask: Resolution, image: Resolution) -> None:
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
def test_a_mask_of_another_shape_is_refused_with_both_sizes(mask: Resolution, image: Resolution) -> None:
    with pytest.raises(InvalidValue, match=f"{mask} does not match the image's {image}") as caught:
        match_mask(np.full((mask.height, mask.width), 255, np.uint8), image)
    assert caught.value.param == "mask"


# --- the latent grid --------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([8, 16]), st.data())
def test_a_single_pixel_repaints_its_whole_cell_and_no_other(
    columns: int, rows: int, cell: int, data: st.DataObject
) -> None:
    mask = np.zeros((rows * cell, columns * cell), np.uint8)
    row, column = data.draw(st.integers(0, rows * cell - 1)), data.draw(st.integers(0, columns * cell - 1))
    mask[row, column] = 255
    found = pool(mask, cell)
    expected = np.zeros_like(mask)
    top, left = row // cell * cell, column // cell * cell
    expected[top : top + cell, left : left + cell] = 255
    assert np.array_equal(found, expected)


def test_the_pixel_the_library_looks_at_is_set_in_each_repainted_cell() -> None:
    mask = random_mask(share=0.02)
    found = pool(mask, 8)
    cells = mask.reshape(5, 8, 6, 8).max((1, 3))
    assert np.array_equal(found[::8, ::8], cells)


# --- the seam ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_the_feather_never_leaves_the_mask_and_never_empties_it(seed: int, blur: int) -> None:
    mask = np.where(np.random.default_rng(seed).random((20, 24)) < 0.7, 255, 0).astype(np.uint8)
    weight = feather(mask, blur)
    assert np.array_equal(weight > 0, mask > 0)


def rings(mask: Pixels, blur_px: int) -> np.ndarray:
    """The definition of a seam: one erosion after the other, with and without diagonals in turn, and what is left of each."""
    inside = mask > 0
    weight = inside.astype(np.uint16)
    for ring in range(blur_px):
        padded = np.pad(inside, 1, mode="edge")
        height, width = inside.shape
        for down in range(3):
            for right in range(3):
                if ring % 2 or 1 in (down, right):
                    inside = inside & padded[down : down + height, right : right + width]
        weight += inside
    return weight


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 48), st.integers(1, 48), st.sampled_from([0, 1, 3, 40, 400]), st.data()
)
def test_a_seam_of_any_width_has_the_weights_of_its_rings(
    seed: int, height: int, width: int, kept: int, data: st.DataObject
) -> None:
    noise = np.random.default_rng(seed)
    mask = np.full((height, width), 255, np.uint8)
    mask[noise.integers(0, height, kept), noise.integers(0, width, kept)] = 0
    blur = data.draw(st.one_of(st.integers(0, 64), st.just(RINGS_LIMIT_PX), st.just(RINGS_LIMIT_PX + 1)))
    found = feather(mask, blur)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, rings(mask, blur))


def test_a_wide_seam_of_a_large_mask_takes_no_longer_than_a_narrower_one() -> None:
    mask = np.full((1024, 1024), 255, np.uint8)
    mask[:, :3] = 0

    def seconds(blur_px: int) -> float:
        began = time.process_time()
        feather(mask, blur_px)
        return time.process_time() - began

    assert min(seconds(256) for _ in range(3)) < 3 * min(seconds(40) for _ in range(3))


def test_the_feather_grows_from_the_seam_inwards() -> None:
    mask = np.zeros((41, 41), np.uint8)
    mask[10:31, 10:31] = 255
    weight = feather(mask, 4)
    assert weight[20, 8:17].tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert weight.max() == 5


def test_the_border_of_the_picture_is_no_seam() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, :10] = 255
    assert feather(mask, 3)[5].tolist() == [4] * 7 + [3, 2, 1] + [0] * 10


def test_a_thin_mask_is_feathered_no_further_than_it_is_wide() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[4] = 255
    painted = np.full((9, 9, 3), 200, np.uint8)
    result = paste_back(np.zeros((9, 9, 3), np.uint8), painted, mask, 8)
    assert (result[4] == 200).all()


# --- the caller's own pixels ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.sampled_from([3, 4]))
def test_outside_the_mask_every_pixel_is_the_callers_bit_for_bit(seed: int, blur: int, planes: int) -> None:
    noise = np.random.default_rng(seed)
    mask = np.where(noise.random((20, 24)) < 0.5, 255, 0).astype(np.uint8)
    original = noise.integers(0, 256, (20, 24, planes), np.uint8)
    kept = original.copy()
    painted = noise.integers(0, 256, (20, 24, 3), np.uint8)
    result = paste_back(original, painted, mask, blur)
    assert np.array_equal(result[mask == 0], original[mask == 0])
    assert np.array_equal(original, kept)
    if planes == 4:
        assert (result[mask > 0, 3] == 255).all()


def test_inside_a_hard_mask_every_pixel_is_the_painted_one() -> None:
    mask = random_mask()
    original = NOISE.integers(0, 256, (40, 48, 3), np.uint8)
    painted = NOISE.integers(0, 256, (40, 48, 3), np.uint8)
    assert np.array_equal(paste_back(original, painted, mask, 0)[mask > 0], painted[mask > 0])


def test_a_seam_runs_from_the_original_to_the_painted_picture() -> None:
    mask = np.zeros((9, 20), np.uint8)
    mask[:, 10:] = 255
    original = np.zeros((9, 20, 3), np.uint8)
    painted = np.full((9, 20, 3), 100, np.uint8)
    assert paste_back(original, painted, mask, 3)[4, 8:16, 0].tolist() == [0, 0, 25, 50, 75, 100, 100, 100]


def test_a_seam_over_transparent_pixels_mixes_with_what_was_to_be_seen() -> None:
    mask = np.zeros((1, 8), np.uint8)
    mask[:, 4:] = 255
    original = np.zeros((1, 8, 4), np.uint8)  # clear black: seen as white
    result = paste_back(original, np.zeros((1, 8, 3), np.uint8), mask, 1)
    assert result[0, 4].tolist() == [128, 128, 128, 255]
    assert result[0, 5].tolist() == [0, 0, 0, 255]


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.tuples(*[st.integers(0, 15)] * 4))
def test_a_seam_is_that_of_the_whole_picture_and_covers_only_what_is_repainted(
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


def test_a_mask_that_selects_nothing_has_no_seam() -> None:
    empty = np.zeros((8, 8), np.uint8)
    original = np.full((8, 8, 3), 7, np.uint8)
    assert np.array_equal(Seam.plan(empty, 3).paste(original, 255 - original), original)


def test_a_picture_of_many_strips_is_blended_like_one() -> None:
    mask = np.zeros((700, 8), np.uint8)
    mask[20:680, 2:7] = 255
    original, painted = np.zeros((700, 8, 3), np.uint8), np.full((700, 8, 3), 90, np.uint8)
    result = paste_back(original, painted, mask, 2)
    assert [column.tolist() for column in result[100:600, :, 0]] == [[0, 0, 30, 60, 90, 60, 30, 0]] * 500
