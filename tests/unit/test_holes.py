"""An image's own transparent pixels: when they are a mask, and the colour they get before they are repainted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.pixels.holes import fill_holes, mask_from_alpha, settle_alpha
from ovserve.pixels.images import Pixels

NOISE = np.random.default_rng(3)


def of_alpha(*alphas: int) -> Pixels:
    return np.array([[[9, 8, 7, alpha] for alpha in alphas]], np.uint8)


@pytest.mark.parametrize(
    ("alphas", "repaint"),
    [
        ((0, 1, 255), [255, 255, 0]),
        ((127, 128, 249, 250, 255), [255, 255, 255, 0, 0]),
        ((0, 254, 255), [255, 0, 0]),
    ],
)
def test_alpha_with_a_pixel_below_128_is_a_mask(alphas: tuple[int, ...], repaint: list[int]) -> None:
    found = mask_from_alpha(of_alpha(*alphas))
    assert found is not None
    assert found.tolist() == [repaint]


@pytest.mark.parametrize("alphas", [(128, 255), (250, 254), (255,)])
def test_alpha_without_a_pixel_below_128_is_no_mask(alphas: tuple[int, ...]) -> None:
    assert mask_from_alpha(of_alpha(*alphas)) is None
    assert mask_from_alpha(of_alpha(*alphas)[..., :3]) is None


def test_nearly_opaque_pixels_become_opaque_and_keep_their_colour() -> None:
    settled = settle_alpha(of_alpha(0, 249, 250, 254, 255))
    assert settled[0, :, 3].tolist() == [0, 249, 255, 255, 255]
    assert (settled[..., :3] == [9, 8, 7]).all()
    opaque = of_alpha(255, 0)
    assert settle_alpha(opaque) is opaque


def test_a_hole_gets_the_colours_around_it() -> None:
    pixels = np.full((40, 50, 4), (40, 80, 210, 255), np.uint8)
    pixels[10:30, 5:45] = (255, 255, 255, 0)
    assert (fill_holes(pixels) == [40, 80, 210]).all()


def test_a_pixel_of_low_alpha_shows_its_own_colour_only_that_much() -> None:
    pixels = np.full((9, 9, 4), (40, 80, 210, 255), np.uint8)
    pixels[4, 4] = (255, 255, 255, 51)  # one fifth
    assert np.abs(fill_holes(pixels)[4, 4].astype(int) - [83, 115, 219]).max() <= 12


def test_an_image_without_any_colour_is_filled_with_middle_gray() -> None:
    assert np.unique(fill_holes(np.zeros((5, 7, 4), np.uint8))).tolist() == [128]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_colour_under_alpha_zero_never_counts_and_opaque_pixels_stay(width: int, height: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    pixels = noise.integers(0, 256, (height, width, 4), np.uint8)
    pixels[..., 3] = noise.choice([0, 0, 100, 255], (height, width))
    clear = pixels[..., 3] == 0
    other = pixels.copy()
    other[clear, :3] = noise.integers(0, 256, (clear.sum(), 3))
    filled = fill_holes(pixels)
    assert np.array_equal(filled, fill_holes(other))
    opaque = pixels[..., 3] == 255
    assert np.array_equal(filled[opaque], pixels[opaque, :3])
